"""`benchmark --random-weights`: the full-size transformer timed with weights that were never trained.

How long a pass takes does not depend on what the weights are. Timed, in rounds, are whole passes: a full one, one with
the learned predictor in the trunk's place, one with nothing there. Where the model does not fit, its parts are: blocks
of each kind, the predictor, and all that lies outside the trunk; passes are then put together from them, and rows from
passes in both cases. Text encoders, autoencoder and scheduler are left out.

B batch, N tokens
"""

import time
from collections.abc import Callable, Iterator
from dataclasses import asdict
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from vidaccel.bench.environment import environment
from vidaccel.bench.measures.flops import parameters
from vidaccel.bench.own_model import planned, planned_rows
from vidaccel.bench.plan import SizeCosts, method_flops, passes, size_costs, stand_in
from vidaccel.bench.rows import NOT_RUN, SCHEMA, Row, blank_run, speedups
from vidaccel.bench.sizes import meta_transformer, new_transformer, planned_family, rows
from vidaccel.cache.trunk import Trunk
from vidaccel.config.benchmark import BenchmarkConfig, MethodConfig
from vidaccel.families.base import BlockList
from vidaccel.families.walk import call_block, conditions_of, latent_channels, named_arguments
from vidaccel.forecasters.learned import Predictor, new_predictor
from vidaccel.forecasters.reuse import Reuse
from vidaccel.models.loading import DTYPES, resolve_device
from vidaccel.models.velocity import Velocity
from vidaccel.numbers import quartiles
from vidaccel.progress import Progress
from vidaccel.runtime.decode import free_bytes

Seconds = dict[str, float]
"""Of one pass of each kind: full, predictor or reuse."""

ROOM = 1.1
"""Memory that has to be free, over what was worked out."""
GUIDANCE = 6.0
UNTIMED = "random weights do not tell: only full, predicted and reused passes are timed with them"


def time_random_weights(config: BenchmarkConfig, device: str = "auto") -> dict[str, Any]:
    """Every wanted method on every size, as results.json."""
    config, where, runs = planned(config), resolve_device(device), []
    for size in config.videos:
        costs = size_costs(config, planned_family(config), meta_transformer(config), size)
        whole = _fits(config, costs, where) if config.whole is None else config.whole
        with Progress("timing", total=config.rounds, live=False) as bar, torch.no_grad():
            timed = list(_rounds(config, costs, where, whole, bar))
        runs += _runs(config, costs, timed, "whole" if whole else "blocks")
    return {"schema": SCHEMA, "environment": environment(where), "baseline": config.baseline, "runs": runs}


def _rounds(
    config: BenchmarkConfig, costs: SizeCosts, device: torch.device, whole: bool, bar: Progress
) -> Iterator[Seconds]:
    """What `config.rounds` rounds measured, after one that warms up."""
    model = Model(config, costs, device, depth=None if whole else config.predictor_blocks)
    parts, kinds = model.passes() if whole else model.parts()
    for index in range(config.rounds + 1):
        seconds = {name: _time(call, device) for name, call in parts.items()}
        if index:
            bar.advance()
            yield {kind: sum(count * seconds[part] for part, count in of.items()) for kind, of in kinds.items()}


def _time(call: Callable[[], Any], device: torch.device) -> float:
    _wait(device)
    started = time.perf_counter()
    call()
    _wait(device)
    return time.perf_counter() - started


def _wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


class Model:
    """A transformer and a predictor with random weights, and the input of a pass."""

    def __init__(self, config: BenchmarkConfig, costs: SizeCosts, device: torch.device, depth: int | None):
        self.config, self.family, self.device = config, planned_family(config), device
        self.transformer = new_transformer(config, device, depth)
        self.streams = rows(config, self.transformer, costs.size)
        self.velocity = Velocity(self.transformer, self.family)
        self.trunk = Trunk(self.transformer, self.family).attach()
        self.inputs = self._inputs(costs)
        self.arguments = self._block_arguments()
        self.predictor = self._predictor()

    def passes(self) -> tuple[dict[str, Callable], dict[str, dict[str, int]]]:
        """What to time, and what each kind of pass is made of: of itself."""
        calls = {"full": self.full, "predictor": lambda: self.predicted(self.predictor), "reuse": self.without_trunk}
        return calls, {kind: {kind: 1} for kind in calls}

    def parts(self) -> tuple[dict[str, Callable], dict[str, dict[str, int]]]:
        """What to time, and what each kind of pass is made of: so many of each."""
        calls: dict[str, Callable] = {"outside": self.without_trunk, "network": self._network}
        depths, full = meta_transformer(self.config), {"outside": 1}
        for kind, block in self._firsts():
            calls[kind.name] = partial(call_block, kind, block, self.arguments[kind.name])
            full[kind.name] = len(getattr(depths, kind.name))
        return calls, {"full": full, "predictor": {"outside": 1, "network": 1}, "reuse": {"outside": 1}}

    def full(self) -> Tensor:
        with self.trunk.full(self.inputs["t"]):
            return self.velocity(**self.inputs)

    def predicted(self, forecaster: Any) -> Tensor:
        with self.trunk.predicted(forecaster, self.inputs["t"]):
            return self.velocity(**self.inputs)

    def without_trunk(self) -> Tensor:
        return self.predicted(Reuse())

    def _network(self) -> Any:
        arguments = self.arguments[self.family.block_lists[0].name]
        return self.predictor(arguments, self.trunk.memory(), self.inputs["t"])

    def _inputs(self, costs: SizeCosts) -> dict[str, Any]:
        config: Any = self.transformer.config
        frames, height, width = costs.size
        frame_step, pixel_step = self.config.compression
        channels = latent_channels(self.transformer)
        shape = 1, channels, (frames - 1) // frame_step + 1, height // pixel_step, width // pixel_step
        options = {"dtype": DTYPES[self.config.dtype], "device": self.device}
        text = {}
        masks = {tensor.mask for tensor in self.family.text_tensors}
        for tensor in self.family.text_tensors:
            extents = [self.streams[size] if size in self.streams else config[size] for size in tensor.shape]
            make = torch.ones if tensor.argument in masks else torch.randn
            text[tensor.stored] = make(1, *extents, **options)
        for condition in conditions_of(self.transformer, self.family):
            given = condition.channels_config
            extents = [config[given] if given else config.in_channels - channels, *shape[2:]]
            if condition.first_frame:
                extents = [channels, 1, *shape[3:]]
            if condition.tokens and condition.width_config:
                extents = [self.streams[condition.tokens], config[condition.width_config]]
            text[condition.stored] = torch.randn(1, *extents, **options)
        scale = torch.full((1,), GUIDANCE, device=self.device) if self.velocity.embeds("g") else None
        half = torch.full((1,), 0.5, device=self.device)
        return {"x": torch.randn(shape, **options), "t": half, "text": text, "g": scale}

    def _firsts(self) -> list[tuple[BlockList, nn.Module]]:
        """The first block of each list."""
        return [(kind, getattr(self.transformer, kind.name)[0]) for kind in self.family.all_lists]

    def _block_arguments(self) -> dict[str, dict[str, Any]]:
        """What the first block of each list is called with, from a full pass, which the trunk remembers."""
        found: dict[str, dict[str, Any]] = {}

        def note(kind: BlockList, block: nn.Module, args: tuple, kwargs: dict) -> None:
            found[kind.name] = named_arguments(kind, args, kwargs)

        handles = [
            block.register_forward_pre_hook(partial(note, kind), with_kwargs=True) for kind, block in self._firsts()
        ]
        self.full()
        for handle in handles:
            handle.remove()
        return found

    def _predictor(self) -> Predictor:
        tokens = self.trunk.memory()[0].tokens  # for those that enter as well: its statistics change no time
        network = new_predictor(self.transformer, self.family, tokens, tokens, self.config.predictor_blocks).eval()
        return network.run_like(self.transformer).to(self.device)


def _fits(config: BenchmarkConfig, costs: SizeCosts, device: torch.device) -> bool:
    """Whether weights, activations and cache of the whole model fit into what is free."""
    model = meta_transformer(config)
    weights = parameters(model) + Predictor.costs(costs.trunk).parameters
    needed = weights * DTYPES[config.dtype].itemsize + costs.activations + sum(costs.cache["predictor"])
    return ROOM * needed < free_bytes(device)


def _runs(config: BenchmarkConfig, costs: SizeCosts, timed: list[Seconds], how: str) -> Iterator[dict[str, Any]]:
    methods, lacking = planned_rows(config)
    baseline = methods[config.baseline]
    for name, method in methods.items():
        run = blank_run(Row(name, method, costs.size), config.family)
        run["settings"]["random_weights"] = how
        if name in lacking:
            yield run | {"error": f"{NOT_RUN}{lacking[name]}"}
        else:
            yield run | (_timed(method, baseline, costs, timed) if _is_timed(method, costs) else {"error": UNTIMED})


def _is_timed(method: MethodConfig, costs: SizeCosts) -> bool:
    """Whether its passes are those that were timed: a forecaster without FLOPs takes as long as reuse does, or
    nothing where it answers the whole pass."""
    if not method.planned:
        return False
    forecaster = stand_in(method, costs)
    free = forecaster is not None and forecaster.linear + forecaster.attention == 0
    return method.full_count() == method.steps or method.on_skipped == "predictor" or free


def _timed(method: MethodConfig, baseline: MethodConfig, costs: SizeCosts, timed: list[Seconds]) -> dict[str, Any]:
    count, flops = passes(method), method_flops(method, costs)
    seconds = [_denoise(method, costs, each) for each in timed]
    known: dict[str, Any] = {
        "full_steps": method.schedule(),
        "passes": asdict(count),
        "flops": flops,
        "denoise_seconds": quartiles(seconds),
    }
    if _is_timed(baseline, costs):
        slow = [_denoise(baseline, costs, each) for each in timed]
        measured = quartiles([a / b for a, b in zip(slow, seconds, strict=True)])["median"]
        ideal = method_flops(baseline, costs) / flops
        known["speedup"] = speedups(measured, ideal)
    return known


def _denoise(method: MethodConfig, costs: SizeCosts, seconds: Seconds) -> float:
    count, forecaster = passes(method), stand_in(method, costs)
    skipped = 0.0 if forecaster is not None and forecaster.answers_pass else seconds["reuse"]
    return count.full * seconds["full"] + count.predicted * seconds["predictor"] + count.skipped * skipped
