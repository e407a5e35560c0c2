"""Files of weights that others have released: what they become, and what is refused."""

import re
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from diffusers import UniPCMultistepScheduler
from diffusers.loaders.single_file_utils import convert_hunyuan_video_transformer_to_diffusers

from tests import published
from tests.published import write
from tests.students import save_teacher
from tests.tiny import called, tiny_pipeline
from vidaccel.cache.attach import attach
from vidaccel.cache.trunk import Trunk
from vidaccel.errors import UserError
from vidaccel.families.registry import family_of_pipeline
from vidaccel.families.released import LAYOUTS
from vidaccel.file_hashes import FileHashes
from vidaccel.models.conditioning import Conditioning
from vidaccel.models.files import read_model
from vidaccel.models.grid import Grid, on_grid, shift_of
from vidaccel.models.lineage import teachers
from vidaccel.models.loading import load_pipeline, load_student
from vidaccel.models.own_call import remember
from vidaccel.models.released import Released, released_student
from vidaccel.models.saving import save_model
from vidaccel.models.step_hook import step_hook_of
from vidaccel.models.velocity import Velocity
from vidaccel.models.weight_hashes import student_hash

STUDENTS = {
    "hunyuan_video": published.hunyuan_video_student,
    "hunyuan_video_15": published.hunyuan_video_15_student,
    "hunyuan_video_15_i2v": published.hunyuan_video_15_student,
}
SIZES = {"hunyuan_video": published.HUNYUAN_VIDEO, "hunyuan_video_15": published.HUNYUAN_VIDEO_15}
LENGTHS = (5, 3)
"""Tokens of the two prompts of a batch, of six."""


def inputs(family: str, seed: int = 0):
    """x, t, r [2] and what else a pass of two samples is given."""
    draw = torch.Generator().manual_seed(seed)
    mask = torch.arange(6) < torch.tensor(LENGTHS)[:, None]
    text = {"prompt_embeds": torch.randn(2, 6, 32, generator=draw), "prompt_mask": mask}
    if family == "hunyuan_video":
        text["pooled"] = torch.randn(2, 32, generator=draw)
    else:
        text["prompt_embeds_2"] = torch.randn(2, 6, 32, generator=draw)
        text["prompt_mask_2"] = torch.arange(6) < torch.tensor([[2], [4]])
        text["image_latents"] = torch.randn(2, 5, 2, 4, 4, generator=draw)
        text["image_embeds"] = torch.randn(2, 5, 16, generator=draw)
    x = torch.randn(2, 4, 2, 4, 4, generator=draw)
    return x, torch.tensor([0.9, 0.7]) - 0.1 * seed, torch.tensor([0.8, 0.4]) - 0.1 * seed, text


def rendered(family: str, weights, x, t, r, text, **more):
    """The same pass by the published formulas, sample by sample."""
    made = []
    before = more.pop("before", (None, None))
    for i in range(2):
        prompt = text["prompt_embeds"][i, text["prompt_mask"][i]]
        given = {"predictor": (more["theirs"], before[i])} if "theirs" in more else {}
        if family == "hunyuan_video":
            made.append(published.hunyuan_video(weights, x[i], t[i], r[i], prompt, text["pooled"][i], **given))
        else:
            glyphs = text["prompt_embeds_2"][i, text["prompt_mask_2"][i]]
            taken = torch.cat([x[i], text["image_latents"][i]])
            made.append(
                published.hunyuan_video_15(weights, taken, t[i], r[i], prompt, glyphs, text["image_embeds"][i], **given)
            )
    return made


def agree(found, expected, tokens):
    """Velocities and the tokens that leave the trunk, of video and of text without its padding, to 1e-5."""
    for i, each in enumerate(expected):
        text = tokens["encoder_hidden_states"][i, : len(each.txt)]
        for ours, theirs in ((found[i], each.velocity), (tokens["hidden_states"][i], each.img), (text, each.txt)):
            assert theirs.abs().max() > 0.1
            torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-5)


@pytest.fixture
def released(tmp_path):
    """A pipeline, the file of a student for it, and that student's weights as they are published."""

    def made(family: str):
        weights = STUDENTS[family]()
        return tiny_pipeline(family), write(tmp_path / f"{family}.safetensors", weights), weights

    return made


@pytest.mark.parametrize("family", ["hunyuan_video", "hunyuan_video_15_i2v"])
@torch.no_grad()
def test_a_released_student_is_the_published_formulas(family, released):
    pipe, file, weights = released(family)
    loaded = load_student(file, pipe)
    assert loaded.pipe is pipe
    velocity = Velocity(pipe.transformer, loaded.family, loaded.conditioning)
    x, t, r, text = inputs(family)
    with Trunk(pipe.transformer, loaded.family) as trunk, trunk.full():
        found = velocity(x, t, text, r=r)
        left = trunk.memory()
    agree(found, rendered(family, weights, x, t, r, text), left[0].tokens)


@torch.no_grad()
def test_a_student_that_embeds_guidance_is_the_formulas_too(tmp_path):
    sizes = published.Sizes(guidance=True)
    weights = published.hunyuan_video_student(sizes)
    pipe = tiny_pipeline("hunyuan_video", guidance_embeds=True)
    loaded = load_student(write(tmp_path / "student.safetensors", weights), pipe)
    x, t, r, text = inputs("hunyuan_video")
    found = Velocity(pipe.transformer, loaded.family, loaded.conditioning)(x, t, text, r=r, g=torch.tensor([6.0, 4.0]))
    for i, g in enumerate((6.0, 4.0)):
        prompt = text["prompt_embeds"][i, text["prompt_mask"][i]]
        expected = published.hunyuan_video(weights, x[i], t[i], r[i], prompt, text["pooled"][i], torch.tensor(g))
        torch.testing.assert_close(found[i], expected.velocity, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("family", ["hunyuan_video", "hunyuan_video_15_i2v"])
def test_its_pipeline_is_called_as_its_authors_do(family, tmp_path):
    base = load_pipeline(save_teacher(tmp_path / "base", family))
    loaded = load_student(write(tmp_path / "student.safetensors", STUDENTS[family]()), base)
    pipe, told = loaded.pipe, []
    if family == "hunyuan_video":
        loaded.conditioning.register_forward_pre_hook(
            lambda _, args, given: told.append(1000 * float(given["r"][0])), with_kwargs=True
        )
    else:
        pipe.transformer.time_embed.register_forward_pre_hook(
            lambda _, args, given: told.append(float(given["timestep_r"][0])), with_kwargs=True
        )
    pipe(prompt="a red circle", output_type="latent", **called(pipe))
    steps, shift = (20, 5.0) if family == "hunyuan_video" else (8, base.pipe.scheduler.config.shift)
    assert len(told) == steps == loaded.default("steps")
    assert pipe.scheduler.config.shift == shift
    assert told == pytest.approx([1000 * float(s) for s in pipe.scheduler.sigmas[1:]], abs=0.1)


def test_a_student_is_given_with_its_model_and_saved_as_a_folder_of_ours(tmp_path):
    save_teacher(tmp_path / "base", "hunyuan_video")
    weights = STUDENTS["hunyuan_video"]()
    file = write(tmp_path / "student.safetensors", weights, outer="model.")
    files = read_model(tmp_path / "base", file)
    assert (files.default("steps"), files.call["shift"]) == (20, 5.0)
    loaded = load_pipeline(tmp_path / "base", student=file)
    other = load_pipeline(tmp_path / "base")
    assert student_hash(loaded) not in (student_hash(other), None)
    assert f"transformer/{file.name}" in loaded.hashes
    save_model(tmp_path / "own", loaded)
    again = load_pipeline(tmp_path / "own")
    assert again.call == loaded.call
    call = {"output_type": "latent", "num_inference_steps": 2}
    videos = [
        each.pipe("a red circle", generator=torch.Generator().manual_seed(0), **call).frames
        for each in (loaded, again, load_student(file, other))
    ]
    for video in videos[1:]:  # weights that are views into the file lie elsewhere in memory, and round otherwise
        torch.testing.assert_close(video, videos[0], rtol=1e-5, atol=1e-5)
    with pytest.raises(UserError, match="is a student itself"):
        read_model(tmp_path / "own", file)


def test_another_student_takes_the_place_of_one_and_of_what_was_added_to_it(tmp_path):
    save_teacher(tmp_path / "base", "hunyuan_video")
    file = write(tmp_path / "student.safetensors", STUDENTS["hunyuan_video"]())
    loaded = load_pipeline(tmp_path / "base", student=file)
    own = student_hash(loaded)
    loaded.hashes = FileHashes({**loaded.hashes.files, "adapter-0/1": file})
    remember(loaded)
    assert student_hash(loaded) != own
    with (
        attach(loaded, predictor="reuse", steps=2, full_steps=[0]),
        pytest.raises(UserError, match="has a predictor attached"),
    ):
        load_student(file, loaded)
    transformer, scheduler = loaded.pipe.transformer, loaded.pipe.scheduler
    loaded.pipe.scheduler = UniPCMultistepScheduler(prediction_type="flow_prediction", use_flow_sigmas=True)
    with pytest.raises(UserError, match="is a UniPCMultistepScheduler"):
        load_student(file, loaded)
    loaded.pipe.scheduler = scheduler
    assert loaded.pipe.transformer is transformer
    assert step_hook_of(loaded.pipe.transformer) is loaded.hook  # what was refused changed nothing
    assert Conditioning.of(loaded.pipe.transformer, loaded.family) is loaded.conditioning
    assert student_hash(load_student(file, loaded)) == own


def test_a_student_in_the_place_of_one_of_listed_times_is_sampled_on_its_models_own_grid(tmp_path):
    base = save_teacher(tmp_path / "base", "hunyuan_video_15")
    file = write(tmp_path / "student.safetensors", STUDENTS["hunyuan_video_15"]())
    plain, listed = load_pipeline(base), load_pipeline(base)
    own = dict(plain.pipe.scheduler.config)
    listed.decode = "tiled"
    with on_grid(listed.pipe, grid=Grid.listed([1000, 600], None)):
        loaded = load_student(file, listed)
        assert loaded.pipe.scheduler.config["shift"] == own["shift"] != 1.0
        assert (
            shift_of(loaded.pipe.scheduler, loaded.family) == own["shift"]
            and "times" not in loaded.pipe.scheduler.config
        )
    assert loaded.decode == "tiled"


def test_a_saved_student_of_the_other_model_has_its_embedding_of_r(tmp_path):
    save_teacher(tmp_path / "base", "hunyuan_video_15")
    file = write(tmp_path / "student.safetensors", STUDENTS["hunyuan_video_15"]())
    loaded = load_pipeline(tmp_path / "base", student=file)
    save_model(tmp_path / "own", loaded)
    again = load_pipeline(tmp_path / "own")
    assert again.pipe.transformer.config.use_meanflow
    assert again.hook is not None
    assert "one pass each by others, whose weights" in (tmp_path / "own" / "README.md").read_text()
    assert teachers(str(tmp_path / "own"), "") == [str(tmp_path / "base")]
    kept = again.pipe.transformer.state_dict()
    assert all(torch.equal(weight, kept[name]) for name, weight in loaded.pipe.transformer.state_dict().items())


def test_the_conversion_is_the_one_of_diffusers_where_that_knows_a_file():
    """Which splits the first layer of single-stream blocks at 3072 rows: so these have as many, of narrow layers."""
    D = 3072
    shapes = {"linear1.weight": (3 * D + 8, 2), "linear1.bias": (3 * D + 8,), "linear2.weight": (2, 4)}
    weights = {f"single_blocks.0.{name}": torch.randn(shape) for name, shape in shapes.items()}
    weights |= {f"double_blocks.0.img_attn_qkv.{end}": torch.randn(9) for end in ("weight", "bias")}
    weights["final_layer.adaLN_modulation.1.bias"] = torch.randn(4)
    layout = next(each for each in LAYOUTS if each.what == "student" and each.families == ("hunyuan_video",))
    file = Released(Path("a file"), layout, "", {})
    ours = {}
    for name, weight in weights.items():
        ours |= file._converted(name, weight, D)
    theirs = convert_hunyuan_video_transformer_to_diffusers(dict(weights))
    assert ours.keys() == theirs.keys()
    assert all(torch.equal(ours[name], theirs[name]) for name in ours)


# What is refused


def refused(file, pipe, pattern: str) -> str:
    with pytest.raises(UserError, match=pattern) as caught:
        load_student(file, pipe)
    return str(caught.value)


@pytest.mark.parametrize("family", ["hunyuan_video", "hunyuan_video_15"])
def test_every_weight_that_is_missing_or_transposed_is_named(family, tmp_path):
    sizes = replace(SIZES[family], double=2, refiner=2)
    pipe = tiny_pipeline(family)
    record, own = family_of_pipeline(type(pipe).__name__), pipe.transformer
    whole = Released.opened(write(tmp_path / "whole.safetensors", STUDENTS[family](sizes)), "student", record)
    config = dict(own.config) | {"num_layers": 2, "num_refiner_layers": 2}
    transformer, conditioning = released_student(whole, type(own), config, record, torch.float32)
    expected = transformer.state_dict()
    if conditioning is not None:
        expected |= {f"conditioning.{name}": weight for name, weight in conditioning.state_dict().items()}
    for name, shape in whole.shapes.items():
        without = {other: size for other, size in whole.shapes.items() if other != name}
        with pytest.raises(UserError, match=f"1 missing: {re.escape(name)}\\n"):
            Released(whole.file, whole.layout, "", without).weights(expected, 24)
        if len(shape) == 2 and shape[0] != shape[1]:
            turned = Released(whole.file, whole.layout, "", whole.shapes | {name: shape[::-1]})
            with pytest.raises(UserError, match=f"1 of another shape: {re.escape(name)} "):
                turned.weights(expected, 24)


def test_a_weight_too_many_is_named(released):
    pipe, file, weights = released("hunyuan_video")
    write(file, weights | {"double_blocks.7.img_mod.linear.bias": torch.zeros(144)})
    refused(file, pipe, r"1 that it has no place for: double_blocks\.7\.img_mod\.linear\.bias\n")
    write(file, weights | {"logit_scale": torch.zeros(1)}, outer="module.")
    refused(file, pipe, r"1 that it has no place for: module\.logit_scale\n")


def test_a_file_of_another_size_family_or_kind_is_refused(released, tmp_path):
    pipe, file, _ = released("hunyuan_video")
    before = pipe.transformer
    wider = published.hunyuan_video_student(published.Sizes(width=36, heads=3))
    refused(
        write(tmp_path / "wider.safetensors", wider), pipe, r"student of HunyuanVideo of width 24; .* another shape"
    )
    deeper = published.hunyuan_video_student(published.Sizes(double=2))
    refused(write(tmp_path / "deeper.safetensors", deeper), pipe, "no place for: double_blocks.1")
    for family in ("wan", "hunyuan_video_15"):
        refused(file, tiny_pipeline(family), "is a Restricted MeanFlow student of HunyuanVideo, and this is")
    refused(
        write(tmp_path / "predictor.safetensors", published.hunyuan_video_predictor()), pipe, "and a student is asked"
    )
    refused(write(tmp_path / "other.safetensors", {"a.b": torch.zeros(1)}), pipe, "no layout that is known: .* a.b")
    assert pipe.transformer is before


def test_what_is_no_safetensors_file_is_refused_and_nothing_is_downloaded(released, tmp_path, monkeypatch):
    pipe, file, weights = released("hunyuan_video")
    monkeypatch.setattr("socket.socket.connect", lambda *_: pytest.fail("a connection"))
    torch.save(weights, tmp_path / "student.pt")
    refused(tmp_path / "student.pt", pipe, "is a pickle")
    torch.save(weights, tmp_path / "renamed.safetensors")
    refused(tmp_path / "renamed.safetensors", pipe, "not a whole safetensors file")
    (tmp_path / "cut.safetensors").write_bytes(file.read_bytes()[:-8])
    refused(tmp_path / "cut.safetensors", pipe, "not a whole safetensors file")
    refused("tencent/DisCa", pipe, "there is no file tencent/DisCa")


def test_what_holds_no_released_student_is_not_saved_as_one(tmp_path):
    save_teacher(tmp_path / "base", "hunyuan_video")
    with pytest.raises(UserError, match="holds no student of a released file"):
        save_model(tmp_path / "own", load_pipeline(tmp_path / "base"))
