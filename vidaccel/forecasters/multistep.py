"""Fitted scalars: the velocity of a predicted step from the velocities and latents of the last full ones.

    u = sum_j a_j u_j + b x + sum_j c_j x_j        j: the last full steps, newest first, `HISTORY` of them at most

x is the latent that the step starts from, u_j and x_j what full step j gave and started from. The numbers are those of
one model, one grid and one list of full steps, fitted to the model's own runs step after step
(train/predictor/scalars.py). A step that is predicted so costs no pass of the transformer, embedders and head
included. The forecast is linear, so that with guidance in two passes the same numbers serve each of the two.

Of a model with two transformers a predicted step looks back on full steps of its own alone, so that the first step of
each is full (`FittedList.boundary`).

On top of a network (`FittedList.network`) its own answer u_P, which costs a shallow pass, is one more term, the first:

    u = w u_P + sum_j a_j u_j + b x + sum_j c_j x_j

    folder/config.json      what it is for, and the numbers: `MultistepConfig`
    folder/schedule.json    the lists of full steps by budget and grid

Those on top of a network lie in its own folder (`SCALARS_FILE`).

B batch, C channels, T frames, H and W latent pixels, K full steps that are looked back on
"""

import json
import math
from collections.abc import Mapping, Sequence, Set
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from vidaccel.artefacts import RUN_FILE, read_run, verify_files, write_json
from vidaccel.errors import UserError
from vidaccel.families.registry import FAMILIES
from vidaccel.forecasters.base import ForecasterCosts, Making, PlannedTrunk
from vidaccel.forecasters.checkpoint import CONFIG_FILE, SCALARS_FILE, of_another
from vidaccel.models.grid import Grid

FORMAT = "multistep/1"
HISTORY = 3
"""Full steps that are looked back on."""
RIDGE = 1e-4
"""Penalty on the square of a coefficient, as a share of what it multiplies: x is nearly a combination of the others,
and this decides between them."""
ROUNDING = 0.02
"""Share by which a guidance scale may lie outside the range that was fitted: some are read off rounded latents."""


def multistep_velocity(
    coefficients: Tensor, us: Sequence[Tensor], xs: Sequence[Tensor], x: Tensor, network: Tensor | None = None
) -> Tensor:
    """The forecast of a predicted step, [B, C, T, H, W] in the dtype of the velocities; differentiable in everything.

    Args:
        coefficients: [2 K + 1], or [2 K + 1, B] where they differ: a_1 ... a_K, b, c_1 ... c_K; with a network's answer
            its w before them.
        us: K velocities of the last full steps, newest first.
        xs: the K latents that those steps started from.
        x: the latent that the predicted step starts from.
        network: what a network gives at this step, if its answer is among the terms.
    """
    terms = _terms(us, xs, x, network)
    if len(us) != len(xs) or len(coefficients) != len(terms):
        what = f"{len(us)} velocities and {len(xs) + 1} latents"
        raise ValueError(f"{len(coefficients)} coefficients for {what}{'' if network is None else ' and a network'}")
    total = torch.zeros_like(x, dtype=torch.float32)
    for weight, term in zip(coefficients.to(x.device, torch.float32), terms, strict=True):
        total = total + weight.reshape(-1, *[1] * (x.ndim - 1)) * term.float()
    return total.to(us[0].dtype)


def _terms(us: Sequence[Tensor], xs: Sequence[Tensor], x: Tensor, network: Tensor | None) -> tuple[Tensor, ...]:
    """What the numbers of a step multiply, in their order."""
    return (*(() if network is None else (network,)), *us, x, *xs)


def fit_coefficients(
    us: Sequence[Tensor],
    xs: Sequence[Tensor],
    x: Tensor,
    target: Tensor,
    ridge: float = RIDGE,
    network: Tensor | None = None,
    share: Tensor | None = None,
) -> Tensor:
    """[2 K + 1] float64, with a network's answer one more, of least squared error to `target`, by the normal equations
    in float64, a run at a time. With shares [2, 2 K + 1]: what they go from to what they go to.

    Args:
        us, xs, x, network: as `multistep_velocity` takes them, of N runs: [N, C, T, H, W].
        share: of each run, [N] in [0, 1]: how far its numbers have gone from the one set to the other.
        target: the velocities [N, C, T, H, W] to come near to.
        ridge: penalty on the square of a coefficient, as a share of the sum of squares of what it multiplies.

    Raises:
        UserError: there are fewer runs than unknowns, they are not finite, or they do not determine the numbers.
    """
    terms, runs = list(_terms(us, xs, x, network)), len(x)
    if share is not None:
        there = share.reshape(-1, *[1] * (x.ndim - 1)).to(x)
        terms = [*((1 - there) * term for term in terms), *(there * term for term in terms)]
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
    return found if share is None else found.reshape(2, -1)


@dataclass(frozen=True)
class FittedList:
    """The numbers for one list of full steps: what serves, attached to a pipeline."""

    full_steps: tuple[int, ...]
    """Positions of the full steps, rising from 0."""
    coefficients: dict[int, tuple[float, ...]]
    """[2 K + 1] of each predicted step, by its position; K is the number of full steps before it, at most `history`.
    On top of a network its weight comes first."""
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
    network: bool = False
    """Whether the answer of a network is one more term, whose folder this is in."""
    guidance_range: tuple[float, float] | None = None
    """Where they change with the scale of guidance: the lowest, which `coefficients` are for, and the highest."""
    at_highest: dict[int, tuple[float, ...]] | None = None
    """Those at the highest, likewise by position; between the two they lie on a line."""
    boundary: float | None = None
    """Time below which the second of the two transformers takes over that they were fitted to; None: it is one."""

    def __post_init__(self) -> None:
        grid = Grid.recorded(self.steps, self.shift, self.times)
        if grid is None:
            raise ValueError("a list without a grid")
        full = tuple(self.full_steps)
        object.__setattr__(self, "times", grid.times)
        object.__setattr__(self, "full_steps", full)
        if missing := set(self.firsts) - set(full):
            raise ValueError(f"step {min(missing)}, the first of a transformer, is not full")
        object.__setattr__(self, "coefficients", self._checked(self.coefficients))
        if (self.guidance_range is None) != (self.at_highest is None):
            raise ValueError("numbers at the highest scale of guidance and the range of it go together")
        if self.guidance_range is not None and self.at_highest is not None:
            low, high = map(float, self.guidance_range)
            object.__setattr__(self, "guidance_range", (low, high))
            object.__setattr__(self, "at_highest", self._checked(self.at_highest))
            if not low < high:
                raise ValueError(f"numbers that change with guidance from {low:g} to {high:g}")

    def _checked(self, rows: Mapping[Any, Sequence[float]]) -> dict[int, tuple[float, ...]]:
        numbers, full = {int(step): tuple(map(float, row)) for step, row in rows.items()}, self.full_steps
        if sorted({*full, *numbers}) != list(range(self.steps)) or len(full) + len(numbers) != self.steps:
            raise ValueError(
                f"full steps {list(full)} and fitted ones {sorted(numbers)} are not the {self.steps} steps"
            )
        for step, row in numbers.items():
            begin = max(first for first in self.firsts if first <= step)
            known = min(self.history, sum(begin <= before < step for before in full))
            if not known or len(row) != 2 * known + 1 + self.network or not all(map(math.isfinite, row)):
                raise ValueError(f"step {step} has {len(row)} coefficients, or some are not finite")
        return numbers

    @property
    def grid(self) -> Grid:
        """The grid that it was fitted on."""
        grid = Grid.recorded(self.steps, self.shift, self.times)
        assert grid is not None  # or it would not have been made
        return grid

    @property
    def firsts(self) -> tuple[int, ...]:
        """Positions of the steps with which the transformers begin, each of which looks back on nothing."""
        return (0,) if self.boundary is None else self.grid.firsts([self.boundary])

    def record(self) -> dict[str, Any]:
        """As files have it: the boundary only where there is one."""
        return {name: value for name, value in asdict(self).items() if name != "boundary" or value is not None}

    def numbers(self, step: int, guidance: float | Tensor | None = None) -> Tensor:
        """Those of a predicted step: [2 K + 1], or for scales [B] of guidance that they change with [2 K + 1, B].
        Outside their range they are those of its nearest end, and in its middle where no scale is said."""
        lowest = torch.tensor(self.coefficients[step])
        if self.guidance_range is None or self.at_highest is None:
            return lowest
        scale = sum(self.guidance_range) / 2 if guidance is None else guidance
        share = share_of(torch.as_tensor(scale, dtype=torch.float32), self.guidance_range)
        lowest, highest = (
            each.reshape(-1, *[1] * share.ndim) for each in (lowest, torch.tensor(self.at_highest[step]))
        )
        return lowest + share.to(lowest.device) * (highest - lowest)

    def velocity(
        self,
        step: int,
        us: Sequence[Tensor],
        xs: Sequence[Tensor],
        x: Tensor,
        network: Tensor | None = None,
        guidance: float | Tensor | None = None,
    ) -> Tensor:
        """`multistep_velocity` of a predicted step, by its position, for a scale of guidance or scales [B]."""
        return multistep_velocity(self.numbers(step, guidance), us, xs, x, network)


def share_of(guidance: Tensor, guidance_range: tuple[float, float]) -> Tensor:
    """How far scales lie along a range, from 0 at its lowest to 1 at its highest and no further."""
    low, high = guidance_range
    return ((guidance - low) / (high - low)).clamp(0, 1)


@dataclass(frozen=True)
class MultistepConfig:
    """What config.json holds, beside its format."""

    family: str
    """Name of the family's record."""
    student: str
    """`student_hash` of the model it was fitted to."""
    guidance_range: tuple[float, float]
    """Guidance scales of the runs that it was fitted to, lowest and highest; of two transformers the first's."""
    two_pass: bool
    """Whether those scales were reached by two passes a step."""
    lists: tuple[FittedList, ...]
    """One for each list of full steps on each grid."""
    guidance_2: float | None = None
    """Scale of the second of two transformers in those runs; None is that of the first."""

    def __post_init__(self) -> None:
        low, high = map(float, self.guidance_range)
        if not 1 <= low <= high < math.inf:
            raise ValueError(f"guidance from {low:g} to {high:g}")
        lists = [made if isinstance(made, FittedList) else FittedList(**made) for made in self.lists]
        object.__setattr__(self, "guidance_range", (low, high))
        object.__setattr__(self, "lists", tuple(lists))
        if self.guidance_2 is not None and not 1 <= self.guidance_2 < math.inf:
            raise ValueError(f"guidance_2={self.guidance_2}")
        if self.family not in FAMILIES:
            raise UserError(f"the scalars are for the family {self.family!r}", f"known are {', '.join(FAMILIES)}")


class Multistep:
    """The fitted scalars of a folder."""

    def __init__(self, config: MultistepConfig, folder: Path | None = None):
        self.config, self.folder = config, folder

    @classmethod
    def make(cls, making: Making) -> "Multistep":
        """Those in `making.folder`."""
        if making.folder is None:
            raise UserError("scalars are fitted beforehand, and no folder has been named", "set predictor=FOLDER")
        return cls.from_pretrained(making.folder)

    @staticmethod
    def costs(trunk: PlannedTrunk) -> ForecasterCosts:
        return ForecasterCosts(HISTORY, answers_pass=True)

    def save_pretrained(self, folder: str | Path, name: str = CONFIG_FILE) -> None:
        """Write config.json, or `SCALARS_FILE` beside a network; all else is for the command that made the folder."""
        content = {"format": FORMAT} | asdict(self.config) | {"lists": [each.record() for each in self.config.lists]}
        if self.config.guidance_2 is None:
            del content["guidance_2"]
        write_json(Path(folder) / name, content)

    @classmethod
    def from_pretrained(cls, folder: str | Path) -> "Multistep":
        """The saved ones; `UserError`, naming the folder, unless all of it is there and whole."""
        folder = Path(folder)
        if (folder / RUN_FILE).exists():
            verify_files(folder, read_run(folder, FORMAT))
        return cls._read(folder, CONFIG_FILE, "vidaccel train-predictor forecaster=multistep")

    @classmethod
    def on_top_of(cls, folder: str | Path) -> "Multistep | None":
        """Those on top of the network in its folder, whose hashes are the network's to verify; None if it has none.
        `UserError`, naming the folder, if they are not whole."""
        if not (Path(folder) / SCALARS_FILE).exists():
            return None
        return cls._read(Path(folder), SCALARS_FILE, "vidaccel train-predictor")

    @classmethod
    def _read(cls, folder: Path, name: str, command: str) -> "Multistep":
        try:
            content: dict[str, Any] = json.loads((folder / name).read_bytes())
            if (made_as := content.pop("format", None)) != FORMAT:
                raise ValueError(f"its format is {made_as}, not {FORMAT}")
            config = MultistepConfig(**content)
            if any(made.network != (name == SCALARS_FILE) for made in config.lists):
                raise ValueError(f"lists on top of a network are in the {SCALARS_FILE} of its folder, and no others")
            return cls(config, folder)
        except (OSError, ValueError, TypeError, AttributeError, RecursionError, KeyError) as error:
            raise UserError(
                f"{folder} holds no fitted scalars: {' '.join(str(error).split())}",
                f"give the path of a finished `{command}` folder",
            ) from error

    def check_fits(self, family: str, student: Set[str] | None, force: bool = False, called: str | None = None) -> None:
        """`UserError` unless they were fitted to this model.

        Args:
            family: name of its record, which cannot be forced.
            student: all of its `student_hashes`; None is a model that is not known.
            force: take another student than they were fitted to.
            called: folder or hub id of this one, for the message.
        """
        made = self.config
        if made.family != family:
            raise UserError(f"the scalars are for {made.family}, and this is {family}", "fit some for this model")
        if made.student not in (student or set()) and not force:
            hint = "fit some to this one (vidaccel train-predictor forecaster=multistep), or try them with force=true"
            raise of_another("the scalars were fitted to the model", made.student, self.folder, student, called, hint)

    def find(self, full_steps: Sequence[int], steps: int, times: Sequence[float] | None = None) -> FittedList | None:
        """The numbers for these full steps, on the grid of these times where they are said, if there are some."""
        for made in self.config.lists:
            same = made.full_steps == tuple(full_steps) and made.steps == steps
            if same and (times is None or made.grid.fits(times)):
                return made
        return None

    def lacking(self, full_steps: Sequence[int], steps: int, times: Sequence[float] | None = None) -> UserError:
        """That `find` finds none, naming those that there are."""
        known = "; ".join(f"{' '.join(map(str, made.full_steps))} of {made.steps}" for made in self.config.lists)
        asked = f"{' '.join(map(str, full_steps))} of {steps}"
        where = "" if times is None else f" on the grid of {Grid(tuple(times))}"
        return UserError(f"no scalars were fitted to the full steps {asked}{where}", f"take one of: {known}")

    def check_guidance(self, guidance: float, first: float | None = None) -> None:
        """`UserError` for a scale outside the range that they were fitted to, but for `ROUNDING`; with that of the
        first of two transformers, for another scale of the second than it had in the runs."""
        if first is not None:
            own = first if self.config.guidance_2 is None else self.config.guidance_2
            if abs(guidance - own) > ROUNDING * own:
                raise UserError(
                    f"guidance_2={guidance:.3g}, and the scalars were fitted to runs with {own:.3g}",
                    f"sample with guidance_2={own:.3g}, or fit others with guidance_2={guidance:.3g}",
                )
            return
        low, high = self.config.guidance_range
        if not low * (1 - ROUNDING) <= guidance <= high * (1 + ROUNDING):
            raise UserError(
                f"guidance={guidance:.3g}, and the scalars were fitted to runs from {low:g} to {high:g}",
                f"sample with guidance={min(max(guidance, low), high):g}, or fit others with guidance_range=[...]",
            )
