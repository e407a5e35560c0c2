"""The learned forecaster: tokens and cache fused, then a few blocks of the family's own kind (method.md, section 3).

    fused  = cache + deviation * Linear(D, D)(SiLU(Linear(2D, D)([tokens; cache])))
    leaves = cache + s (blocks(fused, and whatever else the trunk's first block was called with) - cache)

where `cache` is what the full step before left, h_0, or for one that looks back on two

    cache  = h_0 + w (h_0 - h_1),    w = (k_0 - k) / ((k_1 - k_0) + (k_0 - k) / 2)

which follows the line through both at first (`Taylor`) but never twice as far as they are apart: a line goes wrong
there. k is the place of a time along the step grid, as there. w is not learnt, because what the squared error
teaches is to follow less far.

Video and text have a fusion each, except where the family's last blocks treat them as one sequence: both then share
one, and since it acts on each token by itself nothing has to be put side by side for it. Nor are tokens and cache:
the fusion's first layer is two products into one result, which is faster than the layer as it is written
(studies/results/gpu).

A new predictor gives the cached tokens, or that forecast of them, which is nearer the truth than the trunk's last
blocks applied to them a second time. So the fusion is a correction of the cache, and what writes it is zero at first;
the blocks are copies of the trunk's last ones but for the layers that write into the residual stream, which are zero
too: each starts as the identity and keeps what it has learnt to look at.

What is added is scaled by the time since the full step: s is k_0 - k in tenths. So it is exact where none has passed,
and has to find a slope, which changes less with the distance than what is missing does.

Fusions see tokens standardised by channel, and correct in units of the cache's own deviation, video and text each by
their own statistics, those of one pass. Channels of one trunk differ a thousandfold, text from video more, and Adam's
steps are as large for a weight on the one as on the other: without it a rate at which the small channels learn throws
the large ones about.

The architecture `published` is the paper's, with none of that:

    leaves = blocks(Linear(D, D)(SiLU(Linear(2D, D)([tokens; cache]))), and whatever else)

of one full step, whatever the time since; the family's embedders run on its steps too, where the corrected cache is
served with what they gave on the full step. It starts from random fusions and copies of the trunk's last blocks: the
paper says of neither how it starts.

Scalars that were fitted with the network's answer as one more term (multistep.py) may lie beside its weights; attached
to a pipeline, the network then serves under them wherever they have its list of full steps.

Of a model with two transformers each has a network of its own (`Predictor.parts`), both of one form and in one file.

B batch, N tokens, D width
"""

from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, cast

import diffusers
import torch
from diffusers import DiffusionPipeline
from torch import Tensor, nn
from torch.nn import functional as F

from vidaccel.compat.diffusers import built_with, execution_device, parallel_of
from vidaccel.compat.torch import KeepsFloat32
from vidaccel.errors import UserError
from vidaccel.families.base import DiTFamily
from vidaccel.families.registry import FAMILIES, family_of
from vidaccel.families.walk import blocks_of, call_block, denoisers_of, named_outputs, width, widths
from vidaccel.forecasters.base import Cached, ForecasterCosts, Making, PlannedTrunk, Tokens, even_time
from vidaccel.forecasters.checkpoint import CORRECTION, PUBLISHED, SCALARS_FILE, Checkpointed, NetworkConfig
from vidaccel.forecasters.multistep import Multistep
from vidaccel.models.files import local_path
from vidaccel.models.grid import check_boundary
from vidaccel.models.loading import LoadedPipeline
from vidaccel.models.released import Released
from vidaccel.runtime.compiled import compile_like
from vidaccel.runtime.fuse import fuse_like

SMALLEST, TINY = 1e-3, 1e-6
"""Least deviation of a channel, as a share of the mean one; and where none changes."""
LAG = 0.1
"""Share of a sampling since the full step at which what is added to the cache counts once."""


class Statistics(KeepsFloat32):
    """Mean and deviation [2, D], by channel, of the tokens that enter the trunk and of the cached ones; float32, since
    what is divided by is not rounded."""

    def __init__(self, width: int):
        super().__init__()
        self.register_buffer("mean", torch.zeros(2, width))
        self.register_buffer("deviation", torch.ones(2, width))

    @torch.no_grad()
    def measure(self, tokens: Tensor, cache: Tensor) -> None:
        """Take them from tokens [..., D] like those to come."""
        for i, values in enumerate((tokens, cache)):
            values = values.float().flatten(0, -2)
            deviation = values.std(0)
            self.mean[i] = values.mean(0)
            self.deviation[i] = deviation.clamp(min=max(SMALLEST * float(deviation.mean()), TINY))


class Fusion(nn.Module):
    """Tokens and cache [B, N, D] -> [B, N, D]."""

    def __init__(self, width: int):
        super().__init__()
        self.inner, self.outer = nn.Linear(2 * width, width), nn.Linear(width, width)
        nn.init.zeros_(self.outer.weight)
        nn.init.zeros_(self.outer.bias)

    def forward(self, tokens: Tensor, cache: Tensor, statistics: Statistics) -> Tensor:
        weight = self.inner.weight / statistics.deviation.flatten()
        bias = self.inner.bias - (weight * statistics.mean.flatten()).sum(1)
        hidden = _side_by_side(tokens, cache, weight, bias)
        return cache + (statistics.deviation[1] * self.outer(F.silu(hidden))).to(cache.dtype)


class PublishedFusion(nn.Module):
    """Tokens and cache [B, N, D] -> [B, N, D], by the layers alone."""

    def __init__(self, width: int):
        super().__init__()
        self.inner, self.outer = nn.Linear(2 * width, width), nn.Linear(width, width)

    def forward(self, tokens: Tensor, cache: Tensor) -> Tensor:
        hidden = _side_by_side(tokens, cache, self.inner.weight, self.inner.bias)
        return self.outer(F.silu(hidden)).to(cache.dtype)


def _side_by_side(tokens: Tensor, cache: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    """A linear layer [D, 2 D] of [tokens; cache], both [B, N, D], which are not put side by side for it."""
    device, dtype = tokens.device.type, tokens.dtype
    if torch.is_autocast_enabled(device):
        dtype = torch.get_autocast_dtype(device)
    for_tokens, for_cache = weight.to(dtype).chunk(2, dim=1)
    hidden = F.linear(tokens.to(dtype), for_tokens, bias.to(dtype))
    return torch.addmm(hidden.flatten(0, 1), cache.to(dtype).flatten(0, 1), for_cache.mT).view_as(hidden)


class Predictor(Checkpointed, nn.Module):
    """A `Forecaster`, of one full step or two. It holds nothing of the trunk that it stands in for."""

    def __init__(self, config: NetworkConfig):
        """Weights are whatever memory held: use `new_predictor` or `Predictor.from_pretrained`."""
        super().__init__()
        self.config, self.history, self._grid = config, config.history, config.grid
        lists = FAMILIES[config.family].block_lists
        self._arguments, self._kind, self._joint = lists[0].arguments, lists[-1], lists[-1].joint
        fusions = ("tokens",) if self._joint else config.cached
        self._corrects = config.architecture == CORRECTION
        fusion, measured = (Fusion, config.cached) if self._corrects else (PublishedFusion, ())
        own = widths(config.transformer, self._kind) | {"tokens": config.width}
        self.fusions = nn.ModuleDict({name: fusion(own[name]) for name in fusions})
        self.statistics = nn.ModuleDict({name: Statistics(own[name]) for name in measured})
        self.blocks = _blocks(config).to_empty(device=torch.get_default_device())
        more = [] if config.boundary is None else [Predictor(replace(config, boundary=None))]
        self.further = nn.ModuleList(more)
        """That of the second of two transformers; this one is then the first's."""
        self.scalars: Multistep | None = None
        """What was fitted with its answer as one more term; the network serves alone where there is nothing."""

    @property
    def parts(self) -> "list[Predictor]":
        """The networks of each transformer."""
        return [self, *(cast(Predictor, network) for network in self.further)]

    @property
    def recomputes(self) -> bool:
        """As in `Forecaster`."""
        return not self._corrects

    @classmethod
    def make(cls, making: Making) -> "Predictor":
        """The one in `making.folder`, or in the released file that it is."""
        assert making.folder is not None
        return predictor_at(making.folder, denoisers_of(making.pipe, making.family)[0], making.family)

    def save_pretrained(self, folder: str | Path) -> None:
        super().save_pretrained(folder)
        if self.scalars is None:
            (Path(folder) / SCALARS_FILE).unlink(missing_ok=True)
        else:
            self.scalars.save_pretrained(folder, SCALARS_FILE)

    @classmethod
    def from_pretrained(cls, folder: str | Path) -> "Predictor":
        made = super().from_pretrained(folder)
        made.scalars = Multistep.on_top_of(folder)
        return made

    @classmethod
    def from_released(cls, path: str | Path, transformer: nn.Module, family: DiTFamily) -> "Predictor":
        """The one in a file that others have released, whose weights stay views into it until they are cast or moved.

        Raises:
            UserError: the file is of no known layout, for another model than this transformer, or not whole.
        """
        released = Released.opened(path, "predictor", family)
        kind, blocks = family.block_lists[-1], released.layout.blocks
        if len(getattr(transformer, kind.name)) < blocks:
            raise UserError(f"{path} has {blocks} blocks, and this trunk's last list fewer", "take the model it is for")
        settings, own = built_with(cast(Any, transformer).config), width(transformer)
        made_for = NetworkConfig(family.name, own, blocks, kind.returns, settings, architecture=PUBLISHED)
        with torch.device("meta"):
            made = cls(made_for)
        made.load_state_dict(released.weights(made.state_dict(), made_for.width), assign=True)
        return made.eval()

    @staticmethod
    def costs(trunk: PlannedTrunk) -> ForecasterCosts:
        # weights of a fusion are [D, 2 D] and [D, D]
        return ForecasterCosts(
            trunk.history,
            linear=trunk.linear + sum(2 * N * 3 * D * D for N, D in trunk.kinds),
            attention=trunk.attention,
            parameters=trunk.parameters + sum(3 * D * D + 2 * D for _, D in trunk.kinds),
        )

    def forward(self, arguments: dict[str, Tensor], memory: tuple[Cached, ...], t: Tensor | None) -> Tokens:
        """As `Forecaster.__call__`. Raises `ValueError` without the times of both passes, unless as published."""
        if not self._corrects:
            return self._through_blocks(arguments, memory[0].tokens)
        lag = even_time(memory[0].t, self._grid) - even_time(t, self._grid)
        kept = self._carried_on(memory, t)
        left = self._through_blocks(arguments, kept)
        scale = (lag / LAG).reshape(-1, 1, 1)
        return {name: torch.lerp(kept[name], left[name], scale.to(left[name])) for name in kept}

    def _through_blocks(self, arguments: dict[str, Tensor], kept: Tokens) -> Tokens:
        """What leaves the blocks, which are given the tokens fused with what is kept of a full step."""
        fused = {}
        for name in self.config.cached:
            measured = (self.statistics[name],) if self._corrects else ()
            fused[name] = self.fusion(name)(arguments[name], kept[name], *measured)
        # Lists name the same arguments differently, but agree on their order.
        values = dict(zip(self._kind.arguments, ((arguments | fused)[name] for name in self._arguments), strict=True))
        for block in self.blocks:
            values |= named_outputs(self._kind, call_block(self._kind, block, values))
        return {name: values[name] for name in self.config.cached}

    def _carried_on(self, memory: tuple[Cached, ...], t: Tensor) -> Tokens:
        """What is corrected: `cache` of the formula."""
        latest = memory[0].tokens
        if len(memory) == 1:
            return latest
        now, k_0, k_1 = (even_time(time, self._grid) for time in (t, memory[0].t, memory[1].t))
        weight = ((k_0 - now) / (k_1 - k_0 + (k_0 - now) / 2)).reshape(-1, 1, 1)
        return {name: h + weight.to(h) * (h - memory[1].tokens[name]) for name, h in latest.items()}

    def check_denoisers(self, pipe: DiffusionPipeline, family: DiTFamily) -> None:
        """`UserError` unless there is a network for each of the pipeline's transformers, at the times that it takes."""
        hint = "train one for this pipeline: vidaccel train-predictor"
        check_boundary("the predictor is", self.config.boundary, pipe, family, hint)

    def fusion(self, name: str) -> nn.Module:
        """The fusion that tokens of this name go through."""
        return self.fusions["tokens" if self._joint else name]

    def run_like(self, transformer: nn.Module, *further: nn.Module) -> "Predictor":
        """Take over how the trunk's own blocks are run: types (families keep some weights in float32), attention
        backend, fused kernels, torch.compile. Each network from its own of several transformers."""
        for network, own in zip(self.parts[1:], further, strict=True):
            network.run_like(own)
        computes: Any = transformer.dtype
        for block, original in self._beside(transformer):
            weights, modules = plain_weights(original), dict(original.named_modules())
            for name, parameter in block.named_parameters():
                held = weights[name].dtype
                parameter.data = parameter.data.to(held if held.itemsize > 1 else computes)  # else it is quantised
            for name, module in block.named_modules():
                if hasattr(module, "set_processor"):
                    module.set_processor(modules[name].processor)
            fuse_like(block, original)
            compile_like(block, original)
        self.fusions.to(computes)
        return self

    def attend_like(self, transformer: nn.Module, *further: nn.Module) -> None:
        """Go about tokens that are split over several devices as the trunk's own blocks now do."""
        for network, own in zip(self.parts[1:], further, strict=True):
            network.attend_like(own)
        module: Any
        for block, original in self._beside(transformer):
            modules: dict[str, Any] = dict(original.named_modules())
            for name, module in block.named_modules():
                if hasattr(module, "set_processor"):
                    processor = modules[name].processor
                    if parallel_of(processor) is not parallel_of(module.processor):
                        module.set_processor(processor)

    def _beside(self, transformer: nn.Module) -> Iterator[tuple[nn.Module, nn.Module]]:
        """Its blocks, each with the trunk's own in the same place from the end."""
        own = [block for _, block in blocks_of(transformer, FAMILIES[self.config.family])]
        return zip(self.blocks, own[-len(self.blocks) :], strict=True)


def new_predictor(
    transformer: nn.Module,
    family: DiTFamily,
    entering: Tokens,
    cached: Tokens,
    blocks: int = 2,
    further: "Sequence[Predictor]" = (),
    **made_for,
) -> Predictor:
    """An untrained predictor in float32 on the transformer's device.

    Args:
        transformer: whose trunk it is to stand in for.
        family: its record.
        entering: tokens that entered the trunk, for their statistics; none where it will have no step to predict.
        cached: those that a full pass left (`Cached.tokens`), by the same names, for theirs.
        blocks: k, at most the length of the transformer's last block list.
        further: the one for the second of two transformers; `made_for` then says their `boundary`.
        made_for: further fields of `NetworkConfig`.

    Raises:
        UserError: the trunk has not that many blocks of the kind, or their weights are packed.
    """
    kind = family.block_lists[-1]
    trunk = getattr(transformer, kind.name)
    if not 1 <= blocks <= len(trunk):
        raise UserError(f"a predictor of {blocks} blocks", f"the trunk's last list has {len(trunk)}: take 1 to that")
    if not all(weight.is_floating_point() for weight in trunk[-1].parameters()):
        raise UserError(
            f"the weights of this {type(transformer).__name__} are packed, and a predictor begins with whole ones",
            "train it on the model in bfloat16 or fp8; it is attached to a packed one all the same",
        )
    settings = built_with(cast(Any, transformer).config)
    predictor = Predictor(NetworkConfig(family.name, width(transformer), blocks, kind.returns, settings, **made_for))
    for block, original in zip(predictor.blocks, trunk[-blocks:], strict=True):
        block.load_state_dict(plain_weights(original))
        layers = dict(block.named_modules())
        for name in kind.residual_layers if predictor.config.architecture == CORRECTION else ():
            for parameter in layers[name].parameters() if name in layers else ():
                nn.init.zeros_(parameter)
    predictor.further = nn.ModuleList(further)
    for name, statistics in predictor.statistics.items():
        if name in entering:
            statistics.measure(entering[name].cpu(), cached[name].cpu())
    return predictor.to(next(transformer.parameters()).device)


def load_predictor(path: str | Path, pipe: DiffusionPipeline | LoadedPipeline) -> Predictor:
    """A predictor for this pipeline, on its device and run as its transformer's blocks are: `attach` takes it.

    Args:
        path: a file of weights that others have released, or a predictor's folder.
        pipe: the pipeline.

    Raises:
        UserError: it is none, or for another model.
    """
    pipe = pipe.pipe if isinstance(pipe, LoadedPipeline) else pipe
    family = family_of(pipe)
    transformers = denoisers_of(pipe, family)
    predictor = predictor_at(local_path(path), transformers[0], family)
    predictor.check_fits(transformers[0], family, force=True)  # whose it is, `attach` asks
    predictor.check_denoisers(pipe, family)
    return predictor.run_like(*transformers).to(execution_device(pipe))


def predictor_at(path: Path, transformer: nn.Module, family: DiTFamily) -> Predictor:
    """The one in a folder, or in a file that others have released for this transformer."""
    if path.is_dir():
        return Predictor.from_pretrained(path)
    return Predictor.from_released(path, transformer, family)


def plain_weights(block: nn.Module) -> dict[str, Tensor]:
    """A block's weights by the names that they have without adapters, whose own are left out."""
    own = {name: weight for name, weight in block.state_dict().items() if ".lora_" not in name}
    return {name.replace(".base_layer", ""): weight for name, weight in own.items()}


def _blocks(config: NetworkConfig) -> nn.ModuleList:
    """The last blocks of a transformer of this configuration, without memory for weights."""
    family = FAMILIES[config.family]
    with torch.device("meta"):
        transformer = getattr(diffusers, family.transformer).from_config(config.transformer)
    return getattr(transformer, family.block_lists[-1].name)[-config.blocks :]
