"""`vidaccel train-predictor forecaster=multistep`: scalars fitted to a model's own runs, and the lists that they serve
best, into a folder.

A list of full steps is fitted as it serves: from the first step on, over all runs at once, each predicted step takes
the numbers that bring the state nearest to the model's own, and the next step goes on from what they leave. Full steps
run the model there, which is all that a fit costs.

Which lists are tried: the cost of a stretch from full step i, after the full step h, up to the next one j is what is
left of the own state at j outside the span of the velocities and latents of i and h on the own run, times what such
errors grow to in the end (search.py). Of two transformers a stretch looks back on full steps of its own and ends where
the other begins. The cheapest of each budget by the sum of these are fitted and run on other
prompts, and the best of them is kept.

N runs, S steps
"""

import logging
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, TypeVar

import torch
from torch import Tensor

from vidaccel.artefacts import (
    RUN_FILE,
    check_output,
    read_run,
    say_finished,
    sha256_file,
    verify_files,
    write_run,
)
from vidaccel.cache.policy import check_full_steps
from vidaccel.cache.schedule import Schedule, candidates, read_schedules, write_schedules
from vidaccel.collect.encode import IMAGE, LATENT, as_array
from vidaccel.collect.features import called_like, check_conditions, open_features
from vidaccel.collect.source import images_of, open_source
from vidaccel.collect.trajectories import TrajectorySampler
from vidaccel.config import loader as configuration
from vidaccel.config.checks import CLIP_SIZE
from vidaccel.config.collect import CollectConfig
from vidaccel.config.predictor import PredictorConfig
from vidaccel.errors import UserError
from vidaccel.forecasters.checkpoint import SCHEDULE_FILE
from vidaccel.forecasters.multistep import (
    FORMAT,
    HISTORY,
    RIDGE,
    FittedList,
    Multistep,
    MultistepConfig,
    fit_coefficients,
    multistep_velocity,
    share_of,
)
from vidaccel.locks import locked
from vidaccel.models.calling import check_image, guidance_in_force, video_size
from vidaccel.models.loading import LoadedPipeline, load_named
from vidaccel.models.weight_hashes import student_hash, student_hashes
from vidaccel.progress import Progress
from vidaccel.prompts import prompts_in
from vidaccel.ranks import refuse_many
from vidaccel.train.predictor.lists import run_lists
from vidaccel.train.predictor.runs import Beneath, Left, Prompt, Runs, own_runs
from vidaccel.train.predictor.task import (
    SEARCHED,
    check_budgets,
    check_student,
    default_budgets,
    require_predicted,
    search_of,
)

log = logging.getLogger(__name__)
COMMAND = "vidaccel train-predictor forecaster=multistep"
T = TypeVar("T")
SMALLEST = 1e-8
"""Ridge of the estimates: enough to solve, too little to count."""


@dataclass(frozen=True)
class Served:
    """Runs under a list of full steps, up to a step."""

    x: Tensor
    """[N, C, T, H, W]"""
    us: tuple[Tensor, ...] = ()
    xs: tuple[Tensor, ...] = ()
    """Of the last full steps, newest first."""
    coefficients: Mapping[int, Tensor] | None = None
    """Of the predicted steps so far."""
    left: Left = ()
    """What the network beneath looks back on, if there is one."""


def _full_step(runs: Runs, state: Served, step: int, beneath: Beneath | None) -> Served:
    if step in runs.firsts:  # of its transformer, which knows nothing of the other's
        state = replace(state, us=(), xs=(), left=())
    if beneath is None:
        u, left = runs.velocity(step, state.x), ()
    else:
        u, left = beneath.full(runs, step, state.x, state.left)
    us, xs = ((new, *old)[:HISTORY] for new, old in ((u, state.us), (state.x, state.xs)))
    return replace(state, x=runs.after(step, state.x, u), us=us, xs=xs, left=left)


def fit_lists(
    runs: Runs,
    lists: Sequence[tuple[int, ...]],
    fitted: int,
    ridge: float = RIDGE,
    beneath: Beneath | None = None,
) -> list[tuple[FittedList, Tensor]]:
    """Scalars for each list of full steps, fitted as served to the first `fitted` runs, with the final latents
    [N - fitted, ...] that they lead to on the others. With a network beneath its answer is one more term.

    Raises:
        UserError: as `fit_coefficients` does.
    """
    grid, made = runs.sampler.grid, []
    span = _varied(runs, fitted, beneath is not None)
    share = None if span is None or runs.g is None else share_of(runs.g, span)

    def full(state: Served, step: int) -> Served:
        progress.advance()
        return _full_step(runs, state, step, beneath)

    def predicted(state: Served, step: int) -> Served:
        dt = float(runs.times[step] - runs.times[step + 1])
        us, xs = ([each[:fitted] for each in kept] for kept in (state.us, state.xs))
        x = state.x[:fitted]
        target = (x.float() - runs.states[step + 1][:fitted].float()) / dt
        network = beneath.answer(runs, step, state.x, state.left) if beneath else None
        known = None if network is None else network[:fitted], None if share is None else share[:fitted]
        numbers = fit_coefficients(us, xs, x, target, ridge, *known)
        there = numbers if share is None else (numbers[0] + share[:, None] * (numbers[1] - numbers[0])).mT
        u = multistep_velocity(there, state.us, state.xs, state.x, network)
        return replace(
            state, x=runs.after(step, state.x, u), coefficients={**(state.coefficients or {}), step: numbers}
        )

    nodes = {each[: k + 1] for each in lists for k in range(len(each))}
    with Progress("lists as served", total=len(nodes)) as progress:
        for each, state in run_lists(lists, grid.steps, Served(runs.states[0]), full, predicted):
            rows = (state.coefficients or {}).items()
            numbers, *highest = (
                {step: tuple(both.reshape(-1, both.shape[-1])[end].tolist()) for step, both in rows}
                for end in ((0,) if share is None else (0, 1))
            )
            error = relative_error(state.x[fitted:], runs.states[-1][fitted:]) if fitted < len(runs) else None
            on = each, numbers, grid.steps, grid.shift, grid.times, error
            found = FittedList(*on, network=beneath is not None, boundary=runs.boundary)
            if highest:
                found = replace(found, guidance_range=span, at_highest=highest[0])
            made.append((found, state.x[fitted:]))
    return made


def _varied(runs: Runs, fitted: int, network: bool) -> tuple[float, float] | None:
    """The scales between which numbers are fitted that change with guidance, where runs differ in it and are twice as
    many as the unknowns that there then are."""
    if runs.g is None or fitted < 4 * (2 * HISTORY + 1 + network):
        return None
    low, high = float(runs.g.min()), float(runs.g.max())
    return (low, high) if low < high else None


def relative_error(x: Tensor, own: Tensor, whole: Tensor | None = None) -> float:
    """Root of the mean, over runs, of the squared error of latents [N, ...] as a share of the square of the own ones,
    or of `whole`."""
    apart = (x.double() - own.double()).flatten(1).square().sum(1)
    return math.sqrt(float((apart / (own if whole is None else whole).double().flatten(1).square().sum(1)).mean()))


def served_final(runs: Runs, made: FittedList, beneath: Beneath | None = None) -> Tensor:
    """Final latents [N, C, T, H, W] of runs that are served by these numbers, with a network beneath where they have
    one."""
    state = Served(runs.states[0])
    for step in range(made.steps):
        if step in made.full_steps:
            state = _full_step(runs, state, step, beneath)
        else:
            network = beneath.answer(runs, step, state.x, state.left) if beneath else None
            u = made.velocity(step, state.us, state.xs, state.x, network, runs.g)
            state = replace(state, x=runs.after(step, state.x, u))
    return state.x


def newest_alone(made: FittedList, network: bool = False) -> FittedList:
    """The list with numbers that give the last full step's velocity again, or the network's answer as it is."""
    rows = {step: (1.0, *[0.0] * (len(row) - made.network + network - 1)) for step, row in made.coefficients.items()}
    return replace(made, coefficients=rows, network=network, guidance_range=None, at_highest=None)


def compared(runs: Runs, lists: Sequence[FittedList]) -> list[dict[str, Any]]:
    """What run.json says of lists that were tried on these runs: the error as served, and its share of that of reuse,
    which gives the last full step's velocity again."""
    reuse = {each.full_steps: relative_error(served_final(runs, newest_alone(each)), runs.states[-1]) for each in lists}
    return [
        {
            "steps": each.steps,
            "full_steps": list(each.full_steps),
            "error": each.error,
            "of_reuse": (each.error or 0.0) / reuse[each.full_steps] if reuse[each.full_steps] else None,
        }
        for each in lists
    ]


def estimated_costs(runs: Runs, growth: Sequence[float]) -> list[list[list[float]]]:
    """costs[h][i][j] [S][S][S + 1] as `candidates` takes them, from inner products on the own runs alone.

    growth: [S + 1], what a squared error at j grows to in the final latents.
    """
    steps, gram = len(runs.velocities), _gram(runs)
    dt = (runs.times[:-1] - runs.times[1:]).double()
    states = torch.zeros(steps + 1, steps + 1, dtype=torch.float64)  # rows: x_i by x_0, u_0, ..., u_{S-1}
    states[:, 0] = 1
    for step in range(steps):
        states[step + 1 :, step + 1] = -dt[step]
    velocities = torch.eye(steps + 1, dtype=torch.float64)[1:]
    nothing = float("inf")
    costs = [[[nothing] * (steps + 1) for _ in range(steps)] for _ in range(steps)]
    for i in range(steps):
        end = next((first for first in runs.firsts if first > i), steps)
        for h in range(i) if i else [0]:
            before = [states[h], velocities[h]] if runs.begin(i) <= h < i else []
            known = torch.stack([states[i], velocities[i], *before])
            inner = known @ gram @ known.mT
            scale = inner.diagonal().sqrt()
            inner = inner / torch.outer(scale, scale) + SMALLEST * torch.eye(len(known), dtype=torch.float64)
            wanted = states[i + 1 :]
            moment = (known @ gram @ wanted.mT) / scale[:, None]
            explained = (moment * torch.linalg.solve(inner, moment)).sum(0)
            whole = (wanted @ gram * wanted).sum(1)
            left = (whole - explained).clamp(min=0)
            left[0] = 0  # the next step begins where the full one leads
            for j in range(i + 1, end + 1):
                costs[h][i][j] = float(left[j - i - 1]) * growth[j]
    return costs


def _gram(runs: Runs) -> Tensor:
    """[S + 1, S + 1] inner products of x_0 and the velocities, averaged over runs as shares of the final latents'."""
    total = torch.zeros(len(runs.velocities) + 1, len(runs.velocities) + 1, dtype=torch.float64)
    for run in range(len(runs)):
        rows = torch.stack([tensor[run].flatten() for tensor in (runs.states[0], *runs.velocities)]).double()
        total += rows @ rows.mT / runs.states[-1][run].double().square().sum()
    return total / len(runs)


def measured_growth(runs: Runs, count: int, ridge: float = RIDGE) -> list[float]:
    """[S + 1]: what a squared error in the state at j grows to in the final latents, on the first `count` runs.

    The error is that of one predicted step, of scalars over the two full steps before it, followed by full steps: S^2 /
    2 passes a run. Sums over runs are compared, because a run with next to no error would count most in a mean of
    ratios.
    """
    steps = len(runs.velocities)
    part = runs.part(slice(count))
    growth = [1.0] * (steps + 1)
    with Progress("how errors grow", total=max(0, steps - 2)) as progress:
        for j in range(2, steps):
            if j - 1 in runs.firsts:  # which is full
                progress.advance()
                continue
            before = range(j - 2, max(runs.begin(j - 1) - 1, j - 4), -1)
            us, xs = ([each[i] for i in before] for each in (runs.velocities, runs.states))
            numbers = fit_coefficients(us, xs, runs.states[j - 1], runs.velocities[j - 1], ridge)
            u = multistep_velocity(numbers, [u[:count] for u in us], [x[:count] for x in xs], part.states[j - 1])
            begun = x = part.after(j - 1, part.states[j - 1], u)
            for step in range(j, steps):
                x = part.after(step, x, part.velocity(step, x))
            at_j = relative_error(begun, part.states[j], part.states[-1])
            growth[j] = (relative_error(x, part.states[-1]) / at_j) ** 2 if at_j else 1.0
            progress.advance()
    return growth


def train_multistep(config: PredictorConfig, output: Path, device: str = "auto") -> list[Schedule]:
    """Fit scalars to the model's own runs, with the lists that they serve best, into the folder `output`; beside those
    of other grids that are there already, where they are of the same model and range of guidance.

    Raises:
        UserError: model and settings do not go together, there are fewer runs than unknowns, or the fit is singular.
    """
    refuse_many("fitting scalars")
    check_student(config)
    check_output(output, FORMAT)
    with locked(output):
        return _fit_and_search(config, output, device)


def _fit_and_search(config: PredictorConfig, output: Path, device: str) -> list[Schedule]:
    started = datetime.now(UTC)
    loaded = load_named(config.student, config.model, device=device, dtype=config.mse.precision, lora=config.lora or ())
    sampler, prompts, span = runs_of(config, loaded)
    steps = sampler.steps
    if config.full_steps is not None:
        _check_listed(config.full_steps, sampler)
    firsts = sampler.grid.firsts(sampler.boundaries)
    require_predicted(steps, firsts)
    check_budgets(config.budgets, steps, firsts)
    data = {"captions": [caption for caption, _ in prompts], **_parents(config, loaded)}
    asked = search_of(config, student_hash(loaded), data)
    before = read_run(output, FORMAT) if (output / RUN_FILE).exists() else {}
    if before.get(SEARCHED, {}).get(str(steps)) == asked:
        verify_files(output, before)
        say_finished(output)
        return [s for s in read_schedules(output / SCHEDULE_FILE) if s.steps == steps]
    log.info("%d runs of %d steps, guidance from %g to %g", len(prompts), steps, *span)
    runs = own_runs(sampler, prompts, config.seed, span, config.mse.batch_size)
    if config.full_steps is not None:
        lists = [tuple(config.full_steps)]
    else:
        own = runs.part(slice(config.runs))
        growth = measured_growth(own, config.search_prompts, config.ridge)
        found = candidates(estimated_costs(own, growth), config.tried)
        budgets = config.budgets or default_budgets(steps, firsts)
        lists = [full for budget in budgets if budget in found for _, full in found[budget]]
    made = [each for each, _ in fit_lists(runs, lists, config.runs, config.ridge)]
    best: dict[int, FittedList] = {}
    for each in made:
        budget = len(each.full_steps)
        if budget not in best or (each.error or 0.0) < (best[budget].error or 0.0):
            best[budget] = each
    fitted = MultistepConfig(
        loaded.family.name,
        student_hash(loaded),
        span,
        sampler.empty is not None,
        tuple(best[budget] for budget in sorted(best)),
        sampler.second,
    )
    beside = compared(runs.part(slice(config.runs, None)), fitted.lists)
    return _finish(config, output, loaded, sampler, fitted, beside, asked, started)


def runs_of(
    config: PredictorConfig, loaded: LoadedPipeline
) -> tuple[TrajectorySampler, list[Prompt], tuple[float, float]]:
    """How the model is sampled, prompts of the runs to fit to and then of those to try on, and the range of guidance.

    Raises:
        UserError: there are no two captions, or the model cannot be sampled so.
    """
    asked, wanted = _collected(config), config.runs + config.checked_prompts
    images = None
    if config.prompts is not None:
        check_image(loaded.family, given=False)
        captions = prompts_in(Path(config.prompts))[:wanted]
    elif config.features is None:
        source = open_source(loaded, asked)
        chosen = range(min(wanted, len(source)))
        captions, images = [source.record(i)["caption"] for i in chosen], images_of(source, chosen, loaded.family)
    else:
        features = open_features(config.features, None, loaded.hashes, config.on_damage)
        count = min(wanted, len(features))
        samples = [features[i] for i in range(count)]
        captions = [record["caption"] for _, record in samples]
        check_conditions(features, loaded)
        loaded = called_like(features, loaded)
        images = [as_array(tensors[IMAGE]) for tensors, _ in samples] if loaded.family.begins_with_image else None
        first = samples[0][0]
        shape = first[LATENT].shape if LATENT in first else first["x"].shape
        asked = replace(asked, **video_size(loaded, shape))
    prompts: list[Prompt] = list(zip(captions, images or [None] * len(captions), strict=True))
    prompts = told_apart(prompts, config.runs, config.checked_prompts)
    sampler, span = _sampled(config, loaded, asked)
    return sampler, prompts, span


def sampler_of(config: PredictorConfig, loaded: LoadedPipeline) -> tuple[TrajectorySampler, tuple[float, float]]:
    """How the model is sampled, in its own size, and the range of guidance.

    Raises:
        UserError: it cannot be sampled so.
    """
    return _sampled(config, loaded, _collected(config))


def _sampled(
    config: PredictorConfig, loaded: LoadedPipeline, asked: CollectConfig
) -> tuple[TrajectorySampler, tuple[float, float]]:
    sampler = TrajectorySampler(loaded, asked)
    if sampler.steps < 2:
        raise UserError("a model of one step has nothing to predict from", "set steps to 2 or more")
    if config.guidance_2 is None and sampler.second == sampler.guidance:
        sampler.second = None  # it is that of the first, whatever that is
    return sampler, _span(config, loaded, sampler)


def _check_listed(full_steps: Sequence[int], sampler: TrajectorySampler) -> None:
    """`UserError` unless the list is one of full steps, with the first of each transformer among them."""
    full, firsts = check_full_steps(full_steps, sampler.steps), sampler.grid.firsts(sampler.boundaries)
    if missing := [first for first in firsts if first not in full]:
        raise UserError(
            f"full_steps={list(full)} leaves out {missing[0]}, the first step of the second transformer",
            f"list it: full_steps={sorted({*full, *firsts})}",
        )


def _collected(config: PredictorConfig) -> CollectConfig:
    """The settings of the runs, as those who collect trajectories know them."""
    high = max(config.guidance_range) if config.guidance_range else config.guidance
    names = ("data", *CLIP_SIZE, "seed", "steps", "shift", "timesteps", "sigmas", "negative_prompt", "guidance_2")
    named = {name: getattr(config, name) for name in names}
    wanted = config.runs + config.checked_prompts
    return CollectConfig(kind="trajectory", model=config.student, clips=wanted, guidance=high, **named)


def told_apart(captions: Sequence[T], fitted: int, tried: int) -> list[T]:
    """`fitted` captions, with what goes with them, to fit to and then `tried` others: where there are fewer, a share of
    them each, again and again with other noise. `UserError` if there is but one."""
    count = len(captions)
    if count < 2:
        raise UserError("scalars are fitted on one caption and tried on another, and there are no two", "give more")
    if count < fitted + tried:
        log.warning("%d captions for %d runs: they are taken again with other noise", count, fitted + tried)
    apart = count - min(tried, max(1, count * tried // (fitted + tried)))
    parts = ((captions[:apart], fitted), (captions[apart:], tried))
    return [part[i % len(part)] for part, wanted in parts for i in range(wanted)]


def _span(config: PredictorConfig, loaded: LoadedPipeline, sampler: TrajectorySampler) -> tuple[float, float]:
    """The range of guidance that is served: as it is set, else what a student was trained on, else the one scale."""
    scale, _ = guidance_in_force(loaded, config.guidance, None)
    trained = loaded.conditioning.config.guidance_range if loaded.conditioning else None
    if sampler.g is None:
        return scale, scale
    if config.guidance_range:
        low, high = config.guidance_range
        return low, high
    if config.guidance is None and trained:
        return trained[0], trained[1]
    return scale, scale


def _finish(
    config: PredictorConfig,
    output: Path,
    loaded: LoadedPipeline,
    sampler: TrajectorySampler,
    fitted: MultistepConfig,
    beside: list[dict[str, Any]],
    asked: str,
    started: datetime,
) -> list[Schedule]:
    """Write the folder, with what it had for other grids."""
    schedules = [
        Schedule(each.steps, each.full_steps, "search", each.shift, each.error, each.times, each.boundary)
        for each in fitted.lists
    ]
    kept, run = _kept(output, loaded, fitted)
    lists = (*(each for each in kept.lists if each.steps != sampler.steps), *fitted.lists) if kept else fitted.lists
    others = [s for s in read_schedules(output / SCHEDULE_FILE) if s.steps != sampler.steps] if kept else []
    before = {
        key: [on for on in run.get(key, []) if on["steps"] != sampler.steps] for key in ("searched_on", "compared")
    }
    (output / RUN_FILE).unlink(missing_ok=True)
    Multistep(replace(fitted, lists=lists)).save_pretrained(output)
    write_schedules(output / SCHEDULE_FILE, [*others, *schedules])
    on = {"steps": sampler.steps, "shift": sampler.shift, "guidance": list(fitted.guidance_range)}
    write_run(
        output,
        format=FORMAT,
        command=COMMAND,
        config=configuration.to_dict(config),
        seed=config.seed,
        started=started,
        parents=_parents(config, loaded),
        searched_on=[*before["searched_on"], on | {"runs": config.runs, "prompts": config.checked_prompts}],
        compared=[*before["compared"], *beside],
        **{SEARCHED: run.get(SEARCHED, {}) | {str(sampler.steps): asked}},
    )
    return schedules


def _parents(config: PredictorConfig, loaded: LoadedPipeline) -> dict[str, str]:
    """SHA-256 of the run.json of what scalars are made of, where it has one."""
    folders = {"student": loaded.source} | ({"features": config.features} if config.features else {})
    files = {role: Path(folder) / RUN_FILE for role, folder in folders.items()}
    return {role: sha256_file(file) for role, file in files.items() if file.is_file()}


def _kept(
    output: Path, loaded: LoadedPipeline, fitted: MultistepConfig
) -> tuple[MultistepConfig | None, dict[str, Any]]:
    """What is in the folder already, if it goes with what was fitted, and its run.json."""
    if not (output / RUN_FILE).exists():
        return None, {}
    run, there = read_run(output, FORMAT), Multistep.from_pretrained(output).config
    guided = [(each.guidance_range, each.guidance_2, each.two_pass) for each in (there, fitted)]
    if there.student not in student_hashes(loaded) or guided[0] != guided[1]:
        log.warning("%s holds scalars for another model or other guidance, which are replaced", output)
        return None, {}
    return there, run
