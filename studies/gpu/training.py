"""The derivative pass of method.md's section 2, and a whole training step around it."""

import torch
from torch import Tensor
from torch.autograd import forward_ad

from studies.gpu.measure import CUDA, DEVICE, Rows
from studies.gpu.model import Shape, build, inputs, running
from studies.gpu.ops import KERNELS
from vidaccel.kernels.attention_jvp.op import AttentionTangents


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
    with running(model, "trimmed, fused"):
        rows.measure("derivative pass", "trimmed, fused", shape.row(), derivative, most=3, warmup=1)
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

        rows.measure("training step", "trimmed, fused", shape.row(), step, most=3, warmup=1)
