"""What a video of HunyuanVideo's full size takes from noise to frames on each card that was measured, and its cost
as a table for docs/results.md: `python -m studies.gpu.summary [--price 2.5]`.

Denoising is composed of timed passes, decoding is added; text encoders, which take well under a second, are left out.
Memory is that of a full pass and, without the transformer, of decoding.
"""

import argparse
import json
from collections.abc import Iterator

from studies.gpu.passes import FUSED
from studies.gpu.run import ROOT

RESULTS = ROOT / "studies" / "results" / "gpu"
BASELINE = "50 steps with CFG, eager"
WAYS = (
    ("50 steps of two passes", "eager", BASELINE, "stock tiles"),
    ("8 full of 20", FUSED, "8 full of 20", "once"),
    ("8 full of 20, fp8", f"{FUSED}, fp8", "8 full of 20", "once"),
    ("4 full of 8", FUSED, "4 full of 8", "once"),
    ("4 full of 8, fp8", f"{FUSED}, fp8", "4 full of 8", "once"),
)
"""Name, variant of the passes, sampler that is composed of them, and how its latents are decoded."""
TITLE = ("", "card", "denoising, s", "decoding, s", "together, s", "times as fast", "GiB, a pass", "GiB, decoding")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--price", type=float, default=2.5, help="of an hour of the card")
    print(markdown(parser.parse_args().price))


def markdown(price: float) -> str:
    """The table, of all reports that are there."""
    reports = [json.loads(path.read_text()) for path in sorted(RESULTS.glob("nvidia-*.json"))]
    title = (*TITLE, f"money, at {price:g} an hour")
    rows = [row for each in reports for row in videos(each, price)]
    lines = [title, ("---", "---", *["--:"] * (len(title) - 2)), *rows]
    return "\n".join("|".join(["", *(f" {cell} " if cell else " " for cell in line), ""]) for line in lines)


def videos(report: dict, price: float) -> Iterator[tuple[str, ...]]:
    """A line a way that was measured; what needs a decoding that was not is empty."""
    tokens = max(row["size"].get("tokens", 0) for row in report["rows"])
    rows = [row for row in report["rows"] if row["size"].get("tokens") == tokens and "error" not in row]
    card = report["machine"]["device"].removeprefix("NVIDIA ").split()[0]

    def find(name: str, variant: str) -> list[dict]:
        return [row for row in rows if (row["name"], row["variant"]) == (name, variant)]

    slow = None
    for title, variant, sampler, way in WAYS:
        passes, decoded = find("composed samplers", variant), find("decode", way)
        if not passes or sampler not in passes[0]["seconds_composed"]:
            continue
        denoise = passes[0]["seconds_composed"][sampler]
        # Of passes that were measured twice the smaller: the other process held a second model.
        memory = min(row["peak_bytes"] for row in find("full pass", variant)) / 2**30
        figures = [f"{denoise:.4g}", "", "", "", f"{memory:.1f}", "", ""]
        if decoded:
            both = denoise + decoded[0]["seconds"]
            slow = slow or both
            figures[1:4] = f"{decoded[0]['seconds']:.3g}", f"{both:.4g}", f"{slow / both:.1f}"
            figures[5:] = f"{decoded[0]['peak_bytes'] / 2**30:.1f}", f"{price * both / 3600:.3f}"
        yield title, card, *figures


if __name__ == "__main__":
    main()
