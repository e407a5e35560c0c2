"""A block, a full pass, a predicted pass and samplers, each in the ways that model.py knows.

A predicted pass is the model's own forward with the predictor in the place of its blocks (vidaccel/cache/trunk.py):
embedders, fusion, two single-stream blocks, output head.
"""

import contextlib
import copy
import functools
import itertools
from collections.abc import Iterable
from dataclasses import replace

import torch
from diffusers import HunyuanVideoTransformer3DModel
from torch import Tensor

from studies.gpu.decoding import STOCK, autoencoder, decode
from studies.gpu.measure import CUDA, DEVICE, Rows, compiled
from studies.gpu.model import FAMILY, Shape, build, inputs, quantized, running
from vidaccel.cache.schedule import PUBLISHED
from vidaccel.cache.trunk import Trunk
from vidaccel.forecasters.learned import Predictor, new_predictor
from vidaccel.models.loading import LoadedPipeline

SAMPLERS = {
    "50 steps with CFG": (50, range(50), 2),
    "8 full of 20": (20, PUBLISHED[20, 8], 1),
    "4 full of 8": (8, PUBLISHED[8, 4], 1),
}
"""Steps, which of them are full, passes a step."""
FUSED = "trimmed, fused"
EVERYTHING = f"{FUSED}, compiled"


@torch.no_grad()
def run_blocks(rows: Rows, shape: Shape, quick: bool) -> None:
    """One block of each kind. `quick` leaves out what is compiled."""
    small = replace(shape, double_blocks=1, single_blocks=1)
    model = build(small)
    variants = ["eager", "trimmed", FUSED, f"{FUSED}, cudnn"]
    for variant in variants if quick else [*variants, "trimmed, compiled", EVERYTHING]:
        measure_blocks(rows, model, shape, variant)
    for kind in [] if quick else ["fp8", "int8"]:
        if quantized(rows, shape, model := build(small), kind):
            measure_blocks(rows, model, shape, f"{EVERYTHING}, {kind}")


def measure_blocks(rows: Rows, model: HunyuanVideoTransformer3DModel, shape: Shape, variant: str) -> None:
    """A block of each kind, called with what a pass gives the first of its list; compiled as anyone would."""
    with rows.attempt("blocks", variant, shape.row()), running(model, variant.replace(", compiled", "")):
        for name, args in _block_inputs(model, shape).items():
            block = getattr(model, name)[0]
            call = functools.partial(compiled(block) if "compiled" in variant else block, *args)
            rows.measure(name, variant, shape.row(), call, flops=shape.flops(variant, blocks=1), most=10)


def _block_inputs(model: HunyuanVideoTransformer3DModel, shape: Shape) -> dict[str, tuple]:
    """The arguments of the first block of each list, by name of the list."""
    caught: dict[str, tuple] = {}
    handles = [
        getattr(model, kind.name)[0].register_forward_pre_hook(
            lambda _, args, name=kind.name: caught.update({name: args})
        )
        for kind in FAMILY.block_lists
    ]
    model(**inputs(shape))
    for handle in handles:
        handle.remove()
    return caught


def run_model(rows: Rows, shapes: list[Shape]) -> None:
    """Passes of one model at each size, the samplers composed of them, and at the first size the samplers themselves,
    from noise to frames.

    What is worth least stands last, should the time run out.
    """
    first, large = shapes[0], shapes[-1]
    model, loaded = build(first), autoencoder(first)
    predictor = new_predictor_of(model, first)
    baseline: dict[Shape, float | None] = {}
    for shape in reversed(shapes):
        for variant in ("eager", FUSED):
            _passes(rows, model, predictor, shape, variant, baseline)
    _samplers(rows, model, predictor, loaded, first, "eager", SAMPLERS)
    _samplers(rows, model, predictor, loaded, first, FUSED, list(SAMPLERS)[1:])
    compiled_too = build(first)
    if quantized(rows, first, model, "fp8"):
        for shape in dict.fromkeys((large, first)):
            _passes(rows, model, predictor, shape, f"{FUSED}, fp8", baseline)
        _samplers(rows, model, predictor, loaded, first, f"{FUSED}, fp8", list(SAMPLERS)[1:])
    _passes(rows, compiled_too, predictor, first, EVERYTHING, baseline)
    _samplers(rows, compiled_too, predictor, loaded, first, EVERYTHING, list(SAMPLERS)[1:])
    _passes(rows, model, predictor, first, f"{EVERYTHING}, fp8", baseline)


@torch.no_grad()
def new_predictor_of(model: HunyuanVideoTransformer3DModel, shape: Shape) -> Predictor:
    """A new one, of two blocks; the time that it takes does not depend on what it has learnt."""
    with Trunk(model, FAMILY) as trunk:
        with trunk.full():
            model(**inputs(shape, model.dtype))
        tokens = trunk.memory()[0].tokens  # for those that enter as well: its statistics change no time
        return new_predictor(model, FAMILY, tokens, tokens, blocks=2)


@torch.no_grad()
def _passes(
    rows: Rows,
    model: HunyuanVideoTransformer3DModel,
    predictor: Predictor,
    shape: Shape,
    variant: str,
    baseline: dict[Shape, float | None],
) -> None:
    """Seconds of a full and of a predicted pass, each one transformer call; and the samplers composed of them.

    `baseline` takes the eager full pass of each size.
    """
    call = functools.partial(model, **inputs(shape))
    small = shape.tokens < 20_000
    few = {"budget": 1.0, "most": 5} if small else {"budget": 0.0, "most": 1}
    # A CUDA graph runs and is recorded before it is replayed; a pass of many seconds needs no other warming up.
    # Fused kernels are tuned in their first call, though.
    few["warmup"] = 2 if "compiled" in variant else int(small or "fused" in variant)
    with rows.attempt("passes", variant, shape.row()), running(model, variant), Trunk(model, FAMILY) as trunk:
        alike = copy.deepcopy(predictor).run_like(model)
        with trunk.full(0.5):
            full = rows.measure("full pass", variant, shape.row(), call, flops=shape.flops(variant), **few)
            if not trunk.memory() and rows.known_row("predicted pass", variant, shape.row()) is None:
                call()  # a run before this one measured the full pass and not the predicted one
        with trunk.predicted(alike, 0.5):
            predicted = rows.measure("predicted pass", variant, shape.row(), call, **few | {"budget": 1.0, "most": 5})
        if variant == "eager":
            baseline[shape] = full
        if full is None or predicted is None:
            rows.add("composed samplers", variant, shape.row(), error="a pass that they are made of failed")
            return
        figures = {}
        for name, (steps, full_steps, passes) in list(SAMPLERS.items())[1:]:
            figures[name] = passes * (len(full_steps) * full + (steps - len(full_steps)) * predicted)
        if baseline.get(shape) is not None:
            figures["50 steps with CFG, eager"] = 100 * baseline[shape]
        rows.add("composed samplers", variant, shape.row(), seconds_composed=figures)


@torch.no_grad()
def _samplers(
    rows: Rows,
    model: HunyuanVideoTransformer3DModel,
    predictor: Predictor,
    loaded: LoadedPipeline,
    shape: Shape,
    variant: str,
    names: Iterable[str],
) -> None:
    """Samplers really run, from noise to frames: what is eager decodes in diffusers' tiles."""
    way = STOCK if variant == "eager" else "once"
    with rows.attempt("end to end", variant, shape.row()), running(model, variant), Trunk(model, FAMILY) as trunk:
        alike = copy.deepcopy(predictor).run_like(model)
        for name in names:
            steps, full_steps, passes = SAMPLERS[name]
            steps = steps if CUDA else 2
            sample = functools.partial(_sample, model, trunk, alike, inputs(shape), steps, full_steps, passes)
            rows.measure(
                "end to end",
                f"{name}, {variant}",
                shape.row(),
                lambda sample=sample: decode(loaded, sample(), way),
                most=1,
                # What is compiled was so by the passes before, but for this copy of the predictor.
                warmup=int("compiled" in variant),
            )


def _sample(model, trunk: Trunk, predictor: Predictor, given: dict, steps: int, full_steps, passes: int) -> Tensor:
    """The Euler sampler of method.md's section 0 with shift 5; `passes` a step, combined as CFG combines two."""
    x = given["hidden_states"]
    grid = torch.linspace(1, 0, steps + 1, dtype=torch.float64)
    grid = (5 * grid / (1 + 4 * grid)).tolist()
    for step, (t, r) in enumerate(itertools.pairwise(grid)):
        now = given | {"hidden_states": x, "timestep": torch.full((1,), 1000 * t, device=DEVICE)}
        guided = passes > 1  # and predicts nothing, so nothing need be kept
        mode = (
            contextlib.nullcontext()
            if guided
            else trunk.full(t)
            if step in full_steps
            else trunk.predicted(predictor, t)
        )
        with mode:
            outputs = [model(**now).sample for _ in range(passes)]
        u = outputs[0] if passes == 1 else outputs[0] + 6 * (outputs[1] - outputs[0])
        x = x - (t - r) * u
    return x
