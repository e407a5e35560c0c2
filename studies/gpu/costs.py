"""What a training step of HunyuanVideo costs at its full size with random weights: of a predictor, on the squared error
and against a discriminator; of a distillation that trains adapters, by rollout and by the exact derivative.

The losses and the step are the product's own. A step draws nothing: latents and texts are there.
"""

import copy
from collections.abc import Callable

import torch
from torch import Tensor, nn

from studies.gpu.measure import CUDA, DEVICE, Rows
from studies.gpu.model import FAMILY, Shape, build, inputs
from studies.gpu.passes import new_predictor_of
from vidaccel.cache.trunk import Trunk
from vidaccel.config.distill import DistillConfig
from vidaccel.config.predictor import DiscriminatorConfig
from vidaccel.config.training import TrainConfig
from vidaccel.families.walk import blocks_of
from vidaccel.models.conditioning import new_conditioning
from vidaccel.models.velocity import Text, Velocity
from vidaccel.train.lora import add_lora
from vidaccel.train.methods import method_of
from vidaccel.train.methods.base import Distillation
from vidaccel.train.methods.mean_velocity.settings import MeanVelocityTraining
from vidaccel.train.objective import Batch, Loss, in_batch
from vidaccel.train.predictor.discriminator import Discriminator
from vidaccel.train.predictor.loss import PredictorLoss
from vidaccel.train.predictor.pairs import Times, noised_pair
from vidaccel.train.step import EagerStep

TRAIN = TrainConfig(batch_size=1, precision="bfloat16" if CUDA else "float32", checkpointing=True)
RANK = 32


def run_predictor(rows: Rows, shapes: list[Shape]) -> None:
    """A network of two blocks, at each size: what it learns from is two passes of the student, in bf16."""
    model = build(shapes[0], torch.bfloat16 if CUDA else torch.float32)
    model.enable_gradient_checkpointing()
    student, predictor = Velocity(model, FAMILY), new_predictor_of(model, shapes[0])
    settings = DiscriminatorConfig()
    discriminator = Discriminator(shapes[0].heads * shapes[0].head_dim, settings).to(DEVICE)
    with Trunk(model, FAMILY) as trunk:
        for shape in shapes:
            for variant, against in (("squared error", None), ("adversarial", discriminator)):
                loss = PredictorLoss(student, trunk, predictor, against, settings if against else None)
                given = inputs(shape, torch.float32)
                x, g, text = given["hidden_states"], given["guidance"] / 1000, _text(given)
                full, predicted = (Times(*(torch.full((1,), t, device=DEVICE) for t in at)) for at in _TIMES)

                def forward(model: nn.Module, index: int, generator: torch.Generator, x=x, text=text, g=g):
                    return model(noised_pair(student, trunk, x, torch.randn_like(x), text, g, full, predicted))  # noqa: B023

                _measure(rows, "predictor step", variant, shape, loss, forward)


_TIMES = ((0.8, 0.7), (0.7, 0.6))
"""Of the full and of the predicted step: t and r."""


def run_distillation(rows: Rows, shapes: list[Shape]) -> None:
    """Adapters on all blocks, teacher and student in float32 under autocast, as `vidaccel distill` has them."""
    model = build(shapes[0], torch.float32)
    teacher = Velocity(model, FAMILY)
    own = copy.deepcopy(model)
    conditioning = new_conditioning(own, FAMILY, ("r",), None, shift=5.0, steps=8)
    student = Velocity(own, FAMILY, conditioning)
    add_lora(own, [block for _, block in blocks_of(own, FAMILY)], RANK, 0)
    own.enable_gradient_checkpointing()
    for shape in shapes:
        for target in ("rollout", "derivative"):
            settings = MeanVelocityTraining(
                target=target, derivative="exact", attention_precision="bfloat16" if CUDA else "float32"
            )
            config = DistillConfig(
                method="mean_velocity", mean_velocity=settings, guidance_range=[6.0, 6.0], sample_steps=8, train=TRAIN
            )
            task = Distillation(config, teacher, student, None, {}, 5.0)  # type: ignore[arg-type]
            objective, given = method_of("mean_velocity").loss(task), inputs(shape, torch.float32)
            x, ends = given["hidden_states"], {"t": 0.8, "r": 0.6, "restrict": 0.2, "step": 0.0}
            numbers = {name: torch.full((1,), value, device=DEVICE) for name, value in ends.items()}
            tensors = {"x": x, "v": torch.randn_like(x), "g": given["guidance"] / 1000} | numbers
            batch = Batch(tensors | in_batch(_text(given)))

            def forward(model: nn.Module, index: int, generator: torch.Generator, loss=objective.loss, batch=batch):
                return loss(model, batch)

            _measure(rows, "distillation step", f"{target}, adapters", shape, student, forward)


def _text(given: dict[str, Tensor]) -> Text:
    return {each.stored: given[each.argument] for each in FAMILY.text_tensors}


def _measure(rows: Rows, name: str, variant: str, shape: Shape, model: nn.Module, loss: Loss) -> None:
    with rows.attempt(name, variant, shape.row()):
        trained = [p for p in model.parameters() if p.requires_grad]
        optimiser = torch.optim.AdamW([{"params": trained, "rate": 1.0}], lr=1e-5, fused=CUDA)
        step: Callable = EagerStep(model.train(), loss, TRAIN, [optimiser], 0)
        few = {"most": 2, "warmup": 1} if shape.tokens < 20_000 else {"most": 1, "warmup": 0}
        rows.measure(
            name, variant, shape.row() | {"trained": sum(map(torch.numel, trained))}, lambda: step(0, 1e-5), **few
        )
