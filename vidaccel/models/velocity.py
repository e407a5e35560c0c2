"""A family's transformer as the function method.md writes: u(x_t, r, t) under a guidance scale g.

Times in [0, 1] and scales go in as they stand in the formulas; here they become the model's own units, arguments and
zero inputs. Training, collection, schedule search and our own sampling loop call models through this.

B batch, C channels, T frames, H and W latent pixels
"""

import pkgutil
from collections.abc import Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from vidaccel.families.base import DiTFamily
from vidaccel.families.walk import as_latents, as_taken, boundaries_of, conditions_of, denoisers_of, embeds
from vidaccel.models.calling import compression_of
from vidaccel.models.conditioning import Conditioning
from vidaccel.models.grid import denoiser_at

if TYPE_CHECKING:  # which imports calling
    from vidaccel.models.loading import LoadedPipeline

LEAST_TIME = 1e-3
"""Below it a clean frame is taken to be there."""

Text = dict[str, Tensor]
"""Text tensors and conditions with a batch dimension, by the `stored` names of the family's record."""


@dataclass(frozen=True)
class LatentScale:
    """What latents stand for in a video."""

    seconds: float
    """Of a latent frame."""
    pixels: int
    """Along a side of a latent pixel."""


class Velocity(nn.Module):
    """Mean velocity over [r, t]; the instantaneous one for a model without r, or where r is not given."""

    def __init__(
        self,
        transformer: nn.Module,
        family: DiTFamily,
        conditioning: Conditioning | None = None,
        scale: LatentScale | None = None,
    ):
        """`conditioning` is attached to the transformer, where it takes the place of any other; the scale is that of
        the family's published pipeline unless given."""
        super().__init__()
        self.transformer, self.family, self.conditioning = transformer, family, conditioning
        self.scale = scale or LatentScale(family.compression[0] / family.defaults.fps, family.compression[1])
        if conditioning is not None:
            conditioning.attach(transformer, family)

    def embeds(self, number: str) -> bool:
        """Whether the model is conditioned on "r" or "g", by itself or by `conditioning`."""
        attached = self.conditioning is not None and number in self.conditioning.config.embeds
        return attached or embeds(self.transformer, self.family, number)

    def forward(self, x: Tensor, t: Tensor, text: Text, r: Tensor | None = None, g: Tensor | None = None) -> Tensor:
        """x [B, C, T, H, W], t, r and g [B] -> [B, C, T, H, W]; r is t unless given.

        Raises:
            ValueError: a scale is missing where the model embeds one, or given where it does not.
        """
        if (g is not None) != self.embeds("g"):
            given, embedded = ("nothing", "one") if g is None else ("one", "none")
            raise ValueError(f"{given} was given for g, and the model embeds {embedded}")
        numbers = {"r": t if r is None else r, "g": g}
        arguments: dict[str, Any] = {each.argument: text[each.stored] for each in self.family.text_tensors}
        told = x.dtype if self.family.rounds_times else torch.promote_types(x.dtype, torch.float32)
        for name, argument, dtype in (("r", self.family.r_argument, told), ("g", self.family.g_argument, x.dtype)):
            if embeds(self.transformer, self.family, name):
                arguments[argument] = (1000 * numbers[name]).to(dtype)
        for blank in self.family.blank_inputs:
            width = self.transformer.config[blank.width_config]
            arguments[blank.argument] = x.new_zeros(len(x), blank.tokens, width)
        arguments |= self._sized(x)
        channels, clean = x, None
        for condition in conditions_of(self.transformer, self.family):
            given = text[condition.stored].to(x.dtype)
            if condition.first_frame:
                channels, clean = torch.cat([given, x[:, :, 1:]], dim=2), given
            elif condition.argument is None:
                channels = torch.cat([x, given], dim=1)
            else:
                arguments[condition.argument] = given
                if condition.counted:
                    arguments[condition.counted] = given.shape[1]
        timestep = (1000 * (1 - t if self.family.rises else t)).to(told)
        if self.family.times_per_frame:
            timestep = _per_frame(timestep, x)
            if (ends := self.family.r_argument) is not None:
                arguments[ends] = _per_frame(arguments[ends], x)
        with nullcontext() if self.conditioning is None else self.conditioning.given(**numbers):
            taken = as_taken(self.family, self._padded(channels))
            given = self.transformer(hidden_states=taken, timestep=timestep, **arguments, return_dict=False)[0]
        u = as_latents(self.family, given, x.shape[2:])
        u = -u if self.family.rises else u
        return u if clean is None else torch.cat([_straight(x[:, :, :1], clean, t).to(u.dtype), u[:, :, 1:]], dim=2)

    def _sized(self, x: Tensor) -> dict[str, Any]:
        """The inputs that follow from the size of latents x."""
        sizes = dict(zip(("frames", "height", "width"), x.shape[2:], strict=True)) | vars(self.scale)
        given = {}
        for each in self.family.sized_inputs:
            if each.function:
                made = pkgutil.resolve_name(each.function)(self.transformer, tuple(x.shape[2:]), x.device)
            else:
                values = [sizes[name] for name in each.sizes]
                made = values[0] if len(values) == 1 else tuple(values)
            given[each.argument] = made
        return given

    def _padded(self, x: Tensor) -> Tensor:
        """With zeros for the channels of an image condition."""
        missing = self.transformer.config.in_channels - x.shape[1]
        if not missing:
            return x
        return torch.cat([x, x.new_zeros(len(x), missing, *x.shape[2:])], dim=1)


class SwitchedVelocity(Velocity):
    """The velocities of several transformers, of which each pass is that one's whose times it lies in.

    `transformer` is the first, whose form all have.
    """

    def __init__(
        self,
        transformers: Sequence[nn.Module],
        family: DiTFamily,
        conditionings: Sequence[Conditioning | None],
        boundaries: Sequence[float],
        scale: LatentScale,
    ):
        """`boundaries` are the times below which the next one's begin; `conditionings` those of each."""
        first, *further = (
            (transformer, family, own, scale) for transformer, own in zip(transformers, conditionings, strict=True)
        )
        super().__init__(*first)
        self.further = nn.ModuleList(Velocity(*each) for each in further)
        self.boundaries = boundaries
        self.second: float | None = None
        """Scale of guidance that passes of all but the first are told in the place of g, where they are told one."""

    def forward(self, x: Tensor, t: Tensor, text: Text, r: Tensor | None = None, g: Tensor | None = None) -> Tensor:
        """As of a `Velocity`; `ValueError` unless all t [B] are of one of them."""
        which = self.denoiser(t)
        if which == 0:
            return super().forward(x, t, text, r, g)
        told = g if g is None or self.second is None else torch.full_like(g, self.second)
        return self.further[which - 1](x, t, text, r, told)

    def denoiser(self, t: Tensor) -> int:
        """Which of them a pass at t [B] is of."""
        which = denoiser_at(t[0], self.boundaries)
        if (t != t[0]).any() and any(denoiser_at(each, self.boundaries) != which for each in (t.min(), t.max())):
            raise ValueError("samples at times of several transformers, and a pass is of one")
        return which


class GuidedVelocity(Velocity):
    """`guided_velocity` at one scale, both passes in one of a doubled batch, so that what is remembered of a pass is of
    both."""

    def __init__(self, velocity: Velocity, empty: Text, guidance: float, second: float | None = None):
        """`velocity` embeds no scale, `empty` [1, ...] is the unconditional text without conditions, and `second` the
        scale of all but the first of several transformers, where it is another."""
        super().__init__(velocity.transformer, velocity.family, None, velocity.scale)
        self.velocity, self.empty, self.guidance, self.second = velocity, empty, guidance, second

    def embeds(self, number: str) -> bool:
        """As of the model, of which nobody tells a scale."""
        return number != "g" and self.velocity.embeds(number)

    def forward(self, x: Tensor, t: Tensor, text: Text, r: Tensor | None = None, g: Tensor | None = None) -> Tensor:
        """As of a `Velocity`, without g."""
        if g is not None:
            raise ValueError("one was given for g, and the scale is set")
        both = {name: _beside(tensor, self.empty.get(name, tensor)) for name, tensor in text.items()}
        twice = None if r is None else r.repeat(2)
        made = self.velocity(x.repeat(2, *(1,) * (x.ndim - 1)), t.repeat(2), both, twice)
        conditional, unconditional = made.chunk(2)
        return unconditional + self._scale(t) * (conditional - unconditional)

    def _scale(self, t: Tensor) -> float:
        switched = self.velocity
        if self.second is None or not isinstance(switched, SwitchedVelocity) or switched.denoiser(t) == 0:
            return self.guidance
        return self.second


def _beside(tensor: Tensor, other: Tensor) -> Tensor:
    """Two texts [B, ...] and [1, ...] as one batch, a shorter one padded."""
    other = other.expand(len(tensor), *other.shape[1:]).to(tensor)
    if tensor.shape == other.shape:
        return torch.cat([tensor, other])
    longest = max(tensor.shape[1], other.shape[1])
    return torch.cat([lengthened(tensor, longest), lengthened(other, longest)])


def lengthened(text: Tensor, length: int) -> Tensor:
    """A text or its mask [B, L, ...] with zeros behind it, up to a length."""
    missing = length - text.shape[1]
    return F.pad(text, (*(0, 0) * (text.ndim - 2), 0, missing)) if missing > 0 else text


def velocity_of(loaded: "LoadedPipeline") -> Velocity:
    """The pipeline's transformer, or transformers by turns, with what is attached to it and told of sizes as the
    pipeline tells it."""
    frames, pixels = compression_of(loaded.pipe, loaded.family)
    scale = LatentScale(frames / loaded.default("fps"), pixels)
    transformers, boundaries = denoisers_of(loaded.pipe, loaded.family), boundaries_of(loaded.pipe, loaded.family)
    if boundaries:
        further = [each.conditioning for each in loaded.further] or [None] * len(boundaries)
        return SwitchedVelocity(transformers, loaded.family, [loaded.conditioning, *further], boundaries, scale)
    return Velocity(transformers[0], loaded.family, loaded.conditioning, scale)


def _per_frame(times: Tensor, x: Tensor) -> Tensor:
    """Times [B] of latents [B, C, T, H, W] as [B, T]."""
    return times[:, None].expand(-1, x.shape[2])


def _straight(x: Tensor, clean: Tensor, t: Tensor) -> Tensor:
    """The velocity that leads from x at t [B] to a clean frame, whatever the model says of it."""
    return (x - clean) / per_sample(t.clamp(min=LEAST_TIME), x)


def per_sample(numbers: Tensor, like: Tensor) -> Tensor:
    """Numbers [B], one a sample, as [B, 1, ..., 1] with the dimensions of `like` [B, ...], to be broadcast over it."""
    return numbers.view(-1, *(1,) * (like.ndim - 1))


def guided_velocity(velocity: Velocity, x: Tensor, t: Tensor, text: Text, empty: Text, g: Tensor) -> Tensor:
    """Two-pass guidance v_uncond + g (v_cond - v_uncond) at x [B, C, T, H, W], t [B], for a scale g [B] each.

    `empty` is the unconditional text, one for all or one a sample, without conditions, which are those of `text`; the
    model embeds no scale itself.
    """
    unconditional = text | {name: tensor.expand(len(x), *tensor.shape[1:]) for name, tensor in empty.items()}
    conditional, unconditional = velocity(x, t, text), velocity(x, t, unconditional)
    return unconditional + per_sample(g, x) * (conditional - unconditional)
