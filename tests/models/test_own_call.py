"""`loaded.pipe(prompt)` is the model's own call, and knows the model that it came from."""

import inspect
import logging

import diffusers
import numpy as np
import pytest
import torch

import vidaccel
from tests.students import save, save_teacher, student, trained
from tests.tiny import FLOW, tiny_pipeline
from vidaccel.config.generate import GenerateConfig
from vidaccel.errors import UserError
from vidaccel.models.loading import load_pipeline
from vidaccel.models.own_call import loaded_of
from vidaccel.sampling import eight_bits, generate

FAMILIES = FLOW


@pytest.fixture(scope="module")
def students(tmp_path_factory):
    root = tmp_path_factory.mktemp("students")
    return {family: student(root / family, family) for family in FAMILIES}


def called(loaded, prompt="a red circle", **arguments) -> np.ndarray:
    generator = torch.Generator().manual_seed(3)
    return eight_bits(loaded.pipe(prompt, generator=generator, output_type="np", **arguments).frames)


@pytest.mark.parametrize("family", FAMILIES)
def test_a_student_called_with_its_prompt_alone_is_what_generate_makes(family, students):
    loaded = load_pipeline(students[family])
    told = []
    loaded.conditioning.register_forward_pre_hook(
        lambda m, a, numbers: told.append(numbers["g"].tolist()), with_kwargs=True
    )
    made = generate(loaded, ["a red circle"], GenerateConfig(), [3])
    assert told == [[4.0]] * 4 == [[4.0]] * made.passes  # one pass a step, of its own 4 steps and scale
    assert np.array_equal(called(loaded), made.frames)
    assert told[4:] == [[4.0]] * 4
    loaded.guidance = 7
    assert loaded.guidance == 7.0
    assert np.array_equal(called(loaded), generate(loaded, ["a red circle"], GenerateConfig(guidance=7.0), [3]).frames)
    assert told[8:] == [[7.0]] * 8
    called(loaded, num_inference_steps=2)
    assert len(told) == 18
    assert called(loaded, ["a red circle"], num_frames=1).shape == (1, 1, 32, 32, 3)


@pytest.mark.parametrize("family", FAMILIES)
def test_a_teacher_with_a_call_of_its_own_takes_its_two_passes(family, tmp_path):
    loaded = load_pipeline(save_teacher(tmp_path / "teacher", family))
    made = generate(loaded, ["a red circle"], GenerateConfig(), [3])
    assert made.passes == 12 and np.array_equal(called(loaded), made.frames)
    loaded.guidance = 1.5
    made = generate(loaded, ["a red circle"], GenerateConfig(), [3])
    assert made.guidance == 1.5 and np.array_equal(called(loaded, ["a red circle"]), made.frames)
    two = loaded.pipe(["a red circle", "a blue square"], num_inference_steps=1, output_type="latent")
    assert len(two.frames) == 2


@pytest.mark.parametrize("family", FAMILIES)
def test_a_plain_folder_is_the_stock_pipeline_and_so_are_others_of_a_students_class(family, students, saved):
    own, plain = load_pipeline(students[family]).pipe, load_pipeline(saved(family)).pipe
    stock = getattr(diffusers, type(plain).__name__)
    assert type(plain) is stock and type(own) is not stock and isinstance(own, stock)
    assert type(own).__name__ == stock.__name__
    assert inspect.signature(type(own).__call__) == inspect.signature(stock.__call__)
    assert own.components.keys() == plain.components.keys()


def test_what_is_no_scale_is_refused_and_another_than_it_learnt_is_warned_of(tmp_path, caplog):
    teacher = load_pipeline(save_teacher(tmp_path / "teacher", "wan"))
    loaded = load_pipeline(save(tmp_path / "student", teacher, trained(teacher, guidance_range=(1.0, 4.0))))
    with pytest.raises(UserError, match="guidance=0.5 is not a number from 1 up"):
        loaded.guidance = 0.5
    assert loaded.guidance == loaded.hook.guidance == 4.0
    with caplog.at_level(logging.WARNING, "vidaccel"):
        loaded.guidance = 5
    assert "guidance=5: the student was trained on scales from 1 to 4" in caplog.text
    one = load_pipeline(save(tmp_path / "one", teacher, trained(teacher, ("r",))))
    with pytest.raises(UserError, match="guidance=5 needs two passes"):
        one.guidance = 5


def test_a_student_is_not_saved_by_diffusers(students, tmp_path, saved):
    loaded = load_pipeline(students["wan"])
    with pytest.raises(UserError, match="without what tells its transformer r and g"):
        loaded.pipe.save_pretrained(tmp_path / "copy")
    assert not (tmp_path / "copy").exists()
    load_pipeline(saved("wan")).pipe.scheduler.save_pretrained(tmp_path / "scheduler")  # parts, and plain models, are
    load_pipeline(save_teacher(tmp_path / "teacher", "wan")).pipe.save_pretrained(tmp_path / "again")


def test_a_pipeline_knows_where_it_came_from(students, saved):
    loaded = load_pipeline(students["wan"])
    assert loaded_of(loaded.pipe) is loaded
    assert loaded_of(tiny_pipeline("wan")) is None
    plain = load_pipeline(saved("wan"))
    assert loaded_of(plain.pipe) is plain
    plain.pipe.transformer = tiny_pipeline("wan", seed=1).transformer
    assert loaded_of(plain.pipe) is None
    with vidaccel.attach(loaded.pipe, predictor="taylor", steps=4, every=2) as attachment:
        loaded.pipe("a red circle", output_type="latent")
    assert (attachment.full_passes, attachment.predicted_passes) == (2, 2)


def test_texts_that_are_encoded_already(saved, tmp_path):
    loaded = load_pipeline(save_teacher(tmp_path / "teacher", "wan"))
    texts = {name: torch.zeros(1, 8, 32) for name in ("prompt_embeds", "negative_prompt_embeds")}
    assert called(loaded, None, **texts, num_inference_steps=1).shape == (1, 5, 32, 32, 3)
