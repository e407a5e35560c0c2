"""Settings of `vidaccel train-predictor`."""

import math
from dataclasses import dataclass, field

from vidaccel.config.checks import expand_paths, require, require_clip_size, require_scales, require_seed, settle_times
from vidaccel.config.training import TrainConfig

TWO_PASS = ("reuse", "taylor", "multistep")
"""Forecasters for models that make two passes a step as well."""


@dataclass
class DiscriminatorConfig:
    """What tells the predictor's steps from the student's in the second stage of its training."""

    depths: list[float] = field(default_factory=lambda: [0.25, 0.5, 0.75])
    """Where features are taken from the student's trunk: shares of its blocks, rising; 1 is the last block."""
    scales: list[int] = field(default_factory=lambda: [1, 2, 4])
    """Heads at each depth: one for means of s x s neighbouring tokens each."""
    width: int = 64
    """Hidden units of a head."""
    learning_rate: float = 1e-2
    """Its peak; the schedule is the predictor's."""
    weight: float = 1.0
    """Of the adversarial loss beside the squared error."""
    balanced: bool = False
    """With `relative`: divide the adversarial loss by the batch's mean error of reuse too. As it is, it weighs as much
    less beside the shares as those are larger than the errors, some hundred times."""
    in_turn: bool = False
    """Train the discriminator by one optimiser step and the predictor by the next, instead of both by each."""

    def __post_init__(self) -> None:
        rising = self.depths == sorted(set(self.depths)) and bool(self.depths)
        rule = "rises within (0, 1], without repetition"
        require(rising and self.depths[0] > 0 and self.depths[-1] <= 1, "depths", self.depths, rule)
        require(min(self.scales, default=0) >= 1, "scales", self.scales, "are one or more numbers from 1 up")
        require(self.width >= 1, "width", self.width, "must be at least 1")
        for key in ("learning_rate", "weight"):
            require(0 < getattr(self, key) < math.inf, key, getattr(self, key), "must be above 0 and finite")


@dataclass
class PredictorConfig:
    """`vidaccel train-predictor`."""

    RENAMED = {"longest": "max_skipped"}

    student: str = "sprites/student"
    """The model that the predictor is for, which stays as it is: shipped, a local folder, or a hub id; or, with
    `model`, a file of weights that others have released."""
    model: str | None = None
    """The model whose transformer's place such a file takes."""
    lora: list[str] | None = None
    """LoRA files that are added to its transformer when it is loaded, each FILE or FILE:SCALE."""
    forecaster: str = "learned"
    """What it is: `learned` (a network in the trunk's place), `multistep` (scalars, fitted to the model's own runs,
    which answer the whole pass; the model may be a teacher of two passes), or `reuse`, `taylor` or `linear`, of which
    there is nothing to train: their schedules are searched."""
    runs: int = 64
    """The model's own runs that scalars are fitted to, of `multistep` or on top of a network."""
    scalars: bool | None = None
    """Of `learned`: fit scalars on top of the network when it is trained, to `runs` runs, with its answer as one more
    term; a list of full steps keeps them where they are better than the network alone. Null is for `pairs=served`, and
    of `stage=search` for a predictor that has some."""
    checked_prompts: int = 16
    """Prompts of their own on which lists of full steps are run as they serve. With scalars at least 1; else 0 takes
    the estimated best without running it."""
    tried: int = 5
    """How many lists of each budget are run so, those of the lowest estimated cost; the best is kept."""
    budgets: list[int] | None = None
    """Numbers of full steps that schedules are wanted for; null is all, of `multistep` up to half of the steps."""
    full_steps: list[int] | None = None
    """Of `multistep`: the one list to fit, in place of a search."""
    ridge: float = 1e-4
    """Of scalars: penalty on the square of a coefficient, as a share of what it multiplies, squared and summed."""
    stage: str = "all"
    """`all` (train, then search schedules) or `search` (search schedules for the predictor that is there already)."""
    features: str | None = None
    """A folder from `vidaccel collect-features`: encoded clips or trajectories of the student. Null encodes clips while
    training; `pairs=trajectory` collects trajectories first, unless they are given, on the captions of what is."""
    prompts: str | None = None
    """Of `multistep`, `reuse`, `taylor` and `linear`: a text file of prompts, one a line, in place of features and
    clips."""
    data: str | None = None
    """Without `features`, a folder of videos with captions.jsonl; null renders the sprites world."""
    clips: int = 4000
    """Scenes of the sprites world, where neither of those is given, and most trajectories that are collected."""
    num_frames: int | None = None
    """Frames of clips that are encoded while training; null is the model's own. Features have their size."""
    height: int | None = None
    """Pixels of such clips; null is the model's own."""
    width: int | None = None
    """Pixels of such clips; null is the model's own."""
    fps: float | None = None
    """Frames a second that such clips are brought to; null is the model's own."""
    on_damage: str = "stop"
    """What to do about damaged shards of `features`: `stop`, or `skip` to train without them."""
    seed: int = 0
    """Of new weights, the order of the data, noise and times."""
    architecture: str = "correction"
    """`correction` (of the cached tokens, growing with the time since) or `published` (the paper's network, which gives
    the tokens anew; embedders of text run on its steps too)."""
    blocks: int = 2
    """Transformer blocks of the predictor."""
    history: int = 1
    """Full steps that it looks back on, 1 or 2; each takes the memory of one set of tokens. With 2 it corrects the line
    through both, and needs `pairs=trajectory` or `served`."""
    pairs: str = "data"
    """What it learns from: `data` (noised clips), `trajectory` (the student's own sampling, predicted steps included)
    or `served` (whole runs from new noise under `lists` of full steps, to the student's own latents, with gradients
    through all predicted steps; captions are all that is taken of the data, and there is no second stage)."""
    scalars_every: int = 0
    """Of `served`, with scalars: optimiser steps between fits of them while it trains. It then learns as one term of
    theirs, and where nothing was fitted, on other grids, it may serve worse than reuse; 0 trains the network alone, and
    they are fitted when it is trained."""
    lists: list[list[int]] | None = None
    """Of `served`: lists of full steps that take turns; null is some of a quarter to half of the steps,
    closer together where there is more noise."""
    intervals: str = "restricted"
    """Of noised clips: `restricted` (t uniform, t - r uniform up to `restrict`, the predicted step up to `lag` later)
    or `grid` (full and predicted step are two of the step grid, at most `lag` and at least one step apart)."""
    restrict: float | None = None
    """Widest interval t - r, in (0, 1]; null is what the student was trained on, else its step grid's widest."""
    lag: float = 0.2
    """Longest time from the full step to the predicted one, in (0, 1]."""
    max_skipped: int = 4
    """Of trajectories: most predicted steps in a row."""
    relative: bool = False
    """Count each sample's squared error as a share of what reusing the cached tokens has. Long lags, where that is
    large, are then not all that is learnt."""
    guidance: float | None = None
    """Scale g that the predictor learns to work at, for a student that embeds it; null is the student's own."""
    guidance_2: float | None = None
    """That of the second of two transformers; null is that of `guidance` where it is said."""
    negative_prompt: str | None = None
    """Of `multistep`, `reuse` and `taylor`: what two passes of a model's runs lead away from; null is that of the
    features, else the model's own."""
    guidance_range: list[float] | None = None
    """[low, high] of scales drawn uniformly in its place, for a predictor that is to serve many."""
    steps: int | None = None
    """Steps of the grid that it is made for; null is the student's own."""
    shift: float | None = None
    """Shift of that grid; null is the student's own."""
    timesteps: list[float] | None = None
    """Times of the grid in place of `steps` and `shift`, from 1000 (noise) down, such as [1000, 757, 522]."""
    sigmas: list[float] | None = None
    """The same from 1 down, such as [1, 0.94, 0.85, 0.63]."""
    search_prompts: int = 8
    """Prompts whose trajectories schedules are searched on."""
    growth_every: int = 1
    """Steps between those at which a search measures, by full passes to the end, how an error grows: S^2 / 2 of them a
    prompt at 1, and half of that at 2, which is enough for 20 steps; `multistep` measures at each."""
    mse: TrainConfig = field(default_factory=lambda: TrainConfig(steps=500, learning_rate=1e-4, schedule="constant"))
    """The first stage, on the squared error; of `pairs=served` the only one, on the error of runs."""
    adversarial: TrainConfig = field(
        default_factory=lambda: TrainConfig(steps=1000, learning_rate=1e-4, schedule="constant")
    )
    """The second stage, against a discriminator as well; 0 steps leave it out."""
    discriminator: DiscriminatorConfig = field(default_factory=DiscriminatorConfig)

    def __post_init__(self) -> None:
        expand_paths(self)
        require(bool(self.student.strip()), "student", self.student, "must name a model")
        for key, names in {
            "forecaster": ("learned", "multistep", "reuse", "taylor", "linear"),
            "architecture": ("correction", "published"),
            "stage": ("all", "search"),
            "on_damage": ("stop", "skip"),
            "pairs": ("data", "trajectory", "served"),
            "intervals": ("restricted", "grid"),
        }.items():
            require(getattr(self, key) in names, key, getattr(self, key), f"is {' or '.join(names)}")
        require_seed(self)
        for key in ("clips", "blocks", "max_skipped", "search_prompts", "growth_every"):
            require(getattr(self, key) >= 1, key, getattr(self, key), "must be at least 1")
        require_clip_size(self)
        for key in ("runs", "tried"):
            require(getattr(self, key) >= 1, key, getattr(self, key), "must be at least 1")
        require(not self.scalars or self.forecaster == "learned", "scalars", True, "is for forecaster=learned")
        least = int(self.forecaster == "multistep" or bool(self.scalars))
        require(self.checked_prompts >= least, "checked_prompts", self.checked_prompts, f"must be at least {least}")
        require(0 <= self.ridge < math.inf, "ridge", self.ridge, "is a number from 0 up")
        budgets = self.budgets
        rising = budgets is None or bool(budgets) and budgets == sorted(set(budgets)) and budgets[0] >= 1
        require(rising, "budgets", budgets, "rises, from 1 or more, or is null")
        if self.full_steps is not None:
            rule = "is for forecaster=multistep, in place of budgets"
            alone = self.forecaster == "multistep" and budgets is None
            require(alone, "full_steps", self.full_steps, rule)
        for key, forecasters in (("negative_prompt", TWO_PASS), ("guidance_2", (*TWO_PASS, "learned"))):
            value, fits = getattr(self, key), self.forecaster in forecasters
            rule = f"is for forecaster={'|'.join(forecasters)}: others make one pass of one transformer"
            require(value is None or fits, key, value, rule)
        alone = self.forecaster != "learned" and self.features is None and self.data is None
        rule = "is for forecaster=multistep|reuse|taylor|linear, without features and data"
        require(self.prompts is None or alone, "prompts", self.prompts, rule)
        require(self.history in (1, 2), "history", self.history, "is 1 or 2")
        both = self.history == 1 or self.pairs != "data"
        require(both, "history", self.history, "needs pairs=trajectory or served: noised clips have one full step")
        require(
            self.lists is None or bool(self.lists), "lists", self.lists, "is one list of full steps or more, or null"
        )
        served = self.pairs == "served"
        recomputing = served and self.mse.checkpointing
        require(not recomputing, "mse.checkpointing", True, "is not for pairs=served: its passes are whole runs")
        every = self.scalars_every
        require(every >= 0, "scalars_every", every, "must be at least 0")
        fitted = served and self.scalars is not False and self.checked_prompts > 0
        require(not every or fitted, "scalars_every", every, "is for pairs=served, and for scalars on top of it")
        require(self.lists is None or served, "lists", self.lists, "is for pairs=served")
        second = self.adversarial.steps
        alone = self.stage == "search" or not self.adversarial.is_on
        require(
            not served or alone, "adversarial.steps", second, "must be 0 with pairs=served, which has no such stage"
        )
        published = self.architecture == "published"
        require(not published or self.history == 1, "history", self.history, "is 1 for architecture=published")
        require(not self.discriminator.balanced or self.relative, "discriminator.balanced", True, "needs relative=true")
        settle_times(self)
        require(self.steps is None or self.steps >= 2, "steps", self.steps, "must be at least 2, or null")
        require(self.shift is None or 0 < self.shift < math.inf, "shift", self.shift, "must be above 0 and finite")
        require(0 < self.lag <= 1, "lag", self.lag, "must be in (0, 1]")
        widest = self.restrict
        require(widest is None or 0 < widest <= 1, "restrict", widest, "must be in (0, 1], or null")
        require_scales(self)
        scales = self.guidance_range
        if scales is not None:
            fits = len(scales) == 2 and 1 <= scales[0] <= scales[1] < math.inf
            require(fits, "guidance_range", scales, "is [low, high] with 1 <= low <= high, or null")
            own = self.pairs != "trajectory" or self.forecaster == "multistep"
            require(own, "guidance_range", scales, "is null for trajectories, which have their own")
