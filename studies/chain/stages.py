"""The stages of a chain, each by the product's own functions, and each within its time.

    work/round-1/autoencoder   the shipped model, its autoencoder and words trained further (only where named)
    work/round-1/teacher       that model, its transformer trained on the new latents (only where named)
    work/round-1/cfg           the teacher, its guidance distilled into one pass
    work/round-1/student       that model in few steps
    work/round-1/scalars       fitted to the student's runs
    work/round-1/predictor     a network trained on top of them
    work/round-1/scores        of held-out prompts

A round that was stopped is gone on with; one that is finished is followed by another, whose stages start from what the
last one made.
"""

import json
import logging
import time
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path

import torch

from studies.chain import pieces, scoring
from studies.chain.settings import MAKING, STAGES, ChainConfig
from studies.late import measured, open_autoencoder
from vidaccel.artefacts import RUN_FILE, read_json, read_run, write_json
from vidaccel.collect.bank import Bank, world_bank
from vidaccel.config import loader as configuration
from vidaccel.config.distill import DistillConfig
from vidaccel.config.generate import GenerateConfig
from vidaccel.config.predictor import PredictorConfig
from vidaccel.errors import UserError
from vidaccel.models.loading import LoadedPipeline, load_pipeline, resolve_device
from vidaccel.models.saving import FORMAT as MODEL
from vidaccel.train.clips import Clips
from vidaccel.train.distill import GATES_FILE, distill
from vidaccel.train.metrics import FILE as METRICS
from vidaccel.train.predictor.multistep import train_multistep
from vidaccel.train.predictor.training import train_served
from vidaccel.worlds import scorer_named, world
from vidaccel.worlds.sprites.make import make_model
from vidaccel.worlds.sprites.settings import CONF as WORLD_CONF
from vidaccel.worlds.sprites.settings import SpritesConfig

log = logging.getLogger(__name__)
SHORTEST = 2.0
"""Seconds of training under which a stage is not begun."""
TRAINED = 0.7
"""Share of what is left for a network that it is trained in; in the rest scalars are fitted on top of it."""
MADE_BY = {
    "autoencoder": ("autoencoder",),
    "teacher": ("teacher",),
    "cfg": ("cfg",),
    "few_steps": ("student",),
    "forecasters": ("scalars", "predictor"),
    "score": ("scores",),
}
"""The folders of each stage."""


@dataclass
class Chain:
    """One call."""

    config: ChainConfig
    started: float

    def __post_init__(self) -> None:
        self.work = Path(self.config.work)
        self.device = resolve_device(self.config.device)
        if self.device.type == "cuda":
            torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = True
        rounds = sorted(self.work.glob("round-*"), key=_number)
        unfinished = rounds and not (rounds[-1] / "finished.json").exists()
        self.earlier = rounds[:-1] if unfinished else rounds
        self.round = rounds[-1] if unfinished else self.work / f"round-{len(rounds) + 1}"
        self.ends = self.config.ends()

    def run(self) -> dict[str, object]:
        """Every stage; returns what is to be said of them."""
        self.round.mkdir(parents=True, exist_ok=True)
        report: dict[str, object] = {"device": self._device_name(), "round": self.round.name, "stages": {}}
        for stage in (stage for stage in (*MAKING, *STAGES) if stage in self.config.stages):
            before = self._passed()
            self._check_time(stage)
            self._say(f"{stage} until {self.ends[stage]:.0f} s")
            outcome = getattr(self, f"_{stage}")()
            report["stages"][stage] = {"seconds": round(self._passed() - before, 1), "outcome": outcome}  # type: ignore[index]
            write_json(self.round / "chain.json", report)
            self.export()
        write_json(self.round / "finished.json", {"minutes": self.config.minutes, "seconds": round(self._passed(), 1)})
        return report

    def export(self) -> list[Path]:
        """The pieces of what there is, each from the newest round that made it."""
        folders = {name: self.newest(name) for names in MADE_BY.values() for name in names}
        found = {name: folder for name, folder in folders.items() if folder is not None} | {"notes": self._notes()}
        size = self.config.piece_mib * 2**20
        return pieces.pack(found, world(self.config.world).SHIPPED / "teacher", Path(self.config.output), size)

    def newest(self, name: str) -> Path | None:
        """The newest finished folder of that name."""
        last = {"scores": "scores.json"}.get(name, RUN_FILE)
        rounds = reversed([*self.earlier, self.round])
        return next((each / name for each in rounds if (each / name / last).exists()), None)

    def _notes(self) -> Path:
        """What each round says of itself, in one folder."""
        notes = self.work / "notes"
        for folder in (*self.earlier, self.round):
            for path in (*folder.glob("*.json"), *folder.glob(f"*/{GATES_FILE}"), *folder.glob("*/metrics.jsonl")):
                to = notes / folder.name / path.relative_to(folder)
                to.parent.mkdir(parents=True, exist_ok=True)
                to.write_bytes(path.read_bytes())
        notes.mkdir(parents=True, exist_ok=True)
        return notes

    # The stages

    def _autoencoder(self) -> str:
        """Words and autoencoder of the newest model, then lamps as they come through it, and when they are settled."""
        start = self.newest("teacher") or self.newest("autoencoder") or self._shipped("teacher")
        minutes = self._minutes_left("autoencoder")
        words = [f"autoencoder.clips.minutes={0.6 * minutes}", f"autoencoder.decoder.minutes={0.4 * minutes}"]
        words += ["teacher.train.minutes=null", "teacher.train.steps=0", "score_prompts=1", "steps=1"]
        made = self._made("autoencoder", start, [*words, *self.config.autoencoder])
        found = measured(open_autoencoder(str(made)).to(self.device), 16, 0)
        write_json(self.round / "late.json", {name: row._asdict() for name, row in found.items()})
        return "\n".join(f"{name}: d {row.d:.1f}, settled at {row.t:.2f}" for name, row in found.items())

    def _teacher(self) -> str:
        """The transformer of the newest model on the latents of its autoencoder."""
        start = self.newest("autoencoder") or self.newest("teacher")
        if start is None:
            raise UserError("teacher, and there is no autoencoder yet", "run stages=[autoencoder,teacher]")
        words = ["text.train.steps=0", f"teacher.train.minutes={self._minutes_left('teacher')}"]
        for part in ("images", "clips", "decoder"):
            words += [f"autoencoder.{part}.minutes=null", f"autoencoder.{part}.steps=0"]
        made = self._made("teacher", start, [*words, *self.config.teacher])
        scores = (read_json(made / file, "run the stage again") for file in ("score.json", "score-lamps.json"))
        return "\n".join(", ".join(f"{key} {row[key]['mean']:.1f}" for key in row) for row in scores)

    def _made(self, stage: str, start: Path | str, words: list[str]) -> Path:
        """A model folder by the world's own stages, which go on where a call was stopped."""
        done, work = self.round / stage, self.round / f"making-{stage}"
        if not (done / RUN_FILE).exists():
            words = [f"start={start}", f"device={self.config.device}", *words]
            make_model(configuration.load(WORLD_CONF, SpritesConfig, self.config.making, words), work)
            (work / "model").rename(done)
        return done

    def _minutes_left(self, stage: str) -> float:
        return max(self.ends[stage] - self._passed() - self.config.reserve, SHORTEST) / 60

    def _cfg(self) -> str:
        self._distilled("cfg", "cfg", "sprites/cfg", self.config.cfg, self._teacher_name(), self._start("cfg"))
        return self._gates("cfg")

    def _few_steps(self) -> str:
        teacher = self._of_teacher("cfg")
        if teacher is None:
            raise UserError("few_steps, and there is no CFG-distilled model yet", "run stages=[cfg,few_steps]")
        self._distilled(
            "few_steps",
            "student",
            "sprites/restricted_meanflow",
            self.config.few_steps,
            str(teacher),
            self._start("student"),
        )
        return self._gates("student")

    def _distilled(
        self, stage: str, name: str, conf: str, overrides: list[str], teacher: str, start: str | None
    ) -> None:
        if (self.round / name / RUN_FILE).exists():
            return
        config = configuration.load("distill", DistillConfig, conf, ["train.steps=null", *overrides, "train.minutes=1"])
        made_of = {"world": self.config.world, "scenes": self.config.scenes, "captions": self.config.captions}
        clips = Clips(self._clips, made_of, self._held_out)
        left = self.ends[stage] - self._passed() - self.config.reserve
        train = replace(
            config.train, minutes=max(left, SHORTEST) / 60, sample_every=0, save_every=1000, evaluate_every=10**9
        )
        config = replace(
            config,
            teacher=teacher,
            start=start,
            seed=self.config.seed + 1000 * len(self.earlier),
            gate_runs=None if config.method == "cfg" else self.config.runs,  # whose gates take none
            train=train,
        )
        distill(config, self.round / name, self.config.device, clips)

    def _forecasters(self) -> str:
        return "\n".join([*self._scalars(), *self._network()])

    def _network(self) -> list[str]:
        """Trained in what is left of the stage's time."""
        left = self.ends["forecasters"] - self._passed() - self.config.reserve / 2
        if left < SHORTEST:
            return ["no time was left for a network"]
        words = ["pairs=served", "mse.steps=null", "adversarial.steps=0", f"student={self._student()}"]
        config = configuration.load(
            "train-predictor", PredictorConfig, self.config.world, [*words, *self.config.learned, "mse.minutes=1"]
        )
        seed = self.config.seed + 1000 * len(self.earlier)
        minutes = TRAINED * left / 60  # then scalars are fitted on top
        config = replace(config, seed=seed, mse=replace(config.mse, minutes=minutes, save_every=1000))
        loaded = load_pipeline(self._student(), device=self.config.device, dtype="float32")
        found = train_served(loaded, self._clips, config, self.round / "predictor")
        return [f"network at {each}" for each in found]

    def _scalars(self) -> list[str]:
        student, made = self._student(), []
        half = (self._passed() + self.ends["forecasters"]) / 2  # the other half is the network's
        for steps in self.config.grids:
            before = self._passed()
            config = configuration.load(
                "train-predictor",
                PredictorConfig,
                self.config.world,
                ["forecaster=multistep", f"student={student}", f"steps={steps}", *self.config.multistep],
            )
            found = train_multistep(config, self.round / "scalars", self.config.device)
            made += [
                f"{s.budget} of {s.steps}: {s.expected_error:.3f} at {' '.join(map(str, s.full_steps))}" for s in found
            ]
            took = self._passed() - before
            if self._passed() + took > half:
                self._say(f"a grid took {took:.0f} s: no time is left for another")
                break
        return made

    def _score(self) -> str:
        student = self._student()
        folder = self.round / "scores"
        config = self.config
        teacher_of = self.newest("teacher")
        shared = (teacher_of.parent / "teacher-scores") if teacher_of else self.work / "scores"
        shared.mkdir(parents=True, exist_ok=True)
        folder.mkdir(parents=True, exist_ok=True)
        scorer = config.scorer or config.world
        of = scorer.replace(config.world, "", 1).replace("/", "-")
        rows: dict[str, list] = {}
        texts = scorer_named(scorer).held_out_prompts(config.prompts)
        with scoring.workers(max(1, min(14, (torch.get_num_threads() if self.device.type == "cpu" else 14)))) as pool:

            def row(name: str, loaded: LoadedPipeline, given: GenerateConfig, file: Path) -> None:
                rows[name] = scoring.score_row(loaded, given, scorer, config.prompts, config.score_batch, file, pool)
                report = scoring.summary(scorer, texts, rows)
                scoring.write_summary(folder, report, config.prompts)
                self._say(scoring.table({name: report[name]}))

            teacher = load_pipeline(self._teacher_name(), device=config.device, dtype="float32")
            row("teacher-50", teacher, GenerateConfig(model=str(teacher.source)), shared / f"teacher-50{of}.jsonl")
            loaded = load_pipeline(student, device=config.device, dtype="float32")
            for steps in config.score_steps:
                if self._passed() > self.ends["score"] - 2:
                    self._say(f"no time is left to score {steps} steps")
                    break
                given = GenerateConfig(model=str(student), steps=steps)
                row(f"student-{steps}", loaded, given, folder / f"student-{steps}{of}.jsonl")
        return scoring.table(scoring.summary(scorer, texts, rows))

    # What they share

    @cached_property
    def _teacher_model(self) -> LoadedPipeline:
        return load_pipeline(self._teacher_name(), device=self.config.device, dtype="float32")

    def _teacher_name(self) -> str:
        return str(self.newest("teacher") or self._shipped("teacher"))

    def _of_teacher(self, name: str) -> Path | None:
        """The newest of its kind, unless a teacher was made since."""
        newest, teacher = self.newest(name), self.newest("teacher")
        made_since = newest and teacher and _number(teacher.parent) > _number(newest.parent)
        return None if made_since else newest

    def _start(self, name: str) -> str | None:
        """What a distillation goes on from: what there is of its kind and teacher, or what ships; a new teacher's first
        one starts from the teacher."""
        if (own := self._of_teacher(name)) is not None:
            return str(own)
        return None if self.newest("teacher") else self._shipped("student")

    @cached_property
    def _clips(self) -> Bank:
        bank = world_bank(self._teacher_model, self.config.scenes, self.config.captions, self._fresh())
        if bank is None:
            raise UserError(f"{self._teacher_model.source} is no model of {self.config.world}", "name its world")
        self._say(f"{len(bank)} clips are encoded")
        return bank

    @cached_property
    def _held_out(self) -> Bank | None:
        return world_bank(self._teacher_model, self.config.held_out, 1, self.config.seed, "held_out")

    def _fresh(self) -> int:
        """Every round sees clips of its own."""
        return self.config.seed + len(self.earlier)

    def _student(self) -> str:
        if (own := self._of_teacher("student")) is not None:
            return str(own)
        if self.newest("teacher"):
            raise UserError("there is no student of the new teacher yet", "run stages=[cfg,few_steps]")
        return self._shipped("student")

    def _shipped(self, name: str) -> str:
        return f"{self.config.world}/{name}"

    def _gates(self, name: str) -> str:
        found = read_json(self.round / name / GATES_FILE, "run the stage again")
        gates = [f"{gate['value']:.3f} {gate['name']} (gate {gate['at_least']:g})" for gate in found["gates"]]
        return "\n".join([self._speed(name), *gates])

    def _speed(self, name: str) -> str:
        """Steps that were made, and samples a second of the second half of them."""
        lines = [json.loads(line) for line in (self.round / name / METRICS).read_text().splitlines()]
        last, middle = lines[-1], lines[len(lines) // 2]
        took, steps = last["seconds"] - middle["seconds"], last["step"] - middle["step"]
        size = read_run(self.round / name, MODEL)["config"]["train"]["batch_size"]
        rate = f"{size * steps / took:,.0f}" if took else "unknown"
        return f"{last['step']} steps of {size} samples in {last['seconds']:.0f} s, {rate} samples/s at the end"

    def _passed(self) -> float:
        return time.monotonic() - self.started

    def _check_time(self, stage: str) -> None:
        left = self.ends[stage] - self._passed()
        if left < SHORTEST + (self.config.reserve if stage in (*MAKING, "cfg", "few_steps") else 0):
            raise UserError(
                f"{left:.0f} seconds are left for {stage}, which is too short",
                f"give it a larger share, or more than minutes={self.config.minutes:g}",
            )

    def _say(self, what: str) -> None:
        log.info("[%6.1f] %s", self._passed(), what)

    def _device_name(self) -> str:
        return torch.cuda.get_device_name() if self.device.type == "cuda" else "cpu"


def _number(folder: Path) -> int:
    """Of a round."""
    return int(folder.name.removeprefix("round-"))
