"""Few-step students at equal training time: `python -m studies.distill --teacher FOLDER --features FOLDER ...`.

Each row is written to the results file as soon as it is measured, and the same command again goes on where it was
stopped. `--rows rollout-0.2 --seeds 3` trains chosen students of the grid with more seeds, `--cost` measures what a
training step costs instead; both add to the same file.
"""

import shlex
from collections.abc import Iterable
from dataclasses import replace
from pathlib import Path
from typing import Annotated

import typer

from studies.distill.cost import cost as cost_of
from studies.distill.results import Results, digest
from studies.distill.study import GRID, Student, Study, shaping
from vidaccel.artefacts import RUN_FILE, read_run, sha256_file
from vidaccel.cli.common import Debug, quiet_libraries, reported
from vidaccel.collect.features import FORMAT as FEATURES
from vidaccel.config import loader as configuration
from vidaccel.config.distill import DistillConfig
from vidaccel.errors import UserError, nearest
from vidaccel.models.files import read_model

app = typer.Typer()


@app.command()
@reported
def main(
    teacher: Annotated[str, typer.Option(help="Model folder, not CFG-distilled.")],
    features: Annotated[Path, typer.Option(help="Encoded clips, by `vidaccel collect-features`.")],
    output: Annotated[Path, typer.Option("-o", "--output", help="Results file, .json; the table goes beside it.")],
    work: Annotated[Path, typer.Option(help="Folder for models, checkpoints and latents, not in the repository.")],
    overrides: Annotated[list[str] | None, typer.Argument(metavar="[KEY=VALUE]...", help="Of both trainings.")] = None,
    minutes: Annotated[float, typer.Option(min=0, help="Training time of each student.")] = 4.0,
    cfg_minutes: Annotated[float, typer.Option(min=0, help="Of the CFG distillation.")] = 4.0,
    prompts: Annotated[int, typer.Option(min=1, help="Held-out prompts.")] = 64,
    rows: Annotated[list[str] | None, typer.Option(help=f"A student: {', '.join(GRID)}. Else all.")] = None,
    seeds: Annotated[int, typer.Option(min=1, help="Trainings of each, with seeds 0, 1, ...")] = 1,
    conf: Annotated[str, typer.Option(help="Of the students.")] = "sprites/restricted_meanflow",
    cfg_conf: Annotated[str, typer.Option(help="Of the CFG distillation.")] = "sprites/cfg",
    cost: Annotated[bool, typer.Option("--cost", help="Measure what a training step costs, and nothing else.")] = False,
    repeats: Annotated[int, typer.Option(min=1, help="Rounds of --cost.")] = 20,
    debug: Debug = False,
) -> None:
    """Distil at equal time, sample at few steps, score, and write it down."""
    quiet_libraries()
    if output.suffix != ".json":
        raise UserError(f"{output} is not a .json", "name the results file: -o NAME.json")
    students = _chosen(rows, seeds)
    read_run(features, FEATURES)
    places = {"teacher": teacher, "features": str(features)}
    cfg = replace(settings_of(cfg_conf, "cfg", overrides), **places)
    student = replace(settings_of(conf, "mean_velocity", overrides), **places)
    shared = {"minutes": minutes, "cfg_minutes": cfg_minutes, "prompts": prompts}
    hashes = {"teacher": digest(dict(read_model(teacher).hashes)), "features": sha256_file(features / RUN_FILE)}
    made_of = hashes | shared | {"cfg": shaping(cfg), "student": shaping(student)}
    options = places | {"work": work, "output": output, "conf": conf, "cfg-conf": cfg_conf} | shared
    grid = [*_flat(("--rows", row) for row in rows or []), "--seeds", seeds]
    words = [*(["--cost", "--repeats", repeats] if cost else grid), *(overrides or [])]
    results = Results(output, made_of, command_line(options, words))
    if not cost:
        Study(cfg, student, work / digest(made_of)[:12], results).run(students)
    elif results.document["cost"] is None:
        results.set_cost(cost_of(student, repeats))
    typer.echo(f"{output}: {len(results.document['rows'])} rows; {output.with_suffix('.md')}: their table")


def command_line(options: dict[str, object], words: Iterable[object]) -> str:
    """The command that was given; of a place on this machine the name alone."""
    given = map(str, [*_flat((f"--{name.replace('_', '-')}", value) for name, value in options.items()), *words])
    return shlex.join(["python", "-m", "studies.distill", *(_without_place(word) for word in given)])


def _without_place(word: str) -> str:
    return Path(word).name if Path(word).is_absolute() else word


def _flat(pairs: Iterable[tuple[str, object]]) -> list[object]:
    return [word for pair in pairs for word in pair]


def settings_of(conf: str, method: str, overrides: list[str] | None) -> DistillConfig:
    """A distillation's settings, with the way to the derivative chosen as `vidaccel distill` does in one process."""
    config = configuration.load("distill", DistillConfig, conf, overrides or [])
    if config.method != method:
        raise UserError(f"{conf} is of method {config.method}, not {method}", "give another --conf or --cfg-conf")
    if method != "mean_velocity":
        return config
    own = replace(config.mean_velocity, derivative=config.mean_velocity.derivative or "exact")
    return replace(config, mean_velocity=own)


def _chosen(rows: list[str] | None, seeds: int) -> list[Student]:
    for name in rows or []:
        if name not in GRID:
            raise UserError(f'there is no student "{name}" in the grid', nearest(name, GRID))
    return [Student(*GRID[name], seed) for name in rows or GRID for seed in range(seeds)]


if __name__ == "__main__":
    app(prog_name="python -m studies.distill")
