"""Settings of `python -m vidaccel.sprites`."""

import math
from dataclasses import dataclass, field
from pathlib import Path

from vidaccel.config.checks import expand_paths, require, require_seed
from vidaccel.config.training import TrainConfig

CONF = Path(__file__).parent / "conf"
"""Folder of the shipped YAMLs."""


@dataclass
class TextTraining:
    """The two text encoders of the sprites model, trained to know a caption's meaning."""

    width: int = 64
    train: TrainConfig = field(default_factory=TrainConfig)


@dataclass
class AutoencoderTraining:
    """The sprites model's video autoencoder."""

    latent_channels: int = 16
    block_out_channels: list[int] = field(default_factory=lambda: [16, 24, 48, 64])
    """Widths at 64, 32, 16 and 8 pixels, each a multiple of `norm_groups`."""
    norm_groups: int = 2
    """Groups of the group norms. Few: a norm over two channels would wipe out a plain background's brightness."""
    layers_per_block: int = 1
    image_pixels: int = 32
    """Size of the crops of single frames that it is trained on first: many different pictures a step."""
    excerpts: list[list[int]] = field(default_factory=lambda: [[5, 32], [9, 32], [9, 32], [17, 32], [9, 64], [17, 64]])
    """[frames, pixels] of the excerpts of clips that it is trained on then, in turn."""
    kl_weight: float = 1e-4
    """Weight of the Kullback-Leibler term, per latent element."""
    l1_weight: float = 0.1
    """Weight of the absolute error beside the squared one; it sharpens what is nearly right."""
    gradient_weight: float = 1.0
    """Weight of the squared error of spatial differences, which keeps edges sharp."""
    latent_noise: float = 0.2
    """Noise on the whitened latents that the decoder has to see through, over their standard deviation. It also bounds
    how far weak directions are widened."""
    images: TrainConfig = field(default_factory=TrainConfig)
    """The first stage; its batch size counts crops. With 0 steps it is left out, as when a trained model goes on."""
    clips: TrainConfig = field(default_factory=TrainConfig)
    """The second stage; its batch size counts crops of `image_pixels`, and longer or larger excerpts are fewer. Where a
    stage trained the encoder, latents are whitened afterwards."""
    decoder: TrainConfig = field(default_factory=lambda: TrainConfig(steps=0))
    """The last stage, of the decoder alone, on noisy latents and excerpts as before: latents, and a transformer trained
    on them, stay what they are."""

    def __post_init__(self) -> None:
        require(0 < self.latent_noise < 1, "latent_noise", self.latent_noise, "must be in (0, 1)")
        for excerpt in [[1, self.image_pixels], *self.excerpts]:
            rule = "is [frames, pixels] with frames = 4k + 1 and pixels a multiple of 8, at most 64"
            require(
                len(excerpt) == 2 and excerpt[0] % 4 == 1 and excerpt[1] % 8 == 0 and 8 <= excerpt[1] <= 64,
                "excerpts",
                excerpt,
                rule,
            )


@dataclass
class TeacherTraining:
    """The sprites model's diffusion transformer, by flow matching."""

    heads: int = 4
    head_dim: int = 32
    double_blocks: int = 8
    single_blocks: int = 16
    train_shift: float = 3.0
    """Shift of the logit-normal distribution of t (method.md, section 0)."""
    caption_dropout: float = 0.1
    """Share of samples trained with the empty caption, for classifier-free guidance."""
    alignment: float = 0.5
    """Weight of the loss for naming what each token shows; used where scenes are rendered, and so known."""
    alignment_warmup: int | None = None
    """Steps over which that weight rises from a twentieth, for a trained transformer whose head is new; null begins
    with all of it."""
    growth: int = 4
    """Blocks at full depth for each one of the shallow stage."""
    shallow: TrainConfig = field(default_factory=lambda: TrainConfig(steps=0))
    """A first stage on a `growth`-th of the blocks, from random weights; 0 steps begin at full depth."""
    train: TrainConfig = field(default_factory=TrainConfig)
    """The stage at full depth."""

    def __post_init__(self) -> None:
        require(0 <= self.caption_dropout < 1, "caption_dropout", self.caption_dropout, "must be in [0, 1)")
        require(self.alignment >= 0, "alignment", self.alignment, "must be at least 0")
        rising = self.alignment_warmup
        require(rising is None or rising >= 1, "alignment_warmup", rising, "must be at least 1, or null")
        require(self.growth >= 1, "growth", self.growth, "must be at least 1")
        if self.shallow.is_on:
            for key in ("double_blocks", "single_blocks"):
                rule = f"must be a multiple of growth={self.growth} for a shallow stage"
                require(getattr(self, key) % self.growth == 0, key, getattr(self, key), rule)


@dataclass
class SpritesConfig:
    """`python -m vidaccel.sprites`: the shipped world made from nothing."""

    seed: int = 0
    device: str = "auto"
    data: str | None = None
    """A folder of videos with captions.jsonl to train on; null renders scenes on the fly."""
    start: str | None = None
    """A sprites model whose weights every part goes on from; null starts from random ones. A part whose steps are 0
    stays as it is there."""
    clips: int = 10000
    """Clips that are encoded once and then trained on (all of the folder's, if `data` is set)."""
    captions: int = 0
    """Captions of a clip that are encoded beforehand for the teacher, clips and captions then lying in the device's
    memory, as a GPU wants it; 1 is the most where `data` is set. 0 encodes clips into a folder, and other captions in
    every step."""
    tf32: bool = False
    """Whether float32 products on a GPU may be rounded to TensorFloat-32."""
    pair_share: float = 0.5
    """Share of rendered scenes with two sprites."""
    odds: dict[str, int] = field(default_factory=dict)
    """How often a shape or a background is drawn, by its name, against once for the others: {cross: 2, gray: 2}."""
    lamps: float = 0.0
    """Share of rendered scenes with lamps. Above 0 the model learns their words, beside those that `start` knows."""
    text: TextTraining = field(default_factory=TextTraining)
    autoencoder: AutoencoderTraining = field(default_factory=AutoencoderTraining)
    teacher: TeacherTraining = field(default_factory=TeacherTraining)
    score_prompts: int = 256
    """Held-out prompts that the teacher is scored on."""
    steps: int = 50
    guidance: float = 4.0
    sample_shift: float = 3.0
    """Shift of the sampler's step grid."""

    def __post_init__(self) -> None:
        expand_paths(self)
        require_seed(self)
        for key in ("clips", "score_prompts", "steps"):
            require(getattr(self, key) >= 1, key, getattr(self, key), "must be at least 1")
        most = 1 if self.data else math.inf
        rule = "must be 0 or 1: a clip of a folder has one" if self.data else "must be at least 0"
        require(0 <= self.captions <= most, "captions", self.captions, rule)
        require(0 <= self.pair_share <= 1, "pair_share", self.pair_share, "must be in [0, 1]")
        require(0 <= self.lamps <= 1, "lamps", self.lamps, "must be in [0, 1]")
        require(all(times >= 1 for times in self.odds.values()), "odds", self.odds, "must each be at least 1")
