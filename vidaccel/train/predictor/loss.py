"""One forward pass of a predictor's training: a predicted step, how far off it is, and whether it can be told apart.

What is trained at all are the predictor and, in the second stage, the discriminator, in one loss with one backward
pass: the discriminator is taught on features that are cut off, the predictor by a discriminator that is frozen, so that
neither sees the other's gradients. The student between them lets gradients through and stays as it is.
"""

import torch
from torch import Tensor, nn

from vidaccel.cache.trunk import Trunk
from vidaccel.config.predictor import DiscriminatorConfig
from vidaccel.forecasters.base import Forecaster
from vidaccel.forecasters.reuse import Reuse
from vidaccel.models.velocity import Velocity
from vidaccel.train.predictor.discriminator import (
    Discriminator,
    discriminator_hinge,
    predictor_hinge,
    token_grid,
    trunk_features,
)
from vidaccel.train.predictor.pairs import Pair

SHARE = 1e-4
"""Of a velocity's square, what an error is compared with where the step before is so near that reuse has hardly any."""


class PredictorLoss(nn.Module):
    """Predictor and discriminator, beside the frozen student whose trunk they are for."""

    def __init__(
        self,
        student: Velocity,
        trunk: Trunk,
        predictor: nn.Module,
        discriminator: Discriminator | None = None,
        config: DiscriminatorConfig | None = None,
        relative: bool = False,
    ):
        """`relative` counts each sample's squared error as a share of what giving the cached tokens again has, plus
        SHARE of the target's own square."""
        super().__init__()
        self.student, self.predictor, self.discriminator = student, predictor, discriminator
        self.trunk, self.config, self.relative = trunk, config, relative

    def train(self, mode: bool = True) -> "PredictorLoss":
        super().train(mode)
        self.student.eval()
        return self

    def forward(self, pair: Pair) -> tuple[Tensor, dict[str, float]]:
        """The loss, and what is worth knowing: the squared error, that of giving the cached tokens again, and the mean
        share of the one in the other."""
        u = self._predicted(pair, self.predictor)
        errors = _squares(u.float() - pair.target.float())
        with torch.no_grad():
            reused = _squares(self._predicted(pair, Reuse()).float() - pair.target.float())
            least = reused + SHARE * _squares(pair.target.float())
        shares = errors / least
        measured = {"mse": errors.mean().item(), "reuse": reused.mean().item(), "share": shares.mean().item()}
        loss = (shares if self.relative else errors).mean()
        if self.discriminator is None:
            return loss, measured
        adversarial, judged = self._judged(pair, u)
        return loss + adversarial, measured | judged

    def _predicted(self, pair: Pair, forecaster: Forecaster) -> Tensor:
        with self.trunk.predicted(forecaster, pair.times.t, pair.memory):
            return self.student(pair.x, pair.times.t, pair.text, r=pair.times.r, g=pair.g)

    def _judged(self, pair: Pair, u: Tensor) -> tuple[Tensor, dict[str, float]]:
        """L_D and the adversarial part of L_P, of where a step with u ends and where the student's own does."""
        grid = token_grid(self.student.transformer, pair.x)
        ours = self._features(pair, u)
        with torch.no_grad():
            theirs = self._features(pair, pair.target)
        told = discriminator_hinge(
            self.discriminator(theirs, grid), self.discriminator([tokens.detach() for tokens in ours], grid)
        )
        fooled = predictor_hinge(self.discriminator(ours, grid, frozen=True))
        loss = told + self.config.weight * fooled
        return loss, {"discriminator": told.item(), "adversarial": fooled.item()}

    def _features(self, pair: Pair, u: Tensor) -> list[Tensor]:
        return trunk_features(self.student, self.config.depths, pair.stepped(u), pair.times.r, pair.text, pair.g)


def _squares(x: Tensor) -> Tensor:
    """[B], means over each sample."""
    return x.square().flatten(1).mean(1)
