"""HunyuanVideo with random weights: a block, a full step, a predicted step, samplers, and the derivative pass.

The predicted step runs the model's own forward with its block lists exchanged for one stand-in that fuses tokens and
cache and runs two single-stream blocks: embedders, predictor and output head, as in method.md's section 3.
"""

import contextlib
import copy
import functools
from collections.abc import Iterator
from dataclasses import dataclass, replace

import torch
from diffusers import HunyuanVideoTransformer3DModel
from torch import Tensor, nn
from torch.autograd import forward_ad

from benchmarks.gpu.measure import BACKEND, CUDA, DEVICE, Rows, compiled
from benchmarks.gpu.ops import KERNELS
from vidaccel.kernels.attention_jvp.op import AttentionTangents
from vidaccel.kernels.cache_fusion.op import cache_fusion
from vidaccel.models.fuse import fuse


@dataclass(frozen=True)
class Shape:
    """A transformer and the video it denoises."""

    heads: int = 24
    head_dim: int = 128
    double_blocks: int = 20
    single_blocks: int = 40
    text_dim: int = 4096
    pooled_dim: int = 768
    text_tokens: int = 256
    text_used: int = 60
    rope: tuple[int, int, int] = (16, 56, 56)
    latent: tuple[int, int, int] = (13, 44, 44)
    """Latent frames, height, width. 33 x 88 x 88 is 129 frames of 704 x 704, 63,888 tokens; 13 x 44 x 44 a tenth."""

    @property
    def tokens(self) -> int:
        return self.latent[0] * (self.latent[1] // 2) * (self.latent[2] // 2)

    def row(self) -> dict:
        return {"tokens": self.tokens, "blocks": [self.double_blocks, self.single_blocks], "heads": self.heads}

    def flops(self, texts: int) -> int:
        """Of one full pass: 2 a weight and token in the blocks, and two attention products a block. Text included."""
        N, D = self.tokens + texts, self.heads * self.head_dim
        return (self.double_blocks + self.single_blocks) * (2 * 12 * D**2 * N + 4 * N**2 * D)


def build(shape: Shape, dtype: torch.dtype = torch.bfloat16) -> HunyuanVideoTransformer3DModel:
    """Weights drawn at a size that keeps activations finite; the time a pass takes does not depend on them."""
    with torch.device("meta"):
        model = HunyuanVideoTransformer3DModel(
            num_attention_heads=shape.heads,
            attention_head_dim=shape.head_dim,
            num_layers=shape.double_blocks,
            num_single_layers=shape.single_blocks,
            text_embed_dim=shape.text_dim,
            pooled_projection_dim=shape.pooled_dim,
            rope_axes_dim=shape.rope,
        )
    model = model.to(dtype).to_empty(device=DEVICE).eval().requires_grad_(False)
    generator = torch.Generator(DEVICE).manual_seed(0)
    for name, weight in model.named_parameters():
        if weight.ndim > 1:
            weight.normal_(std=weight.shape[1] ** -0.5, generator=generator)
        else:
            weight.fill_(1.0 if name.endswith("weight") else 0.0)
    return model


def inputs(shape: Shape, dtype: torch.dtype = torch.bfloat16) -> dict[str, Tensor]:
    generator = torch.Generator(DEVICE).manual_seed(1)

    def normal(*size: int) -> Tensor:
        return torch.randn(size, generator=generator, device=DEVICE, dtype=dtype)

    return {
        "hidden_states": normal(1, 16, *shape.latent),
        "timestep": torch.full((1,), 500.0, device=DEVICE),
        "encoder_hidden_states": normal(1, shape.text_tokens, shape.text_dim),
        "encoder_attention_mask": torch.arange(shape.text_tokens, device=DEVICE)[None] < shape.text_used,
        "pooled_projections": normal(1, shape.pooled_dim),
        "guidance": torch.full((1,), 6000.0, device=DEVICE),
    }


class Predictor(nn.Module):
    """Stands in the place of a block list: Linear(SiLU(Linear([tokens; cache]))), then two copies of the last block."""

    def __init__(self, model: HunyuanVideoTransformer3DModel):
        super().__init__()
        block = model.single_transformer_blocks[-1]
        width = block.proj_out.out_features
        like = {"device": DEVICE, "dtype": block.proj_out.weight.dtype}
        self.first = nn.Linear(2 * width, width, **like).requires_grad_(False)
        self.second = nn.Linear(width, width, **like).requires_grad_(False)
        self.blocks = nn.ModuleList([copy.deepcopy(block) for _ in range(2)])
        self.cache: Tensor | None = None

    def forward(self, hidden_states: Tensor, encoder_hidden_states: Tensor, *rest) -> tuple[Tensor, Tensor]:
        lengths = [hidden_states.shape[1], encoder_hidden_states.shape[1]]
        tokens = torch.cat([hidden_states, encoder_hidden_states], dim=1)
        if self.cache is None:
            self.cache = torch.randn_like(tokens)  # the time does not depend on what a full step would have left here
        fused = cache_fusion(tokens, self.cache, self.first.weight, self.first.bias, kernels=KERNELS)
        video, text = self.second(fused).split(lengths, dim=1)
        for block in self.blocks:
            video, text = block(video, text, *rest)
        return video, text


@contextlib.contextmanager
def predicting(model: HunyuanVideoTransformer3DModel, predictor: Predictor) -> Iterator[None]:
    """Passes inside are predicted ones."""
    lists = model.transformer_blocks, model.single_transformer_blocks
    model.transformer_blocks, model.single_transformer_blocks = nn.ModuleList(), nn.ModuleList([predictor])
    try:
        yield
    finally:
        model.transformer_blocks, model.single_transformer_blocks = lists


def quantize(rows: Rows, shape: Shape, model: HunyuanVideoTransformer3DModel) -> bool:
    """Linear layers of the blocks in fp8, weights and activations, by torchao; False and an error row if that fails."""
    try:
        from torchao.quantization import Float8DynamicActivationFloat8WeightConfig, quantize_

        for blocks in (model.transformer_blocks, model.single_transformer_blocks):
            quantize_(blocks, Float8DynamicActivationFloat8WeightConfig())
    except Exception as error:  # noqa: BLE001
        rows.add("quantisation", "fp8", shape.row(), error=f"{type(error).__name__}: {error}"[:500])
        return False
    return True


def block_inputs(model: HunyuanVideoTransformer3DModel, shape: Shape) -> dict[str, tuple]:
    """The arguments that a forward pass gives the first block of each list, by name of the list."""
    caught: dict[str, tuple] = {}
    handles = [
        getattr(model, name)[0].register_forward_pre_hook(lambda _, args, name=name: caught.update({name: args}))
        for name in ("transformer_blocks", "single_transformer_blocks")
    ]
    with torch.no_grad():
        model(**inputs(shape))
    for handle in handles:
        handle.remove()
    return caught


@torch.no_grad()
def run_blocks(rows: Rows, shape: Shape, quick: bool) -> None:
    """One block of each kind: eager, fused, compiled, both, and both with fp8; `quick` leaves out what is compiled."""
    model = build(replace(shape, double_blocks=1, single_blocks=1))
    D, N = shape.heads * shape.head_dim, shape.tokens + shape.text_used
    flops = 2 * 12 * D**2 * N + 4 * N**2 * D

    def each(*variants: str) -> None:
        for name, args in block_inputs(model, shape).items():
            for variant in variants:
                block = getattr(model, name)[0]
                call = functools.partial(compiled(block) if "compiled" in variant else block, *args)
                rows.measure(name, variant, shape.row(), call, flops=flops, most=10)

    if quick:
        each("eager")
        with fuse(model, KERNELS):
            each("fused")
        return
    each("eager", "compiled")
    with fuse(model, KERNELS):
        each("fused", "fused, compiled")
        if quantize(rows, shape, model):
            each("fused, compiled, fp8")


def run_model(rows: Rows, shapes: list[Shape]) -> None:
    """Passes of one model at each size, the samplers composed of them, and at the first size the samplers themselves.

    What is worth least stands last, should the time run out.
    """
    model = build(shapes[0])
    baseline = {}
    for index, shape in enumerate(shapes):
        baseline[shape], _ = _passes(rows, model, shape, "eager", baseline)
        if index == 0:
            _samplers(rows, model, shape)
        with fuse(model, KERNELS):
            _passes(rows, model, shape, "fused", baseline)
    with fuse(model, KERNELS):
        _passes(rows, model, shapes[0], "fused, compiled", baseline)
        if quantize(rows, shapes[0], model):
            for shape in shapes:
                _passes(rows, model, shape, "fused, compiled, fp8", baseline)


@torch.no_grad()
def _passes(
    rows: Rows, model: HunyuanVideoTransformer3DModel, shape: Shape, variant: str, baseline: dict[Shape, float | None]
) -> tuple[float | None, float | None]:
    """Seconds of a full and of a predicted pass, each one transformer call; and the samplers composed of them."""
    predictor = Predictor(model)
    if "compiled" in variant:
        # One graph serves all blocks of a class: compilation is paid twice, not sixty times.
        for block in (*model.transformer_blocks, *model.single_transformer_blocks, *predictor.blocks):
            block.compile(dynamic=False, backend=BACKEND)
    call = functools.partial(model, **inputs(shape))
    texts = shape.text_tokens if variant == "eager" else shape.text_used
    few = {"budget": 1.0, "most": 5} if shape.tokens < 20_000 else {"budget": 0.0, "most": 1, "warmup": 1}
    full = rows.measure("full pass", variant, shape.row(), call, flops=shape.flops(texts), **few)
    with predicting(model, predictor):
        predicted = rows.measure("predicted pass", variant, shape.row(), call, **few)
    if full is None or predicted is None:
        rows.add("composed samplers", variant, shape.row(), error="a pass that they are made of failed")
        return full, predicted
    figures = {"8 full of 20": 8 * full + 12 * predicted, "4 full of 8": 4 * full + 4 * predicted}
    eager = baseline.get(shape, full)
    if eager is not None:
        figures["50 steps with CFG, eager"] = 100 * eager
    rows.add("composed samplers", variant, shape.row(), seconds_composed=figures)
    return full, predicted


@torch.no_grad()
def _samplers(rows: Rows, model: HunyuanVideoTransformer3DModel, shape: Shape) -> None:
    """Three samplers really run, from noise to latent, weights eager: 50 steps with CFG, 8 full of 20, 4 full of 8."""
    schedules = {
        "50 steps with CFG": (50, range(50), 2),
        "8 full of 20": (20, (0, 1, 2, 5, 9, 13, 17, 19), 1),
        "4 full of 8": (8, (0, 2, 4, 7), 1),
    }
    predictor = Predictor(model)
    for name, (steps, full_steps, passes) in schedules.items():
        steps = steps if CUDA else 2
        run = functools.partial(_sample, model, predictor, inputs(shape), steps, full_steps, passes)
        rows.measure("sampler", name, shape.row(), run, most=1, warmup=0)


def _sample(model, predictor: Predictor, given: dict, steps: int, full_steps, passes: int) -> Tensor:
    """The Euler sampler of method.md's section 0 with shift 5; `passes` a step, combined as CFG combines two."""
    x = given["hidden_states"]
    grid = torch.linspace(1, 0, steps + 1, dtype=torch.float64)
    grid = (5 * grid / (1 + 4 * grid)).tolist()
    for step, (t, r) in enumerate(zip(grid, grid[1:], strict=False)):
        now = given | {"hidden_states": x, "timestep": torch.full((1,), 1000 * t, device=DEVICE)}
        mode = contextlib.nullcontext() if step in full_steps else predicting(model, predictor)
        with mode:
            outputs = [model(**now).sample for _ in range(passes)]
        u = outputs[0] if passes == 1 else outputs[0] + 6 * (outputs[1] - outputs[0])
        x = x - (t - r) * u
    return x


def run_training(rows: Rows, shape: Shape) -> None:
    """The derivative pass of method.md's section 2 three ways, and a whole training step, of a model of this depth.

    float32 outside attention, bf16 within. The central difference is the alternative that needs no derivative kernel.
    """
    model = build(shape, torch.float32)
    given = inputs(shape, torch.float32)
    x, t = given["hidden_states"], given["timestep"]
    direction = torch.randn_like(x)
    torch.backends.cuda.matmul.allow_tf32 = True

    def derivative() -> Tensor:
        with torch.no_grad(), forward_ad.dual_level(), AttentionTangents(KERNELS, torch.bfloat16 if CUDA else None):
            moving = {
                "hidden_states": forward_ad.make_dual(x, direction),
                "timestep": forward_ad.make_dual(t, torch.full_like(t, 1000.0)),
            }
            return forward_ad.unpack_dual(model(**given | moving).sample).tangent

    @torch.no_grad()
    def difference() -> Tensor:
        h = 1e-3
        ends = [
            model(**given | {"hidden_states": x + s * h * direction, "timestep": t + s * 1000 * h}) for s in (1, -1)
        ]
        return (ends[0].sample - ends[1].sample) / (2 * h)

    with torch.no_grad():
        rows.measure(
            "derivative pass", "plain forward, no derivative", shape.row(), lambda: model(**given).sample, most=3
        )
    rows.measure("derivative pass", "central difference", shape.row(), difference, most=3, warmup=1)
    rows.measure("derivative pass", "eager ops, attention_jvp", shape.row(), derivative, most=3, warmup=1)
    with fuse(model, KERNELS):
        rows.measure("derivative pass", "fused", shape.row(), derivative, most=3, warmup=1)
        model.requires_grad_(True).train()
        model.enable_gradient_checkpointing()
        optimiser = torch.optim.AdamW(model.parameters(), lr=1e-5, fused=CUDA)

        def step() -> Tensor:
            target = direction - 0.05 * derivative()
            with torch.autocast(DEVICE.type, torch.bfloat16, enabled=CUDA):
                loss = (model(**given).sample - target).square().mean()
            loss.backward()
            optimiser.step()
            optimiser.zero_grad()
            return loss.detach()

        rows.measure("training step", "fused", shape.row(), step, most=3, warmup=1)
