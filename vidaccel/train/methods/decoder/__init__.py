"""A narrower decoder of the family's own autoencoder class, taught the frames of the decoder that it stands in for."""

import math
from dataclasses import dataclass

from vidaccel.config.checks import require


@dataclass
class DecoderTraining:
    """Settings of `method=decoder`."""

    width: float = 0.5
    """Channels of every level over the teacher's, rounded to what its norms divide by."""
    widths: list[int] | None = None
    """Channels of each level, in the order of the autoencoder's config (full resolution first), in place of `width`."""
    layers_per_block: int | None = None
    """The autoencoder's setting of its residual blocks a level; null is the teacher's."""
    error: str = "l2"
    """Of pixels and of their differences, in [-1, 1]: `l2` or `l1`, under which sprites had no colours after a thousand
    steps: what is small is best left out there."""
    space: float = 1.0
    """Weight of differences between neighbouring pixels."""
    time: float = 1.0
    """Weight of differences between neighbouring frames."""
    lpips: float = 0.0
    """Weight of LPIPS of every frame, which the extra `lpips` brings."""
    noise: float = 0.0
    """Standard deviation of noise on the latents, in the transformer's units: both decoders get the same."""
    crop: list[int] | None = None
    """[frames, height, width] of the excerpt of each latent that a pass sees; null is the whole latent."""
    kept: float = 1.0
    """GiB of memory in which latents, and in half precision the teacher's frames of them, stay once they were made.
    Noise and excerpts leave no frames to keep."""

    def __post_init__(self) -> None:
        require(0 < self.width <= 1, "width", self.width, "must be in (0, 1]")
        widths = self.widths
        fits = widths is None or (bool(widths) and min(widths) >= 1)
        require(fits, "widths", widths, "lists channels of each level, at least 1 each, or is null")
        depth = self.layers_per_block
        require(depth is None or depth >= 0, "layers_per_block", depth, "must be at least 0, or null")
        require(self.error in ("l1", "l2"), "error", self.error, "is l2 or l1")
        for key in ("space", "time", "lpips", "noise", "kept"):
            value = getattr(self, key)
            require(0 <= value < math.inf, key, value, "must be at least 0 and finite")
        crop = self.crop
        fits = crop is None or (len(crop) == 3 and min(crop) >= 1)
        require(fits, "crop", crop, "is [frames, height, width] of latents, at least 1 each, or null")
