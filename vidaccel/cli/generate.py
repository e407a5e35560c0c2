"""`vidaccel generate`: prompts in, videos out."""

import json
import logging
import time
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Annotated, Any

import typer

from vidaccel.cli.common import (
    Debug,
    Device,
    Explain,
    PrintConf,
    is_setting,
    quiet_libraries,
    reported,
    settings,
    split_settings,
)
from vidaccel.config.generate import GenerateConfig, default_conf, withdrawn
from vidaccel.errors import UserError
from vidaccel.prompts import check_prompts, prompts_in

log = logging.getLogger(__name__)


@reported
def generate(
    words: Annotated[
        list[str] | None, typer.Argument(metavar="[PROMPT] [KEY=VALUE]...", help="The prompt, and settings to change.")
    ] = None,
    prompt: Annotated[
        str | None,
        typer.Option(help='The prompt, where it begins like a setting: --prompt "steps=4 of a dance".'),
    ] = None,
    output: Annotated[
        Path | None,
        typer.Option(
            "-o",
            "--output",
            help="A .mp4 or .gif, or a folder of PNGs; with --prompts a folder of videos. Default: out.mp4, or out.",
            show_default=False,
        ),
    ] = None,
    prompts: Annotated[Path | None, typer.Option(help="A text file of prompts, one a line.")] = None,
    conf: Annotated[
        str | None,
        typer.Option(
            help="A shipped configuration, or the path of a YAML file. Default: the shipped student with its "
            "predictor; with model=, that model as it is.",
            show_default=False,
        ),
    ] = None,
    seed: Annotated[int | None, typer.Option(help="Seed of the first video; the next ones count up.")] = None,
    device: Device = "auto",
    sheet: Annotated[Path | None, typer.Option(help="Also write a PNG of frames side by side.")] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print one JSON object about what was made.")] = False,
    print_conf: PrintConf = False,
    explain: Explain = None,
    debug: Debug = False,
) -> None:
    """Generate a video from PROMPT, or one for each line of --prompts.

    vidaccel generate "a red circle moving right on black" -o out.mp4

    A word is a setting if it begins with the name of one and "=". "E=mc2" is a prompt.
    """
    free, overrides = _told_apart(words or [], prompt, prompts)
    if seed is not None:
        overrides.append(f"seed={seed}")
    given = {key.lstrip("+"): value for key, _, value in (word.partition("=") for word in overrides)}
    given = {key: None if value == "null" else value for key, value in given.items()}
    overrides += [f"{key}=null" for key in withdrawn(given)]
    config = settings("generate", conf or default_conf(given), overrides, print_conf, explain)
    texts = _prompts(free, prompts)
    files = _outputs(output, len(texts), many=prompts is not None)

    _check_outputs(files, sheet)
    report = _make(config, texts, files, sheet, device, say=(lambda line: None) if as_json else typer.echo)
    if as_json:
        typer.echo(json.dumps(report, indent=2))


def _check_outputs(files: list[Path], sheet: Path | None) -> None:
    from vidaccel.data.video import check_output, check_sheet

    for file in files:
        check_output(file)
    if sheet:
        check_sheet(sheet)


def _make(
    config: GenerateConfig, texts: list[str], files: list[Path], sheet: Path | None, device: str, say: Callable
) -> dict[str, Any]:
    """Load the model, write one video a text, and the sheet; what `--json` prints."""
    quiet_libraries()
    from vidaccel.data.video import contact_sheet, write_video
    from vidaccel.models.grid import shift_of
    from vidaccel.session import session

    videos = []
    with session(config, device) as ready:
        loaded, attachment, seconds = ready.loaded, ready.attachment, Counter(load=ready.seconds)
        for made, file in zip(ready.videos(texts), files, strict=True):
            if sheet:
                videos.append(made.frames[0])
            started = time.perf_counter()
            write_video(made.frames[0], file, loaded.default("fps"))
            seconds.update(made.seconds | {"write": time.perf_counter() - started})
            say(f"{file}: {made.summary()}")
    if sheet:
        contact_sheet(videos, sheet, labels=texts)
        say(f"{sheet}: {len(videos)} video{'s' if len(videos) > 1 else ''}, frames side by side")
    return {
        "files": [str(file) for file in files],
        "sheet": str(sheet) if sheet else None,
        "prompts": texts,
        "seed": config.seed,
        "steps": made.steps,
        "passes": {"full": made.passes - made.predicted, "predicted": made.predicted},
        "full_steps": sorted(attachment.policy.full_steps) if attachment else None,
        "predictor": config.predictor,
        "shift": config.shift or shift_of(loaded.pipe.scheduler, loaded.family),
        "guidance": made.guidance,
        "runtime": ready.runtime,
        "size": list(made.frames.shape[1:4]),
        "seconds": {stage: round(value, 3) for stage, value in seconds.items()},
        "model": loaded.source,
        "family": loaded.family.name,
        "hashes": {**loaded.hashes, **_predictor_hash(config.predictor)},
    }


def _predictor_hash(predictor: str | None) -> dict[str, str]:
    """SHA-256 of a trained predictor's weights, or of fitted scalars."""
    from vidaccel.artefacts import sha256_file
    from vidaccel.forecasters.checkpoint import CONFIG_FILE, WEIGHTS_FILE, kind_of
    from vidaccel.forecasters.registry import attachable
    from vidaccel.models.loading import local_path

    if predictor is None or predictor in attachable():
        return {}
    folder = local_path(predictor)
    file = CONFIG_FILE if kind_of(folder) == "multistep" else WEIGHTS_FILE
    return {f"predictor/{file}": sha256_file(folder / file)}


def _told_apart(words: list[str], prompt: str | None, file: Path | None) -> tuple[list[str], list[str]]:
    """Prompts and settings. What looks like a setting and has the name of none is the prompt, where there is no other:
    beside one it is a misspelt setting."""
    free, overrides = split_settings(words)
    free += [] if prompt is None else [prompt]
    unknown = [word for word in overrides if not is_setting(word, GenerateConfig)]
    if len(unknown) == 1 and not free and file is None:
        log.info('"%s" is taken for the prompt: no setting has that name', unknown[0])
        overrides.remove(unknown[0])
        free = unknown
    return free, overrides


def _prompts(free: list[str], file: Path | None) -> list[str]:
    if len(free) + (file is not None) != 1:
        what = "no prompt was given" if not free and file is None else "more than one prompt was given"
        raise UserError(what, "give one prompt in quotes, or many in a file: --prompts FILE, one a line")
    if file is None:
        if not free[0].strip():
            raise UserError("the prompt is empty", 'say what to show, such as "a red circle moving right on black"')
        check_prompts(free)
        return [free[0].strip()]
    return prompts_in(file)


def _outputs(output: Path | None, count: int, many: bool) -> list[Path]:
    if not many:
        return [output or Path("out.mp4")]
    folder = output or Path("out")
    if folder.suffix.lower() in (".mp4", ".gif", ".png"):
        raise UserError(f"{folder} is one file, and --prompts makes many", "give -o the name of a folder")
    return [folder / f"{i:04d}.mp4" for i in range(count)]
