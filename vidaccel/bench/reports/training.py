"""The plan of a training as lines and tables for people."""

from collections.abc import Iterator

from rich.table import Table

from vidaccel.bench.plan_training import TrainingPlan, Work
from vidaccel.bench.reports.tables import empty_table
from vidaccel.config.plan import PlanConfig
from vidaccel.numbers import rounded, si
from vidaccel.train.checkpoints import KEPT


def training_tables(planned: TrainingPlan, plan: PlanConfig) -> Iterator[str | Table]:
    """In order, of what a training costs on the cards of `plan`."""
    frames, height, width = planned.model.size
    tokens = planned.tokens
    yield planned.of
    yield (
        f"{planned.model.config.family}, {frames} frames of {width} x {height}: {tokens['video']:,} video and "
        f"{tokens['text']:,} text tokens (size of {planned.model.source})"
    )
    known = ", ".join(f"{count:,} {name}" for name, count in planned.parameters.items())
    yield f"parameters: {known}"
    yield _work_table(planned, plan)
    card = plan.card
    peaks = f"{si(card.bfloat16, 'FLOP/s')} in bf16 and {si(card.float32, 'FLOP/s')} in float32"
    yield f"hours of one {card.title}, at {plan.mfu:.1%} of its {peaks}"
    yield "with N processes a step has N times as many samples; each takes these hours"
    yield from _memory(planned, plan)
    yield from (f"disk: {what}: {si(size, 'B')}" for what, size in planned.disk.items())
    if any(what == "a checkpoint" for what in planned.disk):
        yield f"the last {KEPT} checkpoints and the best are kept"
    yield from planned.notes


def _work_table(planned: TrainingPlan, plan: PlanConfig) -> Table:
    table = empty_table()
    table.add_column("what", overflow="fold")
    for heading in ("FLOPs", "hours", *(["money"] if plan.price is not None else [])):
        table.add_column(heading, justify="right", no_wrap=True)
    total = Work("total", sum(w.flops for w in planned.work), sum(w.float32 for w in planned.work))
    for part in [*planned.work, total]:
        hours = plan.seconds(part.flops, part.float32) / 3600
        money = [rounded(hours * plan.price)] if plan.price is not None else []
        table.add_row(part.what, si(part.total), rounded(hours), *money)
    return table


def _memory(planned: TrainingPlan, plan: PlanConfig) -> Iterator[str | Table]:
    held = planned.memory
    shared = ", ".join(f"{name} {si(size, 'B')}" for name, size in held.shared.items())
    own = ", ".join(f"{name} {si(size, 'B')}" for name, size in held.own.items() if size)
    yield f"memory, shared by the processes: {shared}"
    gathered = f"; if there are several, gathered weights {si(held.gathered, 'B')}" if held.gathered else ""
    yield f"memory of each process: {own} (blocks alone, an estimate){gathered}"
    beside = sum(planned.model.beside.values())
    if planned.model.beside:
        named = ", ".join(f"{name} {si(size, 'B')}" for name, size in planned.model.beside.items())
        yield f"and beside that on each card: {named}"
    table = empty_table()
    for heading in ("GPUs", "each holds", "all", f"in {si(plan.room, 'B')}"):
        table.add_column(heading, justify="right", no_wrap=True)
    for gpus in plan.gpus:
        size = held.on(gpus)
        fits = "fits" if size + beside <= plan.room else "too small"
        table.add_row(str(gpus), si(size, "B"), si(size + beside, "B"), fits)
    yield table
