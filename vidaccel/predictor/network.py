"""The learned forecaster: tokens and cache fused, then a few blocks of the family's own kind (method.md, section 3).

    fused  = Linear(D, D)(SiLU(Linear(2D, D)([tokens; cache])))
    leaves = blocks(fused, and whatever else the trunk's first block was called with)

Video and text have a fusion each, except where the family's last blocks treat them as one sequence: both then share
one, and since it acts on each token by itself nothing has to be put side by side for it. The fusion's first layer is
one op (kernels/cache_fusion).

A new predictor gives about what it was given: the cached tokens. Measured on the sprites teacher at 20 steps, reusing
the tokens of the full step before is 3 to 8 % wrong in velocity, while the trunk's last blocks applied to them a
second time are 7 to 14 % wrong, and a random fusion is no better than nothing. So

- the blocks are copies of the trunk's last ones but for the layers that write into the residual stream, which are zero:
  each starts as the identity, keeps what it has learnt to look at, and learns what to say about it;
- the fusion's first layer standardises each channel of the cache and shifts it to where SiLU has no curvature, and its
  second undoes that. A smaller scale would come nearer to the identity, at the price of larger weights behind it that
  Adam's steps then throw about. What the tokens' statistics are has to be asked of one full pass.

B batch, N tokens, D width
"""

import diffusers
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from vidaccel.errors import UserError
from vidaccel.kernels.cache_fusion.op import cache_fusion
from vidaccel.models.catalog import FAMILIES
from vidaccel.models.compiled import compile_like
from vidaccel.models.conditioning import embedding_width
from vidaccel.models.family import DiTFamily
from vidaccel.models.fuse import FUSED_BLOCKS
from vidaccel.predictor.checkpoint import Checkpointed, NetworkConfig
from vidaccel.predictor.forecasters import Cached, Tokens

RESIDUAL_OUTPUTS = ("proj_out", "to_out.0", "to_add_out", "net.2")
"""How the names of those Linear layers of a block end whose output is added to its tokens, in all families."""
FLAT, SLOPE = 2.39935728, 1.09983932
"""Where SiLU has no second derivative, and its first one there."""
SPREAD = 0.5
"""Standard deviation of what enters SiLU at the start."""


class Fusion(nn.Module):
    """Tokens and cache [B, N, D] -> [B, N, D]."""

    def __init__(self, width: int):
        super().__init__()
        self.inner, self.outer = nn.Linear(2 * width, width), nn.Linear(width, width)

    def forward(self, tokens: Tensor, cache: Tensor, kernels: str) -> Tensor:
        inputs = tokens, cache, self.inner.weight, self.inner.bias
        if torch.is_autocast_enabled(tokens.device.type):
            inputs = (tensor.to(torch.get_autocast_dtype(tokens.device.type)) for tensor in inputs)
        return self.outer(cache_fusion(*inputs, kernels=kernels))

    @torch.no_grad()
    def start_as_reuse(self, cache: Tensor) -> None:
        """Nearly the identity on cached tokens such as these [..., D], blind to the others but ready to learn."""
        cache = cache.float().flatten(0, -2)
        mean, deviation = cache.mean(0), cache.std(0)
        deviation = deviation.clamp(min=1e-3 * deviation.mean()) / SPREAD
        self.inner.weight.copy_(torch.cat([torch.zeros(len(mean), len(mean)).to(mean), torch.diag(1 / deviation)], 1))
        self.inner.bias.copy_(FLAT - mean / deviation)
        self.outer.weight.copy_(torch.diag(deviation / SLOPE))
        self.outer.bias.copy_(mean - F.silu(torch.tensor(FLAT)) * deviation / SLOPE)


class Predictor(Checkpointed, nn.Module):
    """A `Forecaster`. It holds nothing of the trunk that it stands in for.

    `kernels` is "reference", "fused" or "auto", as in `kernels.select`.
    """

    history = 1

    def __init__(self, config: NetworkConfig):
        """Weights are whatever memory held: use `new_predictor` or `Predictor.from_pretrained`."""
        super().__init__()
        self.config, self.kernels = config, "auto"
        lists = FAMILIES[config.family].block_lists
        self._arguments, self._joint = lists[0].arguments, lists[-1].joint
        fusions = ("tokens",) if self._joint else config.cached
        self.fusions = nn.ModuleDict({name: Fusion(config.width) for name in fusions})
        self.blocks = _blocks(config).to_empty(device="cpu")

    def forward(self, arguments: dict[str, Tensor], memory: tuple[Cached, ...], t: Tensor | None = None) -> Tokens:
        """As `Forecaster.__call__`; the blocks see t through their own arguments."""
        cached = self.config.cached
        fused = {name: self.fusion(name)(arguments[name], memory[0].tokens[name], self.kernels) for name in cached}
        values = [(arguments | fused)[name] for name in self._arguments]
        for block in self.blocks:
            left = block(*values)
            left = left if isinstance(left, tuple) else (left,)
            values[: len(left)] = left
        return dict(zip(cached, left, strict=True))

    def fusion(self, name: str) -> Fusion:
        """The fusion that tokens of this name go through."""
        return self.fusions["tokens" if self._joint else name]

    def run_like(self, transformer: nn.Module) -> "Predictor":
        """Take over how the trunk's own blocks are run: types (families keep some weights in float32), attention
        backend, fused kernels, torch.compile."""
        original = getattr(transformer, FAMILIES[self.config.family].block_lists[-1].name)[-1]
        weights, modules = original.state_dict(), dict(original.named_modules())
        for block in self.blocks:
            for name, parameter in block.named_parameters():
                parameter.data = parameter.data.to(weights[name].dtype)
            for name, module in block.named_modules():
                if hasattr(module, "set_processor"):
                    module.set_processor(modules[name].processor)
            if type(original) in FUSED_BLOCKS.values():
                block.__class__, block.kernels = type(original), original.kernels
            compile_like(block, original)
        self.kernels = getattr(original, "kernels", "reference")
        self.fusions.to(transformer.dtype)
        return self


def new_predictor(transformer: nn.Module, family: DiTFamily, cached: Tokens, blocks: int = 2, **made_for) -> Predictor:
    """An untrained predictor in float32 on the transformer's device.

    Args:
        transformer: whose trunk it is to stand in for.
        family: its record.
        cached: tokens that a full pass left (`Cached.tokens`), by whose statistics it starts as near reuse as it does.
        blocks: k, at most the length of the transformer's last block list.
        made_for: further fields of `NetworkConfig`.

    Raises:
        UserError: the trunk has not that many blocks of the kind.
    """
    kind = family.block_lists[-1]
    trunk = getattr(transformer, kind.name)
    if not 1 <= blocks <= len(trunk):
        raise UserError(f"a predictor of {blocks} blocks", f"the trunk's last list has {len(trunk)}: take 1 to that")
    settings = {name: value for name, value in transformer.config.items() if not name.startswith("_")}
    width = embedding_width(transformer, family)
    predictor = Predictor(NetworkConfig(family.name, width, blocks, kind.returns, settings, **made_for))
    for block, original in zip(predictor.blocks, trunk[-blocks:], strict=True):
        block.load_state_dict(original.state_dict())
        for name, layer in block.named_modules():
            if name.endswith(RESIDUAL_OUTPUTS):
                nn.init.zeros_(layer.weight)
                nn.init.zeros_(layer.bias)
    for name in predictor.fusions:
        tokens = cached.values() if name == "tokens" else [cached[name]]
        predictor.fusions[name].start_as_reuse(torch.cat([t.flatten(0, 1) for t in tokens]).cpu())
    return predictor.to(next(transformer.parameters()).device)


def _blocks(config: NetworkConfig) -> nn.ModuleList:
    """The last blocks of a transformer of this configuration, without memory for weights."""
    family = FAMILIES[config.family]
    with torch.device("meta"):
        transformer = getattr(diffusers, family.transformer).from_config(config.transformer)
    return getattr(transformer, family.block_lists[-1].name)[-config.blocks :]
