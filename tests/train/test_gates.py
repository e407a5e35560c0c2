"""How much of a gap is closed, on velocities whose answers are known."""

import math
from types import SimpleNamespace

import pytest
import torch

from tests.students import student as student_folder
from vidaccel.config.distill import DistillConfig
from vidaccel.models.conditioning import new_conditioning
from vidaccel.models.grid import step_grid
from vidaccel.models.loading import load_pipeline
from vidaccel.models.velocity import Velocity
from vidaccel.train.distill import velocity_of
from vidaccel.train.gates import (
    GUIDANCE_GATES,
    MEAN_VELOCITY_GATES,
    Gate,
    HeldOut,
    guidance_gap,
    guidance_gap_closed,
    guidance_gates,
    mean_velocity_gap_closed,
    mean_velocity_gates,
)
from vidaccel.train.methods import method_of
from vidaccel.train.methods.base import Distillation
from vidaccel.train.methods.mean_velocity import method as mean_velocity
from vidaccel.train.methods.mean_velocity.rollout import rollout_target

B = 6
SHAPE = (B, 2, 1, 3, 3)
SHIFT = 2.0


class Toy(Velocity):
    """A velocity that a function gives; it notes how many samples it was given at a time."""

    def __init__(self, answer, embeds="rg"):
        torch.nn.Module.__init__(self)
        self.answer, self.numbers, self.sizes = answer, embeds, []

    def embeds(self, number):
        return number in self.numbers

    def forward(self, x, t, text, r=None, g=None):
        assert (g is not None) == self.embeds("g") and not torch.is_grad_enabled()
        self.sizes.append(len(x))
        return self.answer(x, t, text, t if r is None else r, g)


def wide(numbers):
    return numbers.view(-1, 1, 1, 1, 1)


def teacher_answer(x, t, text, r, g):
    return torch.sin(x) * wide(1 + t) + wide(text["number"] * (0.2 + t))


def guided_answer(x, t, text, r, g):
    """In two passes, the second of the number 1."""
    conditional = teacher_answer(x, t, text, r, g)
    unconditional = teacher_answer(x, t, {"number": torch.ones_like(t)}, r, g)
    return unconditional + wide(g) * (conditional - unconditional)


TEACHER = Toy(teacher_answer, embeds="")
EXACT = Toy(guided_answer)
UNTRAINED = Toy(teacher_answer)
HALF = Toy(lambda *given: (teacher_answer(*given) + guided_answer(*given)) / 2)


@pytest.fixture(params=[torch.float32, torch.float64])
def samples(request):
    generator = torch.Generator().manual_seed(0)
    x_0, eps = (torch.randn(SHAPE, generator=generator, dtype=request.param) for _ in range(2))
    text = {"number": torch.randn(B, generator=generator, dtype=request.param)}
    return x_0, eps, text, {"number": torch.ones(1, dtype=request.param)}


def gap(samples, student, t=None, **changes):
    x_0, eps, text, empty = samples
    t = torch.linspace(0.1, 0.9, B).to(x_0) if t is None else t
    return guidance_gap_closed(student, TEACHER, x_0, eps, t, text, empty, **changes)


def test_the_guidance_gap_is_open_before_training_and_closed_by_an_exact_student(samples):
    tolerance = 1e-5 if samples[0].dtype == torch.float32 else 1e-12
    for student, share in ((UNTRAINED, 0), (EXACT, 1), (HALF, 0.5)):
        closed = gap(samples, student)
        assert list(closed) == [1.5, 2.0, 3.0, 4.0]
        assert list(closed.values()) == pytest.approx([share] * 4, abs=tolerance)


def test_where_there_is_no_gap_the_error_is_put_against_the_difference_of_the_passes(samples):
    """At scale 1: 0 for an exact student, and 1 for one that answers as without a prompt."""

    def without(x, t, text, r, g):
        return teacher_answer(x, t, {"number": torch.ones_like(t)}, r, g)

    assert gap(samples, EXACT, scales=[1.0])[1.0] == pytest.approx(0, abs=1e-5)
    assert gap(samples, Toy(without), scales=[1.0])[1.0] == pytest.approx(1)


def test_norms_are_over_all_samples_together(samples):
    """The student is exact on one sample and untrained on the others: by hand from |v_cond - v_g| of each."""
    x_0, eps, text, _ = samples
    t = torch.full_like(text["number"], 0.5)

    def first_alone(x, t, text, r, g):
        first = text["number"] == samples[2]["number"][0]
        return torch.where(wide(first), guided_answer(x, t, text, r, g), teacher_answer(x, t, text, r, g))

    lengths = (text["number"] - 1).abs()  # |v_cond - v_g| is that times what is the same of all
    share = 1 - float(lengths[1:].norm() / lengths.norm())
    assert gap(samples, Toy(first_alone), t)[3.0] == pytest.approx(share, rel=1e-4)


@pytest.mark.parametrize("size", [1, 4, 100])
def test_the_size_of_batches_changes_nothing(samples, size):
    exact = {"rel": 1e-5 if samples[0].dtype == torch.float32 else 1e-12}
    student = Toy(lambda x, t, text, r, g: 0.9 * guided_answer(x, t, text, r, g))
    assert gap(samples, student, batch_size=size) == pytest.approx(gap(samples, student, batch_size=B), **exact)
    assert max(student.sizes) == B

    whole, parts = (runs(samples, student, frozen(), batch_size=count) for count in (B, size))
    assert parts == pytest.approx(whole, **exact)


def test_times_one_by_one_are_the_whole_where_they_are_its_times(samples):
    """All samples at each of two times, or each time's copies of the samples at once: the squares are the same."""
    x_0, eps, text, empty = samples
    student = Toy(lambda x, t, text, r, g: guided_answer(x, t, text, r, g) + wide(t * t))
    gaps = guidance_gap(
        student, TEACHER, x_0, eps, text, empty, SHIFT, torch.Generator(), times=[0.25, 0.75], timed_scales=[3.0]
    )
    assert list(gaps.by_time) == [3.0] and list(gaps.by_time[3.0]) == [0.25, 0.75]
    t = torch.tensor([0.25, 0.75]).to(x_0)
    both = gap((*(torch.cat([x, x]) for x in (x_0, eps)), {"number": text["number"].repeat(2)}, empty), student,
               t.repeat_interleave(B), scales=[3.0])  # fmt: skip
    squares = [left_of(closed, samples, time) for time, closed in gaps.by_time[3.0].items()]
    wrong, whole = (sum(part) for part in zip(*squares, strict=True))
    assert both[3.0] == pytest.approx(1 - math.sqrt(wrong / whole), rel=1e-5)


def left_of(closed, samples, time):
    """|u - v_g|^2 and |v_cond - v_g|^2 at a time, from the share that is closed."""
    x_0, eps, text, _ = samples
    whole = (9 * (2 * (text["number"] - 1) * (0.2 + time)) ** 2).sum().item()
    return (1 - closed) ** 2 * whole, whole


def test_the_gap_is_taken_over_times_of_the_grid(samples):
    """t = s k / (1 + (s - 1) k), the same for the same generator, and reported by scale, time and at scale 1."""
    x_0, eps, text, empty = samples
    seen = []

    def noting(x, t, text, r, g):
        seen.append(t)
        return guided_answer(x, t, text, r, g)

    def gaps():
        generator = torch.Generator().manual_seed(5)
        return guidance_gap(Toy(noting), TEACHER, x_0, eps, text, empty, SHIFT, generator, times=(0.5,))

    first = gaps()
    k = (torch.arange(B) + torch.rand(B, generator=torch.Generator().manual_seed(5))) / B
    torch.testing.assert_close(seen[0], (2 * k / (1 + k)).to(x_0))
    assert first == gaps()
    assert list(first.closed) == [1.5, 2.0, 3.0, 4.0] and first.off_at_one == pytest.approx(0, abs=1e-5)
    assert list(first.by_time) == list(GUIDANCE_GATES)


@pytest.mark.parametrize("span", [(0.8, 1.0), (0.0, 0.8)])
def test_one_of_two_transformers_is_asked_at_its_own_times(samples, span):
    x_0, eps, text, empty = samples
    seen = []
    student = Toy(lambda x, t, text, r, g: seen.append(t) or guided_answer(x, t, text, r, g))
    at = guidance_gap(student, TEACHER, x_0, eps, text, empty, SHIFT, torch.Generator().manual_seed(0), span=span)
    given = torch.cat(seen)
    assert ((given >= span[0] - 1e-6) & (given <= span[1] + 1e-6)).all()
    assert float(seen[0].max() - seen[0].min()) > 0.6 * (span[1] - span[0])
    assert set(at.by_time[3.0]) == ({1.0, 0.95, 0.85} if span[1] == 1 else {0.7, 0.5, 0.3, 0.1})


def field(x, t, text, r, g):
    """Bends along a run."""
    return torch.cos(2 * x) * wide(g * (0.5 + t) + text["number"])


def frozen():
    return Toy(field, embeds="g")


def runs(samples, student, teacher, **changes):
    _, eps, text, _ = samples
    settings = {"shift": SHIFT, "g": 1.5, "grids": (4, 3), "substeps": 2} | changes
    return mean_velocity_gap_closed(student, teacher, eps, text, **settings)


def test_the_mean_velocity_gap_is_open_before_training_and_closed_by_an_exact_student(samples):
    tolerance = 1e-5 if samples[0].dtype == torch.float32 else 1e-12

    def exact(x, t, text, r, g):
        return rollout_target(lambda x, t: field(x, t, text, t, g), x, t, r, 2)

    assert list(runs(samples, Toy(field), frozen())) == [4, 3]
    assert runs(samples, Toy(field), frozen()) == pytest.approx({4: 0, 3: 0}, abs=tolerance)
    assert runs(samples, Toy(exact), frozen()) == pytest.approx({4: 1, 3: 1}, abs=tolerance)
    half = Toy(lambda *given: (exact(*given) + field(*given)) / 2)
    assert runs(samples, half, frozen()) == pytest.approx({4: 0.5, 3: 0.5}, abs=tolerance)


def test_the_run_is_the_frozen_teachers_on_the_grid(samples):
    """Each step from where its own mean velocity leads, whatever the student says; the last ends at 0."""
    _, eps, text, _ = samples
    seen = []
    runs(samples, Toy(lambda x, t, text, r, g: seen.append((x, t, r)) or torch.zeros_like(x)), frozen(), grids=(3,))
    x, g = eps, torch.full_like(text["number"], 1.5)
    grid = step_grid(3, SHIFT).to(eps)
    for (given, t, r), start, end in zip(seen, grid[:-1], grid[1:], strict=True):
        torch.testing.assert_close(given, x)
        assert (t == start).all() and (r == end).all()
        x = x - (start - end) * rollout_target(lambda x, t: field(x, t, text, t, g), x, t, r, 2)


@pytest.mark.parametrize("span, steps", [((0.8, 1.0), range(2)), ((0.0, 0.8), range(2, 4))])
def test_runs_of_one_of_two_transformers_are_its_steps_of_the_grid(samples, span, steps):
    """The first's last ends where its times do, and the second's begin with clips under noise."""
    x_0, eps, text, _ = samples
    grid, seen = step_grid(4, 3.0).to(eps), []  # 1, 0.9, 0.75, 0.5, 0
    student = Toy(lambda x, t, text, r, g: seen.append((x, float(t[0]), float(r[0]))) or torch.zeros_like(x))
    settings = {"shift": 3.0, "span": span, "x_0": x_0}
    assert list(runs(samples, student, frozen(), grids=(4, 1), **settings)) == ([4, 1] if span[1] == 1 else [4])
    for (_, t, r), i in zip(seen, steps, strict=False):
        assert (t, r) == pytest.approx((float(grid[i]), max(float(grid[i + 1]), span[0])))
    first = eps if span[1] == 1 else 0.25 * x_0 + 0.75 * eps
    torch.testing.assert_close(seen[0][0], first)
    task = SimpleNamespace(student=student, teacher=frozen(), shift=3.0, span=span, config=DistillConfig())
    seen.clear()
    mean_velocity.METHOD.gates(task, HeldOut(x_0, eps, text, torch.Generator(), B, B, brief=True))
    assert {t for _, t, _ in seen} <= {t for t in step_grid(8, 3.0).tolist() if span[0] <= t <= span[1]}
    assert {len(x) for x, _, _ in seen} == {B} and len(seen) >= 4


def test_a_teacher_without_guidance_of_its_own_is_told_none(samples):
    plain = Toy(lambda x, t, text, r, g: field(x, t, text, r, torch.ones_like(t)), embeds="")
    assert runs(samples, Toy(field), plain, g=1.0)[3] == pytest.approx(0, abs=1e-6)


def test_a_real_student_that_has_just_been_made_closes_nothing(tmp_path):
    """Of its own teacher: embeddings that begin at zero, and the wrapper's numbers and units."""
    folder = student_folder(tmp_path, "hunyuan_video", ())
    teacher = velocity_of(load_pipeline(tmp_path / "teacher"))
    copy = load_pipeline(folder)
    transformer = copy.pipe.transformer
    new = Velocity(transformer, copy.family, new_conditioning(transformer, copy.family, ("r", "g")))
    generator = torch.Generator().manual_seed(0)
    x_0, eps = (torch.randn(2, 4, 2, 4, 4, generator=generator) for _ in range(2))
    text = {
        "prompt_embeds": torch.randn(2, 6, 32, generator=generator),
        "prompt_mask": torch.ones(2, 6),
        "pooled": torch.randn(2, 32, generator=generator),
    }
    empty = {name: tensor[:1].flip(-1) for name, tensor in text.items()}
    closed = guidance_gap_closed(new, teacher, x_0, eps, torch.tensor([0.3, 0.8]), text, empty)
    assert list(closed.values()) == pytest.approx([0] * 4, abs=1e-3)  # rounding beside how little texts matter to it
    assert mean_velocity_gap_closed(new, teacher, eps, text, SHIFT, grids=(2,), substeps=1) == {
        2: pytest.approx(0, abs=1e-3)
    }


def test_a_gate_says_in_one_sentence_whether_it_was_reached():
    (gate,) = guidance_gates({1.5: 0.9, 3.0: 0.41})
    assert (gate.at_least, gate.passed) == (0.45, False)
    assert gate.said("the CFG stage") == (
        "the CFG stage closes 0.41 of the guidance gap at g = 3, below its gate of 0.45: "
        "train it longer, or go on from its weights (start=)"
    )
    first, second = mean_velocity_gates({20: 0.1, 8: 0.5, 4: 0.6, 3: 0.1})
    assert first.passed and second.passed
    assert second.said("the student") == "the student closes 0.60 of the mean-velocity gap in 4 steps: its gate is 0.50"
    assert set(MEAN_VELOCITY_GATES) == {8, 4}


def test_a_number_that_is_none_passes_no_gate():
    assert not Gate("of the gap", math.nan, 0.5).passed


@pytest.mark.parametrize(("learnt", "scales", "gated"), [([1.0, 8.0], [1.5, 2, 3, 4], 1), ([1.0, 2.5], [1.5, 2], 0)])
def test_a_student_is_asked_at_scales_that_it_was_told(samples, learnt, scales, gated):
    x_0, eps, text, empty = samples
    config = DistillConfig(guidance_range=learnt)
    task = Distillation(config, TEACHER, EXACT, None, empty, SHIFT)
    held_out = HeldOut(x_0, eps, text, torch.Generator().manual_seed(0), 0, B)
    measured = method_of("cfg").gates(task, held_out)
    assert list(measured.guidance.closed) == scales and min(measured.guidance.closed.values()) > 0.99
    assert len(measured.gates) == len(measured.guidance.by_time) == gated and "g = 1:" in str(measured)
