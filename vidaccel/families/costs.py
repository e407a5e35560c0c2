"""What each part of a family's transformer works on, as data: FLOPs and memory are computed from it.

A *stream* is a number of rows: `one` (the conditioning vector), `video` or `text` tokens, `all` of them, those of a
latent `frame`, how many `frames` there are, or one of several texts by its name in the configuration; `prompt+1` is one
row more. A Linear or patch convolution costs 2 FLOPs a weight and row of its stream, an attention 4 D a pair of query
and key, and nothing else is counted: PyTorch's counter leaves out norms, rotations and activation functions as well,
and tests/bench/measures/test_flops.py holds the sums against it, to the last FLOP. So all that a family adds, as
`costs` of its record, is a table of `layer name -> stream`.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field

Layers = tuple[tuple[str, str], ...]
"""(pattern of a layer's dotted name, as fnmatch reads it; stream), the first that matches holds."""

Attentions = tuple[tuple[str, ...], ...]
"""(stream of the queries, stream of the keys) of each attention, and where it is not as wide as the video's tokens the
transformer config keys whose product its width is. Linear attention has its keys summed up to `head` rows, D / H, or
`half` of that."""


@dataclass(frozen=True)
class Argument:
    """A tensor that a block is called with besides the tokens, or that an embedder gives."""

    shape: tuple[int | str | tuple[str, ...], ...]
    """Sizes, or what they are: a stream, `width` D, `head` D / H, `half` of that, a transformer config key, or several
    whose product it is."""
    dtype: str = "model"
    """`model` is the one of the weights."""
    copies: int = 1
    """2 is a tuple of two such tensors (cosines and sines)."""
    names: tuple[str, ...] = ()
    """Of a dictionary that has it by each of them: one tensor."""


@dataclass(frozen=True)
class BlockCosts:
    """One block of a list."""

    layers: Layers
    attentions: Attentions
    branches: tuple[str, ...]
    """Streams of the tensors that a cache of every residual branch (FORA, TaylorSeer) keeps of the block."""
    arguments: dict[str, Argument | str | None]
    """By the names in the record's BlockList; None is what text to video passes as None, a stream's name how many rows
    that has."""


@dataclass(frozen=True)
class FamilyCosts:
    """One family's transformer."""

    layers: Layers
    """Of embedders and output head."""
    attentions: dict[str, Attentions]
    """Of embedders: module, or list of them -> attentions of each."""
    blocks: dict[str, BlockCosts]
    """By name of the block list."""
    fusions: tuple[str, ...]
    """Stream of each fusion MLP of the predictor, which is also what the cache holds."""
    static_embedders: tuple[Argument, ...]
    """What the record's `static_embedders` embedders give."""
    products: Mapping[str, tuple[str, str]] = field(default_factory=dict)
    """Embedder, by path -> (parameter of the transformer that it multiplies rows with, their stream)."""

    @property
    def texts(self) -> set[str]:
        """Streams of the texts and of what stands beside them, whose lengths a configuration gives."""
        others = {"one", "video", "text", "all", "frame", "frames"}
        return {stream.partition("+")[0] for _, stream in self.layers} - others
