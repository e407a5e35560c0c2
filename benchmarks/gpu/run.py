"""Everything that is measured on a GPU, in one go: `python -m benchmarks.gpu.run [--output DIR] [--minutes 9]`.

It runs the kernel tests on the GPU, then the items of items.py, each in a process of its own and within what is left of
the time, and writes one JSON a machine: device, versions, this machine's ceilings, what was aimed at (targets.py), one
row a measurement, and an error row for whatever failed or did not fit. `--dry-run` does it at toy sizes on any machine,
to show that it runs.

It needs torch, triton, numpy, pytest with xdist, hypothesis, and the wheels that wheelhouse.sh gathers; no network.
"""

import argparse
import datetime
import importlib.metadata
import json
import os
import platform
import re
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import torch

import vidaccel
from benchmarks.gpu.measure import read_rows
from benchmarks.gpu.targets import targets

ROOT = Path(__file__).parents[2]
# Seconds that an item may take at most on a GPU; an item also ends when the whole time is up.
LIMITS = {"tests": 110, "ops": 120, "blocks": 90, "model": 190, "training": 50}
PACKAGES = ("torch", "triton", "diffusers", "torchao", "jvp-flash-attention")


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--output", type=Path, default=ROOT / "benchmarks" / "results" / "gpu")
    parser.add_argument("--minutes", type=float, default=9.0)
    parser.add_argument("--dry-run", action="store_true", help="toy sizes, on a CPU if there is no GPU")
    parser.add_argument("--items", nargs="+", choices=LIMITS, default=list(LIMITS))
    options = parser.parse_args()
    if not torch.cuda.is_available() and not options.dry_run:
        print("error: no CUDA device\nhint: --dry-run runs everything at toy sizes on a CPU", file=sys.stderr)
        return 2
    report = measure(options.items, options.dry_run, time.monotonic() + 60 * options.minutes)
    options.output.mkdir(parents=True, exist_ok=True)
    target = options.output / f"{'dry-run-' if options.dry_run else ''}{slug(report['machine']['device'])}.json"
    partial = target.with_suffix(".part")
    partial.write_text(json.dumps(report, indent=1) + "\n")
    partial.replace(target)
    print(table(report))
    print(target)
    return 0


def measure(items: list[str], dry: bool, deadline: float) -> dict:
    """The whole report; rows in the order in which they were measured."""
    started = datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds")
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "rows.jsonl"
        for item in items:
            left = deadline - time.monotonic()
            limit = left if dry else min(LIMITS[item], left)
            print(f"{item}: at most {max(limit, 0):.0f} s", file=sys.stderr, flush=True)
            error = _run(item, path, dry, limit) if limit > 5 else "skipped: the time was used up"
            if error:
                with path.open("a") as file:
                    file.write(
                        json.dumps({"item": item, "name": item, "variant": "", "size": {}, "error": error}) + "\n"
                    )
        rows = read_rows(path)
    ceilings = _add_shares(rows)
    return {
        "format": "gpu/1",
        "dry_run": dry,
        "started": started,
        "machine": machine(),
        "versions": {"vidaccel": vidaccel.__version__} | {name: version(name) for name in PACKAGES},
        "ceilings": ceilings,
        "targets": targets(rows),
        "rows": rows,
    }


def _run(item: str, path: Path, dry: bool, limit: float) -> str | None:
    """Runs one item; what went wrong, or None. Its rows are in the file either way."""
    if item == "tests":
        what = ["tests/kernels/test_select.py"] if dry else ["tests/kernels", "-n", "8"]
        command = [sys.executable, "-m", "pytest", *what, "-q", "-p", "no:cacheprovider", "-m", "not slow"]
    else:
        command = [sys.executable, "-m", "benchmarks.gpu.items", item, str(path), *(["--dry-run"] if dry else [])]
    environment = os.environ | {"PYTHONPATH": os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")])}
    try:
        done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=limit)
    except subprocess.TimeoutExpired:
        return f"stopped after {limit:.0f} s"
    if item == "tests":
        counts = {word: int(n) for n, word in re.findall(r"(\d+) (passed|failed|skipped|errors?)", done.stdout)}
        failed = re.findall(r"^FAILED (\S+)", done.stdout, re.MULTILINE)
        row = {"item": item, "name": "tests/kernels", "variant": "", "size": {}, "counts": counts, "failed": failed}
        with path.open("a") as file:
            file.write(json.dumps(row) + "\n")
    if done.returncode:
        return f"exit {done.returncode}: {(done.stderr or done.stdout).strip()[-800:]}"
    return None


def _add_shares(rows: list[dict]) -> dict[str, float]:
    """Adds each row's share of the machine's ceilings; returns those, in bytes and operations a second."""
    ceilings = {}
    for row in rows:
        if "seconds" in row and row["name"] in ("copy", "matmul"):
            amount = "bytes" if row["name"] == "copy" else "flops"
            ceilings[row["name"]] = row[amount] / row["seconds"]
    for row in rows:
        for amount, ceiling in (("bytes", "copy"), ("flops", "matmul")):
            if amount in row and ceiling in ceilings:
                row[f"of_{ceiling}"] = row[amount] / row["seconds"] / ceilings[ceiling]
    return ceilings


def machine() -> dict:
    if not torch.cuda.is_available():
        return {"device": platform.processor() or "cpu", "cores": os.cpu_count()}
    properties = torch.cuda.get_device_properties(0)
    return {
        "device": properties.name,
        "memory_bytes": properties.total_memory,
        "multiprocessors": properties.multi_processor_count,
        "capability": f"{properties.major}.{properties.minor}",
        "cuda": torch.version.cuda,
        "cores": os.cpu_count(),
    }


def version(package: str) -> str | None:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None


def slug(name: str) -> str:
    return re.sub(r"[^a-z0-9]+", "-", name.lower()).strip("-")


def table(report: dict) -> str:
    """A line a row: what ran, how long it took, which share of a ceiling that is, or what went wrong."""
    lines = []
    for row in report["rows"]:
        what = f"{row['name']:32} {row['variant']:40} {row['size'].get('N') or row['size'].get('tokens') or '':>6}"
        if "error" in row:
            lines.append(f"{what} ERROR {row['error'].splitlines()[-1][:80] if row['error'] else ''}")
        elif "seconds" in row:
            share = row.get("of_copy", row.get("of_matmul"))
            lines.append(f"{what} {1000 * row['seconds']:10.3f} ms" + (f" {share:6.1%}" if share else ""))
        else:
            lines.append(f"{what} {row.get('counts') or row.get('seconds_composed') or row.get('config')}")
    for line in report["targets"]:
        got = "not measured" if line["got"] is None else f"{line['got']:.2f}"
        verdict = {True: "met", False: "MISSED", None: ""}[line["met"]]
        lines.append(f"{line['target']:60} {line['wanted'] or '':>5} {got:>12} {verdict}")
    return "\n".join(lines)


if __name__ == "__main__":
    raise SystemExit(main())
