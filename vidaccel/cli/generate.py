"""`vidaccel generate`: prompts in, videos out."""

import gc
import json
import logging
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, NoReturn

import typer

from vidaccel import __version__
from vidaccel.artefacts import remove_left, sha256_file
from vidaccel.cli.common import (
    Debug,
    Device,
    Explain,
    PrintConf,
    is_setting,
    quiet_libraries,
    settings,
    shared,
    split_settings,
)
from vidaccel.config.generate import GenerateConfig, default_conf, withdrawn
from vidaccel.errors import UserError
from vidaccel.prompts import check_prompts, prompts_in
from vidaccel.ranks import launched, number, refuse_many, share

if TYPE_CHECKING:  # which import torch
    from vidaccel.sampling import Generated
    from vidaccel.session import Session

log = logging.getLogger(__name__)


@shared
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
    image: Annotated[
        Path | None, typer.Option(help="The png, jpg or webp that an image-to-video model begins with.")
    ] = None,
    images: Annotated[
        Path | None,
        typer.Option(help="A folder of such images, one for each line of --prompts, in the order of their names."),
    ] = None,
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
    compare: Annotated[
        bool,
        typer.Option(
            "--compare",
            help="Make the video the model's own full way too, from the same noise, and write both side by side: how "
            "much faster, and what it costs.",
        ),
    ] = False,
    export: Annotated[
        bool,
        typer.Option(
            "--export",
            help="Make no video, but a folder (-o) of the model that diffusers loads alone, its guidance fixed: of a "
            "student of method=cfg, or a plain model with its LoRAs. -o NAME.safetensors: its transformer as one file "
            "by the original names. -o NAME.lora.safetensors: the adapter of a student that keeps it apart.",
        ),
    ] = False,
    as_json: Annotated[bool, typer.Option("--json", help="Print one JSON object about what was made.")] = False,
    print_conf: PrintConf = False,
    explain: Explain = None,
    debug: Debug = False,
) -> None:
    """Generate a video from PROMPT, or one for each line of --prompts.

    vidaccel generate "a red circle moving right on black" -o out.mp4

    vidaccel generate "a cat on a surfboard" model=path/to/model predictor=taylor every=3 --compare

    The videos of --prompts that are there already, made of the same, are not made again (but for --sheet, --compare).

    On many processes: torchrun --nproc-per-node=8 -m vidaccel generate --prompts FILE ...

    One video on many: torchrun --nproc-per-node=8 -m vidaccel generate PROMPT parallel.ulysses=8 ...

    A word is a setting if it begins with the name of one and "=". "E=mc2" is a prompt.
    """
    free, overrides = _told_apart(words or [], prompt, prompts)
    if seed is not None:
        overrides.append(f"seed={seed}")
    given = {key.lstrip("+"): value for key, _, value in (word.partition("=") for word in overrides)}
    given = {key: None if value == "null" else value for key, value in given.items()}
    overrides += [f"{key}=null" for key in withdrawn(given)]
    config = settings(
        "generate", conf or ("teacher" if export else default_conf(given)), overrides, print_conf, explain
    )
    if export:
        if compare or as_json:
            raise UserError(f"--export came with {'--compare' if compare else '--json'}", "leave one of them out")
        _export(config, output, [*free, *filter(None, (prompts, image, images, sheet))], device)
        return
    texts = _prompts(free, prompts)
    files = _outputs(output, len(texts), many=prompts is not None)
    pictures = _images(image, images, len(texts), many=prompts is not None)

    if config.compare_to is not None and not compare:
        raise UserError(f"compare_to={config.compare_to} came without --compare", "add --compare, or leave it out")
    _check_outputs(files, sheet)
    say: Callable[[str], None] = (lambda line: None) if as_json else typer.echo
    if prompts is None or compare or sheet:
        if compare or sheet or config.parallel.devices == 1:
            refuse_many("--compare" if compare else "--sheet" if sheet else "one video")
        _refuse_other_processes(config.parallel.devices)
        make = _compare if compare else _make
        report = make(config, texts, pictures, files, sheet, device, say)
    else:
        report = _make_many(config, texts, pictures, files, device, say)
    if as_json:
        typer.echo(json.dumps(report, indent=2))


def _export(config: GenerateConfig, output: Path | None, others: Sequence[str | Path], device: str) -> None:
    if output is None or others:
        instead = f"not a video of {others[0]}" if others else "none is named"
        raise UserError(
            f"--export makes a folder or a file, and {instead}", "vidaccel generate --export model=MODEL -o FOLDER"
        )
    refuse_many("--export")
    quiet_libraries()
    from vidaccel.api import export_model

    arguments = export_model(output, config, device=device)
    said = ", ".join(f"{name}={value!r}" for name, value in arguments.items())
    if output.suffixes[-2:] == [".lora", ".safetensors"]:
        loads = "by its load_lora_weights or its transformer's load_lora_adapter"
        typer.echo(f"{output}: for the pipeline that it was trained on, {loads}, at scale 1; called with {said}")
        return
    if output.suffix == ".safetensors":
        made = output if output.exists() else f"{output.with_suffix('')}.*.safetensors"  # one of each transformer
        typer.echo(f"{made}: by its original names, for what loads such files; in diffusers' terms called with {said}")
        return
    typer.echo(f"{output}: for diffusers alone; call its pipeline with {said}")


def _check_outputs(files: list[Path], sheet: Path | None) -> None:
    from vidaccel.data.video import check_output, check_sheet

    for file in files:
        check_output(file)
    if sheet:
        check_sheet(sheet)


def _make(
    config: GenerateConfig,
    texts: list[str],
    images: list[Path],
    files: list[Path],
    sheet: Path | None,
    device: str,
    say: Callable,
) -> dict[str, Any]:
    """Load the model, write one video a text, and the sheet; what `--json` prints. Of the processes that make one video
    together the first writes it."""
    quiet_libraries()
    from vidaccel.data.video import contact_sheet
    from vidaccel.processes import processes
    from vidaccel.session import session

    videos, records = [], []
    with processes(), session(config, device, images=images) as ready:
        for line in ready.fitted:
            say(line)
        for made, file in zip(ready.videos(texts), files, strict=True):
            if sheet:
                videos.append(made.frames[0])
            records.append(_record(made) if number() else _written(ready, made, file))
            say(f"{file}: {made.summary()}")
        report = _report(ready, texts, files, sheet, records)
    if sheet:
        contact_sheet(videos, sheet, labels=texts)
        say(f"{sheet}: {len(videos)} video{'s' if len(videos) > 1 else ''}, frames side by side")
    return report


def _make_many(
    config: GenerateConfig, texts: list[str], images: list[Path], files: list[Path], device: str, say: Callable
) -> dict[str, Any]:
    """As `_make`, of those videos that are not there yet, shared by torchrun's processes."""
    quiet_libraries()
    from vidaccel.data.notes import forget, note, note_of, noted
    from vidaccel.processes import by_first, locked_by_first, on_first, processes, sharing, world
    from vidaccel.session import session

    folder = files[0].parent
    with processes(), locked_by_first(folder), session(config, device, images=images) as ready:
        on_first(lambda: remove_left([*files, *map(note_of, files)]))
        made_of = by_first(lambda: _made_of(ready, texts, images))  # whose hashes read the weights once, not in each
        todo = on_first(lambda: [i for i, file in enumerate(files) if noted(file, made_of[i]) is None])
        if len(todo) < len(files):
            log.info("%d of %d videos are there already", len(files) - len(todo), len(files))
        for line in ready.fitted:
            say(line)
        together = config.parallel.devices
        mine = share(together).of(todo)
        with sharing("videos", total=len(files), done=len(files) - len(todo)) as advance:
            for i, made in zip(mine, ready.videos(texts, mine), strict=True):
                if number() % together:  # another process of those that made it together
                    continue
                forget(files[i])
                note(files[i], made_of[i], _written(ready, made, files[i]))
                say(f"{files[i]}: {made.summary()}")
                advance()
        if world() > 1:
            say(f"{folder}: {len(files)} videos")
        records = []
        for file, what in zip(files, made_of, strict=True):
            records.append(noted(file, what) or _refuse_changed(file))
        return _report(ready, texts, files, None, records)


def _refuse_changed(file: Path) -> NoReturn:
    raise UserError(f"{file} was changed meanwhile", "give the same command again")


def _refuse_other_processes(devices: int) -> None:
    """`UserError` where torchrun started another number of processes than those that make one video."""
    if 1 < launched() != devices:
        raise UserError(
            f"one video with parallel.ulysses times parallel.ring = {devices} is the work of {devices} processes, and "
            f"torchrun started {launched()}",
            f"torchrun --nproc-per-node={devices} -m vidaccel generate ...",
        )


def _made_of(ready: "Session", texts: list[str], images: list[Path]) -> list[dict[str, Any]]:
    """All that tells each video from another."""
    from vidaccel.config.loader import to_dict
    from vidaccel.families.walk import denoisers_of

    apart = ("seed", "compare_to", "offload")  # said for each video, or what changes none
    config = {name: value for name, value in to_dict(ready.config).items() if name not in apart}
    if config["decoder"] is None:  # which earlier versions did not know
        del config["decoder"]
    common = {"vidaccel": __version__, "config": config, "hashes": _hashes(ready), "full_steps": _full_steps(ready)}
    common["dtype"] = str(next(denoisers_of(ready.loaded.pipe, ready.loaded.family)[0].parameters()).dtype)
    pictures = [sha256_file(image) for image in images] or [None]
    return [
        common | {"prompt": text, "seed": ready.config.seed + i, "image": pictures[i % len(pictures)]}
        for i, text in enumerate(texts)
    ]


def _written(ready: "Session", made: "Generated", file: Path) -> dict[str, Any]:
    """What is said of a video that this writes."""
    from vidaccel.data.video import write_video

    started = time.perf_counter()
    write_video(made.frames[0], file, ready.loaded.default("fps"))
    return _record(made, write=time.perf_counter() - started)


def _record(made: "Generated", **seconds: float) -> dict[str, Any]:
    return {
        "steps": made.steps,
        "passes": {"full": made.passes - made.predicted, "predicted": made.predicted},
        "guidance": made.guidance,
        **({} if made.guidance_2 is None else {"guidance_2": made.guidance_2}),
        "size": list(made.frames.shape[1:4]),
        "seconds": made.seconds | seconds,
    }


def _compare(
    config: GenerateConfig,
    texts: list[str],
    images: list[Path],
    files: list[Path],
    sheet: Path | None,
    device: str,
    say: Callable,
) -> dict[str, Any]:
    """Each video in both ways in one file; what `--json` prints."""
    quiet_libraries()
    from vidaccel.comparison import Compared, as_fast, full_way
    from vidaccel.data.video import contact_sheet, write_video
    from vidaccel.session import session

    full = full_way(config)
    with session(config, device, warm_up=texts[0], images=images) as ready:
        for line in ready.fitted:
            say(line)
        quick = list(ready.videos(texts))
        report = _report(ready, texts, files, sheet, [_record(made) for made in quick])
        full, fps = as_fast(full, config, ready.loaded, quick[0]), ready.loaded.default("fps")
    del ready
    gc.collect()  # a loaded pipeline knows itself, and the device may have no room for two
    log.info("beside it %s in full, of the same size and guided alike", full.model)
    with session(full, device, warm_up=texts[0], images=images) as ready:
        both = [Compared(*pair) for pair in zip(quick, ready.videos(texts), strict=True)]
    for each, file in zip(both, files, strict=True):
        write_video(each.frames(), file, fps)
        say(f"{file}: left {config.model}, {each.fast.how()}; right {full.model}, {each.full.how()}")
        say(f"{file}: {each.summary()}")
    if sheet:
        names = (config.model, full.model)
        labels = [f"{name}: {text}" for text in texts for name in names]
        contact_sheet([way.frames[0] for each in both for way in (each.fast, each.full)], sheet, labels=labels)
        say(f"{sheet}: both ways, a row each")
    whole = _added({"load": ready.seconds}, *(each.full.seconds for each in both))
    return report | {
        "compared": {
            "model": full.model,
            "steps": both[0].full.steps,
            "passes": both[0].full.passes,
            "guidance": both[0].full.guidance,
            "seconds": {stage: round(value, 3) for stage, value in whole.items()},
            "speedup": [each.speedup for each in both],
            "latent_error": [each.latent_error for each in both],
        }
    }


def _added(*each: Mapping[str, float]) -> dict[str, float]:
    """Seconds of the stages, summed."""
    names = dict.fromkeys(name for seconds in each for name in seconds)
    return {name: sum(seconds.get(name, 0.0) for seconds in each) for name in names}


def _report(
    ready: "Session",
    texts: list[str],
    files: list[Path],
    sheet: Path | None,
    records: list[dict[str, Any]],
) -> dict[str, Any]:
    """What `--json` prints; of what is the same for all videos that of the last."""
    from vidaccel.models.grid import Grid, shift_of

    config, loaded = ready.config, ready.loaded
    own = loaded.call if config.shift is None else {}
    listed = Grid.listed(config.timesteps, config.sigmas) or Grid.listed(own.get("timesteps"), own.get("sigmas"))
    last, seconds = records[-1], _added({"load": ready.seconds}, *(record["seconds"] for record in records))
    return {
        "files": [str(file) for file in files],
        "sheet": str(sheet) if sheet else None,
        "prompts": texts,
        "images": list(ready.fitted),
        "seed": config.seed,
        "steps": last["steps"],
        "passes": last["passes"],
        "full_steps": _full_steps(ready),
        "predictor": config.predictor,
        "decoder": config.decoder,
        "shift": None if listed else config.shift or shift_of(loaded.pipe.scheduler, loaded.family),
        "times": listed and list(listed.times),
        "guidance": last["guidance"],
        **({"guidance_2": last["guidance_2"]} if "guidance_2" in last else {}),
        "runtime": ready.runtime,
        "size": last["size"],
        "seconds": {stage: round(value, 3) for stage, value in seconds.items()},
        "model": loaded.source,
        "family": loaded.family.name,
        "hashes": _hashes(ready),
    }


def _full_steps(ready: "Session") -> list[int] | None:
    return sorted(ready.attachment.policy.full_steps) if ready.attachment else None


def _hashes(ready: "Session") -> dict[str, str]:
    from vidaccel.forecasters.checkpoint import predictor_hashes

    decoder = ready.loaded.decoder
    return {
        **ready.loaded.hashes,
        **predictor_hashes(ready.config.predictor),
        **(decoder.hashes if decoder else {}),
    }


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


def _images(image: Path | None, folder: Path | None, count: int, many: bool) -> list[Path]:
    if folder is None:
        return [] if image is None else [image]
    if image is not None or not many:
        what = "--image as well" if image is not None else "one prompt"
        raise UserError(f"--images {folder} came with {what}", "give --image FILE, or --images FOLDER --prompts FILE")
    from vidaccel.data.images import images_in

    return list(images_in(folder, count))


def _outputs(output: Path | None, count: int, many: bool) -> list[Path]:
    if not many:
        return [output or Path("out.mp4")]
    folder = output or Path("out")
    if folder.suffix.lower() in (".mp4", ".gif", ".png"):
        raise UserError(f"{folder} is one file, and --prompts makes many", "give -o the name of a folder")
    return [folder / f"{i:04d}.mp4" for i in range(count)]
