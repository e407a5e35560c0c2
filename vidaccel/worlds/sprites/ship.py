"""A student of the shipped teacher, its predictor, its fitted scalars and a decoder, as the package has them.

    student/     the transformer, conditioning/ and scheduler/; run.json names sprites/teacher for the rest
    predictor/   as `vidaccel train-predictor` left it
    scalars/     as `vidaccel train-predictor forecaster=multistep` left them
    decoder/     as `vidaccel distill method=decoder` left it

Each has a card with how it was made and what a results.json of `vidaccel benchmark` says about it. No weight changes,
and so neither does the identity by which a predictor knows its student.
"""

import json
import math
import shutil
from collections.abc import Mapping
from datetime import datetime
from pathlib import Path
from typing import Any

from omegaconf import OmegaConf

from vidaccel.artefacts import CHECKPOINTS, RUN_FILE, atomic_folder, read_run, sha256_file, write_run
from vidaccel.bench.reports.plots import kind_of
from vidaccel.bench.reports.tables import passes_text
from vidaccel.errors import UserError
from vidaccel.forecasters.checkpoint import CONFIG_FILE, SCALARS_FILE, SCHEDULE_FILE, WEIGHTS_FILE
from vidaccel.forecasters.checkpoint import FORMAT as PREDICTOR
from vidaccel.forecasters.multistep import FORMAT as SCALARS
from vidaccel.forecasters.multistep import Multistep
from vidaccel.models.decoder import ENCODING, check_decoder, read_decoder
from vidaccel.models.decoder import FORMAT as DECODER
from vidaccel.models.decoder import WEIGHTS_FILE as DECODER_WEIGHTS
from vidaccel.models.files import read_model
from vidaccel.models.folder import FORMAT as MODEL
from vidaccel.models.folder import read_json, safetensors_header
from vidaccel.train.metrics import FILE as METRICS
from vidaccel.train.predictor.task import STAGES
from vidaccel.worlds.sprites import SHIPPED
from vidaccel.worlds.sprites.card import made_here, trained_stage

TEACHER = "sprites/teacher"
STUDENT = """\
The few-step student of sprites/teacher: one forward pass a step, guidance included, in {steps} steps unless told
otherwise. With `instantaneous=true` it is the CFG-distilled teacher, to be sampled in 50. All but the transformer are
the teacher's own parts. Licence: Apache-2.0."""
NOT_KEPT = "The weights of the CFG distillation that it goes on from were not kept."
INSTEAD = """\
Stands in for the blocks of sprites/student on the steps that a schedule leaves to it. schedule.json has, for every
number of full steps, those that the search found. Licence: Apache-2.0."""
NO_PASS = """\
Fitted scalars: on the steps that are not full they give a velocity of sprites/student from the last ones and their
latents, without a pass of it, for guidance from {low:g} to {high:g}. Licence: Apache-2.0."""
NARROW = """\
Decodes latents of sprites/teacher and sprites/student in the place of their own decoder, whose frames it was taught:
{ours:,} parameters in place of {theirs:,}, channels {narrow} of {wide}. {psnr:.1f} dB to those frames on {clips} clips
that it was not trained on. Licence: Apache-2.0."""
ERRORS = [
    "Error of the final latents beside a run of full steps alone, on prompts and noise that nothing was fitted to, by",
    "which each list was chosen among the tried; and its share of that of the last full step's velocity given again.",
    "",
    "| full steps | error | of that of reuse |",
    "|---|---|---|",
]
SCORES = [
    "Percent, with 95 % bootstrap intervals over the meanings of held-out prompts; the latent error is relative to the",
    "teacher's 50 steps of two passes from the same noise.",
    "",
    "| | passes | semantic | quality | total | interval | latent error |",
    "|---|---|---|---|---|---|---|",
]


def ship_student(
    student: Path, distilled: Path | None, results: Path | None, remark: str, output: Path, machine: str | None = None
) -> None:
    """Write the student's own parts to `output`, with its card.

    Args:
        student: folder of `vidaccel distill` or of a script, whose every component but the transformer is the shipped
            teacher's.
        distilled: folder of the CFG distillation before it; None says in the card that it was not kept.
        results: the results.json that its card quotes; None leaves that out.
        remark: a paragraph for the card on what the settings do not say of the training.
        output: the new folder.
        machine: what the student was trained on; None is this machine.

    Raises:
        UserError: a folder is not finished, another teacher's, or cannot be written.
    """
    run = read_run(student, MODEL)
    files, teacher = read_model(student), read_model(TEACHER)
    own = teacher.contents.family.denoisers[0].attribute
    shared = {name: digest for name, digest in teacher.hashes.items() if not name.startswith(f"{own}/")}
    if foreign := [name for name, digest in shared.items() if files.hashes.get(name) != digest]:
        raise UserError(f"the {foreign[0]} of {student} is not that of {TEACHER}", "distil the shipped teacher")
    made_by = {}
    if distilled is not None:
        before = read_run(distilled, MODEL)
        command = _command(f"distill --conf sprites/cfg -o {distilled}", before, "features")
        made_by["CFG distillation"] = (command, before, distilled / METRICS)
    command = _command(f"distill --conf sprites/restricted_meanflow -o {student}", run, "teacher", "features")
    made_by["few steps"] = (command, run, student / METRICS)
    remarks = [remark] if distilled else [remark, NOT_KEPT]
    with atomic_folder(output) as folder:
        shutil.copytree(files.contents.components[own].folder, folder, dirs_exist_ok=True)
        for name in ("conditioning", "scheduler"):
            shutil.copytree(student / name, folder / name)
        about = STUDENT.format(steps=run["call"]["steps"])
        card = _card("sprites/student", about, made_by, _scores(results, "sampler"), remarks, machine)
        (folder / "README.md").write_text(card, encoding="utf-8")
        parents = run["parents"] | {"pipeline": sha256_file(SHIPPED / "teacher" / RUN_FILE)}
        _finish(folder, run, MODEL, parents, call=run["call"], pipeline=TEACHER)


def ship_predictor(predictor: Path, results: Path | None, output: Path, remark: str = "") -> None:
    """Write the predictor to `output`, with its card; arguments and errors as for `ship_student`."""
    run = read_run(predictor, PREDICTOR)
    command = _command("train-predictor --conf sprites", run, "student", "features")
    stages = [stage for stage in STAGES if run["config"][stage]["steps"] != 0]
    made_by = {f"predictor, {stage}": (command, run, predictor / CHECKPOINTS / stage / METRICS) for stage in stages}
    with atomic_folder(output) as folder:
        for name in (CONFIG_FILE, WEIGHTS_FILE, SCHEDULE_FILE, SCALARS_FILE):
            if name != SCALARS_FILE or (predictor / name).exists():
                shutil.copy(predictor / name, folder / name)
        steps = " and ".join(str(grid["steps"]) for grid in run["searched_on"])
        searched = f"Schedules were searched on grids of {steps} steps."
        card = _card("sprites/predictor", INSTEAD, made_by, _scores(results, "with a predictor"), [searched, remark])
        (folder / "README.md").write_text(card, encoding="utf-8")
        told = {key: run[key] for key in ("searched_on", "fitted") if key in run}
        _finish(folder, run, PREDICTOR, run["parents"], **told)


def ship_scalars(scalars: Path, output: Path, remark: str = "") -> None:
    """Write the fitted scalars to `output`, with a card that has the error of each list; arguments and errors as for
    `ship_student`."""
    run, made = read_run(scalars, SCALARS), Multistep.from_pretrained(scalars).config
    command = _command("train-predictor forecaster=multistep", run, "student", "features", "steps", "guidance_range")
    of_reuse = {(on["steps"], *on["full_steps"]): on["of_reuse"] for on in run.get("compared", [])}
    rows = []
    for each in sorted(made.lists, key=lambda each: (each.steps, len(each.full_steps))):
        share = of_reuse.get((each.steps, *each.full_steps))
        cells = ["" if number is None else f"{number:.{places}f}" for number, places in ((each.error, 3), (share, 2))]
        rows.append(f"| {' '.join(map(str, each.full_steps))} of {each.steps} | {' | '.join(cells)} |")
    low, high = made.guidance_range
    about = NO_PASS.format(low=low, high=high)
    with atomic_folder(output) as folder:
        for name in (CONFIG_FILE, SCHEDULE_FILE):
            shutil.copy(scalars / name, folder / name)
        made_by = {"scalars": (command, run, scalars / METRICS)}
        card = _card("sprites/scalars", about, made_by, [], [remark, "\n".join([*ERRORS, *rows])])
        (folder / "README.md").write_text(card, encoding="utf-8")
        told = {key: run[key] for key in ("searched_on", "compared") if key in run}
        _finish(folder, run, SCALARS, run["parents"], **told)


def ship_decoder(decoder: Path, output: Path, remark: str = "") -> None:
    """Write the decoder to `output`, with its card; arguments and errors as for `ship_student`."""
    found, teacher = read_decoder(decoder), read_model(TEACHER)
    component, run = teacher.contents.components["vae"], found.run
    wide = read_json(component.folder / component.config_name)
    check_decoder(found, component.cls, wide, teacher.hashes, TEACHER)
    further = ("start", "seed", "clips", "train.steps", "train.learning_rate") if run["config"].get("start") else ()
    command = _command(f"distill --conf sprites/decoder -o {decoder}", run, "features", *further)
    sizes = [
        sum(math.prod(shape) for name, (_, shape) in safetensors_header(file).items() if not name.startswith(ENCODING))
        for file in (found.folder / DECODER_WEIGHTS, *component.weight_files)
    ]
    about = NARROW.format(
        ours=sizes[0],
        theirs=sum(sizes[1:]),
        narrow=found.config["block_out_channels"],
        wide=wide["block_out_channels"],
        psnr=run["measured"]["psnr_db"],
        clips=run["measured"]["clips"],
    )
    with atomic_folder(output) as folder:
        for name in (CONFIG_FILE, DECODER_WEIGHTS):
            shutil.copy(found.folder / name, folder / name)
        card = _card("sprites/decoder", about, {"decoder": (command, run, decoder / METRICS)}, [], [remark])
        (folder / "README.md").write_text(card, encoding="utf-8")
        told = {key: run[key] for key in ("family", "autoencoder", "measured")}
        _finish(folder, run, DECODER, run["parents"], **told)


def _command(words: str, run: Mapping[str, Any], *keys: str) -> str:
    """That which `run` is of, with these of its settings; a script's, whose settings are others, as it stands."""
    config = {**run["config"], **{f"train.{key}": value for key, value in run["config"].get("train", {}).items()}}
    if not config.keys() >= set(keys):
        return run["command"]
    given = {key: config[key] for key in keys if config[key] is not None}
    return " ".join(["vidaccel", words, *(f"{key}={value}".replace(" ", "") for key, value in given.items())])


def _finish(folder: Path, run: Mapping[str, Any], format: str, parents: Mapping[str, str], **extra) -> None:
    """run.json, which says of the training what the training said."""
    write_run(
        folder,
        format=format,
        command=run["command"],
        config=run["config"],
        seed=run["seed"],
        started=datetime.fromisoformat(run["started"]),
        parents=parents,
        **extra,
    )


def _scores(results: Path | None, kind: str) -> list[str]:
    """Markdown about the scored rows of a `kind_of` that begins so; nothing where there are none."""
    found = json.loads(results.read_text(encoding="utf-8")) if results else {"runs": []}
    runs = [run for run in found["runs"] if run["total"] is not None and kind_of(run).startswith(kind)]
    if not runs:
        return []
    return ["## How it scores", "", f"Rows of `{found['command']}`.", *SCORES, *map(_scores_line, runs), ""]


def _card(
    title: str,
    about: str,
    made_by: Mapping[str, tuple[str, dict, Path]],
    scores: list[str],
    remarks: list[str],
    machine: str | None = None,
) -> str:
    """Markdown; `made_by` has, for each stage of training, its command, its run.json and its metrics, if it has any."""
    commands = {command: run for command, run, _ in made_by.values()}
    stages = [trained_stage(stage, metrics) for stage, (_, _, metrics) in made_by.items() if metrics.is_file()]
    seed = next(iter(commands.values()))["seed"]
    lines = [f"# {title}", "", about, "", "## How it was made", ""]
    lines += [*(f"    {command}" for command in commands), "", *made_here(stages, seed, machine)]
    for remark in filter(None, remarks):
        lines += [remark, ""]
    lines += scores
    for command, run in commands.items():
        lines += [f"## Settings of `{command}`", "", "```yaml", _yaml(run["config"]), "```", ""]
    return "\n".join(lines)


def _scores_line(run: Mapping[str, Any]) -> str:
    low, high = run["intervals"]["total"]
    scores = " | ".join(f"{run[name]:.1f}" for name in ("semantic", "quality", "total"))
    error = run["fidelity"]["latent_relative_l2"] if run["fidelity"] else 0.0  # the baseline itself
    return f"| {run['method']} | {passes_text(run)} | {scores} | {low:.1f} to {high:.1f} | {error:.3f} |"


def _yaml(config: Mapping[str, Any]) -> str:
    return OmegaConf.to_yaml(OmegaConf.create(dict(config))).rstrip()
