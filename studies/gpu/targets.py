"""What the measurements are held to, and how far they come: a line a target, or none where a row is missing.

A block counts as the model has it: twenty double-stream, forty single-stream. Fused ops and compilation are compared
with the stock block on the same trimmed text, so that what trimming gains is not counted as theirs.
"""

from collections.abc import Callable

from studies.gpu.decoding import STOCK
from studies.gpu.passes import EVERYTHING, FUSED

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
        wanted += [*_fp8(get, tokens[0], tokens[-1]), *_blocks(get, tokens[0]), *_decoding(get, tokens[-1])]
        wanted += _samplers(get, tokens[0], tokens[-1])
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
    """Composed of timed passes at the full size; really run at a tenth of it, from noise to frames."""
    baseline = "50 steps with CFG, eager"

    def composed(variant: str, name: str, decoded: bool = False) -> float:
        figures = get("composed samplers", variant, composed_at, "seconds_composed")
        stock, ours = (get("decode", way, composed_at) if decoded else 0.0 for way in (STOCK, "once"))
        eager = get("composed samplers", "eager", composed_at, "seconds_composed")[baseline]
        return (eager + stock) / (figures[name] + ours)

    def run(name: str) -> float:
        return get("end to end", baseline, run_at) / get("end to end", name, run_at)

    for name, eager, everything, bf16, fp8 in (
        ("8 full of 20", 11.8, 14.0, 16.0, 17.0),
        ("4 full of 8", 23.0, 28.0, 30.0, 32.0),
    ):
        yield f"{name}, eager, composed", eager, lambda name=name: composed("eager", name)
        for variant, wanted in ((FUSED, bf16), (f"{FUSED}, fp8", fp8)):
            yield f"{name}, {variant}, composed", everything, lambda n=name, v=variant: composed(v, n)
            yield f"{name}, {variant}, composed, with decoding", wanted, lambda n=name, v=variant: composed(v, n, True)
        for variant in ("eager", FUSED, f"{FUSED}, fp8", EVERYTHING):
            line = f"{name}, {variant}"
            yield f"{line}, from noise to frames at a tenth", None, lambda line=line: run(line)


def _decoding(get: Get, size: int):
    for seconds in (9.0, 6.0):
        yield (
            f"decoding {size:,} tokens: {seconds:g} s over what it takes",
            1.0,
            lambda s=seconds: s / get("decode", "once", size),
        )
    yield (
        f"decoding {size:,} tokens: faster than stock tiles",
        None,
        lambda: get("decode", STOCK, size) / get("decode", "once", size),
    )


def _line(target: str, wanted: float | None, measure: Callable[[], float]) -> dict | None:
    try:
        got = measure()
    except KeyError:
        return {"target": target, "wanted": wanted, "got": None, "met": None} if wanted else None
    return {"target": target, "wanted": wanted, "got": got, "met": got >= wanted if wanted else None}
