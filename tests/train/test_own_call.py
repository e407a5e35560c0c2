"""What is said once, at collect-features, is how a student is trained, shown and called."""

from dataclasses import replace

import pytest
import torch

from tests.tiny import tiny_pipeline
from tests.train.test_distill import TRAIN, write_features
from vidaccel.collect.encode import encode_texts
from vidaccel.config.distill import DistillConfig
from vidaccel.config.predictor import PredictorConfig
from vidaccel.config.training import TrainConfig
from vidaccel.errors import UserError
from vidaccel.forecasters.reuse import Reuse
from vidaccel.models.calling import call_arguments
from vidaccel.models.loading import load_pipeline
from vidaccel.models.velocity import GuidedVelocity
from vidaccel.train import distill as module
from vidaccel.train.distill import distill
from vidaccel.train.own_call import with_scales
from vidaccel.train.predictor.multistep import runs_of
from vidaccel.train.predictor.search import search_schedules
from vidaccel.train.predictor.task import task_of

SAID = {"guidance": 9.0, "negative_prompt": "a green square"}


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    """A plain Wan folder, whose own video would be 81 x 480 x 832, and features of another size."""
    folder = tmp_path_factory.mktemp("wan")
    tiny_pipeline("wan").save_pretrained(folder / "wan")
    write_features(folder / "features", load_pipeline(folder / "wan"), size=(3, 4, 6), said=SAID)
    return folder


def config(model, **changes) -> DistillConfig:
    own = {"teacher": str(model / "wan"), "features": str(model / "features"), "sample_steps": 3}
    return DistillConfig(**own | {"train": TrainConfig(**TRAIN)} | changes)


def test_a_student_is_called_as_its_features_say(model, tmp_path, monkeypatch, caplog):
    seen, sheets = [], []
    method = module.method_of("cfg")
    monkeypatch.setattr(module, "method_of", lambda name: replace(method, preflight=seen.append))
    monkeypatch.setattr(module, "contact_sheet", lambda videos, file, labels: sheets.extend(videos))
    distill(config(model), tmp_path / "cfg")
    monkeypatch.undo()
    (task,) = seen
    expected = encode_texts(load_pipeline(model / "wan"), ["a green square"])
    assert torch.equal(task.empty["prompt_embeds"], expected["prompt_embeds"])
    assert task.config.guidance_range == [1.0, 9.0] and "learns scales" not in caplog.text
    assert {video.shape for video in sheets} == {(9, 32, 48, 3)}
    student = load_pipeline(tmp_path / "cfg")
    size = {"num_frames": 9, "height": 32, "width": 48}
    assert student.call == size | {"fps": 8, "steps": 3, "shift": 3.0, "two_pass": False} | SAID
    assert student.conditioning.config.guidance_range == (1.0, 9.0)
    arguments = call_arguments(student)
    assert arguments == size | {"num_inference_steps": 3, "guidance_scale": 1.0}
    with pytest.raises(UserError, match="negative_prompt='a dog' needs two passes"):
        call_arguments(student, negative_prompt="a dog")
    # The student of a student goes on so, and with a scale of its own says that.
    few = config(model, method="mean_velocity", teacher=str(tmp_path / "cfg"), guidance=2.0)
    distill(few, tmp_path / "few")
    assert load_pipeline(tmp_path / "few").call == student.call | {"guidance": 2.0}
    distill(replace(few, teacher=str(tmp_path / "few"), guidance=None), tmp_path / "fewer")
    assert load_pipeline(tmp_path / "fewer").call["guidance"] == 2.0  # not the features' 9


def test_the_settings_of_a_training_come_first(model, tmp_path, monkeypatch, caplog):
    seen = []
    method = module.method_of("cfg")
    monkeypatch.setattr(module, "method_of", lambda name: replace(method, preflight=seen.append))
    own = {"guidance": 5.0, "negative_prompt": "", "guidance_range": [1.0, 4.0]}
    train = TrainConfig(**TRAIN | {"steps": 0, "sample_every": 0})
    distill(config(model, **own, train=train), tmp_path / "cfg")
    expected = encode_texts(load_pipeline(model / "wan"), [""])
    assert torch.equal(seen[0].empty["prompt_embeds"], expected["prompt_embeds"])
    assert load_pipeline(tmp_path / "cfg").call["guidance"] == 5.0
    assert "the student is called with guidance 5 and learns scales from 1 to 4: set guidance=" in caplog.text


def test_another_negative_prompt_is_another_training(model, tmp_path):
    train = TrainConfig(**TRAIN | {"steps": 1, "sample_every": 0})
    distill(config(model, train=train), tmp_path / "cfg")
    with pytest.raises(UserError, match="negative_prompt was 'a green square', now 'a dog'"):
        distill(config(model, train=train, negative_prompt="a dog"), tmp_path / "cfg")


@pytest.mark.parametrize(("scale", "chosen"), [(None, [1.0, 8.0]), (6.0, [1.0, 8.0]), (9.5, [1.0, 9.5])])
def test_the_range_holds_the_scale_that_the_student_is_called_with(teachers, scale, chosen):
    assert with_scales(DistillConfig(guidance=scale), teachers["wan"]).guidance_range == chosen
    own = replace(teachers["wan"], call={"guidance": scale}) if scale else teachers["wan"]
    assert with_scales(DistillConfig(), own).guidance_range == chosen
    given = DistillConfig(guidance=scale, guidance_range=[1.0, 2.0])
    assert with_scales(given, teachers["wan"]).guidance_range == [1.0, 2.0]


def test_so_is_a_search_of_a_model_in_two_passes(model, caplog):
    loaded = load_pipeline(model / "wan")
    own = {"student": str(model / "wan"), "features": str(model / "features"), "shift": 3.0, "steps": 4}

    def task(**changes):
        return task_of(loaded, PredictorConfig(**own | {"forecaster": "reuse"} | changes), None)

    for changes, guidance, away_from in (
        ({}, 9.0, "a green square"),
        ({"guidance": 3.0, "negative_prompt": "a dog"}, 3.0, "a dog"),
    ):
        made = task(**changes)
        assert isinstance(made.student, GuidedVelocity) and not made.student.embeds("g")
        assert made.sampling.guidance == made.student.guidance == guidance
        expected = encode_texts(loaded, [away_from])["prompt_embeds"]
        assert torch.equal(made.student.empty["prompt_embeds"], expected)
        assert made.provenance["guidance"] == guidance and made.provenance["negative_prompt"] == away_from
    assert not isinstance(task(guidance=1.0).student, GuidedVelocity)
    with pytest.raises(UserError, match="negative_prompt='a dog' needs two passes"):
        task(guidance=1.0, negative_prompt="a dog")
    for guidance in (1.0, 3.0):
        with pytest.raises(UserError, match=r"guidance_2=2.0, and Wan 2.1 has one transformer"):
            task(guidance=guidance, guidance_2=2.0)
    with pytest.raises(UserError, match=r"makes two passes a step, and.*\nhint: .*forecaster=reuse\|taylor\|multistep"):
        task(forecaster="learned")
    sampler, _, span = runs_of(PredictorConfig(**own, forecaster="multistep"), loaded)
    assert (sampler.guidance, sampler.negative_prompt, span) == (9.0, "a green square", (9.0, 9.0))


@pytest.mark.parametrize("forecaster", ["reuse", "multistep"])
def test_prompts_are_enough_for_what_has_no_network(model, forecaster, tmp_path):
    """In place of clips; of videos of the model's own size, or as it is said."""
    loaded = load_pipeline(model / "wan")
    (tmp_path / "prompts.txt").write_text("a red circle\na blue square\n\na dog\n")
    size = {"num_frames": 5, "height": 32, "width": 48}
    named = {"student": str(model / "wan"), "forecaster": forecaster, "prompts": str(tmp_path / "prompts.txt")}
    asked = PredictorConfig(**named, **size, shift=3.0, steps=3, guidance=3.0, search_prompts=1, checked_prompts=1)
    if forecaster == "multistep":
        sampler, prompts, _ = runs_of(replace(asked, runs=2), loaded)
        assert sampler.size == size and {prompt for prompt, _ in prompts} == {"a red circle", "a blue square", "a dog"}
        return
    task = task_of(loaded, asked, None)
    assert len(task.data) == 3 and task.data[2][1] == {"caption": "a dog"}
    assert task.data[0][0]["latent"].shape == (4, 2, 4, 6)
    expected = encode_texts(loaded, ["a blue square"])["prompt_embeds"][0]
    assert torch.equal(task.data[1][0]["prompt_embeds"], expected)
    with task.trunks:
        found = search_schedules(task, Reuse())
    assert [each.budget for each in found] == [1, 2, 3] and found[0].expected_error > 0
    with pytest.raises(UserError, match=r"is for forecaster=multistep\|reuse\|taylor\|linear, without features"):
        PredictorConfig(**named | {"forecaster": "learned"})
