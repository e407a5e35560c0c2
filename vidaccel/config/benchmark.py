"""Settings of `vidaccel benchmark`: its rows, and what they share."""

import math
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Any

from vidaccel.config.checks import DTYPES, SIZE, expand_paths, require, require_scales, require_seed, settle_times
from vidaccel.config.runtime import DECODE, RuntimeConfig
from vidaccel.errors import UserError, nearest
from vidaccel.forecasters.registry import FORECASTERS
from vidaccel.worlds import WORLDS

LEFT_OUT = ("branches", "attention")
"""What training-free caches of parts of the trunk leave out on skipped steps."""

FROM_FOLDERS = ("predictor", "multistep")
"""Forecasters that a folder holds, with schedules of their own; of the others `train-predictor forecaster=NAME` leaves
schedules alone."""

EQUAL_COMPUTE = "equal compute"
"""In place of a row's name: as many full steps of the same model as a row costs."""

OWN_DECODER = "own"
"""In place of a decoder's folder: that of the autoencoder itself."""

DIRECTED = ("latent_relative_l2", "psnr_db", "ssim", "lpips", "agreement")
"""Measures of likeness of which it is known which way is better: less or more motion is neither."""

VBENCH_DIMENSIONS = (
    "subject_consistency",
    "background_consistency",
    "motion_smoothness",
    "dynamic_degree",
    "aesthetic_quality",
    "imaging_quality",
    "overall_consistency",
    "temporal_flickering",
    "temporal_style",
    "human_action",
)
"""Of VBench, those that need nothing but a video and its prompt; the last three are for prompts of their kind."""

CACHES = {
    "pab": "diffusers:PyramidAttentionBroadcastConfig",
    "fastercache": "diffusers:FasterCacheConfig",
    "first_block": "diffusers:FirstBlockCacheConfig",
    "taylorseer": "diffusers:TaylorSeerCacheConfig",
    "magcache": "diffusers:MagCacheConfig",
    "seacache": "diffusers:SeaCacheConfig",
    "fora": "vidaccel.bench.baselines.fora:Fora",
    "teacache": "vidaccel.bench.baselines.teacache:TeaCache",
    "delta_dit": "vidaccel.bench.baselines.delta_dit:DeltaDiT",
    "cache_dit": "vidaccel.bench.baselines.cache_dit:DBCache",
}
"""Every training-free cache: name -> where its class is, which is imported when a row has it."""


@dataclass
class MethodConfig:
    """A row of the benchmark: how many steps, which of them run the whole transformer, and what runs on the others."""

    RENAMED = {"between": "on_skipped"}

    @staticmethod
    def renamed_values(settings: Mapping[str, Any]) -> dict[str, Any]:
        """What `settings` of earlier versions are now: the `trunk`'s output again is `reuse`, carried on `taylor`."""
        if settings.get("on_skipped") != "trunk":
            return {}
        return {"on_skipped": "taylor" if settings.get("order") else "reuse"}

    weights: str = "student"
    """Which weights it runs on: `teacher` or `student`. A teacher's single pass a step needs guidance distilled into
    it: `BenchmarkConfig.distilled`."""
    steps: int = 50
    """Sampler steps."""
    shift: float | None = None
    """Shift of the step grid; null is the model's own."""
    timesteps: list[float] | None = None
    """Times of the grid in place of `steps` and `shift`, from 1000 (noise) down, such as [1000, 757, 522]."""
    sigmas: list[float] | None = None
    """The same from 1 down, such as [1, 0.94, 0.85, 0.63]."""
    guidance: float | None = None
    """Classifier-free guidance scale g of this row alone."""
    guidance_2: float | None = None
    """That of the second of two transformers; null is that of `guidance` where the row says one, else the
    benchmark's."""
    two_pass: bool = False
    """true: two forward passes a step, with and without the prompt (classifier-free guidance)."""
    as_called: bool = False
    """true: in the steps and passes that the row's model is called with unless told, a teacher being `model` itself;
    `steps` and `two_pass` then hold only where nothing is loaded, in a plan."""
    full_steps: list[int] | None = None
    """Steps, counted from 0, that run the whole transformer; null: all, or those that `every` gives."""
    every: int | None = None
    """Steps 0, n, 2n, ... run the whole transformer."""
    budget: int | None = None
    """So many steps run the whole transformer: those that schedule.json lists in the folder of `predictor`, which a row
    of `reuse`, `taylor` or `linear` has to name itself."""
    full_share: float | None = None
    """In place of `budget`, about that share of however many steps there are: of the numbers that the predictor's own
    schedule.json has for so many steps, the nearest."""
    on_skipped: str = "predictor"
    """What runs on the other steps, beside embedders and output head: a forecaster by name (`predictor`, the learned
    one; `multistep`, fitted scalars, which answer the whole pass; `reuse`, the trunk's last output again; `taylor`,
    the last ones carried on; `linear`, a linear map fitted beforehand to the row's own sampling, with one pass a
    step), or a cache that gives again every block's residual
    `branches`, or every block's `attention` (whose blocks compute the rest)."""
    order: int = 0
    """Derivatives that are kept of each tensor beside its value: by a cache of branches (TaylorSeer), or by `taylor`,
    for which 0 is 1."""
    cache: str | None = None
    """A training-free cache, which then decides on its own by `settings`; `full_steps`, `every` and `on_skipped` say
    what that leads to, where it does not depend on the video, and only plans read them."""
    settings: dict[str, Any] = field(default_factory=dict)
    """Of that cache, by its own names."""
    sweep: dict[str, list[Any]] = field(default_factory=dict)
    """Settings with values that are tried as well, a row each, where quality is measured too."""
    at_most: float | None = None
    """Of a row with a sweep, full passes a video by FLOPs. Where quality is measured, one row stands for the sweep: of
    the values that cost no more, the one whose videos of choosing prompts are nearest to those of the model's own full
    run. Without such prompts (`choosing_prompts`) every value is a row."""
    model: str | None = None
    """Weights of this row alone, in place of the benchmark's teacher or student."""
    lora: list[str] | None = None
    """LoRA files that are added to the model of this row alone, each FILE or FILE:SCALE; [] adds none where the
    benchmark's `lora` adds some."""
    predictor: str | None = None
    """The predictor of this row alone: a folder, of fitted scalars where on_skipped=multistep, of schedules alone where
    there is nothing to train."""
    decoder: str | None = None
    """The folder of the distilled decoder that makes this row's frames, in place of the benchmark's; `own` is the
    autoencoder's own where the benchmark has another."""
    decode: str | None = None
    """How this row's latents become frames, in place of the benchmark's `decode`."""

    def __post_init__(self) -> None:
        expand_paths(self)
        require(self.weights in ("teacher", "student"), "weights", self.weights, "is teacher or student")
        settle_times(self, unless=50)
        require(self.steps >= 1, "steps", self.steps, "must be at least 1")
        require(self.shift is None or 0 < self.shift < math.inf, "shift", self.shift, "must be above 0 and finite")
        require_scales(self)
        require(self.every is None or self.every >= 1, "every", self.every, "must be at least 1")
        require(self.order >= 0, "order", self.order, "must be at least 0")
        require(self.decode in (None, *DECODE), "decode", self.decode, f"is one of {', '.join(DECODE)}, or null")
        known = (*FORECASTERS, *LEFT_OUT)
        require(self.on_skipped in known, "on_skipped", self.on_skipped, f"is one of {', '.join(known)}")
        fits = not (self.forecasts and self.two_pass and FORECASTERS[self.on_skipped].one_pass)
        require(fits, "on_skipped", self.on_skipped, "is for one pass a step")
        require(self.cache in (None, *CACHES), "cache", self.cache, f"is one of {', '.join(CACHES)}")
        require(self.cache is not None or not self.settings, "settings", self.settings, "are those of a cache")
        require(self.cache is not None or not self.sweep, "sweep", self.sweep, "is over settings of a cache")
        limit = self.at_most
        fits = limit is None or (bool(self.sweep) and 1 <= limit < math.inf)
        require(fits, "at_most", limit, "is a number of passes from 1 up, with a sweep, or null")
        if self.full_share is not None:
            alone = self.budget is None and self.every is None and self.full_steps is None and self.cache is None
            whose = " or ".join(FROM_FOLDERS)
            rule = f"is between 0 and 1, without budget, full_steps, every or cache, and with on_skipped={whose}"
            fits = 0 < self.full_share < 1 and self.on_skipped in FROM_FOLDERS
            require(alone and fits, "full_share", self.full_share, rule)
        if self.budget is not None:
            alone = self.every is None and self.full_steps is None and self.cache is None
            rule = f"is from 1 to {self.steps}, without full_steps, every or cache, and with a forecaster"
            require(alone and self.forecasts and 1 <= self.budget <= self.steps, "budget", self.budget, rule)
        if self.full_steps is not None:
            require(self.every is None, "every", self.every, "must be null where full_steps is set")
            ordered = self.full_steps == sorted(set(self.full_steps)) and self.full_steps[:1] == [0]
            rule = f"rises from 0, without repetition, to at most {self.steps - 1}"
            require(ordered and self.full_steps[-1] < self.steps, "full_steps", self.full_steps, rule)

    @property
    def planned(self) -> bool:
        """Whether what it computes is known before it runs."""
        return self.cache is None or self.every is not None or self.full_steps is not None

    @property
    def forecasts(self) -> bool:
        """Whether what runs on the steps that are not full is a forecaster."""
        return self.on_skipped in FORECASTERS

    @property
    def predicts(self) -> bool:
        """Whether the learned predictor takes part."""
        return self.cache is None and self.on_skipped == "predictor" and self.full_count() != self.steps

    def schedule(self) -> list[int] | None:
        """The steps that run the whole transformer; None where the settings alone do not say."""
        if not self.planned or self.by_folder:
            return None
        return list(range(0, self.steps, self.every or 1)) if self.full_steps is None else self.full_steps

    @property
    def by_folder(self) -> bool:
        """Whether a folder's own schedules say which steps run the whole transformer."""
        return self.budget is not None or self.full_share is not None

    def full_count(self) -> int | None:
        """How many steps run the whole transformer; of a share, as far as the settings alone say it."""
        if self.full_share is not None:
            return max(1, min(self.steps - 1, round(self.full_share * self.steps)))
        return self.budget if (schedule := self.schedule()) is None else len(schedule)

    def swept(self) -> dict[str, "MethodConfig"]:
        """This row for each value of its sweep but the one that it has, by what is to stand behind its name."""
        return {
            f" {key}={value}": replace(
                self, settings=self.settings | {key: value}, sweep={}, at_most=None, full_steps=None, every=None
            )
            for key, values in self.sweep.items()
            for value in values
            if value != self.settings.get(key)
        }


@dataclass
class BenchmarkConfig(RuntimeConfig):
    """`vidaccel benchmark`."""

    RENAMED = {"marker": "scorer"}

    family: str = "hunyuan_video"
    """Name of the model family, for a plan without a model; `model` has its own."""
    model: str | None = None
    """The teacher: a shipped model (sprites/teacher), a diffusers pipeline folder or, to run it, a hub id. A plan
    reads only its transformer's settings; null: `transformer`."""
    lora: list[str] | None = None
    """LoRA files that are added to `model` when it is loaded, each FILE or FILE:SCALE, for all rows that run on it and
    name none."""
    student: str | None = None
    """The distilled student, as `model`."""
    distilled: str | None = None
    """The teacher with guidance distilled into one pass; null: the teacher itself if it embeds its guidance, else the
    student sampled with r = t."""
    predictor: str | None = None
    """Folder of the trained predictor, or a shipped one (sprites/predictor)."""
    decoder: str | None = None
    """Folder of a distilled decoder that makes the frames of all rows but the baseline and those that name one; null is
    the autoencoder's own."""
    transformer: dict[str, Any] = field(default_factory=dict)
    """Arguments of the family's transformer class that are not its defaults."""
    compression: list[int] = field(default_factory=lambda: [4, 8])
    """[frames, pixels] of a video that the autoencoder makes one latent of."""
    text_tokens: dict[str, int] = field(default_factory=lambda: {"prompt": 256})
    """Tokens of each text, padding included, as the pipeline hands them to the transformer."""
    beside: dict[str, int] = field(default_factory=dict)
    """Parameters of what a pipeline holds beside the transformer, by what it is; plans name its size in bf16."""
    dtype: str = "bfloat16"
    """Of weights, activations and caches: `float32`, `bfloat16` or `float16`."""
    sizes: list[list[int]] | None = field(default_factory=lambda: [[129, 704, 704]])
    """Videos: [frames, height, width]; null is the size that the student, else the model, is made for."""
    num_frames: int | None = None
    """With `height` and `width`, one size in place of `sizes`, said as every other command is told it; what is left
    null is that of the first of `sizes`."""
    height: int | None = None
    """See `num_frames`."""
    width: int | None = None
    """See `num_frames`."""
    predictor_blocks: int = 2
    """Transformer blocks of the learned predictor that is planned with."""
    predictor_history: int = 1
    """Full steps that a planned predictor looks back on, 1 or 2: it holds the tokens of each."""
    methods: dict[str, MethodConfig] = field(default_factory=dict)
    """Rows, by name."""
    only: list[str] | None = None
    """Names of the rows that are wanted; null: all."""
    baseline: str = "cfg-50"
    """Name of the row that speedups are relative to, and whose videos the others' are compared with."""
    scorer: str | None = None
    """What scores videos beyond their likeness to the baseline's: `sprites`, for models of the shipped world."""
    prompts: list[str] = field(default_factory=list)
    """Prompts; where there are none the scorer's world has its own."""
    images: str | None = None
    """Of image to video: a folder of what the videos begin with, one for each of `prompts`, in the order of names."""
    seed: int = 0
    """Of the first prompt's noise; prompt i gets seed + i."""
    guidance: float | None = None
    """Classifier-free guidance scale g of all rows that name none; null is each model's own."""
    guidance_2: float | None = None
    """That of the second of two transformers; null is that of `guidance` where this is said."""
    negative_prompt: str | None = None
    """What rows of two passes lead away from; null is the model's own, else what the student leads away from. Students
    have theirs inside."""
    rounds: int = 3
    """Times that every row is timed, one after the other."""
    timed_prompts: int = 1
    """Prompts of a round."""
    timed_seconds: float = 0.75
    """Least that a row denoises in a round: its videos are made again until then, and the mean is what counts."""
    scored_prompts: int = 64
    """Prompts that quality is measured on: as many of `prompts` as there are."""
    scored_seed: int | None = None
    """Of the noise of the first of them, in place of `seed`: apart from the seeds that anything was trained or searched
    with."""
    stream: str = "report"
    """Which prompts of the scorer's world: `report`, held out of everything; `choose`, for choosing thresholds, grids,
    guidance and schedules, so that what is reported was chosen on other prompts."""
    endpoints: list[str] = field(
        default_factory=lambda: ["semantic", "pair", "total", "own_fidelity.latent_relative_l2"]
    )
    """Measures that rows are told apart by, named before anything is measured: scores, `fidelity.NAME` against the
    baseline's videos, `own_fidelity.NAME` against the same model's own full run,
    `vbench.DIMENSION`. Each gets a verdict, corrected for there being so many; all else gets an interval alone."""
    contrasts: dict[str, list[str]] = field(default_factory=dict)
    """Questions named beforehand: rows, and the rows that each is to be held against, by name; `equal compute` stands
    for few steps of the same model that cost as much. One correction is for all of them and all endpoints."""
    equal_compute: bool = False
    """Whether, where quality is measured, each row with predicted steps gets the rows to be held against: its model's
    own full run, and few steps of it that cost as much."""
    scoring_processes: int | None = None
    """Processes that score while the next videos are made; 0: none but this one; null: one for each core but one where
    models run on a GPU, else none."""
    sweeps: bool = True
    """Whether caches whose threshold sets their speed are scored at others too, as their rows say."""
    choosing_prompts: int = 32
    """Prompts, none of which is reported on, that values of sweeps are chosen on for rows with `at_most`: of the
    scorer's world, or those of `prompts` that follow the scored ones, of which there may be fewer."""
    keep_videos: bool = False
    """Whether the videos that quality is measured on stay: videos/ROW/PROMPT-N.mp4, as VBench wants them named."""
    vbench: str | None = None
    """Python of an environment in which VBench is installed: where quality is measured it judges the videos, which are
    then kept."""
    vbench_dimensions: list[str] = field(default_factory=lambda: list(VBENCH_DIMENSIONS[:7]))
    """What it judges them by, of those that it has for prompts of one's own."""
    batch_size: int = 8
    """Videos made together where they are only scored; a cache that decides by what it sees gets one at a time."""
    whole: bool | None = None
    """Random weights: true times the whole transformer, false one block of each kind; null: whole if it fits."""

    def __post_init__(self) -> None:
        expand_paths(self)
        super().__post_init__()
        require(self.sizes != [], "sizes", self.sizes, "must hold at least one size")
        for size in self.sizes or ():
            rule = "is a list of [frames, height, width]: sizes=[[81,480,832]], or num_frames=81 height=480 width=832"
            require(len(size) == 3 and min(size) >= 1, "sizes", size, rule)
        for key in SIZE:
            extent = getattr(self, key)
            require(extent is None or extent >= 1, key, extent, "must be at least 1, or null")
        lowest = min(self.compression, default=0)
        require(len(self.compression) == 2 and lowest >= 1, "compression", self.compression, "is [frames, pixels]")
        require(self.rounds >= 2, "rounds", self.rounds, "must be at least 2: one time has no spread")
        for key in ("predictor_blocks", "timed_prompts", "scored_prompts", "choosing_prompts", "batch_size"):
            require(getattr(self, key) >= 1, key, getattr(self, key), "must be at least 1")
        require(0 <= self.timed_seconds < math.inf, "timed_seconds", self.timed_seconds, "is in seconds, 0 or more")
        require(self.predictor_history in (1, 2), "predictor_history", self.predictor_history, "is 1 or 2")
        require(min(self.text_tokens.values(), default=1) >= 1, "text_tokens", self.text_tokens, "are at least 1 each")
        require(self.dtype in DTYPES, "dtype", self.dtype, f"is one of {', '.join(DTYPES)}")
        scored = self.scorer is None or self.scorer.partition("/")[0] in WORLDS
        require(scored, "scorer", self.scorer, f"is one of {', '.join(WORLDS)}, perhaps with /PROMPTS, or null")
        require_seed(self)
        if self.scored_seed is not None:
            require_seed(self, "scored_seed")
        require(self.stream in ("report", "choose"), "stream", self.stream, "is report or choose")
        for name in self.endpoints:
            group, _, measure = name.rpartition(".")
            known = not group or (group in ("fidelity", "own_fidelity") and measure in DIRECTED)
            known = known or (group == "vbench" and measure in VBENCH_DIMENSIONS)
            rule = f"is a score, vbench.DIMENSION or (own_)fidelity.NAME, NAME one of {', '.join(DIRECTED)}"
            require(known, "endpoints", name, rule)
        for name in self.vbench_dimensions:
            rule = f"is one of {', '.join(VBENCH_DIMENSIONS)}"
            require(name in VBENCH_DIMENSIONS, "vbench_dimensions", name, rule)
        for name in (*self.contrasts, *(other for others in self.contrasts.values() for other in others)):
            require(name in (EQUAL_COMPUTE, *self.methods), "contrasts", name, "is the name of a row, or equal compute")
        processes = self.scoring_processes
        require(processes is None or processes >= 0, "scoring_processes", processes, "must be at least 0, or null")
        require_scales(self)

    @property
    def videos(self) -> list[tuple[int, int, int]]:
        """`sizes`, where they are known."""
        assert self.sizes is not None
        return [(frames, height, width) for frames, height, width in self.sizes]

    def wanted(self, swept: bool = False) -> dict[str, MethodConfig]:
        """The wanted methods and, first, the baseline; with the rows of their sweeps behind each of them if asked for.

        Raises:
            UserError: a name is not among `methods`.
        """
        names = dict.fromkeys((self.baseline, *(self.methods if self.only is None else self.only)))
        for name in names:
            if name not in self.methods:
                raise UserError(f'there is no method "{name}"', nearest(name, self.methods))
        rows = {}
        for name in names:
            rows[name] = row = self._decoded(name)
            if swept:
                rows |= {name + suffix: other for suffix, other in row.swept().items()}
        return rows

    def _decoded(self, name: str) -> MethodConfig:
        """The row of that name with the decoder that it gets."""
        row = self.methods[name]
        if row.decoder == OWN_DECODER:
            return replace(row, decoder=None)
        own = row.decoder is not None or self.decoder is None or name == self.baseline
        return row if own else replace(row, decoder=self.decoder)
