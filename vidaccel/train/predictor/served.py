"""A predictor trained as it is served: through whole runs of the student from new noise, to the student's own latents.

A run's full steps are the student's, from wherever the predicted steps before have led; its error grows and shrinks as
it does when a video is made, and the gradients of all of it reach the predictor. Lists of full steps take turns. Of the
data only texts are wanted.

    loss = 2 e_S + 1/2 (e of the other states that a predicted step came before),    e = |x' - x*| / |x*|, a sample's

with x* the student's own run of full steps alone, from the same noise. Under scalars (in_loop.py) the network's answer
is one of their terms, as it is where they serve on top of it.

B runs, S steps, M texts, C channels, T frames, H and W latent pixels
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import cast

import torch
from torch import Tensor, nn

from vidaccel.cache.trunk import Trunk
from vidaccel.cache.trunks import Trunks
from vidaccel.collect.bank import Bank, cut_texts
from vidaccel.collect.encode import LATENT, batch, encode_texts
from vidaccel.collect.source import EncodedSource
from vidaccel.errors import UserError
from vidaccel.families.walk import stored_inputs
from vidaccel.forecasters.base import Cached, Forecaster, Tokens
from vidaccel.forecasters.learned import Predictor, new_predictor
from vidaccel.forecasters.multistep import HISTORY, FittedList, multistep_velocity
from vidaccel.forecasters.reuse import Reuse
from vidaccel.models.grid import denoiser_at
from vidaccel.models.velocity import Text, Velocity
from vidaccel.models.weight_hashes import student_hash
from vidaccel.train.flow_matching import sample_guidance
from vidaccel.train.objective import Batch, Objective, generator_for, in_batch, text_of
from vidaccel.train.predictor.in_loop import Fits
from vidaccel.train.predictor.lists import FullSteps
from vidaccel.train.predictor.task import PredictorTask

OF_THE_END, OF_OTHERS = 2.0, 0.5
"""Weights of the errors of final latents and of the states before."""
TINY = 1e-6
"""Added to squares under a root, whose slope is infinite at 0."""
AT_ONCE = 64
"""Captions that are encoded together."""


# runs


@dataclass(frozen=True)
class Serving:
    """A student, and how it is sampled. Nothing here waits for the device, unless it asks which of two transformers a
    step is of."""

    student: Velocity
    trunk: Trunk | Trunks
    grid: Tensor
    """Times [S + 1], on the student's device."""
    firsts: FullSteps = (0,)
    """The steps with which its transformers begin."""

    @property
    def steps(self) -> int:
        return len(self.grid) - 1

    def step(self, index: int, x: Tensor, text: Text, g: Tensor | None) -> Tensor:
        """Where a step from x leads, [B, C, T, H, W], full or predicted as the trunk is set."""
        t, r = self.grid[index], self.grid[index + 1]
        u = self.student(x, t.expand(len(x)), text, r=r.expand(len(x)), g=g)
        return (x.float() - (t - r) * u.float()).to(x.dtype)

    def full_step(self, index: int, x: Tensor, text: Text, g: Tensor | None) -> tuple[Tensor, Cached]:
        """Where it leads, and what it leaves for predicted steps."""
        with self.trunk.full(self.grid[index]):
            x = self.step(index, x, text, g)
        (left, *_) = self.trunk.memory()
        self.trunk.reset()
        return x, left

    @torch.no_grad()
    def own(self, noise: Tensor, text: Text, g: Tensor | None, kept: int = 0) -> tuple[list[Tensor], list[Cached]]:
        """S + 1 states of a run of full steps, and what the first `kept` of these left."""
        states, left = [noise], []
        for index in range(self.steps):
            if index < kept:
                x, cached = self.full_step(index, states[-1], text, g)
                left.append(cached)
            else:
                x = self.step(index, states[-1], text, g)
            states.append(x)
        return states, left

    def served(
        self,
        forecaster: Forecaster,
        full_steps: FullSteps,
        own: tuple[list[Tensor], list[Cached]],
        text: Text,
        g: Tensor | None,
        numbers: Mapping[int, Tensor] | None = None,
    ) -> list[Tensor]:
        """The states of a run with these full steps, from the one that its first predicted step leads to on.

        Args:
            own: of the same run in full, with what all steps before that one have left.
            numbers: of each predicted step, [terms] or [terms, B], the scalars on top of the network, if there are
                some.
        """
        first = leading(full_steps)
        begin = max(i for i in self.firsts if i <= first)  # of the transformer of that step
        x, states, history = own[0][first], [], forecaster.history
        memory = tuple(reversed(own[1][begin:first]))[:history]
        known = [(self.mean(i, *own[0][i : i + 2]), own[0][i]) for i in reversed(range(begin, first))][:HISTORY]
        for index in range(first, self.steps):
            before = x
            if index in self.firsts:
                memory, known = (), []
            if index in full_steps:
                x, left = self.full_step(index, x, text, g)
                memory = (left, *memory)[:history]
                known = [(self.mean(index, before, x), before), *known][:HISTORY]
            else:
                with self.trunk.predicted(forecaster, self.grid[index], memory):
                    x = self.step(index, x, text, g)
                if numbers is not None:
                    us, xs = zip(*known, strict=True)
                    u = multistep_velocity(numbers[index], us, xs, before, self.mean(index, before, x))
                    x = (before.float() - (self.grid[index] - self.grid[index + 1]) * u.float()).to(x.dtype)
            states.append(x)
        return states

    def mean(self, index: int, x: Tensor, after: Tensor) -> Tensor:
        """The velocity of a step that led from x to `after`."""
        return (x - after) / (self.grid[index] - self.grid[index + 1])


def leading(full_steps: FullSteps) -> int:
    """How many steps are full before the first one that is not."""
    return next((index for index, step in enumerate(full_steps) if index != step), len(full_steps))


def relative_squares(x: Tensor, own: Tensor) -> Tensor:
    """[B]: |x' - x*|^2 / |x*|^2."""
    apart, whole = (each.float().flatten(1).square().mean(1) for each in (x.float() - own.float(), own))
    return apart / whole


def served_loss(
    serving: Serving,
    forecaster: Forecaster,
    full_steps: FullSteps,
    noise: Tensor,
    text: Text,
    g: Tensor | None,
    numbers: Mapping[int, Tensor] | None = None,
) -> tuple[Tensor, Tensor]:
    """The loss of runs from noise [B, C, T, H, W], and the mean error of their final latents, both []."""
    own = serving.own(noise, text, g, kept=leading(full_steps))
    states = serving.served(forecaster, full_steps, own, text, g, numbers)
    pairs = zip(states, own[0][-len(states) :], strict=True)
    *before, last = ((relative_squares(x, of_own) + TINY).sqrt().mean() for x, of_own in pairs)
    return OF_THE_END * last + OF_OTHERS * sum(before), last.detach()


def default_lists(steps: int, firsts: FullSteps = (0,)) -> list[FullSteps]:
    """Lists of a quarter, three eighths and a half of the steps, which come closer together where there is more noise:
    i-th of k full steps at S (i/k)^2 or S (i/k)^1.5. The steps with which transformers begin are added."""
    found = []
    for share in (0.25, 0.375, 0.5):
        count = max(1, round(share * steps))
        for power in (2.0, 1.5):
            places = [int(steps * (i / count) ** power) for i in range(count)]
            for i in range(1, count):
                places[i] = max(places[i], places[i - 1] + 1)
            found.append(tuple(sorted({*places, *firsts})))
    return sorted({each for each in found if len(each) < steps} or {firsts}, key=lambda each: (len(each), each))


def check_lists(lists: Sequence[Sequence[int]], steps: int, firsts: FullSteps = (0,)) -> list[FullSteps]:
    """As tuples; `UserError` for one that is no list of full steps of so many, or leaves nothing to predict."""
    for each in lists:
        rising = list(each) == sorted(set(each)) and bool(each)
        if not rising or each[0] != 0 or each[-1] >= steps or len(each) >= steps:
            raise UserError(
                f"lists: {list(each)} are no full steps of {steps}",
                f"a list rises from 0, stays below {steps}, and leaves a step to predict",
            )
        if missing := set(firsts) - set(each):
            raise UserError(
                f"lists: {list(each)} leaves out {min(missing)}, the first step of the second transformer", "list it"
            )
    return [tuple(each) for each in lists]


# data


@dataclass(frozen=True)
class Starts:
    """What runs begin with: texts and conditions [M, ...] by stored name, and the shape [C, T, H, W] of noise."""

    texts: Text
    shape: tuple[int, ...]

    def __len__(self) -> int:
        return len(next(iter(self.texts.values())))

    @classmethod
    def of(cls, task: PredictorTask, most: int) -> "Starts":
        """Those of a task's data, at most so many; of a bank all."""
        if isinstance(task.data, Bank):
            return cls(dict(task.data.texts), tuple(task.data.latents.shape[1:]))
        data = task.samples
        count = min(most, len(data))
        first = data[0][0]
        shape = first["x"].shape[1:] if "x" in first else first[LATENT].shape
        family = task.loaded.family
        if isinstance(data, EncodedSource) and not family.begins_with_image:  # it would encode clips as well
            captions = [data.source.record(i)["caption"] for i in range(count)]
            parts = [encode_texts(task.loaded, captions[i : i + AT_ONCE]) for i in range(0, count, AT_ONCE)]
            texts = {name: torch.cat([part[name] for part in parts]) for name in parts[0]}
        else:
            names = stored_inputs(task.student.transformer, task.loaded.family)
            samples = [data[i][0] for i in range(count)]
            texts = batch([{name: each[name] for name in names} for each in samples], task.device, torch.float32)
        return cls(cut_texts(texts, task.loaded.family), tuple(shape))

    def apart(self, count: int) -> tuple["Starts", "Starts"]:
        """The last `count` texts, and the others; all twice where that leaves none."""
        if count >= len(self):
            return self, self
        parts = (
            {name: text[part] for name, text in self.texts.items()} for part in (slice(-count, None), slice(-count))
        )
        last, others = (Starts(texts, self.shape) for texts in parts)
        return last, others

    def draw(
        self, count: int, generator: torch.Generator, device: torch.device, dtype: torch.dtype = torch.float32
    ) -> dict[str, Tensor]:
        """Noise, and texts drawn with replacement, of so many runs, by their names in a `Batch`."""
        row = torch.randint(len(self), (count,), generator=generator, device=generator.device)
        noise = torch.randn(count, *self.shape, generator=generator, device=generator.device)
        texts = in_batch({name: text.index_select(0, row.to(text.device)) for name, text in self.texts.items()})
        return {name: tensor.to(device, dtype) for name, tensor in ({"noise": noise} | texts).items()}


def served_objective(
    serving: Serving,
    starts: Starts,
    lists: Sequence[FullSteps],
    count: int,
    scales: tuple[float, float] | None,
    passes: int = 1,
    fits: Callable[[int], Mapping[FullSteps, FittedList]] | None = None,
) -> Objective:
    """Of a predictor, by batches of `count` runs. Their variant is the list of full steps, which is the same in all
    `passes` of an optimiser step: sharded weights are waited for in each.

    Args:
        scales: guidance, lowest and highest; None for a student that embeds none.
        fits: the scalars that the network is under in an optimiser step, by list; None trains it alone.
    """

    def draw(index: int, generator: torch.Generator) -> Batch:
        device = serving.grid.device
        tensors = starts.draw(count, generator, device)
        if scales is not None:
            tensors["g"] = sample_guidance(count, *scales, generator).to(device)
        step = index // passes
        variant = lists[step % len(lists)]
        if fits is not None:
            tensors |= in_numbers(fits(step)[variant], tensors.get("g"), device)
        return Batch(tensors, variant)

    def loss(model: nn.Module, batch: Batch) -> tuple[Tensor, dict[str, Tensor]]:
        tensors = batch.tensors
        full_steps = cast(FullSteps, batch.variant)
        forecaster = cast(Forecaster, model)
        numbers = None if fits is None else numbers_of(tensors)
        value, error = served_loss(
            serving, forecaster, full_steps, tensors["noise"], text_of(tensors), tensors.get("g"), numbers
        )
        return value, {"error": error}

    return Objective(draw, loss, (serving.student,))


NUMBERS = "scalars."
"""What the names of scalars begin with in a `Batch`."""


def in_numbers(made: FittedList, g: Tensor | None, device: torch.device) -> dict[str, Tensor]:
    """Scalars for runs of these scales, by the names that they have in a `Batch`: [terms], or [terms, B] where they
    change with the scale."""
    return {f"{NUMBERS}{step}": made.numbers(step, g).to(device) for step in made.coefficients}


def numbers_of(tensors: Mapping[str, Tensor]) -> dict[int, Tensor]:
    """The scalars in a `Batch`, by step."""
    return {int(name.removeprefix(NUMBERS)): each for name, each in tensors.items() if name.startswith(NUMBERS)}


# training


def serving_of(task: PredictorTask) -> Serving:
    return Serving(task.student, task.trunks, task.sampling.grid.tensor.to(task.device), task.firsts)


def lists_of(task: PredictorTask) -> list[FullSteps]:
    """Those that take turns in its training."""
    steps, asked = task.sampling.grid.steps, task.config.lists
    return default_lists(steps, task.firsts) if asked is None else check_lists(asked, steps, task.firsts)


def drawn_as_sampled(task: PredictorTask, starts: Starts, count: int, generator: torch.Generator) -> dict[str, Tensor]:
    """So many runs (`Batch.tensors`) as the student is sampled: of its dtype, under its own guidance."""
    tensors = starts.draw(count, generator, task.device, next(task.student.transformer.parameters()).dtype)
    if task.student.embeds("g"):
        tensors["g"] = torch.full((count,), task.sampling.guidance, device=task.device)
    return tensors


def start_predictor(task: PredictorTask, starts: Starts) -> Predictor:
    """A new one, which has the statistics of all predicted steps of a few runs under reuse."""
    serving = serving_of(task)
    tensors = drawn_as_sampled(task, starts, task.config.mse.batch_size, generator_for(task.config.seed, 0))
    text, g = text_of(tensors), tensors.get("g")
    seen: dict[int, tuple[dict[str, list[Tensor]], dict[str, list[Tensor]]]] = {}

    class Look(Reuse):
        def __call__(self, arguments: Tokens, memory: tuple[Cached, ...], t: Tensor | None = None) -> Tokens:
            assert t is not None
            boundaries = [] if task.boundary is None else [task.boundary]
            entering, cached = seen.setdefault(denoiser_at(t, boundaries), ({}, {}))
            for name, tokens in memory[0].tokens.items():
                entering.setdefault(name, []).append(arguments[name].float().cpu())
                cached.setdefault(name, []).append(tokens.float().cpu())
            return super().__call__(arguments, memory, t)

    full_steps = max(lists_of(task), key=len) if task.boundary is None else task.firsts
    with torch.no_grad():
        own = serving.own(tensors["noise"], text, g, kept=leading(full_steps))
        serving.served(Look(), full_steps, own, text, g)
    measured = {
        which: tuple({name: torch.cat(parts) for name, parts in each.items()} for each in both)
        for which, both in seen.items()
    }
    return new_networks(task, measured)


def new_networks(task: PredictorTask, measured: Mapping[int, tuple[Tokens, ...]]) -> Predictor:
    """An untrained predictor for the task, with a network for each transformer of the student.

    Args:
        measured: tokens that entered the trunk and those that full passes left, by transformer; nothing for one that
            has no step to predict.
    """
    config, grid, made = task.config, task.sampling.grid, []
    for which, velocity in reversed([*enumerate(task.velocities)]):
        entering, cached = measured.get(which, ({}, {}))
        predictor = new_predictor(
            velocity.transformer,
            velocity.family,
            entering,
            cached,
            config.blocks,
            made,
            architecture=config.architecture,
            history=config.history,
            steps=grid.steps,
            shift=grid.shift,
            times=grid.times,
            student=student_hash(task.loaded),
            boundary=None if which else task.boundary,
        )
        made = [predictor]
    return made[0]


def objective_of(task: PredictorTask, starts: Starts, passes: int = 1, fits: Fits | None = None) -> Objective:
    """`served_objective` as a task's settings say."""
    low, high = task.config.guidance_range or (task.sampling.guidance,) * 2
    scales = (low, high) if task.student.embeds("g") else None
    return served_objective(serving_of(task), starts, lists_of(task), task.config.mse.batch_size, scales, passes, fits)
