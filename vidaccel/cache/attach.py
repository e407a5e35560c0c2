"""Predicted steps in a diffusers pipeline that is called as ever.

    with attach(pipe, predictor="runs/predictor", steps=20, full_steps=[0, 1, 2, 5, 9, 13, 17, 19]) as attachment:
        video = pipe("a cat on a surfboard", num_inference_steps=20).frames[0]
    attachment.full_passes, attachment.predicted_passes

What serves them is an `Attachment`, or of fitted scalars a `WholePass`. CPU offload may be enabled before or after,
sequential offload before.
"""

import json
import logging
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from functools import partial
from pathlib import Path
from typing import Any

from diffusers import DiffusionPipeline

from vidaccel.artefacts import RUN_FILE, own_files, refuse_unfinished
from vidaccel.cache.attachment import Attachment, Bound
from vidaccel.cache.checks import check_forecaster, check_pipeline
from vidaccel.cache.policy import FullSteps
from vidaccel.cache.schedule import Schedule, pick, read_schedules, schedules_of
from vidaccel.cache.schedule import every as every_nth
from vidaccel.cache.whole_pass import WholePass, require_free, takes_euler_steps
from vidaccel.compat.diffusers import execution_device
from vidaccel.errors import UserError
from vidaccel.families.base import DiTFamily
from vidaccel.families.registry import family_of
from vidaccel.families.walk import denoisers_of, embeds
from vidaccel.file_hashes import FileHashes
from vidaccel.forecasters.base import Forecaster, Making
from vidaccel.forecasters.checkpoint import PUBLISHED, SCHEDULE_FILE, kind_of, of_another, schedules_for
from vidaccel.forecasters.learned import Predictor
from vidaccel.forecasters.multistep import FittedList, Multistep
from vidaccel.forecasters.registry import FORECASTERS, attachable, forecaster_class
from vidaccel.models.conditioning import Conditioning
from vidaccel.models.files import local_path
from vidaccel.models.grid import Grid, check_boundary, on_grid, running_grid, shift_of
from vidaccel.models.loading import LoadedPipeline
from vidaccel.models.own_call import loaded_of
from vidaccel.models.step_hook import step_hook_of
from vidaccel.models.unchanged import Sample, changed, pipeline_sample, stored_sample
from vidaccel.models.weight_hashes import student_hashes

log = logging.getLogger(__name__)


def attach(
    pipe: DiffusionPipeline | LoadedPipeline,
    *,
    predictor: str | Path | Forecaster | Multistep,
    steps: int | None = None,
    full_steps: list[int] | None = None,
    every: int | None = None,
    budget: int | None = None,
    schedule: str | Path | Schedule | None = None,
    timesteps: Sequence[float] | None = None,
    sigmas: Sequence[float] | None = None,
    force: bool = False,
) -> Attachment | WholePass:
    """Let a forecaster stand in for the transformer's blocks on all but the full steps.

    Args:
        pipe: of a supported family, on its device; a student's is what `vidaccel.load_pipeline` gives, or its `pipe`.
        predictor: the folder of a trained one, of fitted scalars or of schedules that were searched for a forecaster, a
            file of weights that others have released, sprites/<name> for one that is shipped, "reuse", "taylor" or
            another name of forecasters/registry.py, or any forecaster, taken as it is.
        steps: denoising steps that the pipeline will be called with; needed with `full_steps` and `every`, and where
            schedules for several are at hand.
        full_steps: positions of the full steps, rising from 0.
        every: n, for the full steps 0, n, 2n, ...
        budget: how many full steps, where schedules for several are at hand.
        schedule: a schedule, or a file of them; unless full steps are said, it is the predictor's own, or of a
            released file the published one.
        timesteps: times of the grid, from 1000 down, on which the pipeline is then sampled by flow-match Euler; they
            say how many steps there are.
        sigmas: the same from 1 down.
        force: take a predictor that was trained for another student or on another step grid, scalars that were fitted
            to another student or other guidance, or schedules of another; their grid and full steps cannot be forced.

    A trained predictor is served under the scalars that were fitted on top of it where they have its full steps; where
    they have not, or not on the grid that it is forced onto, it serves alone.

    Returns:
        What takes it off again: by `detach()` or at the end of a `with` block. The pipeline is then as it was.

    Raises:
        UserError: the pipeline is attached already, the predictor is not for it, or the full steps make no sense.
    """
    if isinstance(pipe, LoadedPipeline):
        loaded, pipe = pipe, pipe.pipe
    else:
        loaded = loaded_of(pipe)
    family = family_of(pipe)
    grid = Grid.listed(timesteps, sigmas)
    if grid is not None and steps not in (None, grid.steps):
        raise UserError(f"steps={steps}, and {grid.steps} times are listed", "leave steps= out")
    with ExitStack() as stack:
        stack.enter_context(on_grid(pipe, grid=grid))
        which = (grid.steps if grid else steps, full_steps, every, budget, schedule)
        attachment = _attached(pipe, loaded, family, predictor, which, force, stack)
        attachment.leaving = stack.pop_all()
    return attachment


def named_predictor(name: str | Path) -> str | Path:
    """What `attach` takes a predictor's name for: a forecaster of that name, else the path of a folder or file;
    `UserError` where nothing is there."""
    if name in attachable():
        return name
    path = local_path(name)
    if not name or not path.exists():
        hint = f"a predictor is a folder, a released file of weights, or one of: {', '.join(attachable())}"
        hint += f"; vidaccel train-predictor forecaster={name} makes one" if name in FORECASTERS else ""
        raise UserError(f"there is no folder {name}", f"{hint}; nothing is downloaded")
    return path


def _attached(
    pipe: DiffusionPipeline,
    loaded: LoadedPipeline | None,
    family: DiTFamily,
    predictor: str | Path | Forecaster | Multistep,
    which: tuple,
    force: bool,
    leaving: ExitStack,
) -> Attachment | WholePass:
    """What `attach` gives, on the grid that the pipeline has; `which` are its arguments that say the full steps, and
    `leaving` is closed when it is taken off."""
    check_pipeline(pipe, family)
    require_free(pipe, family)
    if isinstance(predictor, str | Path):
        predictor = named_predictor(predictor)
    forecaster = _forecaster(predictor, pipe, family)
    if isinstance(forecaster, Multistep | Predictor):  # whose they are, before which steps they are for
        named = isinstance(forecaster, Multistep) or forecaster.config.student is not None
        student = _student(loaded, pipe, family, force or not named)
        called = loaded.source if loaded else pipe.name_or_path
        if isinstance(forecaster, Multistep):
            forecaster.check_fits(family.name, student, force, called)
        else:
            for transformer in denoisers_of(pipe, family):
                forecaster.check_fits(transformer, family, student, force, called)
                if not (named or force or forecaster.config.architecture != PUBLISHED):
                    _refuse_without_r(transformer, family)
            forecaster.check_denoisers(pipe, family)
            if named and forecaster.scalars is not None:
                forecaster.scalars.check_fits(family.name, student, force, called)
    if isinstance(predictor, Path) and (searched := schedules_for(predictor)) and not force:
        student, called = _student(loaded, pipe, family, force), loaded.source if loaded else pipe.name_or_path
        if searched[1] not in (student or ()):
            hint = "search some for this model, or see what they do with force=true"
            raise of_another("the schedules were searched for", searched[1], predictor, student, called, hint)
    chosen = _schedule(predictor, *which)
    if chosen.boundary is not None:
        hint = "say which steps are full (every=3), or search a schedule"
        check_boundary("the schedule is", chosen.boundary, pipe, family, hint)
    if isinstance(forecaster, Multistep):
        return _under_scalars(pipe, family, forecaster, chosen, force, leaving)
    scalars = None
    if isinstance(forecaster, Predictor):
        scalars = forecaster.scalars
        if scalars is not None and _fitted(scalars, chosen, pipe, family, elsewhere=not force) is None:
            scalars = None
        if forecaster is not predictor:
            forecaster.run_like(*denoisers_of(pipe, family)).to(execution_device(pipe))
    bound = _bound_to(forecaster, chosen, force)
    shift = shift_of(pipe.scheduler, family)
    if bound and shift is not None and bound.grid.shift is not None:  # other grids show when a generation begins
        bound.check(Grid.shifted(chosen.steps, shift))
    attached = partial(Attachment, pipe, family, forecaster, FullSteps(chosen.full_steps, chosen.steps), bound)
    return _under_scalars(pipe, family, scalars, chosen, force, leaving, attached) if scalars else attached()


def _refuse_without_r(transformer: Any, family: DiTFamily) -> None:
    """`UserError` unless the transformer is told where a step ends, as that of a released predictor was."""
    if step_hook_of(transformer) is None and not embeds(transformer, family, "r"):
        raise UserError(
            "a released predictor is for a student of mean velocities, and this transformer is told no r",
            "give the student as well (student=FILE, vidaccel.load_student); or see what it does with force=true",
        )


def _picked(schedule: str | Path, predictor: object, budget: int | None, steps: int | None) -> Schedule:
    """`pick` from a file; one of a predictor's that has none for so many steps says how some are searched."""
    found = read_schedules(schedule)
    try:
        return pick(found, budget, steps)
    except UserError as error:
        if steps is None or any(each.steps == steps for each in found):
            raise
        if not (isinstance(predictor, Path) and (predictor / RUN_FILE).is_file()):
            raise
        config = json.loads((predictor / RUN_FILE).read_bytes())["config"]
        fitted = config.get("forecaster") == "multistep"
        way = "forecaster=multistep" if fitted else "stage=search"
        command = f"vidaccel train-predictor -o {predictor} {way} student={config['student']} steps={steps}"
        raise UserError(error.message, f"{error.hint}; or search some: {command}") from error


def _schedule(predictor, steps, full_steps, every, budget, schedule) -> Schedule:
    """The one that these arguments of `attach` mean."""
    ways = {"full_steps": full_steps, "every": every, "budget": budget, "schedule": schedule}
    given = [name for name, value in ways.items() if value is not None]
    if len(given) > 1 and given != ["budget", "schedule"]:
        raise UserError(
            f"{given[0]}= came with {given[1]}=", f"{given[0]}= says it all: leave {given[1]}= out, or set it to null"
        )
    if full_steps is not None or every is not None:
        if steps is None:
            raise UserError(f"{given[0]}= came without steps=", "pass the number of denoising steps as well")
        return every_nth(steps, every) if full_steps is None else Schedule(steps, tuple(full_steps))
    if schedule is None and isinstance(predictor, Path):
        if predictor.is_file():
            return pick(schedules_of(predictor), budget, steps)
        schedule = predictor / SCHEDULE_FILE
    if schedule is None:
        hint = "every=3 makes each third one full, full_steps=[0, 1, 4] names them, schedule= has them from a file"
        if budget is not None:
            search = f"vidaccel train-predictor forecaster={predictor} student=MODEL prompts=FILE finds the best"
            hint = f"{hint}; {search}" if isinstance(predictor, str) else hint
            raise UserError(f"budget={budget} says how many steps are full, and nothing which", hint)
        raise UserError("nothing says which steps are full", hint)
    if not isinstance(schedule, Schedule):
        if isinstance(predictor, Path) and not Path(schedule).exists():
            refuse_unfinished(predictor)  # whose schedules are searched last
        schedule = _picked(schedule, predictor, budget, steps)
    elif budget not in (None, schedule.budget):
        raise UserError(f"budget={budget}, and the schedule has {schedule.budget} full steps", "leave budget= out")
    if steps not in (None, schedule.steps):
        raise UserError(
            f"steps={steps}, and the schedule is for {schedule.steps}",
            f"sample in {schedule.steps} steps, or pass full_steps= of your own",
        )
    return schedule


def _bound_to(forecaster: Forecaster, schedule: Schedule, force: bool) -> Bound | None:
    """The grid that has to be run; a schedule that was searched on a grid vouches for the predictor on it too."""
    if schedule.grid is not None:
        return Bound("the schedule", schedule.grid, "say which steps are full (every=3), or search a schedule")
    if isinstance(forecaster, Predictor) and forecaster.config.grid is not None and not force:
        return Bound("the predictor", forecaster.config.grid, "see what it does with force=true, or search a schedule")
    return None


def _under_scalars(
    pipe: DiffusionPipeline,
    family: DiTFamily,
    multistep: Multistep,
    chosen: Schedule,
    force: bool,
    leaving: ExitStack,
    beneath: Callable[[], Attachment] | None = None,
) -> WholePass:
    """The pipeline under the scalars of these full steps, where they are on top of a network with what attaches that
    beneath; `UserError` unless they were fitted to its grid. Until `leaving` is closed its steps are Euler's."""
    scalars = _fitted(multistep, chosen, pipe, family)
    if scalars is None:
        raise multistep.lacking(chosen.full_steps, chosen.steps, chosen.times)
    check_boundary("these scalars are", scalars.boundary, pipe, family, "fit some to this pipeline")
    remedy = "vidaccel train-predictor forecaster=multistep shift={shift:g}"
    bound = Bound(
        f"this list of scalars ({chosen.budget} of {chosen.steps})", scalars.grid, "or fit some to it", remedy
    )
    shift = shift_of(pipe.scheduler, family)
    if shift is not None and scalars.shift is not None:
        bound.check(Grid.shifted(chosen.steps, shift))
    if not takes_euler_steps(pipe.scheduler):
        own = type(pipe.scheduler).__name__
        leaving.enter_context(on_grid(pipe, grid=scalars.grid))
        log.info("sampled by flow-match Euler, to whose steps the scalars are fitted, in place of the %s", own)

    def check_grid() -> None:
        bound.check(running_grid(pipe.scheduler, family))

    check_guidance = (lambda *scales: None) if force else multistep.check_guidance
    network = beneath() if beneath else None
    return WholePass(pipe, family, scalars, check_grid, check_guidance, multistep.config.two_pass, network)


def _fitted(
    multistep: Multistep, chosen: Schedule, pipe: DiffusionPipeline, family: DiTFamily, elsewhere: bool = True
) -> FittedList | None:
    """The numbers for these full steps, if there are some: on the schedule's grid, else on the pipeline's, else, if
    `elsewhere`, on another, which the refusal then names."""
    times = chosen.times or pipe.scheduler.config.get("times")
    shift = shift_of(pipe.scheduler, family)
    if times is None and shift is not None:
        times = Grid.shifted(chosen.steps, shift).times
    found = multistep.find(chosen.full_steps, chosen.steps, times)
    if found is None and elsewhere and chosen.times is None:
        return multistep.find(chosen.full_steps, chosen.steps)
    return found


def _forecaster(
    predictor: str | Path | Forecaster | Multistep, pipe: DiffusionPipeline, family: DiTFamily
) -> Forecaster | Multistep:
    if not isinstance(predictor, str | Path):
        if not isinstance(predictor, Multistep):
            check_forecaster(predictor, pipe)
        return predictor
    if isinstance(predictor, Path):
        return forecaster_class(kind_of(predictor)).make(Making(pipe, family, folder=predictor))
    return forecaster_class(predictor).make(Making(pipe, family))


def _student(loaded: LoadedPipeline | None, pipe: DiffusionPipeline, family: DiTFamily, force: bool) -> set[str] | None:
    """`student_hashes` of the model that is in the pipeline; `UserError` if it is none of the files' any more."""
    if loaded is None:
        return _student_of(pipe, family, force)
    _refuse_changed(loaded.trunk, pipe, family, loaded.source, force)
    return student_hashes(loaded)


def _refuse_changed(
    before: Sample | None, pipe: DiffusionPipeline, family: DiTFamily, source: object, force: bool
) -> None:
    if before is None or force:
        return
    name = changed(before, pipeline_sample(pipe, family))
    if name is not None:
        raise UserError(
            f"the weights in memory are not those of {source}: {name} was changed, as by an adapter that was fused",
            "unload it, or load the model with it (lora=[FILE:SCALE]) and train a predictor for that; or see what this "
            "one does with force=true",
        )


def _student_of(pipe: DiffusionPipeline, family: DiTFamily, force: bool) -> set[str] | None:
    """`student_hashes` of a pipeline that diffusers loaded, by the files it came from; None if it was put together."""
    source, parts = pipe.name_or_path, {d.attribute: getattr(pipe, d.attribute) for d in family.denoisers}
    places = [Path(part.config.get("_name_or_path") or "") for part in parts.values()]
    folder = places[0].parent
    if source is None or places != [folder / name for name in parts] or not _is_of(str(source), folder):
        return None
    names = list(parts)
    if (folder / "conditioning").is_dir():
        if not force and Conditioning.of(parts[names[0]], family) is None:
            raise UserError(
                f"this pipeline has only what diffusers loads of {source}, without its conditioning/",
                "load it by vidaccel.load_pipeline(folder), and attach to what that gives",
            )
        names.append("conditioning")
    files = [(name, file) for name in names for file in own_files(folder / name, "*.safetensors")]
    hashes = FileHashes({f"{name}/{file.name}": file for name, file in files})
    stored = None if force else stored_sample((each for each in files if each[0] in parts), family)
    _refuse_changed(stored, pipe, family, source, force)
    return student_hashes(LoadedPipeline(pipe, family, source, {}, hashes))


def _is_of(source: str, folder: Path) -> bool:
    """Whether a part's folder is that of the pipeline's source, or the snapshot of a hub id in the hub's cache."""
    return folder == Path(source) or f"models--{source.replace('/', '--')}" in folder.parts
