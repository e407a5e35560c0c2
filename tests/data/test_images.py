"""Images that videos begin with: what is taken, what is refused, and how they are fitted."""

import struct
import zlib

import numpy as np
import pytest
from PIL import Image

from vidaccel.data.images import fitted, images_in, read_image
from vidaccel.errors import UserError

PIXELS = np.random.default_rng(0).integers(0, 256, (24, 40, 3), dtype=np.uint8)


def refused(source) -> UserError:
    with pytest.raises(UserError) as caught:
        read_image(source)
    assert "\n" not in caught.value.message and caught.value.hint
    return caught.value


@pytest.mark.parametrize("suffix", ["png", "webp", "jpg"])
def test_pixels_are_those_of_the_file(suffix, tmp_path):
    file = tmp_path / f"a.{suffix}"
    Image.fromarray(PIXELS).save(file, lossless=True)
    read = read_image(file)
    assert read.shape == PIXELS.shape and read.dtype == np.uint8
    if suffix != "jpg":
        assert np.array_equal(read, PIXELS)
    assert np.array_equal(read_image(Image.fromarray(PIXELS)), PIXELS)


@pytest.mark.parametrize(("mode", "channels"), [("L", 1), ("P", 3), ("CMYK", 3), ("1", 1)])
def test_other_colours_become_rgb(mode, channels, tmp_path):
    file = tmp_path / ("a.jpg" if mode == "CMYK" else "a.png")
    Image.fromarray(PIXELS).convert(mode).save(file)
    read = read_image(file)
    assert read.shape == PIXELS.shape
    assert channels == 3 or (read[..., 0] == read[..., 2]).all()


@pytest.mark.parametrize("suffix", ["png", "jpg", "webp"])
def test_the_orientation_is_honoured(suffix, tmp_path):
    """6: the camera was turned, and what is shown is a quarter turn clockwise of what is stored."""
    exif = Image.Exif()
    exif[0x0112] = 6
    left_dark = np.zeros((24, 40, 3), np.uint8)
    left_dark[:, 20:] = 255
    Image.fromarray(left_dark).save(tmp_path / f"a.{suffix}", exif=exif)
    read = read_image(tmp_path / f"a.{suffix}")
    assert read.shape == (40, 24, 3) and read[:18].max() < 60 and read[22:].min() > 200


def test_what_is_no_picture_of_ours_is_refused(tmp_path):
    file, images = tmp_path / "a.png", [Image.fromarray(PIXELS), Image.fromarray(PIXELS[::-1].copy())]
    assert "No such file" in refused(file).message
    file.write_text("a cat")
    assert "no png, jpg or webp" in refused(file).message
    images[0].save(tmp_path / "a.bmp")
    assert "no png, jpg or webp" in refused(tmp_path / "a.bmp").message
    images[0].save(file)
    file.write_bytes(file.read_bytes()[:200])
    assert "cannot be read" in refused(file).message
    for suffix in ("png", "webp"):
        images[0].save(tmp_path / f"b.{suffix}", save_all=True, append_images=images[1:], duration=100)
        assert "is animated" in refused(tmp_path / f"b.{suffix}").message


def test_what_is_transparent_in_parts_is_refused(tmp_path):
    alpha = np.full((24, 40, 1), 255, np.uint8)
    for file, value in ((tmp_path / "opaque.png", 255), (tmp_path / "clear.png", 254)):
        alpha[0, 0] = value
        Image.fromarray(np.concatenate([PIXELS, alpha], -1)).save(file)
    assert np.array_equal(read_image(tmp_path / "opaque.png"), PIXELS)
    assert "transparent in parts" in refused(tmp_path / "clear.png").message
    Image.fromarray(PIXELS).convert("P").save(tmp_path / "palette.png", transparency=0)
    assert "transparent in parts" in refused(tmp_path / "palette.png").message


def test_sixteen_bits_are_refused(tmp_path):
    """Of grey, which pillow keeps, and of colours, of which it would drop eight in silence."""
    deep = Image.fromarray(np.full((24, 40), 40000, np.uint16))
    deep.save(tmp_path / "grey.png")
    assert "16 bits" in refused(tmp_path / "grey.png").message
    assert "8 bits" in refused(deep).message
    (tmp_path / "colours.png").write_bytes(deep_png(PIXELS))
    assert "16 bits" in refused(tmp_path / "colours.png").message


def deep_png(pixels) -> bytes:
    def chunk(name: bytes, content: bytes) -> bytes:
        crc = zlib.crc32(name + content)
        return struct.pack(">I", len(content)) + name + content + struct.pack(">I", crc)

    height, width = pixels.shape[:2]
    rows = b"".join(b"\0" + (257 * row.astype(">u2")).astype(">u2").tobytes() for row in pixels)
    header = struct.pack(">IIBBBBB", width, height, 16, 2, 0, 0, 0)
    parts = chunk(b"IHDR", header), chunk(b"IDAT", zlib.compress(rows)), chunk(b"IEND", b"")
    return b"\x89PNG\r\n\x1a\n" + b"".join(parts)


def test_an_image_is_cropped_and_scaled_to_the_video_and_that_is_said():
    assert fitted(PIXELS, 24, 40, "a.png") == (PIXELS, "a.png: 40x24, as it is")
    halves = np.zeros((32, 96, 3), np.uint8)
    halves[:, 48:] = 255
    made, said = fitted(halves, 16, 16, "a.png")
    assert made.shape == (16, 16, 3) and made[:, :7].max() < 60 and made[:, 9:].min() > 200
    assert said == "a.png: 96x32, 67% cropped away, scaled to 16x16"
    assert fitted(halves, 16, 48, "a.png")[1] == "a.png: 96x32, scaled to 48x16"


def test_a_tiny_image_is_refused():
    assert fitted(PIXELS, 96, 160, "a.png")[0].shape == (96, 160, 3)
    with pytest.raises(UserError, match="40x24 pixels, too few for a video of 320x192") as caught:
        fitted(PIXELS, 192, 320, "a.png")
    assert "80x48" in caught.value.hint
    with pytest.raises(UserError, match="too few"):
        fitted(PIXELS, 320, 320, "a.png")  # of its height there is as little as of a tiny one


def test_a_folder_has_an_image_a_prompt_in_the_order_of_names(tmp_path):
    for name in ("b.jpg", "a.PNG", "notes.txt", ".hidden.png"):
        (tmp_path / name).touch()
    assert [file.name for file in images_in(tmp_path, 2)] == ["a.PNG", "b.jpg"]
    for count in (1, 3):
        with pytest.raises(UserError, match=f"2 images .* there are {count} prompts"):
            images_in(tmp_path, count)
    with pytest.raises(UserError, match="is no folder"):
        images_in(tmp_path / "none", 1)
