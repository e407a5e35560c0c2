"""Clips and captions from a folder and from the sprites world, and their samples encoded when asked for."""

import json
import shutil
from dataclasses import replace

import pytest
import torch

from tests.collect.conftest import CAPTIONS, FPS
from tests.data.test_formats import CASES, COUNTED
from tests.tiny import SIZE, tiny_pipeline
from vidaccel.collect.encode import encode_samples
from vidaccel.collect.source import EncodedPrompts, EncodedSource, Prompts, open_source
from vidaccel.config.collect import CollectConfig
from vidaccel.data.order import epoch_order
from vidaccel.errors import UserError
from vidaccel.families.registry import FAMILIES
from vidaccel.models.loading import LoadedPipeline
from vidaccel.worlds import sprites as sprites_world
from vidaccel.worlds.sprites.parse import parse
from vidaccel.worlds.sprites.pipeline import build_tokenizer
from vidaccel.worlds.sprites.source import LAMPS_SHARE, RenderedScenes, knows_sprites, lamps_share

SIXTY_FOUR = {"num_frames": 17, "height": 64, "width": 64}


@pytest.fixture(scope="module")
def sprites() -> LoadedPipeline:
    """A model that takes the sprites world's words and sizes."""
    pipe = tiny_pipeline("hunyuan_video")
    pipe.tokenizer = build_tokenizer(32)
    return LoadedPipeline(
        pipe, FAMILIES["hunyuan_video"], "here", {"num_frames": 17, "height": 64, "width": 64, "fps": 8}, {}
    )


def test_a_rendered_scene_depends_on_seed_and_index_alone():
    source, again, other = RenderedScenes(10, 3), RenderedScenes(20, 3), RenderedScenes(10, 4)
    video, record = source[7]
    assert video.shape == (3, 17, 64, 64) and video.min() >= -1 and video.max() <= 1
    assert torch.equal(video, again[7][0]) and record == again.record(7) == source.record(7)
    assert not torch.equal(video, source[6][0]) and not torch.equal(video, other[7][0])
    assert parse(record["caption"]) and record["fps"] == 8
    assert source.fingerprint == again.fingerprint != other.fingerprint


@pytest.mark.parametrize(("share", "low", "high"), [(0.0, 0, 0), (0.8, 60, 95), (1.0, 100, 100)])
def test_a_share_of_scenes_has_two_sprites(share, low, high):
    source = RenderedScenes(100, 0, share)
    pairs = [len(source.scene(i).sprites) == 2 for i in range(100)]
    assert pairs == [" and " in source.record(i)["caption"] for i in range(100)]
    assert low <= sum(pairs) <= high
    assert source.fingerprint["pair_share"] == share


def test_models_of_the_sprites_world_are_known_by_their_words(sprites):
    assert knows_sprites(sprites)
    assert len(open_source(sprites, CollectConfig(clips=5))) == 5
    more = build_tokenizer(32)
    more.add_tokens("zebra")
    for tokenizer in (tiny_pipeline("hunyuan_video").tokenizer, more):
        pipe = tiny_pipeline("hunyuan_video")
        pipe.tokenizer = tokenizer
        assert not knows_sprites(replace(sprites, pipe=pipe))


def test_scenes_have_lamps_for_a_model_that_knows_their_words(sprites):
    assert lamps_share(sprites) == 0 and sprites_world.clip_source(sprites, 4, 0, SIXTY_FOUR, 8.0).lamps == 0
    pipe = tiny_pipeline("hunyuan_video")
    pipe.tokenizer = build_tokenizer(32, lamps=True)
    knowing = replace(sprites, pipe=pipe)
    assert knows_sprites(knowing) and lamps_share(knowing) == LAMPS_SHARE
    source = sprites_world.clip_source(knowing, 40, 0, SIXTY_FOUR, 8.0)
    lit = sum(any(sprite.lamps for sprite in source.scene(i).sprites) for i in range(40))
    assert 10 < lit < 30 and source.fingerprint["lamps"] == LAMPS_SHARE
    assert "lamps" not in RenderedScenes(4, 0).fingerprint


def test_another_model_is_asked_for_a_folder(loaded):
    with pytest.raises(UserError, match="no model of a world whose clips can be rendered") as caught:
        open_source(loaded, CollectConfig())
    assert "data=FOLDER" in caught.value.hint


@pytest.mark.parametrize("changes", [{"num_frames": 5}, {"height": 32}, {"width": 48}, {"fps": 12.0}])
def test_scenes_have_one_size_and_rate(sprites, changes):
    with pytest.raises(UserError, match="17 frames of 64x64 at 8 a second"):
        open_source(sprites, CollectConfig(**changes))


@pytest.mark.parametrize("changes", [{"num_frames": 6}, {"height": 20}])
def test_sizes_that_the_model_cannot_make_are_refused(loaded, clips, changes):
    with pytest.raises(UserError, match="does not fit"):
        open_source(loaded, CollectConfig(data=str(clips), **changes))


def test_a_folders_clips_are_brought_to_the_models_size_and_rate(loaded, clips):
    source = open_source(loaded, CollectConfig(data=str(clips)))
    video, record = source[1]
    assert video.shape == (3, *SIZE.values())
    assert record == {"caption": CAPTIONS[1], "file": "00001.mp4", "fps": FPS, "crop": "centre"} == source.record(1)
    smaller = open_source(loaded, CollectConfig(data=str(clips), num_frames=1, height=16, width=48, fps=2.0))
    assert smaller[1][0].shape == (3, 1, 16, 48) and smaller[1][1]["fps"] == 2


def test_bad_clips_are_named_and_left_out(loaded, clips, caplog):
    (clips / "00003.mp4").write_bytes((clips / "00003.mp4").read_bytes()[:300])
    with pytest.raises(UserError, match=r"1 of 5 clips .*line 4 \(00003\.mp4\)"):
        open_source(loaded, CollectConfig(data=str(clips)))
    source = open_source(loaded, CollectConfig(data=str(clips), max_bad_share=0.2))
    assert [source.record(i)["caption"] for i in range(len(source))] == [*CAPTIONS[:3], CAPTIONS[4]]
    assert "skipped" in caplog.text and "00003.mp4" in caplog.text


def test_latents_are_of_the_right_frames_whatever_the_container(loaded, tmp_path):
    """A square as bright as the time is late, in files that readers take wrong frames from, and a broken file."""
    for name in COUNTED:
        shutil.copy(CASES / name, tmp_path)
    (tmp_path / "cut.mp4").write_bytes((CASES / "base.mp4").read_bytes()[:2000])
    lines = [json.dumps({"file": name, "caption": name}) for name in [*COUNTED, "cut.mp4"]]
    (tmp_path / "captions.jsonl").write_text("\n".join(lines))
    source = open_source(loaded, CollectConfig(data=str(tmp_path), num_frames=17, max_bad_share=0.1))
    assert len(source) == len(COUNTED) and "cut.mp4" in source.clips.skipped[0]
    for i, (tensors, record) in enumerate(EncodedSource(loaded, source).read(range(len(source)))):
        square = (source[i][0][:, :, 14:18, 14:18].mean((0, 2, 3)) + 1) * 127.5
        assert square.tolist() == pytest.approx([80 * t / FPS for t in range(17)], abs=7), record["file"]
        assert tensors["latent"].isfinite().all() and record["file"] == COUNTED[i]


@pytest.mark.parametrize("lines", ["", '{"file": "gone.mp4", "caption": "a"}\n'])
def test_a_caption_file_without_a_usable_clip(loaded, clips, lines):
    (clips / "captions.jsonl").write_text(lines)
    with pytest.raises(UserError, match="cannot be used"):
        open_source(loaded, CollectConfig(data=str(clips), max_bad_share=0.9))


def test_a_clip_that_changes_during_the_run_is_named(loaded, clips):
    source = open_source(loaded, CollectConfig(data=str(clips)))
    (clips / "00002.mp4").write_bytes(b"")
    assert source[1]
    with pytest.raises(UserError, match=r"00002\.mp4: the file is empty"):
        source[2]


def test_identity_follows_whatever_decides_the_clips(loaded, clips):
    def fingerprint(**changes):
        return json.dumps(open_source(loaded, CollectConfig(data=str(clips), **changes)).fingerprint)

    before = fingerprint()
    assert before == fingerprint()
    moved = clips.rename(clips.with_name("elsewhere"))
    moved.rename(clips)
    assert len({before, fingerprint(height=16), fingerprint(num_frames=1), fingerprint(fps=4.0)}) == 4
    (clips / "00000.mp4").write_bytes((clips / "00001.mp4").read_bytes())
    assert fingerprint() != before


def test_samples_on_the_fly_are_those_of_a_folder(loaded, clips):
    source = open_source(loaded, CollectConfig(data=str(clips)))
    features = EncodedSource(loaded, source, "float16")
    assert len(features) == 5
    tensors, record = features[2]
    ((expected, expected_record),) = encode_samples(loaded, [source[2][0]], [source.record(2)], "float16")
    assert record == expected_record and tensors.keys() == expected.keys()
    assert all(torch.equal(tensors[name], expected[name]) for name in expected)
    encoded, several = [], loaded.pipe.vae.encode
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(loaded.pipe.vae, "encode", lambda videos: encoded.append(len(videos)) or several(videos))
        together = features.read([2, 0, 4])
    assert encoded == [3] and [record for _, record in together] == [source.record(i) for i in (2, 0, 4)]
    torch.testing.assert_close(together[0][0]["latent"], tensors["latent"], rtol=1e-3, atol=1e-3)
    assert [features.at(position, seed=3) for position in range(10)] == [*epoch_order(5, 3, 0), *epoch_order(5, 3, 1)]


def test_prompts_alone_have_the_latents_shape_of_a_model_that_names_no_output_channels():
    model = LoadedPipeline(tiny_pipeline("mochi"), FAMILIES["mochi"], "here", SIZE | {"fps": 8}, {})
    assert model.pipe.transformer.config.out_channels is None
    (tensors, record), *_ = EncodedPrompts(model, Prompts(("a red circle",)), CollectConfig()).read([0])
    assert tensors["latent"].shape[0] == model.pipe.transformer.config.in_channels and record == {
        "caption": "a red circle"
    }


def test_prompts_alone_begin_no_video_with_an_image():
    model = LoadedPipeline(None, FAMILIES["wan_i2v"], "here", SIZE, {})
    with pytest.raises(UserError, match="begins its videos with an image.*\n.*data=FOLDER"):
        EncodedPrompts(model, Prompts(("a red circle",)), CollectConfig())
