"""A predictor's loss: the squared error of a predicted step, and how well a discriminator tells it from a full one.

The predictor and, in the second stage, the discriminator are trained by one loss with one backward pass, or in turn.
The discriminator learns from detached features, the predictor from a frozen discriminator, so that neither gets the
other's gradients. The student between them is frozen and lets gradients through.
"""

from collections.abc import Sequence
from typing import Literal

import torch
from torch import Tensor, nn

from vidaccel.cache.trunk import Trunk
from vidaccel.cache.trunks import Trunks
from vidaccel.config.predictor import DiscriminatorConfig
from vidaccel.forecasters.base import Forecaster
from vidaccel.forecasters.reuse import Reuse
from vidaccel.models.velocity import SwitchedVelocity, Velocity
from vidaccel.train.predictor.discriminator import (
    Discriminator,
    discriminator_hinge,
    predictor_hinge,
    token_grid,
    trunk_features,
)
from vidaccel.train.predictor.pairs import Pair

Turn = Literal["discriminator", "predictor"]
"""Which of the two a pass trains, where it does not train both."""
SHARE = 1e-4
"""Of the target's square: added to the error of reuse that an error is compared with, which is near zero where the full
step is near."""


class PredictorLoss(nn.Module):
    """Predictor and discriminator, beside the frozen student whose trunk they are for."""

    def __init__(
        self,
        student: Velocity,
        trunk: Trunk | Trunks,
        predictor: nn.Module,
        discriminator: Discriminator | None = None,
        config: DiscriminatorConfig | None = None,
        relative: bool = False,
    ):
        """`relative` divides each sample's squared error by that of reusing the cached tokens, plus SHARE of the
        target's own square."""
        super().__init__()
        self.student, self.predictor, self.discriminator = student, predictor, discriminator
        self.trunk, self.config, self.relative = trunk, config, relative

    def train(self, mode: bool = True) -> "PredictorLoss":
        super().train(mode)
        self.student.eval()
        return self

    def forward(self, pair: Pair, turn: Turn | None = None) -> tuple[Tensor, dict[str, float]]:
        """The loss, and metrics: the squared error, that of reusing the cached tokens, and their mean ratio.

        A `turn` leaves out of the loss what trains the other one.
        """
        with torch.set_grad_enabled(torch.is_grad_enabled() and turn != "discriminator"):
            u = self._predicted(pair, self.predictor)
        errors = _squares(u.float() - pair.target.float())
        with torch.no_grad():
            reused = _squares(self._predicted(pair, Reuse()).float() - pair.target.float())
            least = reused + SHARE * _squares(pair.target.float())
        shares = errors / least
        measured = {"mse": errors.mean().item(), "reuse": reused.mean().item(), "share": shares.mean().item()}
        loss = (shares if self.relative else errors).mean()
        if self.discriminator is None or self.config is None:
            return loss, measured
        of_discriminator, of_predictor = self._adversarial(self.discriminator, self.config.depths, pair, u, turn)
        measured |= {"discriminator": of_discriminator.item(), "adversarial": of_predictor.item()}
        if self.config.balanced:
            of_predictor = of_predictor / least.mean()
        if turn == "discriminator":
            return of_discriminator, measured
        adversarial = self.config.weight * of_predictor
        return loss + (adversarial if turn else of_discriminator + adversarial), measured

    def _predicted(self, pair: Pair, forecaster: Forecaster) -> Tensor:
        with self.trunk.predicted(forecaster, pair.times.t, pair.memory):
            return self.student(pair.x, pair.times.t, pair.text, r=pair.times.r, g=pair.g)

    def _adversarial(
        self, discriminator: Discriminator, depths: Sequence[float], pair: Pair, u: Tensor, turn: Turn | None
    ) -> tuple[Tensor, Tensor]:
        """L_D and the adversarial part of L_P, of the latents where a step with u ends and where one with the student's
        own velocity does, as the transformer sees them whose step it is; the one that a turn does not train without
        gradients."""
        grid = token_grid(self.student.transformer, pair.x)
        which = self.student.denoiser(pair.times.t) if isinstance(self.student, SwitchedVelocity) else 0

        def features(u: Tensor) -> list[Tensor]:
            return trunk_features(self.student, depths, pair.stepped(u), pair.times.r, pair.text, pair.g, which)

        ours = features(u)
        with torch.no_grad():
            theirs = features(pair.target)
        with torch.set_grad_enabled(torch.is_grad_enabled() and turn != "predictor"):
            of_discriminator = discriminator_hinge(
                discriminator(theirs, grid, which=which),
                discriminator([tokens.detach() for tokens in ours], grid, which=which),
            )
        return of_discriminator, predictor_hinge(discriminator(ours, grid, frozen=True, which=which))


def _squares(x: Tensor) -> Tensor:
    """[B], means over each sample."""
    return x.square().flatten(1).mean(1)
