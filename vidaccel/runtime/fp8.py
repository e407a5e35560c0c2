"""Linear layers whose weights and inputs are in float8, by products that scale each row; none needs torch.compile.

The weight [N, K] is quantised once, row by row. The input is quantised as it comes, in one pass over memory
(`quantize_rows`), or before: fused blocks have adaLN write the `Rows` that several layers then take, and the second
layer of a feed-forward quantises its input together with the GELU before it. Hardware without such products is refused;
layers where K or N is no multiple of 16 stay plain; the number of rows is free.

K inputs, N outputs
"""

from typing import Any

from diffusers.models.activations import GELU
from diffusers.models.attention import FeedForward
from torch import Tensor, nn

from vidaccel.compat.torch import KeepsTypes, scaled_product
from vidaccel.kernels.quantize_rows import reference
from vidaccel.kernels.quantize_rows.op import quantize_rows
from vidaccel.kernels.quantize_rows.reference import Rows


class Fp8Linear(KeepsTypes, nn.Linear):
    """In the place of a plain linear layer, under the same name: its weight in float8, its bias as it was.

    It can be neither trained nor saved. Cast to another type it computes as before, and gives its results in that.
    """

    scales: Tensor
    """Of the weight's rows, float32 [N]."""

    def __init__(self, layer: nn.Linear, kernels: str = "auto", gelu: bool = False):
        """
        Args:
            layer: what it computes, in the type of its results.
            kernels: what quantises its inputs; its own weight the reference does.
            gelu: take the GELU (tanh-approximate) of a tensor first.
        """
        nn.Module.__init__(self)
        self.in_features, self.out_features = layer.in_features, layer.out_features
        self.dtype = self.results = layer.weight.dtype
        self.kernels, self.gelu = kernels, gelu
        values, scales = reference.quantize_rows(layer.weight.detach())
        self.weight = nn.Parameter(values, requires_grad=False)
        self.register_buffer("scales", scales)
        self.bias = layer.bias

    def rows(self, x: Tensor, left: Tensor | None = None, gelu: bool = False) -> Rows:
        """What `forward` takes in the place of x [..., D] to the right of left [..., K - D]; quantised once, it can be
        given to several layers."""
        return quantize_rows(x, left=left, gelu=gelu or self.gelu, kernels=self.kernels)

    def forward(self, input: Tensor | Rows) -> Tensor:
        """[..., K] -> [..., N] in the type that the weight had, or that the layer was cast to since."""
        values, scales = input if isinstance(input, Rows) else self.rows(input)
        flat = values.flatten(0, -2)
        product = scaled_product(flat, self.weight.t(), scales.reshape(-1, 1), self.scales[None], self.dtype, self.bias)
        return product.view(*values.shape[:-1], self.out_features).to(self.results)


class ProjectionAlone(GELU):
    """The first half of a feed-forward whose second half takes the GELU."""

    def forward(self, hidden_states: Tensor) -> Tensor:
        return self.proj(hidden_states)


def quantize_layers(blocks: nn.Module, names: list[str], kernels: str) -> None:
    """Put an `Fp8Linear` in the place of each of those layers of a block list; in a feed-forward with GELU
    (tanh-approximate) between two layers, the second takes the GELU over."""
    gelu = dict.fromkeys(names, False)
    for name, module in blocks.named_modules():
        if isinstance(module, FeedForward) and f"{name}.net.2" in gelu and _takes_gelu(module):
            module.net[0].__class__ = ProjectionAlone
            gelu[f"{name}.net.2"] = True
    for name in names:
        layer: Any = blocks.get_submodule(name)
        blocks.set_submodule(name, Fp8Linear(layer, kernels, gelu[name]), strict=True)


def _takes_gelu(feed_forward: Any) -> bool:
    """Whether that GELU is all that is between its two layers."""
    first, dropout, *_ = feed_forward.net
    return type(first) is GELU and first.approximate == "tanh" and not dropout.p
