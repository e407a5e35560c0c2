"""A narrower decoder starts as a slice of a wider one: which channels it takes, and what is refused."""

import pytest
import torch

from tests.tiny import tiny_pipeline
from vidaccel.errors import UserError
from vidaccel.families.registry import FAMILIES
from vidaccel.models.decoder import decode_whole, decoding_state
from vidaccel.train.methods.decoder import DecoderTraining
from vidaccel.train.methods.decoder.method import student_of
from vidaccel.train.methods.decoder.slices import channels, narrower, slice_into

DECODERS = ["hunyuan_video", "hunyuan_video_15", "wan", "ltx_video", "cogvideox"]
"""A family of each class of autoencoder."""


def teacher_of(family: str):
    torch.manual_seed(0)
    vae = tiny_pipeline(family).vae
    changes = {
        "ltx_video": {"timestep_conditioning": False},  # as 0.9.0; those after it denoise
        "hunyuan_video_15": {"block_out_channels": [16] * 5},  # channels are spread over eight pixels
    }
    return type(vae).from_config(vae.config, **changes.get(family, {})).eval()


def latent_of(vae, frames: int = 3) -> torch.Tensor:
    width = vae.config.get("latent_channels") or vae.config.z_dim
    return torch.randn(1, width, frames, 4, 4, generator=torch.Generator().manual_seed(1))


def test_the_channels_are_evenly_spaced_and_of_each_group_as_many():
    assert channels(8, 4).tolist() == [0, 2, 4, 6]
    assert channels(24, 8).tolist() == [0, 3, 6, 9, 12, 15, 18, 21]
    assert channels(5, 5).tolist() == [0, 1, 2, 3, 4]
    for wide, narrow, groups in ((48, 24, 2), (64, 48, 2), (512, 192, 32), (12, 8, 4)):
        group = channels(wide, narrow) // (wide // groups)
        assert group.bincount().tolist() == [narrow // groups] * groups


def test_copies_of_an_axis_keep_the_same_channels_of_each():
    taken = channels(4 * 12, 4 * 6).view(4, 6) - 12 * torch.arange(4)[:, None]
    assert taken.tolist() == [channels(12, 6).tolist()] * 4


def test_a_weight_is_cut_along_both_axes():
    wide = {"w": torch.arange(16.0).view(4, 4), "b": torch.arange(4.0)}
    narrow = {"w": torch.zeros(2, 4), "b": torch.zeros(2)}
    slice_into(narrow, wide)
    assert narrow["w"].tolist() == [[0, 1, 2, 3], [8, 9, 10, 11]] and narrow["b"].tolist() == [0, 2]
    with pytest.raises(UserError, match="no weights to start c from"):
        slice_into({"c": torch.zeros(1)}, wide)
    with pytest.raises(UserError, match="no weights to start b from"):
        slice_into({"b": torch.zeros(5)}, wide)


@pytest.mark.parametrize("family", DECODERS)
def test_a_slice_of_full_width_is_the_teacher(family):
    teacher = teacher_of(family)
    made = student_of(teacher, FAMILIES[family], DecoderTraining(width=1.0)).eval()
    ours, theirs = decoding_state(made), decoding_state(teacher)
    assert ours.keys() == theirs.keys() and all(torch.equal(ours[name], theirs[name]) for name in ours)
    with torch.no_grad():
        assert torch.equal(*(decode_whole(each, latent_of(teacher)) for each in (made, teacher)))


@pytest.mark.parametrize("family", DECODERS)
def test_half_the_channels_run_in_the_familys_own_class(family):
    teacher = teacher_of(family)
    made = student_of(teacher, FAMILIES[family], DecoderTraining(width=0.5)).eval()
    assert type(made) is type(teacher)
    counts = [sum(w.numel() for w in decoding_state(each).values()) for each in (made, teacher)]
    assert counts[0] < 0.6 * counts[1]
    with torch.no_grad():
        frames, wanted = (decode_whole(each, latent_of(teacher)) for each in (made, teacher))
    assert frames.shape == wanted.shape and frames.isfinite().all()


def test_every_level_has_its_own_width_and_blocks_are_left_out():
    teacher = teacher_of("hunyuan_video")
    teacher = type(teacher).from_config(teacher.config, block_out_channels=[8, 8, 16, 16])
    family, settings = FAMILIES["hunyuan_video"], DecoderTraining(widths=[4, 4, 12, 12], layers_per_block=0)
    made = student_of(teacher, family, settings)
    assert tuple(made.config.block_out_channels) == (4, 4, 12, 12)
    assert [len(block.resnets) for block in made.decoder.up_blocks] == [1] * 4
    conv, wide = (each.decoder.up_blocks[2].resnets[0].conv1.conv.weight for each in (made, teacher))
    assert torch.equal(conv, wide[::2][:, channels(16, 12)]) and conv.shape[:2] == (4, 12)
    with pytest.raises(UserError, match=r"no weights to start .*conv_shortcut.* from") as error:
        student_of(teacher, family, DecoderTraining(widths=[4, 8, 12, 12]))
    assert "as wide as each other" in error.value.hint


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        ({"widths": [4, 4]}, "4 levels"),
        ({"widths": [16, 8, 8, 8]}, "no more than it has"),
        ({"widths": [6, 8, 8, 8]}, "multiples of 4"),
        ({"layers_per_block": 2}, "the teacher has 1"),
    ],
)
def test_what_no_slice_can_be_is_refused(settings, said):
    teacher = teacher_of("hunyuan_video")
    with pytest.raises(UserError) as error:
        narrower(teacher, FAMILIES["hunyuan_video"], DecoderTraining(**settings))
    assert said in f"{error.value.message} {error.value.hint}"


def test_widths_that_the_class_cannot_have_are_told():
    with pytest.raises(UserError, match="of such widths does not run"):
        student_of(teacher_of("hunyuan_video_15"), FAMILIES["hunyuan_video_15"], DecoderTraining(width=0.25))


def test_a_class_of_one_number_takes_one():
    teacher = teacher_of("wan")
    assert narrower(teacher, FAMILIES["wan"], DecoderTraining(widths=[2]))["decoder_base_dim"] == 2
    with pytest.raises(UserError, match="one number"):
        narrower(teacher, FAMILIES["wan"], DecoderTraining(widths=[2, 4]))


def test_a_decoder_that_denoises_is_refused():
    teacher = tiny_pipeline("ltx_video").vae
    assert teacher.config.timestep_conditioning
    with pytest.raises(UserError, match="last step of denoising"):
        narrower(teacher, FAMILIES["ltx_video"], DecoderTraining())
