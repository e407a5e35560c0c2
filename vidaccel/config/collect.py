"""Settings of `vidaccel collect-features`."""

import math
from dataclasses import dataclass

from vidaccel.config.checks import (
    DTYPES,
    expand_paths,
    require,
    require_scales,
    require_seed,
    require_sizes,
    settle_times,
)


@dataclass
class CollectConfig:
    """`vidaccel collect-features`. A key left null takes the model's own default."""

    kind: str = "encoded"
    """`encoded` (clips as latents and text embeddings) or `trajectory` (the model's own sampling of their captions)."""
    model: str = "sprites/teacher"
    """A shipped model (sprites/teacher), a local diffusers pipeline folder, or a hub id."""
    lora: list[str] | None = None
    """LoRA files that are added to its transformer when it is loaded, each FILE or FILE:SCALE."""
    data: str | None = None
    """A folder of videos with captions.jsonl; null renders scenes, which a model of the sprites world understands."""
    clips: int = 4000
    """Scenes that are rendered; of a folder of videos all are taken."""
    max_bad_share: float = 0.1
    """Share of a folder's clips that may be unusable, and are then left out; a larger one stops."""
    num_frames: int | None = None
    """Frames of a sample; null is the model's own."""
    height: int | None = None
    """Pixels that clips are scaled and cropped to, or that trajectories have; null is the model's own."""
    width: int | None = None
    """Pixels that clips are scaled and cropped to, or that trajectories have; null is the model's own."""
    sizes: list[list[int]] | None = None
    """[frames, height, width] of several sizes, in place of those three: each clip of a folder is brought to the
    nearest in shape whose frames it has, and trainings take batches of one size each."""
    fps: float | None = None
    """Frames a second that clips are brought to."""
    steps: int | None = None
    """Of trajectories: sampler steps."""
    shift: float | None = None
    """Of trajectories: shift of the step grid."""
    timesteps: list[float] | None = None
    """Of trajectories: times of the grid in place of `steps` and `shift`, from 1000 (noise) down, such as
    [1000, 757, 522]."""
    sigmas: list[float] | None = None
    """Of trajectories: the same from 1 down, such as [1, 0.94, 0.85, 0.63]."""
    guidance: float | None = None
    """Classifier-free guidance scale g: trajectories are sampled with it, and students trained on encoded clips are
    called with it unless told."""
    guidance_2: float | None = None
    """Of trajectories: that of the second of two transformers; null is that of `guidance` where this is said."""
    negative_prompt: str | None = None
    """What two-pass guidance leads away from, for trajectories and for whoever is trained on encoded clips."""
    cache: bool = False
    """Of trajectories: the tokens that leave the trunk at each step are stored too, instead of being computed again by
    who needs them. They are large: 0.39 GB a step for HunyuanVideo."""
    seed: int = 0
    """Of rendered scenes and of noise: trajectory i starts from the noise of `vidaccel generate` with seed + i."""
    dtype: str = "auto"
    """What the model computes in: `auto` (float32 on a CPU, as stored on a GPU), `float32`, `bfloat16` or `float16`."""
    store: str = "float16"
    """What is stored: `float16`, `bfloat16` or `float32`."""
    tiling: bool = False
    """The autoencoder encodes overlapping tiles and blends them: large videos in less memory."""
    batch_size: int = 1
    """Samples computed together, which is what a kill loses at most."""
    per_shard: int = 256
    """Samples in one file."""
    max_gigabytes: float | None = 100.0
    """Nothing is written where the whole folder would be larger; null is no limit."""

    def __post_init__(self) -> None:
        expand_paths(self)
        kinds = ("encoded", "trajectory")
        require(self.kind in kinds, "kind", self.kind, f"is {' or '.join(kinds)}")
        for key in ("cache", "steps", "shift", "timesteps", "sigmas", "guidance_2"):
            value = getattr(self, key)
            require(value in (None, False) or self.kind == "trajectory", key, value, "goes with kind=trajectory")
        require(bool(self.model.strip()), "model", self.model, "must name a model")
        require_sizes(self, self.kind == "encoded" and self.data is not None, "data= and kind=encoded")
        for key in ("clips", "batch_size", "per_shard"):
            require(getattr(self, key) >= 1, key, getattr(self, key), "must be at least 1")
        settle_times(self)
        require(self.steps is None or self.steps >= 1, "steps", self.steps, "must be at least 1")
        require_scales(self)
        require(0 <= self.max_bad_share < 1, "max_bad_share", self.max_bad_share, "must be in [0, 1)")
        require_seed(self)
        for key in ("fps", "shift", "max_gigabytes"):
            value = getattr(self, key)
            require(value is None or 0 < value < math.inf, key, value, "must be above 0 and finite")
        require(self.dtype in ("auto", *DTYPES), "dtype", self.dtype, f"is one of auto, {', '.join(DTYPES)}")
        require(self.store in DTYPES, "store", self.store, f"is one of {', '.join(DTYPES)}")
