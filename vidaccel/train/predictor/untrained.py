"""Searches of forecasters that have nothing to train: a student and prompts in, a folder of schedules out.

folder/schedule.json        the best full steps for each budget, on each grid that was searched
folder/model.safetensors    of linear maps, which are fitted first, one for each grid: their weights
"""

from contextlib import nullcontext
from datetime import UTC, datetime
from functools import partial
from pathlib import Path

from vidaccel.artefacts import RUN_FILE, check_output, read_run, say_finished, verify_files, write_run
from vidaccel.cache.schedule import Schedule, read_schedules, write_schedules
from vidaccel.collect.encode import IMAGE, as_array
from vidaccel.config.generate import GenerateConfig
from vidaccel.config.predictor import PredictorConfig
from vidaccel.forecasters.base import Forecaster, Making
from vidaccel.forecasters.checkpoint import SCHEDULE_FILE, SCHEDULES, WEIGHTS_FILE
from vidaccel.forecasters.linear import LinearMap, save_map
from vidaccel.forecasters.registry import forecaster_class
from vidaccel.models.loading import load_named
from vidaccel.models.weight_hashes import student_hash
from vidaccel.processes import locked_by_first, on_first, processes, rank
from vidaccel.sampling import run_pipeline
from vidaccel.train.predictor.search import NOISE_INDEX, PROBE, search_schedules
from vidaccel.train.predictor.task import (
    COMMAND,
    SEARCHED,
    PredictorTask,
    described,
    schedules_found,
    search_asked,
    task_of,
)


def search_untrained(config: PredictorConfig, output: Path, device: str) -> list[Schedule]:
    """Schedules of a forecaster that has nothing to train, into a folder that holds nothing else."""
    check_output(output, SCHEDULES)
    with processes(), locked_by_first(output):
        started = datetime.now(UTC)
        loaded = load_named(config.student, config.model, device=device, lora=config.lora or ())
        task = task_of(loaded, config, None)
        steps, asked = task.sampling.grid.steps, search_asked(task, config)
        before = read_run(output, SCHEDULES) if (output / RUN_FILE).exists() else {}
        if before and before.get(SEARCHED, {}).get(str(steps)) == asked:
            verify_files(output, before)
            on_first(partial(say_finished, output))
            return schedules_found(task, output) if rank() == 0 else []
        with task.trunks:
            forecaster = _made_by_name(task)
            schedules = search_schedules(task, forecaster)
        on_first(partial(_save_schedules, task, config, output, started, schedules, forecaster))
        return schedules if rank() == 0 else []


def _save_schedules(
    task: PredictorTask,
    config: PredictorConfig,
    output: Path,
    started: datetime,
    schedules: list[Schedule],
    forecaster: Forecaster,
) -> None:
    """Beside those of other grids that are there for the same forecaster and student."""
    made_for = {"forecaster": config.forecaster, "student": student_hash(task.loaded)}
    before = read_run(output, SCHEDULES) if (output / RUN_FILE).exists() else {}
    steps, same = task.sampling.grid.steps, all(before.get(key) == value for key, value in made_for.items())
    others = [s for s in read_schedules(output / SCHEDULE_FILE) if s.steps != steps] if same else []
    searched = {key: before[SEARCHED][key] for key in before.get(SEARCHED, {}) if same}
    (output / RUN_FILE).unlink(missing_ok=True)
    if not same:
        (output / WEIGHTS_FILE).unlink(missing_ok=True)
    if isinstance(forecaster, LinearMap):
        save_map(forecaster, steps, output)
    write_schedules(output / SCHEDULE_FILE, [*others, *schedules])
    run = described(task, config, started)
    write_run(
        output,
        format=SCHEDULES,
        command=COMMAND,
        config=run["config"],
        seed=config.seed,
        started=started,
        parents=run["parents"],
        **{SEARCHED: searched | {str(steps): search_asked(task, config)}},
        **made_for,
    )


def _made_by_name(task: PredictorTask) -> Forecaster:
    """The forecaster of the settings; a linear map is fitted to a generation in which every third step is full."""
    pipe, family, config, grid = task.loaded.pipe, task.loaded.family, task.config, task.sampling.grid
    chosen = [task.samples[i] for i in range(min(config.search_prompts, len(task.samples)))]
    captions = [record["caption"] for _, record in chosen]
    times = None if grid.shift is not None else list(grid.times)
    sampling = GenerateConfig(steps=grid.steps, shift=grid.shift, sigmas=times, guidance=task.sampling.guidance)
    seeds = [config.seed + NOISE_INDEX + i for i in range(len(captions))]

    def generate() -> None:
        if not family.begins_with_image:
            run_pipeline(task.loaded, captions, seeds, sampling, nullcontext(), "latent")
            return
        for (tensors, record), seed in zip(chosen, seeds, strict=True):  # a call takes one image
            image = as_array(tensors[IMAGE])
            run_pipeline(task.loaded, [record["caption"]], [seed], sampling, nullcontext(), "latent", image)

    making = Making(pipe, family, full_steps=range(0, grid.steps, PROBE), generate=generate)
    forecaster = forecaster_class(config.forecaster).make(making)
    follow = getattr(forecaster, "follow", None)
    if follow is not None:
        follow(grid)
    return forecaster
