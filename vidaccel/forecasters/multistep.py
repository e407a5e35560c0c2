"""Fitted scalars: the velocity of a predicted step from the velocities and latents of the last full ones.

    u = sum_j a_j u_j + b x + sum_j c_j x_j        j: the last full steps, newest first, `HISTORY` of them at most

x is the latent that the step starts from, u_j and x_j what full step j gave and started from. The numbers are those of
one model, one grid and one list of full steps, fitted to the model's own runs step after step
(train/predictor/multistep.py). A step that is predicted so costs no pass of the transformer, embedders and head
included. The forecast is linear, so that with guidance in two passes the same numbers serve each of the two.

    folder/config.json      what it is for, and the numbers: `MultistepConfig`
    folder/schedule.json    the lists of full steps by budget and grid

B batch, C channels, T frames, H and W latent pixels, K full steps that are looked back on
"""

import json
import math
from collections.abc import Sequence, Set
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from vidaccel.artefacts import RUN_FILE, read_run, verify_files, write_json
from vidaccel.errors import UserError
from vidaccel.families.registry import FAMILIES
from vidaccel.forecasters.base import ForecasterCosts, Making, PlannedTrunk
from vidaccel.forecasters.checkpoint import CONFIG_FILE
from vidaccel.models.grid import Grid

FORMAT = "multistep/1"
HISTORY = 3
"""Full steps that are looked back on."""
RIDGE = 1e-4
"""Penalty on the square of a coefficient, as a share of what it multiplies: x is nearly a combination of the others,
and this decides between them."""
ROUNDING = 0.02
"""Share by which a guidance scale may lie outside the range that was fitted: some are read off rounded latents."""


def multistep_velocity(coefficients: Tensor, us: Sequence[Tensor], xs: Sequence[Tensor], x: Tensor) -> Tensor:
    """The forecast of a predicted step, [B, C, T, H, W] in the dtype of the velocities; differentiable in everything.

    Args:
        coefficients: [2 K + 1]: a_1 ... a_K, b, c_1 ... c_K.
        us: K velocities of the last full steps, newest first.
        xs: the K latents that those steps started from.
        x: the latent that the predicted step starts from.
    """
    terms = (*us, x, *xs)
    if len(us) != len(xs) or len(coefficients) != len(terms):
        raise ValueError(f"{len(coefficients)} coefficients for {len(us)} velocities and {len(xs) + 1} latents")
    total = torch.zeros_like(x, dtype=torch.float32)
    for weight, term in zip(coefficients.to(x.device, torch.float32), terms, strict=True):
        total = total + weight * term.float()
    return total.to(us[0].dtype)


def reuse_coefficients(looked_back_on: int) -> Tensor:
    """[2 K + 1] that give the last full step's velocity again."""
    return torch.eye(2 * looked_back_on + 1)[0]


def fit_coefficients(
    us: Sequence[Tensor], xs: Sequence[Tensor], x: Tensor, target: Tensor, ridge: float = RIDGE
) -> Tensor:
    """[2 K + 1] float64 of least squared error to `target`, by the normal equations in float64, a run at a time.

    Args:
        us, xs, x: as `multistep_velocity` takes them, of N runs: [N, C, T, H, W].
        target: the velocities [N, C, T, H, W] to come near to.
        ridge: penalty on the square of a coefficient, as a share of the sum of squares of what it multiplies.

    Raises:
        UserError: there are fewer runs than unknowns, they are not finite, or they do not determine the numbers.
    """
    terms, runs = (*us, x, *xs), len(x)
    if runs < len(terms):
        raise UserError(f"{runs} runs for {len(terms)} unknowns", f"take runs={len(terms)} or more")
    gram = torch.zeros(len(terms), len(terms), dtype=torch.float64)
    moment = torch.zeros(len(terms), dtype=torch.float64)
    for run in range(runs):
        rows = torch.stack([term[run] for term in terms]).flatten(1).double()
        gram += (rows @ rows.mT).cpu()
        moment += (rows @ target[run].flatten().double()).cpu()
    if not (gram.isfinite().all() and moment.isfinite().all()):
        raise UserError("runs of the model are not finite", "try dtype=float32; if that fails too, it is broken")
    scale = gram.diagonal().sqrt()
    if not (scale > 0).all():
        raise UserError("a velocity or latent is zero in all runs: nothing can be fitted to them", "look at the model")
    penalised = gram / torch.outer(scale, scale) + ridge * torch.eye(len(terms), dtype=torch.float64)
    try:
        found = torch.linalg.solve(penalised, moment / scale) / scale
    except torch.linalg.LinAlgError:
        found = torch.full_like(moment, math.nan)
    if not found.isfinite().all():
        raise UserError(f"the fit is singular at ridge={ridge:g}", f"take a larger one, such as ridge={RIDGE:g}")
    return found


@dataclass(frozen=True)
class FittedList:
    """The numbers for one list of full steps: what serves, attached to a pipeline."""

    full_steps: tuple[int, ...]
    """Positions of the full steps, rising from 0."""
    coefficients: dict[int, tuple[float, ...]]
    """[2 K + 1] of each predicted step, by its position; K is the number of full steps before it, at most `history`."""
    steps: int
    """Steps of the grid."""
    shift: float | None = None
    """Shift that makes the grid, if one does."""
    times: tuple[float, ...] | None = None
    """Its times [steps + 1]; where only steps and shift are said, those that follow."""
    error: float | None = None
    """Of the final latents as served, on the runs that it was tried on, as a share of those of full steps."""
    history: int = HISTORY
    """Full steps that are looked back on."""

    def __post_init__(self) -> None:
        grid = Grid.recorded(self.steps, self.shift, self.times)
        if grid is None:
            raise ValueError("a list without a grid")
        numbers = {int(step): tuple(map(float, row)) for step, row in self.coefficients.items()}
        full = tuple(self.full_steps)
        object.__setattr__(self, "times", grid.times)
        object.__setattr__(self, "full_steps", full)
        object.__setattr__(self, "coefficients", numbers)
        if sorted({*full, *numbers}) != list(range(self.steps)) or len(full) + len(numbers) != self.steps:
            raise ValueError(
                f"full steps {list(full)} and fitted ones {sorted(numbers)} are not the {self.steps} steps"
            )
        for step, row in numbers.items():
            known = min(self.history, sum(before < step for before in full))
            if not known or len(row) != 2 * known + 1 or not all(map(math.isfinite, row)):
                raise ValueError(f"step {step} has {len(row)} coefficients, or some are not finite")

    @property
    def grid(self) -> Grid:
        """The grid that it was fitted on."""
        grid = Grid.recorded(self.steps, self.shift, self.times)
        assert grid is not None  # or it would not have been made
        return grid

    def velocity(self, step: int, us: Sequence[Tensor], xs: Sequence[Tensor], x: Tensor) -> Tensor:
        """`multistep_velocity` of a predicted step, by its position."""
        return multistep_velocity(torch.tensor(self.coefficients[step]), us, xs, x)


@dataclass(frozen=True)
class MultistepConfig:
    """What config.json holds, beside its format."""

    family: str
    """Name of the family's record."""
    student: str
    """`student_hash` of the model it was fitted to."""
    guidance_range: tuple[float, float]
    """Guidance scales of the runs that it was fitted to, lowest and highest."""
    two_pass: bool
    """Whether those scales were reached by two passes a step."""
    lists: tuple[FittedList, ...]
    """One for each list of full steps on each grid."""

    def __post_init__(self) -> None:
        low, high = map(float, self.guidance_range)
        if not 1 <= low <= high < math.inf:
            raise ValueError(f"guidance from {low:g} to {high:g}")
        lists = [made if isinstance(made, FittedList) else FittedList(**made) for made in self.lists]
        object.__setattr__(self, "guidance_range", (low, high))
        object.__setattr__(self, "lists", tuple(lists))
        if self.family not in FAMILIES:
            raise UserError(f"the scalars are for the family {self.family!r}", f"known are {', '.join(FAMILIES)}")


class Multistep:
    """The fitted scalars of a folder."""

    def __init__(self, config: MultistepConfig):
        self.config = config

    @classmethod
    def make(cls, making: Making) -> "Multistep":
        """Those in `making.folder`."""
        if making.folder is None:
            raise UserError("scalars are fitted beforehand, and no folder has been named", "set predictor=FOLDER")
        return cls.from_pretrained(making.folder)

    @staticmethod
    def costs(trunk: PlannedTrunk) -> ForecasterCosts:
        return ForecasterCosts(HISTORY, answers_pass=True)

    def save_pretrained(self, folder: str | Path) -> None:
        """Write config.json; schedule.json and run.json are for the command that made the folder."""
        write_json(Path(folder) / CONFIG_FILE, {"format": FORMAT} | asdict(self.config))

    @classmethod
    def from_pretrained(cls, folder: str | Path) -> "Multistep":
        """The saved ones; `UserError`, naming the folder, unless all of it is there and whole."""
        folder = Path(folder)
        if (folder / RUN_FILE).exists():
            verify_files(folder, read_run(folder, FORMAT))
        try:
            content: dict[str, Any] = json.loads((folder / CONFIG_FILE).read_bytes())
            if (made_as := content.pop("format", None)) != FORMAT:
                raise ValueError(f"its format is {made_as}, not {FORMAT}")
            return cls(MultistepConfig(**content))
        except (OSError, ValueError, TypeError, AttributeError, RecursionError, KeyError) as error:
            raise UserError(
                f"{folder} holds no fitted scalars: {' '.join(str(error).split())}",
                "give the path of a finished `vidaccel train-predictor forecaster=multistep` folder",
            ) from error

    def check_fits(self, family: str, student: Set[str] | None, force: bool = False) -> None:
        """`UserError` unless they were fitted to this model.

        Args:
            family: name of its record, which cannot be forced.
            student: all of its `student_hashes`; None is a model that is not known.
            force: take another student than they were fitted to.
        """
        made = self.config
        if made.family != family:
            raise UserError(f"the scalars are for {made.family}, and this is {family}", "fit some for this model")
        if made.student not in (student or set()) and not force:
            which = "a model whose weight files are not known" if student is None else "another one"
            raise UserError(
                f"the scalars were fitted to the model {made.student[:12]}, and this is {which}",
                "fit some to this model (vidaccel train-predictor forecaster=multistep), or see what they do with "
                "force=true",
            )

    def list_for(self, full_steps: Sequence[int], steps: int, times: Sequence[float] | None = None) -> FittedList:
        """The numbers for these full steps, on the grid of these times where they are said; `UserError`, naming those
        that there are, if there are none."""
        for made in self.config.lists:
            same = made.full_steps == tuple(full_steps) and made.steps == steps
            if same and (times is None or made.grid.fits(times)):
                return made
        known = "; ".join(f"{' '.join(map(str, made.full_steps))} of {made.steps}" for made in self.config.lists)
        asked = f"{' '.join(map(str, full_steps))} of {steps}"
        where = "" if times is None else f" on the grid of {Grid(tuple(times))}"
        raise UserError(f"no scalars were fitted to the full steps {asked}{where}", f"take one of: {known}")

    def check_guidance(self, guidance: float) -> None:
        """`UserError` for a scale outside the range that they were fitted to, but for `ROUNDING`."""
        low, high = self.config.guidance_range
        if not low * (1 - ROUNDING) <= guidance <= high * (1 + ROUNDING):
            raise UserError(
                f"guidance={guidance:.3g}, and the scalars were fitted to runs from {low:g} to {high:g}",
                f"sample with guidance={min(max(guidance, low), high):g}, or fit others with guidance_range=[...]",
            )
