"""Each of two transformers is distilled by itself, for guidance and for few steps, and both end up in one folder."""

import json
from dataclasses import replace

import numpy as np
import pytest
import torch
from typer.testing import CliRunner

import vidaccel
from tests.students import save_teacher
from tests.tiny import SIZE
from tests.train.test_distill import TRAIN, write_features
from vidaccel.artefacts import sha256_file
from vidaccel.bench.generation import timed_generation
from vidaccel.bench.models import Models
from vidaccel.bench.own_model import resolved, with_ancestors
from vidaccel.cli.main import app
from vidaccel.collect.encode import encode_conditions, encode_texts
from vidaccel.collect.trajectories import TrajectorySampler
from vidaccel.config.benchmark import BenchmarkConfig, MethodConfig
from vidaccel.config.collect import CollectConfig
from vidaccel.config.distill import DistillConfig
from vidaccel.config.generate import GenerateConfig
from vidaccel.config.predictor import PredictorConfig
from vidaccel.errors import UserError
from vidaccel.models.calling import warn_of_guidance
from vidaccel.models.loading import load_pipeline, of_one
from vidaccel.models.step_hook import step_hook_of
from vidaccel.models.velocity import SwitchedVelocity, velocity_of
from vidaccel.sampling import generate
from vidaccel.train.distill import _warn_of_other_steps, student_of
from vidaccel.train.methods.base import Distillation
from vidaccel.train.methods.mean_velocity.target import Interval
from vidaccel.train.predictor.task import task_of

CONDITIONINGS = "conditioning", "conditioning_2"
WEIGHTS = "diffusion_pytorch_model.safetensors"
MANY = TRAIN | {"batch_size": 16, "accumulate": 1}
"""Enough times drawn in two passes to be looked at."""


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """Its first transformer distilled in `high`, and then the second as well in `both`, and the times of each."""
    folder, times = tmp_path_factory.mktemp("several"), {"high": [], "both": []}
    teacher = load_pipeline(save_teacher(folder / "teacher", "wan22"))
    write_features(folder / "features", teacher)
    draw = Distillation.draw
    for name, source, output in (("transformer", "teacher", "high"), ("transformer_2", "high", "both")):
        with pytest.MonkeyPatch.context() as patch:

            def noted(task, *args, to=times[output]):
                drawn = draw(task, *args)
                to.append(drawn[2])
                return drawn

            patch.setattr(Distillation, "draw", noted)
            settings = {"features": str(folder / "features"), "sample_steps": 4, "shift": 3.0, "train": MANY}
            vidaccel.distill("cfg", folder / output, teacher=str(folder / source), denoiser=name, **settings)
    return folder, {name: torch.cat(drawn) for name, drawn in times.items()}


def test_each_learns_at_its_own_times(made):
    _, times = made
    assert (times["high"] >= 0.8).all() and (times["high"] < 1).all() and len(times["high"])
    assert (times["both"] >= 0).all() and (times["both"] < 0.8).all() and len(times["both"])


def test_what_is_not_distilled_is_the_teachers_byte_for_byte(made):
    folder, _ = made

    def same(one, other, file):
        return sha256_file(folder / one / file) == sha256_file(folder / other / file)

    assert same("teacher", "high", f"transformer_2/{WEIGHTS}") and not same("teacher", "high", f"transformer/{WEIGHTS}")
    assert same("high", "both", f"transformer/{WEIGHTS}") and not same("high", "both", f"transformer_2/{WEIGHTS}")
    assert same("high", "both", "conditioning/model.safetensors")
    assert (folder / "both/conditioning_2").is_dir() and not (folder / "high/conditioning_2").exists()


def test_gates_are_at_the_times_of_the_one_that_is_distilled(made, tmp_path):
    folder, _ = made
    settings = {"features": str(folder / "features"), "sample_steps": 4, "shift": 3.0, "train": {**TRAIN, "steps": 1}}
    settings |= {"teacher": str(folder / "teacher"), "denoiser": "transformer", "gate_samples": 1}
    vidaccel.distill("cfg", tmp_path / "x", **settings)
    gap = json.loads((tmp_path / "x" / "gates.json").read_text())["guidance_gap"]
    assert {float(t) for t in gap["by_time"]["3"]} == {1.0, 0.95, 0.85}
    assert not (folder / "high" / "gates.json").exists()  # where nobody asks for any


def test_half_of_a_student_is_no_model(made):
    folder, _ = made
    with pytest.raises(
        UserError, match=r"transformer_2 of .*high has not been distilled .*\nhint: .*denoiser=transformer_2"
    ):
        vidaccel.generate("a red circle", model=str(folder / "high"))


@pytest.mark.parametrize("name, denoiser", [("high", "transformer"), ("both", "transformer_2")])
def test_what_is_said_at_the_end_of_half_is_what_makes_it_whole(made, name, denoiser, monkeypatch):
    output = made[0] / name
    monkeypatch.setattr("vidaccel.api.distill", lambda *args, **more: output)
    result = CliRunner().invoke(app, ["distill", "teacher=any", f"denoiser={denoiser}", "-o", str(output)])
    assert result.exit_code == 0, result.output
    more = f"vidaccel distill teacher={output} denoiser=transformer_2 -o ANOTHER"
    half = f"{output}: its transformer, no model yet; `{more}` distils the transformer_2 too"
    whole = f"{output}: the student; `vidaccel generate PROMPT model={output}` runs it"
    assert result.stdout.splitlines()[0] == (half if name == "high" else whole)
    said = "No model yet: its transformer_2 is as it was, and `vidaccel distill teacher="
    assert (said in (output / "README.md").read_text()) == (name == "high")


def test_both_are_told_their_scales_in_one_pass_a_step(made, caplog):
    folder, _ = made
    loaded = load_pipeline(folder / "both")
    assert (loaded.call["guidance"], loaded.call["guidance_2"]) == (3.0, 3.0)  # as its teacher is called
    hooks = [step_hook_of(each) for each in (loaded.pipe.transformer, loaded.pipe.transformer_2)]
    told = []
    for transformer, hook in zip((loaded.pipe.transformer, loaded.pipe.transformer_2), hooks, strict=True):
        transformer.register_forward_pre_hook(lambda *_, hook=hook: told.append(hook.guidance))
    video = generate(loaded, ["a red circle"], GenerateConfig(guidance=5.0, guidance_2=2.0), [0])
    assert told == [5.0, 5.0, 2.0, 2.0] and (video.guidance, video.guidance_2, video.passes) == (5.0, 2.0, 4)
    assert [hook.guidance for hook in hooks] == [3.0, 3.0]
    loaded.guidance = 6.0
    assert [hook.guidance for hook in hooks] == [6.0, 6.0]
    warn_of_guidance(loaded, 5.0, 20.0)
    assert caplog.messages[-1] == "guidance_2=20: the student was trained on scales from 1 to 8"
    assert not any(each.startswith("guidance=") for each in caplog.messages)
    with vidaccel.attach(loaded, predictor="reuse", steps=4, full_steps=[0, 2]) as attachment:
        loaded.pipe("a red circle", output_type="latent")
    assert (attachment.full_passes, attachment.predicted_passes) == (2, 2)


@torch.no_grad()
def test_each_velocity_is_that_of_its_own_transformer_and_conditioning(made):
    folder, _ = made
    loaded = load_pipeline(folder / "both")
    both, x = velocity_of(loaded), torch.randn(1, 4, 2, 4, 4, generator=torch.Generator().manual_seed(0))
    text, g = {"prompt_embeds": torch.randn(1, 8, 32, generator=torch.Generator().manual_seed(1))}, torch.tensor([3.0])
    assert isinstance(both, SwitchedVelocity) and both.embeds("g")
    for name, at in (("transformer", 0.8), ("transformer_2", 0.79)):
        t = torch.tensor([at])
        assert torch.equal(both(x, t, text, g=g), velocity_of(of_one(loaded, name))(x, t, text, g=g))
    both.second = 2.0
    low, expected = torch.tensor([0.79]), velocity_of(of_one(loaded, "transformer_2"))
    assert torch.equal(both(x, low, text, g=g), expected(x, low, text, g=torch.tensor([2.0])))
    with pytest.raises(ValueError, match="times of several transformers"):
        both(x.expand(2, -1, -1, -1, -1), torch.tensor([0.8, 0.7]), text, g=g)


@pytest.fixture(scope="module")
def few(made):
    """Both of them trained for few steps as well, one after the other, and all t and r of each."""
    folder, _ = made
    times = {"few_high": [], "few": []}
    for name, source, output in (("transformer", "both", "few_high"), ("transformer_2", "few_high", "few")):
        with pytest.MonkeyPatch.context() as patch:

            def noted(x, t, r, *more, to=times[output]):
                to.append(torch.stack([t, r]))
                return Interval(x, t, r, *more)

            patch.setattr("vidaccel.train.methods.mean_velocity.method.Interval", noted)
            settings = {"features": str(folder / "features"), "sample_steps": 4, "shift": 3.0, "train": MANY}
            settings |= {"method": "mean_velocity", "denoiser": name, "teacher": str(folder / source)}
            vidaccel.distill("cfg", folder / output, **settings)
    return folder, {name: torch.cat(drawn, 1) for name, drawn in times.items()}


def test_no_interval_leads_from_the_times_of_one_into_those_of_the_other(few):
    folder, times = few
    (t, r), (later_t, later_r) = times["few_high"], times["few"]
    assert (r >= 0.8).all() and (t < 1).all() and (r <= t).all() and (r == 0.8).any()
    assert (later_t < 0.8).all() and (later_r >= 0).all() and (later_r <= later_t).all() and (later_r < 0.2).any()
    first, second = (json.loads((folder / "few" / name / "config.json").read_text()) for name in CONDITIONINGS)
    assert first["until"] == 0.8 and "until" not in second
    with pytest.raises(UserError, match=r"transformer_2 of .*few_high has not been distilled"):
        vidaccel.generate("a red circle", model=str(folder / "few_high"))


def test_steps_that_the_other_was_not_trained_for_are_warned_of(few, caplog):
    teacher = few[0] / "few_high"
    loaded = load_pipeline(teacher)
    for changes, said in (({"sample_steps": 4}, 0), ({"sample_steps": 8}, 1), ({"sample_steps": 4, "shift": 5.0}, 2)):
        for name in ("transformer_2", "transformer"):  # of which the first alone is told r so far
            config = DistillConfig(method="mean_velocity", teacher=str(teacher), denoiser=name, **changes)
            _warn_of_other_steps(config, loaded)
            assert len(caplog.messages) == said, changes
    assert caplog.messages[0].startswith(f"the transformer of {teacher} is for sample_steps=4 shift=3, and")


def test_guidance_that_is_distilled_later_leaves_the_least_r_as_it_was(few):
    loaded = of_one(load_pipeline(few[0] / "few_high"), "transformer")
    config = DistillConfig(method="cfg", teacher=str(few[0] / "few_high"), sample_steps=4)
    assert student_of(loaded, config, span=(0.8, 1.0)).conditioning.config.until == 0.8


@torch.no_grad()
def test_the_step_across_is_told_where_the_first_ends(few):
    folder, _ = few
    loaded = load_pipeline(folder / "few")
    for each in (loaded, *loaded.further):  # what was trained for two steps hardly matters
        torch.nn.init.normal_(
            each.conditioning.embedders["r"].linear_2.weight, generator=torch.Generator().manual_seed(0)
        )
    first, second = loaded.conditioning, loaded.further[0].conditioning
    r, b, g = torch.tensor([0.75]), torch.tensor([0.8]), torch.tensor([3.0])
    assert torch.equal(first(r=r, g=g), first(r=b, g=g)) and not torch.equal(second(r=r, g=g), second(r=b, g=g))
    sampler = TrajectorySampler(loaded, CollectConfig(kind="trajectory", model="here"))
    made = sampler(["a red circle"], [0])  # at 1, 0.9, 0.75, 0.5, 0
    x, u = made["x"][0], made["velocity"][0]
    expected = loaded.pipe("a red circle", latents=x[:1].clone(), output_type="latent").frames
    torch.testing.assert_close(x[-1] - 0.5 * u[-1], expected[0], rtol=1e-4, atol=1e-4)
    text = {"prompt_embeds": made["prompt_embeds"]}
    told = of_one(loaded, "transformer"), torch.tensor([0.9])
    across = velocity_of(told[0])(x[1:2], told[1], text, r=b, g=torch.tensor([3.0]))
    torch.testing.assert_close(u[1:2], across, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(
    "settings, said",
    [
        ({}, "denoises with 2 transformers, and nothing says which"),
        ({"denoiser": "transformer_3"}, "has transformer, transformer_2"),
        ({"denoiser": "transformer", "merge_lora": False, "train": {"lora_rank": 2}}, "adapter apart"),
    ],
)
def test_what_is_refused_is_before_any_weight_is_read(made, settings, said, monkeypatch, tmp_path):
    folder, _ = made
    monkeypatch.setattr("vidaccel.train.distill.load_pipeline", lambda *args, **more: pytest.fail("loaded"))
    with pytest.raises(UserError, match=said):
        vidaccel.distill("cfg", tmp_path / "out", teacher=str(folder / "teacher"), **settings)


def test_what_an_image_gives_is_read_off_beside_a_transformer_without_weights(tmp_path):
    loaded = load_pipeline(save_teacher(tmp_path / "teacher", "wan22_i2v"))
    text, image = encode_texts(loaded, ["a red circle"]), np.full((SIZE["height"], SIZE["width"], 3), 99, np.uint8)
    expected = encode_conditions(loaded, [image], text, SIZE["num_frames"])
    for weight in loaded.pipe.transformer.parameters():  # as it is while the second is distilled
        weight.data = weight.data.new_empty(0)
    found = encode_conditions(of_one(loaded, "transformer_2"), [image], text, SIZE["num_frames"])
    assert expected.keys() == found.keys() and all(torch.equal(found[name], expected[name]) for name in expected)


def test_schedules_are_searched_at_the_scale_of_each(made):
    folder, _ = made
    loaded = load_pipeline(folder / "both")
    loaded.call = loaded.call | {"guidance": 4.0, "guidance_2": 2.0}
    asked = {"student": str(folder / "both"), "features": str(folder / "features"), "forecaster": "reuse", "shift": 3.0}
    task = task_of(loaded, PredictorConfig(**asked), None)
    assert (task.sampling.guidance, task.student.second) == (4.0, 2.0)
    task = task_of(loaded, PredictorConfig(guidance=5.0, **asked), None)
    assert (task.sampling.guidance, task.student.second) == (5.0, 5.0)


def test_a_benchmark_has_its_teacher_guided_as_the_student(made):
    folder, _ = made
    config = with_ancestors(BenchmarkConfig(student=str(folder / "both")))
    assert (config.model, config.distilled) == (str(folder / "teacher"), None)  # and not the half that is no model
    models = Models(replace(config, family="wan22"), "cpu")
    student, teacher = models.pipeline(MethodConfig()), models.pipeline(MethodConfig(weights="teacher", two_pass=True))
    student.call = student.call | {"guidance": 4.0, "guidance_2": 2.0}
    rows, lacking = resolved({"teacher": MethodConfig(weights="teacher", two_pass=True, as_called=True)}, models)
    assert not lacking and (rows["teacher"].guidance, rows["teacher"].guidance_2) == (4.0, 2.0)
    ways = ({}, {"guidance": 5.0}, {"guidance_2": 3.0})
    two = MethodConfig(weights="teacher", two_pass=True, as_called=True)
    for said, expected in zip(ways, ((4.0, 2.0), (None, None), (4.0, 3.0)), strict=True):
        models.config = replace(config, family="wan22", **said)
        row = resolved({"teacher": two}, models)[0]["teacher"]
        assert (row.guidance, row.guidance_2) == expected
    seen = []
    teacher.pipe.set_progress_bar_config(disable=True)
    with pytest.MonkeyPatch.context() as patch:
        call = type(teacher.pipe).__call__
        patch.setattr(type(teacher.pipe), "__call__", lambda pipe, **more: seen.append(more) or call(pipe, **more))
        for method, said in (
            (replace(two, steps=2, guidance=4.0, guidance_2=2.0), {"guidance": 7.0, "guidance_2": 6.0}),
            (replace(two, steps=2, guidance=4.0), {"guidance_2": 6.0}),
            (replace(two, steps=2), {"guidance": 7.0, "guidance_2": 6.0, "negative_prompt": "a dog"}),
        ):
            timed_generation(teacher, method, tuple(SIZE.values()), ["blue"], [0], BenchmarkConfig(**said), False)
    assert [(each["guidance_scale"], each["guidance_scale_2"], each["negative_prompt"]) for each in seen] == [
        (4.0, 2.0, [""]),
        (4.0, 4.0, [""]),
        (7.0, 6.0, ["a dog"]),
    ]
