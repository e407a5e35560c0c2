"""Images that videos begin with: files to arrays uint8 [H, W, 3] RGB, fitted to a video as the frames of a clip are.

H height, W width
"""

import os
from pathlib import Path

import numpy as np
from PIL import Image, ImageOps

from vidaccel.data.video import cover
from vidaccel.errors import UserError

Source = str | os.PathLike[str] | Image.Image
FORMATS = ("PNG", "JPEG", "WEBP")
SUFFIXES = (".png", ".jpg", ".jpeg", ".webp")
LARGEST_SCALE = 4
"""How many times larger an image may be made: from fewer pixels it is no picture of anything."""
_HINT = "give a png, jpg or webp"


def read_image(source: Source) -> np.ndarray:
    """A png, jpg or webp, or an image of pillow, upright as its EXIF orientation says.

    Raises:
        UserError: it cannot be read or is no such image, is animated, has transparent parts or 16 bits a channel.
    """
    if isinstance(source, Image.Image):
        return _upright(source, "the image")
    path = Path(source)
    try:
        with Image.open(path, formats=FORMATS) as image:
            if _deep(path):
                raise UserError(f"{path} has 16 bits a channel", "save it with 8")
            return _upright(image, str(path))
    except Image.UnidentifiedImageError as error:
        raise UserError(f"{path} is no png, jpg or webp", _HINT) from error
    except Image.DecompressionBombError as error:
        raise UserError(f"{path} is too large: {error}", "scale it down to the size of the video") from error
    except (OSError, SyntaxError, ValueError) as error:  # the last two for files that are damaged
        reason = error.strerror if isinstance(error, OSError) and error.strerror else error
        raise UserError(f"{path} cannot be read: {reason}", _HINT) from error


def _upright(image: Image.Image, name: str) -> np.ndarray:
    # A jpg with a preview or a second view behind the picture (MPO) is a picture still.
    if getattr(image, "is_animated", False) and image.format != "MPO":
        raise UserError(f"{name} is animated, and a video begins with one image", "save the frame that is meant")
    if image.mode[0] in "IF":
        raise UserError(f"{name} has more than 8 bits a channel ({image.mode})", "save it with 8")
    upright = ImageOps.exif_transpose(image)
    if "transparency" in upright.info or upright.getbands()[-1] in "Aa":
        upright = upright.convert("RGBA")
        if np.asarray(upright)[..., 3].min() < 255:
            raise UserError(f"{name} is transparent in parts", "save it on the background that is meant")
    return np.asarray(upright.convert("RGB"))


def images_in(folder: str | os.PathLike, count: int) -> list[Path]:
    """The images of a folder in the order of their names, one for each of `count` prompts.

    Raises:
        UserError: there is no such folder, or it has more or fewer.
    """
    folder = Path(folder)
    if not folder.is_dir():
        raise UserError(f"{folder} is no folder", "name one with an image for each prompt, in the order of their names")
    files = sorted(
        file for file in folder.iterdir() if file.suffix.lower() in SUFFIXES and not file.name.startswith(".")
    )
    if len(files) != count:
        raise UserError(
            f"{folder} has {len(files)} images ({', '.join(SUFFIXES)}), and there are {count} prompts",
            "give one image a prompt: they are taken in the order of their names",
        )
    return files


def fitted(image: np.ndarray, height: int, width: int, name: str) -> tuple[np.ndarray, str]:
    """The largest centred part of an image that has the shape of the video, scaled to it, and what was done in words.

    Raises:
        UserError: that would make it more than `LARGEST_SCALE` times larger.
    """
    own_height, own_width = image.shape[:2]
    crop_width, crop_height = min(own_width, own_height * width / height), min(own_height, own_width * height / width)
    if crop_height * LARGEST_SCALE < height:
        raise UserError(
            f"{name} has {own_width}x{own_height} pixels, too few for a video of {width}x{height}",
            f"give one of {-(-width // LARGEST_SCALE)}x{-(-height // LARGEST_SCALE)}; or set height= and width=",
        )
    if (own_height, own_width) == (height, width):
        return image, f"{name}: {width}x{height}, as it is"
    said = f"{name}: {own_width}x{own_height}"
    if (cut := 1 - crop_width * crop_height / (own_width * own_height)) >= 0.005:
        said += f", {cut:.0%} cropped away"
    return cover(image, height, width), f"{said}, scaled to {width}x{height}"


def _deep(path: Path) -> bool:
    """Whether it is a png with 16 bits a channel, of which pillow would drop eight."""
    with path.open("rb") as file:
        head = file.read(25)
    return head.startswith(b"\x89PNG") and head[24] == 16
