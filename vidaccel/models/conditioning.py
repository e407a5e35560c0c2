"""Embeddings of r and g for a transformer that was built without them (method.md, sections 1 and 2).

Each is a sinusoidal embedding of 1000 times the number and two linear layers, added to what the transformer's own
timestep embedder gives out. The last layer starts at zero, so that a student starts equal to its teacher.

    folder/config.json          family, width, which numbers are embedded, and what the weights were trained for
    folder/model.safetensors

B batch, D width
"""

import json
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path

from diffusers.models.embeddings import TimestepEmbedding, Timesteps
from safetensors import SafetensorError
from safetensors.torch import load_model, save_model
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from vidaccel.artefacts import write_json
from vidaccel.compat.torch import forward_hooks
from vidaccel.errors import UserError
from vidaccel.families.base import DiTFamily
from vidaccel.models.grid import Grid

CONFIG_FILE, WEIGHTS_FILE = "config.json", "model.safetensors"
FREQUENCIES = 256
"""Sines and cosines that stand for one number, as in every family's own timestep embedding."""


@dataclass(frozen=True)
class ConditioningConfig:
    """What conditioning/config.json holds."""

    family: str
    """Name of the family's record."""
    width: int
    """D of the timestep embedding that is added to."""
    embeds: tuple[str, ...]
    """Of "r" and "g", those that these weights embed."""
    rule: str = "add"
    """How they combine with the timestep's embedding; `add` is the only rule so far."""
    shift: float | None = None
    """Shift that makes the step grid that the student was trained for, if one does."""
    steps: int | None = None
    """Steps of that grid."""
    restrict: float | None = None
    """Restrict factor R: the widest interval t - r it was trained on."""
    guidance_range: tuple[float, float] | None = None
    """[low, high] of the scales g it was trained on."""
    times: tuple[float, ...] | None = None
    """Times [steps + 1] of that grid; where only steps and shift are said, those that follow."""
    until: float = 0.0
    """Least r it was trained on, which stands for all below: where the second of two transformers takes over."""

    def __post_init__(self) -> None:
        object.__setattr__(self, "embeds", tuple(self.embeds))
        grid = Grid.recorded(self.steps, self.shift, self.times)
        object.__setattr__(self, "times", grid and grid.times)
        if self.guidance_range is not None:
            object.__setattr__(self, "guidance_range", tuple(self.guidance_range))
        if self.rule != "add":
            raise UserError(f"the conditioning combines by {self.rule!r}", "this vidaccel knows the rule add")
        if not self.embeds or set(self.embeds) - {"r", "g"}:
            raise UserError(f"the conditioning embeds {list(self.embeds)}", "r, g or both can be embedded")


class Conditioning(nn.Module):
    """Embeds r, g or both, and adds them wherever it is attached.

        conditioning.attach(transformer, family)
        with conditioning.given(r=r, g=g):
            transformer(...)

    A pass of an attached transformer outside `given` raises, because it would be that of another model. The embeddings
    are computed wherever their weights lie, and come out where the transformer needs them.
    """

    def __init__(self, config: ConditioningConfig):
        super().__init__()
        self.config = config
        self.frequencies = Timesteps(FREQUENCIES, flip_sin_to_cos=True, downscale_freq_shift=0)
        self.embedders = nn.ModuleDict({name: TimestepEmbedding(FREQUENCIES, config.width) for name in config.embeds})
        for embedder in self.embedders.values():
            nn.init.zeros_(embedder.linear_2.weight)
            nn.init.zeros_(embedder.linear_2.bias)
        self._given: dict[str, Tensor] | None = None

    def forward(self, **numbers: Tensor) -> Tensor:
        """Numbers [B] by name, r in [0, 1] and g as a scale, -> [B, D]."""
        dtype = next(self.parameters()).dtype
        if self.config.until and "r" in self.embedders:
            numbers["r"] = numbers["r"].clamp(min=self.config.until)
        embedded = (e(self.frequencies(1000 * numbers[name]).to(dtype)) for name, e in self.embedders.items())
        return sum(embedded)

    def attach(self, transformer: nn.Module, family: DiTFamily) -> RemovableHandle:
        """Add to this transformer's timestep embedding until the handle's `remove()`.

        A transformer carries one conditioning: another that is attached, or this one, is taken off first.

        Raises:
            UserError: the weights are of another family or width.
        """
        width = embedding_width(transformer, family)
        if (family.name, width) != (self.config.family, self.config.width):
            raise UserError(
                f"the conditioning is for {self.config.family} of width {self.config.width}, "
                f"and this transformer is {family.name} of width {width}",
                "take the conditioning/ folder that was saved with this transformer",
            )
        self.detach(transformer, family)
        return transformer.get_submodule(family.timestep_embedder).register_forward_hook(self._add)

    @staticmethod
    def of(transformer: nn.Module, family: DiTFamily) -> "Conditioning | None":
        """The one that the transformer carries."""
        hooks = forward_hooks(transformer.get_submodule(family.timestep_embedder)).values()
        owners = (getattr(hook, "__self__", None) for hook in hooks)
        return next((owner for owner in owners if isinstance(owner, Conditioning)), None)

    @staticmethod
    def detach(transformer: nn.Module, family: DiTFamily) -> None:
        """Take off whichever conditioning the transformer carries."""
        hooks = forward_hooks(transformer.get_submodule(family.timestep_embedder))
        for key, hook in list(hooks.items()):
            if isinstance(getattr(hook, "__self__", None), Conditioning):
                del hooks[key]

    @property
    def is_given(self) -> bool:
        """Whether a `given` is in force."""
        return self._given is not None

    @contextmanager
    def given(self, **numbers: Tensor) -> Iterator[None]:
        """The numbers [B] (or [1]) that passes in this block are conditioned on; those not embedded are ignored."""
        before, self._given = self._given, numbers
        try:
            yield
        finally:
            self._given = before

    def _add(self, module: nn.Module, inputs: tuple, output: Tensor) -> Tensor:
        if self._given is None:
            raise RuntimeError(f"this transformer wants {', '.join(self.config.embeds)}: call it under `given`")
        device = next(self.parameters()).device
        added = self(**{name: self._given[name].to(device) for name in self.config.embeds}).to(output)
        if len(added) not in (1, len(output)):  # a timestep of each token is embedded in as many rows (Wan 2.2 TI2V-5B)
            added = added.repeat_interleave(len(output) // len(added), dim=0)
        return output + added

    def save_pretrained(self, folder: str | Path) -> None:
        folder = Path(folder)
        folder.mkdir(parents=True, exist_ok=True)
        save_model(self, folder / WEIGHTS_FILE)
        write_json(folder / CONFIG_FILE, {k: v for k, v in asdict(self.config).items() if k != "until" or v})

    @classmethod
    def from_pretrained(cls, folder: str | Path) -> "Conditioning":
        """Raises `UserError`, naming the file, if one is missing, damaged or does not fit the other."""
        folder = Path(folder)
        try:
            config = ConditioningConfig(**json.loads((folder / CONFIG_FILE).read_bytes()))
            conditioning = cls(config)
            load_model(conditioning, folder / WEIGHTS_FILE)
        except (OSError, ValueError, TypeError, RuntimeError, SafetensorError) as error:
            raise UserError(
                f"{folder} does not load: {' '.join(str(error).split())}", "copy the model folder again"
            ) from error
        return conditioning.eval()


def embedding_width(transformer: nn.Module, family: DiTFamily) -> int:
    """D of the timestep embedding."""
    return transformer.get_submodule(family.timestep_embedder).linear_2.out_features


def new_conditioning(
    transformer: nn.Module,
    family: DiTFamily,
    embeds: tuple[str, ...],
    start: Conditioning | None = None,
    **trained,
) -> Conditioning:
    """Untrained embeddings that fit this transformer; `trained` are further fields of `ConditioningConfig`.

    What `start`, the teacher's, embeds as well starts as a copy of that.
    """
    config = ConditioningConfig(family.name, embedding_width(transformer, family), embeds, **trained)
    conditioning = Conditioning(config)
    for name in set(embeds) & set(start.config.embeds if start else ()):
        conditioning.embedders[name].load_state_dict(start.embedders[name].state_dict())
    return conditioning.to(next(transformer.parameters()).device)
