"""`benchmark --speedup [--quality]`: every row counted, timed in turn with the others, and scored, into results.json.

Three stages, each of which goes on where it was stopped, after settings were chosen (choosing.py) for rows with sweeps:

1. One generation of each row that nobody times: passes and FLOPs as they happen, what caches hold, peak memory up to
   the latents, beyond which all rows are the same. In the process that times it, a row has then warmed up.
2. Rounds: every row once, one after the other, so that the ratio of a row to the baseline is one of neighbours in time.
3. With --quality, videos of many prompts, each compared with the baseline's from the same noise and with those of the
   same model's own full run, which are therefore made first. Judging them is left to other processes where there are.

Of torchrun's processes the first counts, times and writes; all of them make and judge videos, each a batch at a time.

Whatever a row raises is its result. results.json is written again after each step.
"""

import itertools
import logging
import math
from collections.abc import Callable, Sequence
from concurrent.futures import Executor, Future
from datetime import UTC, datetime
from functools import partial
from pathlib import Path
from shutil import rmtree
from statistics import mean
from typing import Any

import torch

from vidaccel.artefacts import RUN_FILE, check_writable, read_json, say_finished, write_json, write_run
from vidaccel.bench import choosing, counterparts, vbench
from vidaccel.bench.baselines.parts import Unsupported
from vidaccel.bench.baselines.registry import calibrate, check_settings, one_at_a_time
from vidaccel.bench.environment import environment
from vidaccel.bench.generation import Size, TimedGeneration, reconstructed, timed_generation, writing_seconds
from vidaccel.bench.judges import Judged, judged, judges
from vidaccel.bench.measures.counting import Observer
from vidaccel.bench.measures.pairs import smallest_difference
from vidaccel.bench.measures.peak_memory import PeakMemory
from vidaccel.bench.measures.quality import perceptual_network, prompts_of, scorer_of
from vidaccel.bench.models import CALIBRATION_SEED, Models
from vidaccel.bench.output_folder import FORMAT, open_output_folder, parents
from vidaccel.bench.own_model import fitted, resolved, with_ancestors
from vidaccel.bench.reports.tables import not_run
from vidaccel.bench.results import EXAMPLES, RECONSTRUCTED, results_of, write_results
from vidaccel.bench.rows import NOT_RUN, STAGES, Row, Rows
from vidaccel.config.benchmark import BenchmarkConfig, MethodConfig
from vidaccel.config.checks import SIZE
from vidaccel.config.loader import to_dict
from vidaccel.data.video import write_video
from vidaccel.errors import ProcessLost, UserError
from vidaccel.models.calling import check_image, check_sizes
from vidaccel.models.loading import LoadedPipeline
from vidaccel.processes import by_first, gathered, locked_by_first, on_first, processes, rank, world
from vidaccel.progress import Progress

log = logging.getLogger(__name__)

RESULTS_FILE, CEILINGS_FILE = "results.json", "ceilings.json"
ATTEMPTS = 2
"""Times that a row may take the process with it."""


def run(
    config: BenchmarkConfig,
    folder: Path,
    quality: bool = False,
    device: str = "auto",
    command: str = "vidaccel benchmark",
) -> dict[str, Any]:
    """What results.json holds in the end; `command` is what the user typed, which it repeats.

    Raises:
        UserError: methods or settings that are not there, no model, or a folder of another benchmark or in use.
    """
    with processes(), locked_by_first(folder):
        models = Models(config, device)  # of both benchmarks: the device may have no room for a model twice
        if quality and choosing.chosen_for(config):
            config, asked = _to_choose(config, models)
            if asked is not None:
                log.info("choosing settings on prompts of their own: %s", folder / choosing.FOLDER)
                found = Benchmark(asked, folder / choosing.FOLDER, True, models, command).run()
                config = choosing.with_choices(config, found)
        return Benchmark(config, folder, quality, models, command).run()


def _to_choose(config: BenchmarkConfig, models: Models) -> tuple[BenchmarkConfig, BenchmarkConfig | None]:
    """The benchmark as it fits its model, and that which chooses for those of its rows that can run."""
    config = with_ancestors(config)
    models.begin(config)
    config = fitted(config, models)
    _, lacking = resolved(config.wanted(), models)
    return config, choosing.to_choose(config, lacking)


class Benchmark:
    """One output folder, begun or finished."""

    def __init__(self, config: BenchmarkConfig, folder: Path, quality: bool, models: Models, command: str):
        methods = config.wanted(swept=quality and config.sweeps)
        for name, method in methods.items():
            if method.cache is not None:
                check_settings(name, method)
        config = with_ancestors(config)
        self.models = models
        models.begin(config)
        self.config = config = fitted(config, models)
        methods, lacking = resolved(methods, self.models)
        if quality and config.equal_compute:
            can_run = {name: method for name, method in methods.items() if name not in lacking}
            added = _named_as_configured(counterparts.own_runs(can_run), config)
            methods |= {name: method for name, method in added.items() if name not in methods}
        self.methods, self.folder, self.quality, self.command = methods, folder, quality, command
        self._check_baseline(methods[config.baseline])
        if lacking:
            log.info("%s", not_run(lacking))
        if standing := self.models.student_stands_for_teacher(methods, lacking):
            log.info("%s", standing)
        self.timed_prompts = prompts_of(config, config.timed_prompts)
        self.scored_prompts = prompts_of(config, config.scored_prompts, config.stream) if quality else []
        if quality and (scorer := scorer_of(config)) is not None:
            for prompt in self.scored_prompts:
                scorer.meaning(prompt)  # now, and not when a row is counted
        if config.vbench:
            if not quality:
                raise UserError(
                    "vbench judges the videos that --quality makes, which is not asked for", "add --quality"
                )
            vbench.check(config.vbench)
        if quality:
            perceptual_network()  # now, and not after an hour of timing
        self.environment = environment(self.models.device)
        self.started = datetime.now(UTC)
        self._warmed_up: set[str] = set()
        """Rows, and decoders at sizes, that have run in this process."""
        self.parents = parents(config, methods)
        on_first(self._open_folder)
        rows = [Row(name, method, size) for size in config.videos for name, method in methods.items()]
        for row in rows:
            row.error = f"{NOT_RUN}{lacking[row.name]}" if row.name in lacking else None
        self.rows = Rows(folder, rows)
        self.rows.keep_whole_rounds()
        file = folder / CEILINGS_FILE
        self.ceilings: dict[str, Any] = read_json(file, "remove it") if file.exists() else {}

    def run(self) -> dict[str, Any]:
        if on_first(lambda: (self.folder / RUN_FILE).exists() and not self._unjudged):
            say_finished(self.folder)
            return on_first(lambda: read_json(self.folder / RESULTS_FILE, "remove the folder's run.json to go on"))
        self.rows.rows = by_first(self._measure)
        if self.quality:
            self._announce()
            self._score()
        return by_first(self._conclude)

    def _open_folder(self) -> None:
        check_writable(self.folder / RESULTS_FILE)
        open_output_folder(self.folder, self.config, self.quality, self.environment, self.parents)

    def _measure(self) -> list[Row]:
        """All rows, counted and timed."""
        self._count()
        if self.quality and self.config.equal_compute:
            self.rows.add(counterparts.few_step_rows(self.rows.without_error, self.config.methods))
            self.rows.keep_whole_rounds()
            self._count()
        self._time()
        return self.rows.rows

    def _conclude(self) -> dict[str, Any]:
        if self._unjudged:
            self._report()  # so that all the rest is there where VBench fails
            self._ask_vbench()
        rmtree(self.folder / "reference", ignore_errors=True)
        return self._finish()

    def _check_baseline(self, method: MethodConfig) -> None:
        """Without a baseline there is nothing to compare with: `UserError` if it cannot make the videos."""
        loaded = self.models.pipeline(method)
        check_image(loaded.family, self.config.images is not None)
        for size in self.config.videos:
            check_sizes(loaded, **dict(zip(SIZE, size, strict=True)))
            for index in range(len(self.config.prompts)):
                self.models.image(index, size)

    def _count(self) -> None:
        todo = [row for row in self.rows.without_error if row.counts is None]
        with Progress("counting", total=len(todo)) as bar:
            for row in todo:
                self._attempt(row, partial(self._count_row, row))
                bar.advance()

    def _count_row(self, row: Row) -> None:
        self.models.place(row.method)
        loaded = self.models.pipeline(row.method)
        seed = self.config.seed + CALIBRATION_SEED
        row.settings = calibrate(
            loaded, row.method, lambda: self._generate(row, [self.timed_prompts[0]], [seed], loaded, decode=False)
        )
        with (
            self.models.running(row.method, row.settings),
            PeakMemory(self.models.device, self.models.modules(row.method, loaded)) as peak,
            Observer(loaded) as seen,
        ):
            self._generate(row, [self.timed_prompts[0]], [self.config.seed], loaded, decode=False)
        if not self.config.compile:  # what is counted runs uncompiled
            self._warmed_up.add(row.id)
        full = sum(seen.full)
        other = {"predicted" if row.method.predicts else "skipped": len(seen.passes) - full}
        row.counts = {
            "full_steps": seen.full_steps,
            "passes": {"full": full, "predicted": 0, "skipped": 0} | other,
            "flops": seen.flops,
            "cache_bytes": seen.held,
            "peak_memory_bytes": peak.bytes,
            "parameters": self.models.parameters(row.method, loaded),
        }

    def _time(self) -> None:
        done = min((len(row.rounds) for row in self.rows.without_error), default=0)
        if done < self.config.rounds:
            self.models.place(self.methods[self.config.baseline])
            self._warm_up(self.methods[self.config.baseline], self.rows.rows[0].size)
        total = (self.config.rounds - done) * len(self.rows.without_error)
        with Progress("timing", total=total, live=False) as bar:
            for _ in range(done, self.config.rounds):
                for row in list(self.rows.without_error):
                    self._attempt(row, partial(self._time_row, row))
                    bar.advance()

    def _time_row(self, row: Row) -> None:
        spent: dict[str, list[float]] = {stage: [] for stage in STAGES}
        if self.models.place(row.method):
            self._warm_up(row.method, row.size)
        with self.models.running(row.method, row.settings) as loaded:
            # The model's own decoder, as the benchmark has it decode, ran in the warm-up.
            own = f"{row.method.decoder} {row.method.decode} {row.size}"
            cold = (row.method.decoder or row.method.decode) is not None and own not in self._warmed_up
            if cold or row.id not in self._warmed_up:
                self._generate(row, [self.timed_prompts[0]], [self.config.seed], loaded, decode=cold)
                self._warmed_up |= {row.id, own}
            for i, prompt in enumerate(self.timed_prompts):
                made = self._generate(row, [prompt], [self.config.seed + i], loaded, first=i)
                spent["text"].append(made.text_seconds)
                spent["denoise"].append(made.denoise_seconds)
                spent["decode"].append(made.decode_seconds)
                assert made.frames is not None
                if (writing := writing_seconds(made.frames[0], loaded.default("fps"))) is not None:
                    spent["write"].append(writing)
                if i == 0 and not row.rounds:
                    self.rows.save_frames(row, made.frames[0])
                    self.rows.save_clip(row, made.frames[0], loaded.default("fps"))
            # A few steps are over before the machine has settled: more of them, without the decoder.
            for i, prompt in itertools.cycle(enumerate(self.timed_prompts)):
                if sum(spent["denoise"]) >= self.config.timed_seconds:
                    break
                made = self._generate(row, [prompt], [self.config.seed + i], loaded, decode=False, first=i)
                spent["denoise"].append(made.denoise_seconds)
        stages = {stage: mean(seconds) if seconds else None for stage, seconds in spent.items()}
        row.rounds.append(stages | {"end_to_end": sum(seconds or 0 for seconds in stages.values())})

    def _warm_up(self, method: MethodConfig, size: Size) -> None:
        """One step of a model that was just brought onto the device, and its decoder: no clock sees their first use."""
        keys = ("weights", "model", "lora", "two_pass", "guidance", "guidance_2", "as_called")
        same: dict[str, Any] = {name: getattr(method, name) for name in keys}
        loaded = self.models.pipeline(method)
        fewest = MethodConfig(**same, steps=loaded.family.least_steps)
        prompt, image = self.timed_prompts[:1], self.models.image(0, size)
        with self.models.decoded(method, loaded):
            timed_generation(loaded, fewest, size, prompt, [self.config.seed], self.config, image=image)

    def _announce(self) -> None:
        """Say how long scoring may take, and what difference it will be able to see."""
        rows, scorer = self.rows.without_error, scorer_of(self.config)
        seconds = sum(
            (len(self.scored_prompts) - len(row.videos)) * mean(each["end_to_end"] for each in row.rounds)
            for row in rows
        )
        count = len({scorer.meaning(prompt) if scorer else prompt for prompt in self.scored_prompts})
        spreads = scorer.spreads if scorer else {}
        seen = [f"{smallest_difference(spread, count):.2g} points of {name}" for name, spread in spreads.items()]
        log.info(
            "scoring %d rows on %d prompts of %d meanings: %d min to make the videos one by one; in pairs, a "
            "difference of %s is seen four times in five",
            len(rows),
            len(self.scored_prompts),
            count,
            math.ceil(seconds / 60),
            " or ".join(seen) or f"{smallest_difference(1, count):.2g} standard deviations",
        )

    def _score(self) -> None:
        self.rows.rows = by_first(self._remake_references)
        total = sum(len(self.scored_prompts) - len(row.videos) for row in self.rows.without_error)
        with judges(self.config, self.models.device) as others, Progress("scoring", total=total) as bar:
            for row in self._in_scoring_order():
                waiting: list[list[Future[Judged]]] = []
                step = self._batch_size(row)
                firsts = range(len(row.videos), len(self.scored_prompts), step)
                batches = [range(first, min(first + step, len(self.scored_prompts))) for first in firsts]
                for place in range(0, len(batches), world()):
                    if row.error is None:
                        work = partial(
                            self._score_batches, row, batches[place : place + world()], others, waiting, bar.advance
                        )
                        self._attempt(row, work, written=False)
                self._attempt(row, partial(self._take, row, waiting, 0, bar.advance))
            by_first(partial(self._score_ceilings, others))

    @property
    def _unjudged(self) -> list[Row]:
        """Rows whose videos VBench is to judge and has not."""
        wanted = self.rows.without_error if self.config.vbench else []
        return [row for row in wanted if not all("vbench" in video for video in row.videos)]

    def _ask_vbench(self) -> None:
        assert self.config.vbench is not None
        rows = self._unjudged
        with Progress("VBench", total=len(rows)) as bar:
            for row in rows:
                files = self.rows.video_files(row, self.scored_prompts)
                if lost := next((file for file in files if not file.exists()), None):
                    raise UserError(f"{lost} is not there for VBench", "remove the folder, and start with vbench=...")
                prompts = {file.name: prompt for file, prompt in zip(files, self.scored_prompts, strict=True)}
                work = self.folder / "vbench" / row.file_name
                found = vbench.judge(self.config.vbench, files[0].parent, prompts, self.config.vbench_dimensions, work)
                row.vbench = found.overall
                for video, file in zip(row.videos, files, strict=True):
                    video["vbench"] = found.videos.get(file.name, {})
                self.rows.save(row)
                bar.advance()

    def _score_ceilings(self, others: Executor | None) -> None:
        """Of videos as the prompts ask for, where the world can make them, and of the same through the baseline's
        autoencoder."""
        scorer = scorer_of(self.config)
        if self.ceilings or scorer is None:
            return
        drawn = (scorer.example(prompt, i) for i, prompt in enumerate(self.scored_prompts))
        examples = [frames for frames in drawn if frames is not None]
        if len(examples) < len(self.scored_prompts):
            return
        method = self.methods[self.config.baseline]
        self.models.place(method)
        loaded = self.models.pipeline(method)
        latents = torch.zeros(1)
        for name, through in ((EXAMPLES, None), (RECONSTRUCTED, loaded)):
            futures = []
            for frames, prompt in zip(examples, self.scored_prompts, strict=True):
                frames = frames if through is None else reconstructed(through, frames)
                video = TimedGeneration(frames[None], latents, 0.0, 0.0)
                futures.append(_handed(others, self.config.scorer, prompt, video, None, {}))
            self.ceilings[name] = [future.result() for future in futures]
        write_json(self.folder / CEILINGS_FILE, self.ceilings)

    def _in_scoring_order(self) -> list[Row]:
        """Those first whose videos others are compared with."""
        rows = self.rows.without_error
        first = [row for row in rows if row.name == self.config.baseline]
        first += [row for row in counterparts.references(rows) if row not in first]
        return [*first, *(row for row in rows if row not in first)]

    def _score_batches(
        self,
        row: Row,
        batches: list[range],
        others: Executor | None,
        waiting: list[list[Future[Judged]]],
        advance: Callable[[], None],
    ) -> None:
        """One batch a process: make the videos and hand them on; take the marks of the batch before, or of this one
        where none but this process judges, or others make videos too."""
        if world() == 1:
            waiting.append(self._handed_on(row, batches[0], others))
            self._take(row, waiting, 0 if others is None else 1, advance)
            return

        def outcome(indices: range) -> list[Judged] | str:
            try:
                return [future.result() for future in self._handed_on(row, indices, others)]
            except Exception as error:  # which is the row's result, in every process
                return _one_line(error)

        for found in gathered(batches, outcome):
            if isinstance(found, str):
                raise _Elsewhere(found)
            row.videos += found
            for _ in found:
                advance()

    def _remake_references(self) -> list[Row]:
        """All rows; videos that others are still to be compared with are made again where only their marks are left, as
        where a row of a finished benchmark is measured anew."""
        todo = [(row, lost) for row in self._in_scoring_order() if (lost := self._lost_references(row))]
        if not todo:
            return self.rows.rows
        with Progress("videos to compare with", total=sum(len(lost) for _, lost in todo)) as bar:
            for row, lost in todo:
                for first in range(0, len(lost), step := self._batch_size(row)):
                    if row.error is None:
                        batch = lost[first : first + step]
                        self._attempt(row, partial(self._remake, row, batch), written=False)
                        bar.advance(len(batch))
        return self.rows.rows

    def _lost_references(self, row: Row) -> list[int]:
        """Prompts of which the row's video is gone, though another row is to be compared with it."""
        others = [other for other in self.rows.without_error if other is not row and other.size == row.size]
        if row.name != self.config.baseline:
            others = [other for other in others if counterparts.compared_with(other, row)]
        first = min((len(other.videos) for other in others), default=len(row.videos))
        kept = self._kept_as(row)
        return [
            index
            for index in range(first, len(row.videos))
            if not all(self.rows.reference_file(row.size, index, own).exists() for own in kept)
        ]

    def _remake(self, row: Row, indices: Sequence[int]) -> None:
        self._keep(row, indices, self._made(row, indices))

    def _kept_as(self, row: Row) -> list[Row | None]:
        """As what the row's videos are kept for others: itself, where the same model runs in full; None, as the
        baseline."""
        kept: list[Row | None] = [None] if row.name == self.config.baseline else []
        return [*kept, row] if row in counterparts.references(self.rows.without_error) else kept

    def _keep(self, row: Row, indices: Sequence[int], made: TimedGeneration) -> None:
        """The videos that others are compared with."""
        for place, index in enumerate(indices):
            for own in self._kept_as(row):
                self.rows.save_reference(row.size, index, _only(made, place), own)

    def _made(self, row: Row, indices: Sequence[int]) -> TimedGeneration:
        """The row's videos of these prompts."""
        prompts, seeds = [self.scored_prompts[i] for i in indices], [self._scored_seed + i for i in indices]
        with self.models.running(row.method, row.settings) as loaded:
            return self._generate(row, prompts, seeds, loaded, first=indices[0])

    def _handed_on(self, row: Row, indices: range, others: Executor | None) -> list[Future[Judged]]:
        """The videos of a batch, made and on their way to be judged."""
        made = self._made(row, indices)
        self._keep(row, indices, made)
        references = counterparts.references(self.rows.without_error)
        compared = [each for each in references if counterparts.compared_with(row, each)]
        baseline, batch = row.name == self.config.baseline, []
        kept, fps = self.rows.video_files(row, self.scored_prompts), self.models.pipeline(row.method).default("fps")
        for place, index in enumerate(indices):
            video = _only(made, place)
            files = {each.name: self.rows.reference_file(row.size, index, each) for each in compared}
            base = None if baseline else self.rows.reference_file(row.size, index)
            batch.append(_handed(others, self.config.scorer, self.scored_prompts[index], video, base, files))
            if self.config.keep_videos or self.config.vbench:
                assert video.frames is not None
                write_video(video.frames[0], kept[index], fps)
        return batch

    @staticmethod
    def _take(row: Row, waiting: list[list[Future[Judged]]], left: int, advance: Callable[[], None]) -> None:
        """The marks of all batches but the last `left`."""
        while len(waiting) > left:
            videos = [future.result() for future in waiting.pop(0)]
            row.videos += videos
            for _ in videos:
                advance()

    @property
    def _scored_seed(self) -> int:
        return self.config.seed if self.config.scored_seed is None else self.config.scored_seed

    def _batch_size(self, row: Row) -> int:
        together = not one_at_a_time(row.method) and self.models.pipeline(row.method).family.batched_autoencoder
        return self.config.batch_size if together and not self.config.images else 1

    def _generate(
        self,
        row: Row,
        prompts: list[str],
        seeds: list[int],
        loaded: LoadedPipeline,
        decode: bool = True,
        first: int = 0,
    ) -> TimedGeneration:
        """`first` is the place of the first prompt among those of the configuration, whose image is taken."""
        image = self.models.image(first, row.size)
        return timed_generation(loaded, row.method, row.size, prompts, seeds, self.config, decode, image)

    def _attempt(self, row: Row, work: Callable[[], None], written: bool = True) -> None:
        """Do a piece of a row's work, unless it has ended the process before; then all that is known is written, into
        results.json only if `written`.

        Whatever it raises becomes the row's error, but for the loss of another process.
        """
        row.attempts += 1
        if row.attempts > ATTEMPTS:
            row.error = f"the process ended {ATTEMPTS} times while it ran"
        self._save(row)
        try:
            if row.error is None:
                work()
            row.attempts = 0
        except (KeyboardInterrupt, ProcessLost):  # which is not the row's doing
            row.attempts = 0
            self._save(row)
            raise
        except Exception as error:  # a method may fail in any way, and that is then what there is to report about it
            row.error = _one_line(error)
            if row.error not in (other.error for other in self.rows.rows if other is not row):  # one line for all
                log.warning("%s: %s", row.name, row.error)
            log.debug("%s", row.name, exc_info=error)
        self._save(row)
        if written and rank() == 0:
            write_results(self.folder / RESULTS_FILE, self._results())

    def _save(self, row: Row) -> None:
        if rank() == 0:
            self.rows.save(row)

    def _results(self, compared: bool = False) -> dict[str, Any]:
        count, first = len(self.timed_prompts), self.config.seed
        if any(row.videos for row in self.rows.rows):
            count, first = len(self.scored_prompts), self._scored_seed
        seeds = [first + i for i in range(count)]
        found = results_of(
            self.config, self.rows, self.environment, seeds, self.scored_prompts, compared, self.ceilings
        )
        return {"command": self.command} | found

    def _finish(self) -> dict[str, Any]:
        results = self._report()
        write_run(
            self.folder,
            format=FORMAT,
            command=self.command,
            config=to_dict(self.config),
            seed=self.config.seed,
            started=self.started,
            parents=self.parents,
        )
        return results

    def _report(self) -> dict[str, Any]:
        """results.json with all comparisons, and the report of it."""
        from vidaccel.bench.reports.html import write_report

        results = self._results(compared=self.quality)
        write_results(self.folder / RESULTS_FILE, results)
        write_report(self.folder, results, self.rows)
        return results


class _Elsewhere(Exception):
    """What a row raised in any of the processes, in one line."""


def _named_as_configured(rows: dict[str, MethodConfig], config: BenchmarkConfig) -> dict[str, MethodConfig]:
    """A row that the configuration has, but not among those that are wanted, by its name there."""
    names = {id(row): name for row in rows.values() for name, other in config.methods.items() if other == row}
    return {names.get(id(row), name): row for name, row in rows.items()}


def _only(made: TimedGeneration, place: int) -> TimedGeneration:
    """One video of a batch."""
    assert made.frames is not None
    only = slice(place, place + 1)
    return TimedGeneration(made.frames[only], made.latents[only], 0.0, 0.0)


def _handed(others: Executor | None, *clip: Any) -> Future[Judged]:
    """The judgement of a clip, at once where there is nobody else to leave it to."""
    if others is not None:
        return others.submit(judged, *clip)
    done: Future[Judged] = Future()
    done.set_result(judged(*clip))
    return done


def _one_line(error: Exception) -> str:
    """What was said to a user in those words, anything else with the name of its kind."""
    if isinstance(error, UserError):
        return f"{error.message} ({error.hint})"
    text = " ".join(str(error).split())[:300]
    if isinstance(error, Unsupported | _Elsewhere):
        return text
    return f"{type(error).__name__}: {text}" if text else type(error).__name__
