"""What the commands do, for Python: `import vidaccel` has these functions, and the commands call them.

`config` is a command's dataclass of settings, the name of a shipped configuration (conf/<command>/<name>.yaml) or the
path of a YAML file. Any other keyword changes a setting: `steps=4`, for one in a group `train={"steps": 5}` or
`**{"train.steps": 5}`. torch is imported by the first call.
"""

import logging
from collections.abc import Sequence
from contextlib import nullcontext
from pathlib import Path
from typing import TYPE_CHECKING, Any, overload

from vidaccel.artefacts import check_output, say_finished
from vidaccel.config.benchmark import BenchmarkConfig
from vidaccel.config.collect import CollectConfig
from vidaccel.config.distill import DistillConfig
from vidaccel.config.generate import GenerateConfig, default_conf, withdrawn
from vidaccel.config.loader import settings_of
from vidaccel.config.predictor import PredictorConfig
from vidaccel.errors import UserError

if TYPE_CHECKING:
    import numpy as np

    from vidaccel.cache.schedule import Schedule
    from vidaccel.collect.job import Plan
    from vidaccel.data.images import Source

log = logging.getLogger(__name__)


@overload
def generate(
    prompt: str,
    config: GenerateConfig | str | None = None,
    *,
    image: "Source | None" = None,
    device: str = "auto",
    **overrides: Any,
) -> "np.ndarray": ...


@overload
def generate(
    prompt: Sequence[str],
    config: GenerateConfig | str | None = None,
    *,
    image: "Source | Sequence[Source] | None" = None,
    device: str = "auto",
    **overrides: Any,
) -> "list[np.ndarray]": ...


def generate(
    prompt: str | Sequence[str],
    config: GenerateConfig | str | None = None,
    *,
    image: "Source | Sequence[Source] | None" = None,
    device: str = "auto",
    **overrides: Any,
) -> "np.ndarray | list[np.ndarray]":
    """The frames of a video of the prompt, uint8 [T, H, W, 3]; a list of such for a sequence of prompts.

    Without `config` it is the shipped student with its predictor; with `model=` alone, that model as it is. Prompt i is
    made of the settings' `seed` + i. A model of image to video begins with `image`: a file or an image of pillow, or as
    many as there are prompts.

    Raises:
        UserError: model, predictor, image, machine and settings do not go together.
    """
    from vidaccel.processes import processes
    from vidaccel.session import session

    if config is None:
        config = default_conf(overrides)
    settings = settings_of("generate", config, dict.fromkeys(withdrawn(overrides)) | overrides)
    if settings.compare_to is not None:
        raise UserError(f"compare_to={settings.compare_to} is for `vidaccel generate --compare`", "leave it out")
    images: list[Any] = [] if image is None else list(image) if isinstance(image, list | tuple) else [image]
    together = processes() if settings.parallel.devices > 1 else nullcontext()
    with together, session(settings, device, images=images) as ready:
        videos = [made.frames[0] for made in ready.videos([prompt] if isinstance(prompt, str) else prompt)]
    return videos[0] if isinstance(prompt, str) else videos


def export_model(
    output: str | Path, config: GenerateConfig | str | None = None, *, device: str = "auto", **overrides: Any
) -> dict[str, Any]:
    """Write the model of these settings into the folder `output` for diffusers alone, its guidance fixed, or its
    transformer into the file `output`, NAME.safetensors, by the original names, or a student's adapter into the file
    NAME.lora.safetensors; returns what its pipeline is to be called with.

    Raises:
        UserError: the model is a student that diffusers alone has no place for, `output` is there already, its original
            names are not known, it has no adapter, or a setting is of making videos.
    """
    from vidaccel.models.exporting import check_export, files_of, is_file, is_lora, own_adapter
    from vidaccel.models.exporting import export_model as export
    from vidaccel.models.files import read_model
    from vidaccel.models.loading import load_pipeline

    settings = settings_of("generate", config or "teacher", overrides)
    said = check_export(output, settings)
    files, lora = read_model(settings.model, settings.student), settings.lora or ()
    if is_file(output):
        files_of(output, files.contents.family)
    if is_lora(output):
        own_adapter(files.source, files.hashes)
    loaded = load_pipeline(files, device=device, dtype=settings.dtype, lora=lora)
    return export(output, loaded, guidance=settings.guidance, guidance_2=settings.guidance_2, config=said)


def collect_features(
    config: CollectConfig | str,
    output: str | Path | None,
    *,
    device: str = "auto",
    dry_run: bool = False,
    **overrides: Any,
) -> "Plan":
    """Encode clips and captions into the folder `output`, going on where an earlier run was stopped; returns how many
    samples it holds and how large they are. A dry run only finds that out, and takes None for the folder.

    Raises:
        UserError: model, clips and settings do not go together, or the folder is of others.
    """
    settings = settings_of("collect-features", config, overrides)
    if output is None and not dry_run:
        raise UserError("no place was given for the features", "name a folder: -o runs/features")

    from vidaccel.collect.features import FORMAT
    from vidaccel.collect.job import collect
    from vidaccel.collect.job import plan as planned
    from vidaccel.collect.kinds import job_of
    from vidaccel.models.loading import load_pipeline
    from vidaccel.processes import locked_by_first, processes

    if output is not None:
        check_output(Path(output), FORMAT)
    folder = None if output is None or dry_run else Path(output)
    with processes(), locked_by_first(folder) if folder else nullcontext():
        job = job_of(
            load_pipeline(settings.model, device=device, dtype=settings.dtype, lora=settings.lora or ()), settings
        )
        size = planned(job)
        if folder:
            log.info("%s", size)
            if collect(job, folder):
                say_finished(folder)
    return size


def distill(config: DistillConfig | str, output: str | Path, *, device: str = "auto", **overrides: Any) -> Path | None:
    """Train a student into the folder `output`, going on where an earlier run was stopped; returns the folder, or None
    in the processes under torchrun that did not write it.

    Raises:
        UserError: teacher, data and settings do not go together, or cannot be read.
        TrainingFailed: the training did not stay finite.
    """
    from vidaccel.train.distill import distill as run

    folder = Path(output)
    return folder if run(settings_of("distill", config, overrides), folder, device) else None


def train_predictor(
    config: PredictorConfig | str, output: str | Path, *, device: str = "auto", **overrides: Any
) -> "list[Schedule]":
    """Train a predictor into the folder `output`, going on where an earlier run was stopped, and search its schedules;
    returns those, or none in the processes under torchrun that did not write them.

    Raises:
        UserError: student, data and settings do not go together, or cannot be read.
        TrainingFailed: the training did not stay finite.
    """
    settings = settings_of("train-predictor", config, overrides)
    if settings.forecaster == "multistep":
        from vidaccel.train.predictor.multistep import train_multistep as run
    else:
        from vidaccel.train.predictor.training import train_predictor as run

    return run(settings, Path(output), device)


def benchmark(
    config: BenchmarkConfig | str,
    output: str | Path,
    *,
    device: str = "auto",
    quality: bool = False,
    command: str = "vidaccel.benchmark",
    **overrides: Any,
) -> dict[str, Any]:
    """Time every method, and with `quality` score its videos, into the folder `output`; returns what its results.json
    holds, which repeats `command`.

    Raises:
        UserError: methods or settings that are not there, no model, or a folder of another benchmark.
    """
    from vidaccel.bench.runner import run

    return run(settings_of("benchmark", config, overrides), Path(output), quality, device, command)


def plan(config: BenchmarkConfig | str, **overrides: Any) -> dict[str, Any]:
    """What every method costs on the full-size model, without its weights, in the form of results.json.

    Raises:
        UserError: settings that the family cannot follow, or methods that are not there.
    """
    from vidaccel.bench.plan import plan as work_out

    return work_out(settings_of("benchmark", config, overrides))
