"""The released models in plain torch, from the published formulas, on weights by their names in the released files; and
such files at any width.

Every sample is rendered by itself with the tokens of its text that are none of the padding, so that nothing here has a
mask. D width, H heads
"""

import math
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.nn.functional as F
from safetensors.torch import save_file
from torch import Tensor

Weights = Mapping[str, Tensor]


@dataclass(frozen=True)
class Sizes:
    """Of a tiny model, as tests/tiny.py builds it."""

    width: int = 24
    heads: int = 2
    mlp: int = 48
    text: int = 32
    pooled: int = 32
    glyphs: int = 32
    image: int = 16
    channels: tuple[int, int] = (4, 4)
    patch: int = 2
    double: int = 1
    single: int = 2
    refiner: int = 1
    guidance: bool = False


HUNYUAN_VIDEO = Sizes()
HUNYUAN_VIDEO_15 = Sizes(channels=(9, 4), patch=1, double=2, single=0)


# What the files hold


class _Shapes(dict):
    def linear(self, name: str, takes: int, gives: int) -> None:
        self[f"{name}.weight"], self[f"{name}.bias"] = (gives, takes), (gives,)

    def norm(self, name: str, size: int) -> None:
        self[f"{name}.weight"] = self[f"{name}.bias"] = (size,)

    def embedder(self, name: str, width: int) -> None:
        self.linear(f"{name}.mlp.0", 256, width)
        self.linear(f"{name}.mlp.2", width, width)


def _double_block(shapes: _Shapes, name: str, sizes: Sizes, fused: bool) -> None:
    D, head = sizes.width, sizes.width // sizes.heads
    for stream in ("img", "txt"):
        shapes.linear(f"{name}.{stream}_mod.linear", D, 6 * D)
        if fused:
            shapes.linear(f"{name}.{stream}_attn_qkv", D, 3 * D)
        else:
            for letter in "qkv":
                shapes.linear(f"{name}.{stream}_attn_{letter}", D, D)
        for letter in "qk":
            shapes[f"{name}.{stream}_attn_{letter}_norm.weight"] = (head,)
        shapes.linear(f"{name}.{stream}_attn_proj", D, D)
        shapes.linear(f"{name}.{stream}_mlp.fc1", D, sizes.mlp)
        shapes.linear(f"{name}.{stream}_mlp.fc2", sizes.mlp, D)


def _single_block(shapes: _Shapes, name: str, sizes: Sizes) -> None:
    D = sizes.width
    shapes.linear(f"{name}.linear1", D, 3 * D + sizes.mlp)
    shapes.linear(f"{name}.linear2", D + sizes.mlp, D)
    shapes[f"{name}.q_norm.weight"] = shapes[f"{name}.k_norm.weight"] = (D // sizes.heads,)
    shapes.linear(f"{name}.modulation.linear", D, 3 * D)


def _around_the_blocks(shapes: _Shapes, sizes: Sizes) -> None:
    D, refiner = sizes.width, "txt_in.individual_token_refiner.blocks"
    takes, gives = sizes.channels
    shapes["img_in.proj.weight"] = (D, takes, 1, sizes.patch, sizes.patch)
    shapes["img_in.proj.bias"] = (D,)
    shapes.embedder("time_in", D)
    shapes.embedder("time_r_in", D)
    shapes.linear("txt_in.input_embedder", sizes.text, D)
    shapes.embedder("txt_in.t_embedder", D)
    shapes.linear("txt_in.c_embedder.linear_1", sizes.text, D)
    shapes.linear("txt_in.c_embedder.linear_2", D, D)
    for i in range(sizes.refiner):
        shapes.norm(f"{refiner}.{i}.norm1", D)
        shapes.norm(f"{refiner}.{i}.norm2", D)
        shapes.linear(f"{refiner}.{i}.self_attn_qkv", D, 3 * D)
        shapes.linear(f"{refiner}.{i}.self_attn_proj", D, D)
        shapes.linear(f"{refiner}.{i}.mlp.fc1", D, 4 * D)
        shapes.linear(f"{refiner}.{i}.mlp.fc2", 4 * D, D)
        shapes.linear(f"{refiner}.{i}.adaLN_modulation.1", D, 2 * D)
    shapes.linear("final_layer.adaLN_modulation.1", D, 2 * D)
    shapes.linear("final_layer.linear", D, sizes.patch**2 * gives)


def hunyuan_video_student(sizes: Sizes = HUNYUAN_VIDEO) -> dict[str, Tensor]:
    shapes = _Shapes()
    _around_the_blocks(shapes, sizes)
    shapes.linear("vector_in.in_layer", sizes.pooled, sizes.width)
    shapes.linear("vector_in.out_layer", sizes.width, sizes.width)
    if sizes.guidance:
        shapes.embedder("guidance_in", sizes.width)
    for i in range(sizes.double):
        _double_block(shapes, f"double_blocks.{i}", sizes, fused=True)
    for i in range(sizes.single):
        _single_block(shapes, f"single_blocks.{i}", sizes)
    return _drawn(shapes)


def hunyuan_video_15_student(sizes: Sizes = HUNYUAN_VIDEO_15) -> dict[str, Tensor]:
    shapes, D = _Shapes(), sizes.width
    _around_the_blocks(shapes, sizes)
    shapes.norm("byt5_in.layernorm", sizes.glyphs)
    shapes.linear("byt5_in.fc1", sizes.glyphs, 2048)
    shapes.linear("byt5_in.fc2", 2048, 2048)
    shapes.linear("byt5_in.fc3", 2048, D)
    shapes.norm("vision_in.proj.0", sizes.image)
    shapes.linear("vision_in.proj.1", sizes.image, sizes.image)
    shapes.linear("vision_in.proj.3", sizes.image, D)
    shapes.norm("vision_in.proj.4", D)
    shapes["cond_type_embedding.weight"] = (3, D)
    for i in range(sizes.double):
        _double_block(shapes, f"double_blocks.{i}", sizes, fused=False)
    return _drawn(shapes)


def hunyuan_video_predictor(sizes: Sizes = HUNYUAN_VIDEO) -> dict[str, Tensor]:
    shapes, D = _Shapes(), sizes.width
    shapes.linear("fusion_mlp.0", 2 * D, D)
    shapes.linear("fusion_mlp.2", D, D)
    for i in range(2):
        _single_block(shapes, f"mm_single_blocks.{i}", sizes)
    return _drawn(shapes, seed=1)


def hunyuan_video_15_predictor(sizes: Sizes = HUNYUAN_VIDEO_15) -> dict[str, Tensor]:
    shapes, D = _Shapes(), sizes.width
    for stream in ("img", "txt"):
        shapes.linear(f"fusion_mlp_{stream}.0", 2 * D, D)
        shapes.linear(f"fusion_mlp_{stream}.2", D, D)
    for i in range(2):
        _double_block(shapes, f"double_blocks.{i}", sizes, fused=False)
    return _drawn(shapes, seed=1)


def _drawn(shapes: Mapping[str, tuple[int, ...]], seed: int = 0) -> dict[str, Tensor]:
    draw = torch.Generator().manual_seed(seed)
    drawn = {name: torch.randn(shape, generator=draw) for name, shape in shapes.items()}
    return {name: weight / math.sqrt(max(1, weight[0].numel())) / 2 for name, weight in drawn.items()}


def write(file: Path, weights: Weights, outer: str = "") -> Path:
    save_file({outer + name: weight.contiguous() for name, weight in weights.items()}, file)
    return file


# The formulas


def _linear(weights: Weights, name: str, x: Tensor) -> Tensor:
    return F.linear(x, weights[f"{name}.weight"], weights[f"{name}.bias"])


def _affine(weights: Weights, name: str, x: Tensor, eps: float = 1e-5) -> Tensor:
    return F.layer_norm(x, x.shape[-1:], weights[f"{name}.weight"], weights[f"{name}.bias"], eps)


def _normed(x: Tensor) -> Tensor:
    return F.layer_norm(x, x.shape[-1:], eps=1e-6)


def _modulated(x: Tensor, shift: Tensor, scale: Tensor) -> Tensor:
    return _normed(x) * (1 + scale) + shift


def _embedded(weights: Weights, name: str, number: Tensor) -> Tensor:
    """Of a number in the model's own units, [1] -> [D]."""
    angles = number * torch.exp(-math.log(10000) * torch.arange(128) / 128)
    sinusoids = torch.cat([angles.cos(), angles.sin()])
    return _linear(weights, f"{name}.mlp.2", F.silu(_linear(weights, f"{name}.mlp.0", sinusoids)))


def _attention(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """[N, H, D / H] each -> [N, D]."""
    scores = torch.einsum("nhd,mhd->hnm", q, k) / math.sqrt(q.shape[-1])
    return torch.einsum("hnm,mhd->nhd", scores.softmax(-1), v).flatten(1)


def _rms(weights: Weights, name: str, x: Tensor) -> Tensor:
    return x * (x.pow(2).mean(-1, keepdim=True) + 1e-6).rsqrt() * weights[f"{name}.weight"]


def _rotated(x: Tensor, size: tuple[int, int, int]) -> Tensor:
    """Video tokens [N, H, D / H] turned by their place; axes of (4, 4, 4) channels, base 256."""
    places = torch.cartesian_prod(*(torch.arange(n, dtype=torch.float32) for n in size))
    angles = [places[:, i, None] / 256 ** (torch.arange(0, 4, 2) / 4) for i in range(3)]
    turn = torch.polar(torch.ones(len(x), 6), torch.cat(angles, dim=1))
    return torch.view_as_real(torch.view_as_complex(x.unflatten(2, (-1, 2))) * turn[:, None]).flatten(2)


def _refined(weights: Weights, text: Tensor, t: Tensor, sizes: Sizes) -> Tensor:
    """Text [L, E] -> [L, D], by the token refiner."""
    pooled = _linear(weights, "txt_in.c_embedder.linear_1", text.mean(0))
    about = _embedded(weights, "txt_in.t_embedder", t) + _linear(weights, "txt_in.c_embedder.linear_2", F.silu(pooled))
    x = _linear(weights, "txt_in.input_embedder", text)
    for i in range(sizes.refiner):
        name = f"txt_in.individual_token_refiner.blocks.{i}"
        gate, gate_mlp = _linear(weights, f"{name}.adaLN_modulation.1", F.silu(about)).chunk(2)
        qkv = _linear(weights, f"{name}.self_attn_qkv", _affine(weights, f"{name}.norm1", x, 1e-6))
        attended = _attention(*qkv.unflatten(1, (3, sizes.heads, -1)).unbind(1))
        x = x + gate * _linear(weights, f"{name}.self_attn_proj", attended)
        hidden = F.silu(_linear(weights, f"{name}.mlp.fc1", _affine(weights, f"{name}.norm2", x, 1e-6)))
        x = x + gate_mlp * _linear(weights, f"{name}.mlp.fc2", hidden)
    return x


def _through_double(weights: Weights, name: str, img: Tensor, txt: Tensor, vec: Tensor, size, heads: int):
    """A double-stream block: video [N, D] and text [L, D] tokens -> the same."""
    streams, mods = {"img": img, "txt": txt}, {}
    qkv: dict[str, list[Tensor]] = {}
    for stream, x in streams.items():
        mods[stream] = _linear(weights, f"{name}.{stream}_mod.linear", F.silu(vec)).chunk(6)
        normed = _modulated(x, *mods[stream][:2])
        if f"{name}.{stream}_attn_qkv.weight" in weights:
            parts = _linear(weights, f"{name}.{stream}_attn_qkv", normed).chunk(3, dim=1)
        else:
            parts = [_linear(weights, f"{name}.{stream}_attn_{letter}", normed) for letter in "qkv"]
        q, k, v = (part.unflatten(1, (heads, -1)) for part in parts)
        q, k = _rms(weights, f"{name}.{stream}_attn_q_norm", q), _rms(weights, f"{name}.{stream}_attn_k_norm", k)
        qkv[stream] = [_rotated(q, size), _rotated(k, size), v] if stream == "img" else [q, k, v]
    attended = _attention(*(torch.cat(pair) for pair in zip(qkv["img"], qkv["txt"], strict=True)))
    made = dict(zip(streams, attended.split([len(img), len(txt)]), strict=True))
    for stream, x in streams.items():
        _, _, gate, shift, scale, gate_mlp = mods[stream]
        x = x + gate * _linear(weights, f"{name}.{stream}_attn_proj", made[stream])
        hidden = F.gelu(_linear(weights, f"{name}.{stream}_mlp.fc1", _modulated(x, shift, scale)), approximate="tanh")
        streams[stream] = x + gate_mlp * _linear(weights, f"{name}.{stream}_mlp.fc2", hidden)
    return streams["img"], streams["txt"]


def _through_single(weights: Weights, name: str, x: Tensor, text: int, vec: Tensor, size, heads: int) -> Tensor:
    """A single-stream block: [video; text] tokens [N + L, D] -> the same; L is `text`."""
    D = x.shape[1]
    shift, scale, gate = _linear(weights, f"{name}.modulation.linear", F.silu(vec)).chunk(3)
    made = _linear(weights, f"{name}.linear1", _modulated(x, shift, scale))
    q, k, v = (part.unflatten(1, (heads, -1)) for part in made[:, : 3 * D].chunk(3, dim=1))
    q, k = _rms(weights, f"{name}.q_norm", q), _rms(weights, f"{name}.k_norm", k)
    q, k = (torch.cat([_rotated(part[:-text], size), part[-text:]]) for part in (q, k))
    both = torch.cat([_attention(q, k, v), F.gelu(made[:, 3 * D :], approximate="tanh")], dim=1)
    return x + gate * _linear(weights, f"{name}.linear2", both)


def _fused(weights: Weights, name: str, tokens: Tensor, cache: Tensor) -> Tensor:
    hidden = F.silu(_linear(weights, f"{name}.0", torch.cat([tokens, cache], dim=-1)))
    return _linear(weights, f"{name}.2", hidden)


def _patched(weights: Weights, x: Tensor, patch: int) -> tuple[Tensor, tuple[int, int, int]]:
    tokens = F.conv3d(x[None], weights["img_in.proj.weight"], weights["img_in.proj.bias"], stride=(1, patch, patch))[0]
    return tokens.flatten(1).T, tuple(tokens.shape[1:])


def _head(weights: Weights, tokens: Tensor, vec: Tensor, size: tuple[int, int, int], patch: int) -> Tensor:
    """Video tokens [N, D] -> velocity [C, T, H, W]."""
    shift, scale = _linear(weights, "final_layer.adaLN_modulation.1", F.silu(vec)).chunk(2)
    pixels = _linear(weights, "final_layer.linear", _modulated(tokens, shift, scale))
    pixels = pixels.unflatten(1, (-1, patch, patch)).unflatten(0, size)
    return pixels.permute(3, 0, 1, 4, 2, 5).flatten(4).flatten(2, 3)


@dataclass(frozen=True)
class Rendered:
    """One pass over one sample."""

    velocity: Tensor
    img: Tensor
    """Video tokens that leave the trunk, or the predictor, [N, D]."""
    txt: Tensor
    """Text tokens likewise, without padding."""


def hunyuan_video(
    weights: Weights,
    x: Tensor,
    t: Tensor,
    r: Tensor,
    text: Tensor,
    pooled: Tensor,
    g: Tensor | None = None,
    predictor: tuple[Weights, Rendered] | None = None,
    sizes: Sizes = HUNYUAN_VIDEO,
) -> Rendered:
    """x [C, T, H, W], t, r [], text [L, E], pooled [P]; with a predictor and the full pass before, a predicted one."""
    vec = (_embedded(weights, "time_in", 1000 * t) + _embedded(weights, "time_r_in", 1000 * r)) / 2
    vec = vec + _linear(weights, "vector_in.out_layer", F.silu(_linear(weights, "vector_in.in_layer", pooled)))
    if g is not None:
        vec = vec + _embedded(weights, "guidance_in", 1000 * g)
    img, size = _patched(weights, x, sizes.patch)
    txt = _refined(weights, text, 1000 * t, sizes)
    L = len(txt)
    if predictor is None:
        for i in range(sizes.double):
            img, txt = _through_double(weights, f"double_blocks.{i}", img, txt, vec, size, sizes.heads)
        both = torch.cat([img, txt])
        for i in range(sizes.single):
            both = _through_single(weights, f"single_blocks.{i}", both, L, vec, size, sizes.heads)
    else:
        theirs, before = predictor
        both = _fused(theirs, "fusion_mlp", torch.cat([img, txt]), torch.cat([before.img, before.txt]))
        for i in range(2):
            both = _through_single(theirs, f"mm_single_blocks.{i}", both, L, vec, size, sizes.heads)
    img, txt = both[:-L], both[-L:]
    return Rendered(_head(weights, img, vec, size, sizes.patch), img, txt)


def hunyuan_video_15(
    weights: Weights,
    x: Tensor,
    t: Tensor,
    r: Tensor,
    text: Tensor,
    glyphs: Tensor,
    image: Tensor,
    predictor: tuple[Weights, Rendered] | None = None,
    sizes: Sizes = HUNYUAN_VIDEO_15,
) -> Rendered:
    """As `hunyuan_video`; x with the channels of the image, text, glyphs and image tokens [L, E], each E its own."""
    vec = _embedded(weights, "time_in", 1000 * t) + _embedded(weights, "time_r_in", 1000 * r)
    img, size = _patched(weights, x, sizes.patch)
    kinds = weights["cond_type_embedding.weight"]
    written = _affine(weights, "byt5_in.layernorm", glyphs)
    written = F.gelu(_linear(weights, "byt5_in.fc2", F.gelu(_linear(weights, "byt5_in.fc1", written))))
    seen = F.gelu(_linear(weights, "vision_in.proj.1", _affine(weights, "vision_in.proj.0", image)))
    seen = _affine(weights, "vision_in.proj.4", _linear(weights, "vision_in.proj.3", seen))
    txt = torch.cat(
        [
            seen + kinds[2],
            _linear(weights, "byt5_in.fc3", written) + kinds[1],
            _refined(weights, text, 1000 * t, sizes) + kinds[0],
        ]
    )
    if predictor is not None:
        theirs, before = predictor
        img = _fused(theirs, "fusion_mlp_img", img, before.img)
        txt = _fused(theirs, "fusion_mlp_txt", txt, before.txt)
    blocks, count = (weights, sizes.double) if predictor is None else (predictor[0], 2)
    for i in range(count):
        img, txt = _through_double(blocks, f"double_blocks.{i}", img, txt, vec, size, sizes.heads)
    return Rendered(_head(weights, img, vec, size, sizes.patch), img, txt)
