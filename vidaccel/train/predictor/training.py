"""`vidaccel train-predictor` from end to end: a student and data in, a predictor's folder with its schedules out.

folder/config.json, model.safetensors   the predictor
folder/scalars.json                     fitted on top of the network (on_top.py), where that is wanted and pays
folder/schedule.json                    the best full steps for each budget, on each grid that was searched
folder/checkpoints/mse, adversarial     resume state and metrics of the two stages; of served runs (served.py) the first
folder/trajectories                     of the student, where it learns from them and was given none (trajectories.py)
"""

import logging
from collections.abc import Mapping
from dataclasses import replace
from datetime import UTC, datetime
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from vidaccel.artefacts import (
    CHECKPOINTS,
    RUN_FILE,
    check_output,
    read_run,
    say_finished,
    sha256_file,
    write_json,
    write_run,
)
from vidaccel.cache.schedule import Schedule, read_schedules, write_schedules
from vidaccel.collect.bank import Bank
from vidaccel.config import loader as configuration
from vidaccel.config.checks import CLIP_SIZE
from vidaccel.config.predictor import PredictorConfig
from vidaccel.config.training import TrainConfig
from vidaccel.errors import UserError
from vidaccel.families.walk import blocks_of
from vidaccel.forecasters.base import Cached, Tokens
from vidaccel.forecasters.checkpoint import FORMAT, SCALARS_FILE, SCHEDULE_FILE, WEIGHTS_FILE
from vidaccel.forecasters.learned import Predictor
from vidaccel.forecasters.multistep import HISTORY, Multistep
from vidaccel.forecasters.reuse import Reuse
from vidaccel.locks import locked
from vidaccel.models.cards import README, predictor_card
from vidaccel.models.loading import LoadedPipeline, load_named, resolve_device
from vidaccel.models.velocity import SwitchedVelocity
from vidaccel.models.weight_hashes import student_hash
from vidaccel.processes import by_first, locked_by_first, on_first, processes, rank, world
from vidaccel.train.objective import Loss, generator_for
from vidaccel.train.parallel import full_state, shard
from vidaccel.train.predictor.comparing import Compared, Shares, compare, serving_predictor
from vidaccel.train.predictor.discriminator import Discriminator
from vidaccel.train.predictor.in_loop import Fits
from vidaccel.train.predictor.loss import PredictorLoss, Turn
from vidaccel.train.predictor.on_top import Fitting, fit_on_top, fitting_runs
from vidaccel.train.predictor.pairs import Pair, Pairs
from vidaccel.train.predictor.runs import Beneath
from vidaccel.train.predictor.search import search_schedules
from vidaccel.train.predictor.served import Starts, default_lists, lists_of, new_networks, objective_of, start_predictor
from vidaccel.train.predictor.task import (
    COMMAND,
    SEARCHED,
    STAGES,
    PredictorTask,
    check_student,
    described,
    schedules_found,
    search_asked,
    task_of,
    trainable_student,
)
from vidaccel.train.predictor.trajectories import with_trajectories
from vidaccel.train.predictor.untrained import search_untrained
from vidaccel.train.step import autocast
from vidaccel.train.trainer import WITHOUT_EFFECT, train

log = logging.getLogger(__name__)
NOT_SHAPING = {
    "student",
    "lora",
    "guidance_2",
    "negative_prompt",
    "timesteps",
    "sigmas",
    "stage",
    "features",
    "prompts",
    "data",
    "clips",
    "on_damage",
    "seed",
    "search_prompts",
    "growth_every",
    "scalars",
    "runs",
    "checked_prompts",
    "tried",
    "budgets",
    "full_steps",
    "ridge",
    *CLIP_SIZE,
    *STAGES,
}
"""Settings that shape no stage, or that `train` is told otherwise."""
OF_SCALARS = {"runs", "ridge"}
"""Of them, those that shape a training under scalars (`scalars_every`), which at first did not record them."""
TURNS: tuple[Turn, ...] = ("discriminator", "predictor")
"""Of optimiser steps, where the two are trained in turn."""


def train_predictor(config: PredictorConfig, output: Path, device: str = "auto") -> list[Schedule]:
    """Train a predictor into the folder `output`, going on where an earlier run was stopped, and search its schedules;
    or, for `stage=search`, search those of the predictor that is there, beside which those of other grids stay.
    Returns what was found; of many processes the first does.

    Raises:
        UserError: student, data and settings do not go together, or cannot be read or written.
        TrainingFailed: the training did not stay finite.
    """
    check_student(config)
    if config.forecaster != "learned":
        return search_untrained(config, output, device)
    check_output(output, FORMAT)
    if config.stage == "search":
        read_run(output, FORMAT)  # now, because a lock makes the folder that is missing
    with processes(), locked_by_first(output):
        schedules = _train_and_search(config, output, device)
        return schedules if rank() == 0 else []


def _train_and_search(config: PredictorConfig, output: Path, device: str) -> list[Schedule]:
    started = datetime.now(UTC)
    run = read_run(output, FORMAT) if config.stage == "search" else None
    made = Predictor.from_pretrained(output).config if run else None
    on_cpu = resolve_device(device).type == "cpu"  # whose kernels want a norm's input and weights of one type
    halves = config.mse.precision == config.adversarial.precision == "bfloat16" and not on_cpu
    dtype = "bfloat16" if halves else "float32"
    loaded = load_named(config.student, config.model, device=device, dtype=dtype, lora=config.lora or ())
    trainable_student(loaded, config)  # now, and not when trajectories of it are collected
    task = task_of(loaded, with_trajectories(config, loaded, output), made)
    fitting = None
    with task.trunks:
        if run is None:
            before = read_run(output, FORMAT) if (output / RUN_FILE).exists() else {}
            on_top = Multistep.on_top_of(output) if before and config.scalars is not False else None
            torch.manual_seed(config.seed)
            fitting = (_train_served if config.pairs == "served" else _train)(task, output)
            run = described(task, config, started)
            if before and before["files"][WEIGHTS_FILE] == sha256_file(output / WEIGHTS_FILE):
                run["searched_on"], run[SEARCHED] = before["searched_on"], before.get(SEARCHED, {})
                if on_top is not None:
                    _save_on_top(output, on_top)
                    run["fitted"] = before["fitted"]
                if by_first(partial(_is_done, task, output, before, run)):
                    return schedules_found(task, output)
        asked = search_asked(task, config)
        known = run.setdefault(SEARCHED, {})
        if config.stage == "search" and known.get(str(task.sampling.grid.steps)) == asked:
            on_first(lambda: say_finished(output))
            return schedules_found(task, output)
        schedules = _search(task, output)
        if config.stage != "search":
            run["compared"] = [each.record() for each in _compare(task, output, schedules)]
        if _wants_scalars(config, output):
            schedules = _fit_on_top(task, output, run, schedules, fitting)
    known[str(task.sampling.grid.steps)] = asked
    on_first(lambda: _finish(task, output, run, schedules))
    return schedules


def _wants_scalars(config: PredictorConfig, output: Path) -> bool:
    """As it is set; else for a network that was trained as it is served, and one that has some."""
    if config.scalars is None:
        there = Multistep.on_top_of(output) is not None if config.stage == "search" else config.pairs == "served"
        return there and config.checked_prompts > 0
    return config.scalars


def _fit_on_top(
    task: PredictorTask,
    output: Path,
    run: dict[str, Any],
    schedules: list[Schedule],
    fitting: Fitting | None = None,
) -> list[Schedule]:
    """Fit scalars on top of the predictor in `output`, into it; the schedules with those that these serve best.
    `fitting` are the runs for that, if they are there already."""
    grid, predictor = task.sampling.grid, serving_predictor(task, output)
    trained = lists_of(task) if task.config.pairs == "served" else []
    try:
        found, scalars = fit_on_top(task, predictor, schedules, trained, fitting)
    except UserError as error:
        if task.config.scalars:
            raise
        log.warning("no scalars on top of the network: %s; %s", error.message, error.hint)
        return schedules
    _save_on_top(output, scalars)
    others = [each for each in run.get("fitted", []) if each["steps"] != grid.steps]
    run["fitted"] = [*others, *(each.record() for each in found)]
    best = {
        len(each.made.full_steps): Schedule(
            grid.steps, each.made.full_steps, "search", grid.shift, each.error, grid.times, each.made.boundary
        )
        for each in found
    }
    return [best.get(schedule.budget, schedule) for schedule in schedules]


def _save_on_top(output: Path, scalars: Multistep | None) -> None:
    """Beside the predictor's weights, in place of what is there."""

    def write() -> None:
        (output / RUN_FILE).unlink(missing_ok=True)
        if scalars is None:
            (output / SCALARS_FILE).unlink(missing_ok=True)
        else:
            scalars.save_pretrained(output, SCALARS_FILE)

    on_first(write)


def train_served(loaded: LoadedPipeline, bank: Bank, config: PredictorConfig, output: Path) -> list[Compared]:
    """Train a predictor by `pairs=served` for a student that is loaded, in float32, where it is: on the captions of a
    bank but for the last `search_prompts`, on which it is compared with reuse under each list that it was trained with,
    and on which scalars on top of it are tried.

    The folder `output` is a predictor's as of the command, where for each number of full steps the best of those lists
    and of those that scalars serve better stands in place of searched ones. Goes on where an earlier call was stopped.

    Raises:
        UserError: no predictor can be trained for this student, or not as asked.
        TrainingFailed: the training did not stay finite.
    """
    started = datetime.now(UTC)
    check_output(output, FORMAT)
    with locked(output):
        task = task_of(loaded, config, None, (bank, {"clips": len(bank), "captions": bank.captions}))
        torch.manual_seed(config.seed)
        with task.trunks:
            fitting = _train_served(task, output)
            found = _compare(task, output, [])
            grid = task.sampling.grid
            best = {len(each.full_steps): each for each in sorted(found, key=lambda each: -each.error)}
            schedules = [
                Schedule(grid.steps, each.full_steps, "search", grid.shift, each.error, grid.times, task.boundary)
                for each in best.values()
            ]
            run = described(task, config, started) | {"compared": [each.record() for each in found]}
            if _wants_scalars(config, output):
                schedules = _fit_on_top(task, output, run, schedules, fitting)
        _finish(task, output, run, schedules)
    return found


def _train(task: PredictorTask, output: Path) -> None:
    """Both stages; leaves the predictor in `output`."""
    config, student = task.config, task.student
    predictor, pairs = _start(task)
    judge = Discriminator(predictor.config.width, config.discriminator, len(task.velocities))
    discriminator = judge.to(task.device)
    _say_size(predictor, task)
    _shard(task, predictor, discriminator)
    predictor_loss = PredictorLoss(student, task.trunks, predictor, relative=config.relative)
    looks = config.mse.gates_every or config.adversarial.gates_every
    measure = Shares(task, predictor, Starts.of(task, config.search_prompts)) if looks else None
    _stage("mse", task, pairs, predictor_loss, output, measure)
    if config.adversarial.is_on:
        judged = PredictorLoss(student, task.trunks, predictor, discriminator, config.discriminator, config.relative)
        _stage("adversarial", task, pairs, judged, output, measure)
    _save(predictor, output)


def _train_served(task: PredictorTask, output: Path) -> Fitting | None:
    """The one stage of `pairs=served`; returns the runs that scalars were fitted to on the way, if they were."""
    config, passes = task.config, task.config.mse.accumulate * world()
    tried, learnt = Starts.of(task, config.clips).apart(config.search_prompts)
    predictor = start_predictor(task, learnt)
    _say_size(predictor, task)
    _shard(task, predictor)
    few = config.scalars is None and config.runs < 2 * HISTORY + 2  # the numbers of a step
    if few and config.scalars_every:
        log.warning("the network is trained alone: %d runs are too few to fit scalars to", config.runs)
    fitting, fits = (fitting_runs(task) if config.scalars_every and not few else None), None
    if fitting is not None:
        lists, beneath = lists_of(task), Beneath(task.trunks, predictor)
        runs, folder = fitting.runs.part(slice(config.runs)), output / CHECKPOINTS / "mse"
        fits = Fits(runs, lists, beneath, folder, config.scalars_every, config.ridge)
    measure = Shares(task, predictor, tried, fits)
    objective = objective_of(task, learnt, passes, fits)
    # Which of two transformers a pass is of is asked of its time, which waits for the device.
    _trained("mse", task, predictor, objective if task.boundary is None else objective.__call__, output, measure)
    _save(predictor, output)
    return fitting


def _say_size(predictor: Predictor, task: PredictorTask) -> None:
    transformers = nn.ModuleList(velocity.transformer for velocity in task.velocities)
    own, whole = (sum(p.numel() for p in part.parameters()) for part in (predictor, transformers))
    log.info("the predictor has %d parameters, %.1f %% of the student's %d", own, 100 * own / whole, whole)


def _start(task: PredictorTask) -> tuple[Predictor, Pairs]:
    """A new predictor, which has the statistics of a first pair of passes, and what it will learn from."""
    config, sampling, measured = task.config, task.sampling, {}
    trained_on = [each.conditioning.config.restrict if each.conditioning else None for each in task.velocities]
    restrict = [config.restrict or each or sampling.grid.widest for each in trained_on]
    grid = sampling.grid.tensor.to(task.device)
    known = Reuse(), task.clips, config, grid, sampling.guidance, restrict[0], config.seed
    pairs = Pairs(task.student, task.trunks, *known, task.boundary, restrict[-1])
    with autocast(config.mse, task.device):
        for step, which in enumerate(pairs.steps_of):
            first = pairs.draw(0, config.mse.batch_size, step, generator_for(config.seed, 0))
            measured[which] = _entering(task, first), first.memory[0].tokens
    predictor = new_networks(task, measured)
    return predictor, replace(pairs, predictor=predictor)


@torch.no_grad()
def _entering(task: PredictorTask, pair: Pair) -> Tokens:
    """The tokens that enter the trunk on the predicted step of `pair`."""
    seen: Tokens = {}

    class Look(Reuse):
        def __call__(self, arguments: Tokens, memory: tuple[Cached, ...], t: Tensor | None = None) -> Tokens:
            seen.update({name: arguments[name] for name in memory[0].tokens})
            return super().__call__(arguments, memory, t)

    with task.trunks.predicted(Look(), pair.times.t, pair.memory):
        task.student(pair.x, pair.times.t, pair.text, r=pair.times.r, g=pair.g)
    return seen


def _stage(
    name: str,
    task: PredictorTask,
    pairs: Pairs,
    predictor_loss: PredictorLoss,
    output: Path,
    measure: Shares | None,
) -> None:
    config: TrainConfig = getattr(task.config, name)
    passes = config.accumulate * world()
    in_turn = name == "adversarial" and task.config.discriminator.in_turn

    def loss(predictor_loss: nn.Module, index: int, generator: torch.Generator):
        step = index // passes
        turn = TURNS[step // len(pairs.steps_of) % len(TURNS)] if in_turn else None  # two transformers have turns too
        return predictor_loss(pairs.draw(index, config.batch_size, step, generator), turn)

    _trained(name, task, predictor_loss, loss, output, measure)


def _trained(
    name: str,
    task: PredictorTask,
    model: nn.Module,
    loss: Loss,
    output: Path,
    measure: Shares | None = None,
) -> None:
    config, shaping = getattr(task.config, name), _shaping(task, name)
    train(
        model,
        loss,
        config,
        output / CHECKPOINTS / name,
        seed=task.config.seed + STAGES.index(name),
        title=f"predictor, {name}",
        settings=shaping,
        recorded=partial(_recorded, now=shaping),
        measure=measure,
        rates={"discriminator": task.config.discriminator.learning_rate / config.learning_rate},
    )


def _recorded(recorded: Mapping[str, Any], now: Mapping[str, Any]) -> dict[str, Any]:
    """What shaped a stage that was begun, without what earlier versions took for such."""
    known = configuration.as_recorded_now(recorded, now, PredictorConfig)
    known = {key: value for key, value in known.items() if key in now or key not in NOT_SHAPING}
    known |= {key: now[key] for key in OF_SCALARS if key in now and key not in recorded}
    return known | ({"mse": _with_effect(known["mse"])} if "mse" in known else {})


def _shaping(task: PredictorTask, name: str) -> dict[str, Any]:
    """What shapes a stage, besides what `train` is given itself. The second goes on from the first."""
    config = configuration.to_dict(task.config)
    elsewhere = NOT_SHAPING - (OF_SCALARS if task.config.scalars_every else set()) | {"discriminator"}
    shared = {key: value for key, value in config.items() if key not in elsewhere}
    earlier = {} if name == "mse" else {"mse": _with_effect(config["mse"]), "discriminator": config["discriminator"]}
    provenance = {"data": task.provenance, "student": student_hash(task.loaded), **task.sampling.record()}
    if isinstance(task.student, SwitchedVelocity):
        provenance["guidance_2"] = task.student.second
    return shared | earlier | provenance


def _with_effect(stage: Mapping[str, Any]) -> dict[str, Any]:
    """Settings of an earlier stage without those that may change in that stage as well."""
    return {key: value for key, value in stage.items() if key not in WITHOUT_EFFECT}


def _shard(task: PredictorTask, predictor: Predictor, discriminator: Discriminator | None = None) -> None:
    """Each part on its own, because each is called on its own."""
    for student in task.velocities:
        shard(student.transformer, [block for _, block in blocks_of(student.transformer, student.family)])
        if student.conditioning is not None:
            shard(student.conditioning, [])
    if discriminator is not None:
        shard(discriminator, [])
    if not predictor.further:
        shard(predictor, predictor.blocks)
        return
    for network in predictor.parts:  # of which one holds the other, and neither is called first every time
        for part in (*network.blocks, *network.fusions.values()):
            shard(part, [])


def _save(predictor: Predictor, output: Path) -> None:
    weights = full_state(predictor)  # every process has to call it

    def write() -> None:
        whole = Predictor(predictor.config)
        whole.load_state_dict(weights)
        (output / RUN_FILE).unlink(missing_ok=True)
        whole.save_pretrained(output)

    on_first(write)  # the others go on when it is there


def _search(task: PredictorTask, output: Path) -> list[Schedule]:
    """The schedules of the predictor in `output`, run as it is when it serves."""
    return search_schedules(task, serving_predictor(task, output))


def _compare(task: PredictorTask, output: Path, schedules: list[Schedule]) -> list[Compared]:
    """The predictor in `output` beside reuse: under the schedules of a quarter, three eighths and half of the steps,
    and under the lists that it was trained with."""
    config, steps = task.config, task.sampling.grid.steps
    budgets = {len(each) for each in default_lists(steps, task.firsts)}
    lists = {tuple(each.full_steps) for each in schedules if each.budget in budgets and each.budget < steps}
    served = config.pairs == "served"
    lists |= set(lists_of(task)) if served else set()
    starts = Starts.of(task, config.clips if served else config.search_prompts)
    tried, _ = starts.apart(config.search_prompts)
    return compare(task, serving_predictor(task, output), tried, sorted(lists, key=lambda each: (-len(each), each)))


def _finish(task: PredictorTask, output: Path, run: dict[str, Any], schedules: list[Schedule]) -> None:
    """Beside what was searched before by `run`, which a new training has not."""
    steps = task.sampling.grid.steps
    others = [on for on in run.get("searched_on", []) if on["steps"] != steps]
    kept = [s for s in read_schedules(output / SCHEDULE_FILE) if s.steps != steps] if others else []
    (output / RUN_FILE).unlink(missing_ok=True)
    write_schedules(output / SCHEDULE_FILE, [*kept, *schedules])
    budgets: dict[int, list[int]] = {}
    for schedule in sorted([*schedules, *kept], key=lambda s: (s.steps != steps, s.steps, s.budget)):
        budgets.setdefault(schedule.steps, []).append(schedule.budget)
    learnt = learnt_by(run.get("compared", []), run.get("fitted", []))
    card = predictor_card(
        student=task.config.student, command=COMMAND, config=run["config"], budgets=budgets, learnt=learnt
    )
    (output / README).write_text(card, encoding="utf-8")
    write_run(
        output,
        format=FORMAT,
        command=COMMAND,
        config=run["config"],
        seed=run["seed"],
        started=datetime.fromisoformat(run["started"]),
        parents=run["parents"],
        searched_on=[*others, task.sampling.record() | {"prompts": task.config.search_prompts}],
        compared=run.get("compared", []),
        fitted=run.get("fitted", []),
        **{SEARCHED: {key: asked for key, asked in run.get(SEARCHED, {}).items() if int(key) in budgets}},
    )


def learnt_by(compared: list[dict[str, Any]], fitted: list[dict[str, Any]]) -> list[str]:
    """Lines of a card: what run.json says of the network alone, and of scalars on top of it."""
    alone = [f"{_places(each)}: {each['error']:.3f}, {_share(each)} of reuse" for each in compared]
    on_top = [
        f"{_places(each)} of {each['steps']}, scalars on top: {each['error']:.3f}, {_share(each)} of reuse "
        f"(scalars alone {each['scalars']:.3f}, network alone {each['network']:.3f})"
        for each in fitted
    ]
    return [*alone, *on_top]


def _places(each: Mapping[str, Any]) -> str:
    return " ".join(map(str, each["full_steps"]))


def _share(each: Mapping[str, Any]) -> str:
    return "-" if each["of_reuse"] is None else f"{each['of_reuse']:.2f}"


def _is_done(task: PredictorTask, output: Path, before: dict[str, Any], run: dict[str, Any]) -> bool:
    """Whether `before`, the run.json that was there, is of this very run, searched to its end; it is then put back."""
    searched = task.sampling.record() | {"prompts": task.config.search_prompts}
    if any(before[key] != run[key] for key in ("config", "seed", "parents")) or searched not in before["searched_on"]:
        return False
    files = {
        name: sha256_file(output / name) for name in (SCHEDULE_FILE, README, SCALARS_FILE) if (output / name).is_file()
    }
    if len(files) < 2 or files.items() - before["files"].items():
        return False
    write_json(output / RUN_FILE, before)
    say_finished(output)
    return True
