"""What the measurements are held to, and how far they come: a line a target, or none where a row is missing.

A block counts as the model has it: twenty double-stream, forty single-stream. Fused ops and compilation are compared
with the stock block on the same trimmed text, so that what trimming gains is not counted as theirs.
"""

from collections.abc import Callable

from studies.gpu.passes import EVERYTHING

MEMORY_BOUND = ("adaln", "gated_residual_adaln", "qk_norm_rope", "quantize_rows")
BLOCKS = {"transformer_blocks": 20, "single_transformer_blocks": 40}
Get = Callable[..., float]


def targets(rows: list[dict]) -> list[dict]:
    """[{"target", "wanted", "got", "met"}]; wanted and met are None for what is only of interest."""
    large = max((row["size"]["N"] for row in rows if "N" in row["size"]), default=None)
    passes = [row for row in rows if row["item"] in ("fp8", "model") and "tokens" in row["size"]]
    tokens = sorted({row["size"]["tokens"] for row in passes})
    get = _reader(rows)
    wanted = [*_ops(get, large)]
    if tokens:
        wanted += [*_fp8(get, tokens[0], tokens[-1]), *_blocks(get, tokens[0]), *_samplers(get, tokens[0], tokens[-1])]
    return [line for line in (_line(*entry) for entry in wanted) if line]


def _reader(rows: list[dict]) -> Get:
    """A figure of the row of this name, variant and size; KeyError where it is missing or failed."""
    found = {}
    for row in rows:
        if "error" not in row:
            found[row["name"], row["variant"], row["size"].get("N", row["size"].get("tokens"))] = row
    return lambda name, variant, size, figure="seconds": found[name, variant, size][figure]


def _ops(get: Get, N: int | None):
    for op in MEMORY_BOUND:
        yield f"{op}: share of copy bandwidth", 0.85, lambda op=op: get(op, "vidaccel", N, "of_copy")
        for other, factor in (("eager", 1.0), ("compiled", 1.15)):
            yield f"{op}: faster than {other}", factor, lambda op=op, v=other: get(op, v, N) / get(op, "vidaccel", N)
    yield (
        "attention_jvp: share of the rate of torch's forward attention",
        0.6,
        lambda: 3 * get("attention_jvp", "torch forward, no tangent", N) / get("attention_jvp", "vidaccel", N),
    )
    for word, figure in (("faster", "seconds"), ("smaller", "peak_bytes")):
        yield (
            f"attention_jvp: {word} than jvp-flash-attention",
            1.0,
            lambda figure=figure: (
                get("attention_jvp beside the package", "jvp-flash-attention", N, figure)
                / get("attention_jvp beside the package", "vidaccel", N, figure)
            ),
        )


def _fp8(get: Get, small: int, large: int):
    """Of uncompiled passes on fused ops. Linear layers are 15 % of a large one's time and a good half of a small one's:
    no more than 1.08 and 1.45 is possible where their products take half as long."""

    def gain(size: int, variant: str = "trimmed, fused", name: str = "full pass", fp8: str = "{}, fp8") -> float:
        return get(name, variant, size) / get(name, fp8.format(variant), size)

    yield f"full pass of {large:,} tokens: fp8", 1.06, lambda: gain(large)
    yield f"full pass of {small:,} tokens: fp8", 1.25, lambda: gain(small)
    yield f"full pass of {small:,} tokens, compiled: fp8", None, lambda: gain(small, EVERYTHING)
    for size in (small, large):
        yield f"linear layer of {size:,} tokens: fp8", None, lambda size=size: gain(size, "bf16", "linear", "fp8")


def _blocks(get: Get, tokens: int):
    def seconds(variant: str) -> float:
        return sum(count * get(name, variant, tokens) for name, count in BLOCKS.items())

    yield "block: trimmed text alone", None, lambda: seconds("eager") / seconds("trimmed")
    yield "block: fused ops alone", 1.10, lambda: seconds("trimmed") / seconds("trimmed, fused")
    yield "block: compile on top", 1.25, lambda: seconds("trimmed") / seconds(EVERYTHING)
    yield "block: fp8 on top of that", 1.20, lambda: seconds(EVERYTHING) / seconds(f"{EVERYTHING}, fp8")


def _samplers(get: Get, run_at: int, composed_at: int):
    """Composed of timed passes at the full size; really run at a tenth of it."""

    def composed(variant: str, name: str) -> float:
        figures = get("composed samplers", variant, composed_at, "seconds_composed")
        return figures["50 steps with CFG, eager"] / figures[name]

    def run(name: str) -> float:
        return get("sampler", "50 steps with CFG, eager", run_at) / get("sampler", name, run_at)

    for name, eager, everything in (("8 full of 20", 11.8, 14.0), ("4 full of 8", 23.0, 28.0)):
        yield f"{name}, eager, composed", eager, lambda name=name: composed("eager", name)
        yield (
            f"{name}, everything and fp8, composed",
            everything,
            lambda name=name: composed(f"{EVERYTHING}, fp8", name),
        )
        yield f"{name}, eager, run at a tenth", None, lambda name=name: run(f"{name}, eager")
        yield f"{name}, everything, run at a tenth", None, lambda name=name: run(f"{name}, {EVERYTHING}")


def _line(target: str, wanted: float | None, measure: Callable[[], float]) -> dict | None:
    try:
        got = measure()
    except KeyError:
        return {"target": target, "wanted": wanted, "got": None, "met": None} if wanted else None
    return {"target": target, "wanted": wanted, "got": got, "met": got >= wanted if wanted else None}
