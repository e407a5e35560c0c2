"""`vidaccel train-predictor forecaster=multistep`: scalars fitted to a model's own runs, and the lists that they serve
best, into a folder.

Of each budget the lists of lowest estimated cost are fitted (scalars.py) and run on other prompts, and the best of them
is kept.
"""

import logging
from collections.abc import Sequence
from dataclasses import replace
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, TypeVar

from vidaccel.artefacts import (
    RUN_FILE,
    check_output,
    read_run,
    say_finished,
    verify_files,
    write_run,
)
from vidaccel.cache.policy import check_full_steps
from vidaccel.cache.schedule import Schedule, candidates, read_schedules, write_schedules
from vidaccel.collect.encode import IMAGE, LATENT, as_array
from vidaccel.collect.features import called_like, check_conditions, open_features
from vidaccel.collect.source import OR_PROMPTS, images_of, open_source
from vidaccel.collect.trajectories import TrajectorySampler
from vidaccel.config import loader as configuration
from vidaccel.config.checks import CLIP_SIZE
from vidaccel.config.collect import CollectConfig
from vidaccel.config.predictor import PredictorConfig
from vidaccel.errors import UserError
from vidaccel.forecasters.checkpoint import SCHEDULE_FILE
from vidaccel.forecasters.multistep import (
    FORMAT,
    FittedList,
    Multistep,
    MultistepConfig,
)
from vidaccel.locks import locked
from vidaccel.models.calling import IMAGES_OF_CLIPS, check_image, guidance_in_force, video_size
from vidaccel.models.loading import LoadedPipeline, load_named
from vidaccel.models.weight_hashes import student_hash, student_hashes
from vidaccel.prompts import prompts_in
from vidaccel.ranks import refuse_many
from vidaccel.train.predictor.runs import Prompt, own_runs
from vidaccel.train.predictor.scalars import compared, estimated_costs, fit_lists, measured_growth
from vidaccel.train.predictor.task import (
    SEARCHED,
    check_budgets,
    check_student,
    default_budgets,
    parents_of,
    require_predicted,
    search_of,
)

log = logging.getLogger(__name__)
COMMAND = "vidaccel train-predictor forecaster=multistep"
T = TypeVar("T")


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
    data = {"captions": [caption for caption, _ in prompts], **parents_of(loaded, config)}
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
        check_image(loaded.family, given=False, hint=IMAGES_OF_CLIPS)
        captions = prompts_in(Path(config.prompts))[:wanted]
    elif config.features is None:
        source = open_source(loaded, asked, OR_PROMPTS)
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
        parents=parents_of(loaded, config),
        searched_on=[*before["searched_on"], on | {"runs": config.runs, "prompts": config.checked_prompts}],
        compared=[*before["compared"], *beside],
        **{SEARCHED: run.get(SEARCHED, {}) | {str(sampler.steps): asked}},
    )
    return schedules


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
