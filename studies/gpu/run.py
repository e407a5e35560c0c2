"""Everything that is measured on a GPU, in one go: `python -m studies.gpu.run [--output DIR] [--minutes 9]`.

It runs the kernel tests on the GPU, then the items of items.py, each in a process of its own (a new one where that
dies) and within what is left of the time. One JSON a machine, written anew after each item, has device, versions, this
machine's ceilings, what was aimed at (targets.py), one row a measurement, and an error row for whatever failed or did
not fit. `--items` runs some alone, into a file of their own. `--resume` takes the report that is there and measures
what failed in it, did not fit or is new, of `--items` alone where some are named. `--dry-run` does it all at toy sizes
on any machine, to show that it runs.

It needs torch, triton, numpy, pytest with xdist, hypothesis, and the wheels that wheelhouse.sh gathers; no network.
"""

import argparse
import collections
import contextlib
import datetime
import importlib.metadata
import json
import math
import os
import platform
import re
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

import torch

import vidaccel
from studies.gpu.measure import append_row, read_rows
from studies.gpu.targets import targets

ROOT = Path(__file__).parents[2]
# Seconds that an item may take at most on a GPU, those first that matter most.
LIMITS = {
    "fp8": 140,
    "decode": 130,
    "predictor": 170,
    "model": 300,
    "attention": 40,
    "tests": 90,
    "distillation": 120,
    "offload": 100,
    "ops": 140,
    "blocks": 150,
    "training": 100,
}
PACKAGES = ("torch", "triton", "diffusers", "torchao", "jvp-flash-attention")


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--output", type=Path, default=ROOT / "studies" / "results" / "gpu")
    parser.add_argument("--minutes", type=float, default=9.0)
    parser.add_argument("--dry-run", action="store_true", help="toy sizes, on a CPU if there is no GPU")
    parser.add_argument("--resume", action="store_true", help="measure what the report that is there lacks")
    parser.add_argument("--items", nargs="+", choices=LIMITS, default=list(LIMITS))
    options = parser.parse_args()
    some = options.items != list(LIMITS) and not options.resume
    if not torch.cuda.is_available() and not options.dry_run:
        print("error: no CUDA device\nhint: --dry-run runs everything at toy sizes on a CPU", file=sys.stderr)
        return 2
    options.output.mkdir(parents=True, exist_ok=True)
    # Some of the items are a report of their own, or go into the one that is there: none may take the place of a whole.
    words = ["dry-run"] * options.dry_run + [slug(machine()["device"])] + (options.items if some else [])
    target = options.output / f"{'-'.join(words)}.json"
    known = json.loads(target.read_text())["rows"] if options.resume and target.exists() else []
    for report in reports(options.items, options.dry_run, time.monotonic() + 60 * options.minutes, known):
        partial = target.with_suffix(".part")
        partial.write_text(json.dumps(report, indent=1, allow_nan=False) + "\n")
        partial.replace(target)
    print(table(report))
    print(target)
    return 0


def reports(items: list[str], dry: bool, deadline: float, known: list[dict]) -> Iterator[dict]:
    """The report as it stands after each item, so that whatever ends this process costs one of them at most.

    Of the rows that are `known`, those without an error are not measured again.
    """
    started = datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds")
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "rows.jsonl"
        for row in known:
            if "error" not in row and row["item"] != "tests":
                append_row(path, row)
        for item in items:
            error = _until_done(item, path, dry, min(deadline, time.monotonic() + (math.inf if dry else LIMITS[item])))
            if error:
                append_row(path, {"item": item, "name": item, "variant": "", "size": {}, "error": error})
            yield _report(read_rows(path), dry, started)


def _report(rows: list[dict], dry: bool, started: str) -> dict:
    """Everything known so far; rows in the order in which they were measured."""
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


def _until_done(item: str, path: Path, dry: bool, deadline: float) -> str | None:
    """Runs one item, again while it dies of something new; what went wrong at last, or None."""
    error, begun = None, len(read_rows(path))
    while True:
        left = deadline - time.monotonic()
        if left <= 5:
            return error or "skipped: the time was used up"
        print(f"{item}: at most {left:.0f} s", file=sys.stderr, flush=True)
        error = _run(item, path, dry, left)
        before, begun = begun, len(read_rows(path))
        if error is None or item == "tests" or begun == before:
            return error


def _run(item: str, path: Path, dry: bool, limit: float) -> str | None:
    """Runs one item in a process; what went wrong, or None. Its rows are in the file either way."""
    if item == "tests":
        few = ["tests/kernels/test_select.py", "--noconftest", "-k", "not the_ops_are_there"]  # which starts a process
        what = few if dry else ["tests/kernels", "-n", "12"]
        command = [sys.executable, "-m", "pytest", *what, "-v", "-p", "no:cacheprovider", "-m", "not slow"]
    else:
        command = [sys.executable, "-m", "studies.gpu.items", item, str(path), *(["--dry-run"] if dry else [])]
    environment = os.environ | {"PYTHONPATH": os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")])}
    with tempfile.TemporaryFile("w+") as log:
        process = subprocess.Popen(
            command, cwd=ROOT, env=environment, stdout=log, stderr=subprocess.STDOUT, start_new_session=True
        )
        try:
            failed = process.wait(limit)
            problem = f"exit {failed}" if failed else None
        except subprocess.TimeoutExpired:
            problem = f"stopped after {limit:.0f} s"
        finally:
            # What it started, as tests and compilers do, would go on and hold the device.
            with contextlib.suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)
            process.wait()
        log.seek(0)
        output = log.read()
    if item == "tests":
        append_row(path, {"item": item, "name": "tests/kernels", "variant": "", "size": {}} | _test_results(output))
    return problem and f"{problem}: {output.strip()[-800:]}"


def _test_results(output: str) -> dict:
    """Counts and names out of what pytest printed, also if it was stopped on the way."""
    # Lines as tests end: "[gw3] [ 40%] PASSED tests/..." of several processes, "tests/... PASSED [ 40%]" of one.
    word = "(PASSED|FAILED|ERROR|SKIPPED)"
    ended = re.findall(rf"^\[gw\d+\] \[ *\d+%\] {word} (tests/.+?) *$", output, re.MULTILINE)
    ended += [(w, test) for test, w in re.findall(rf"^(tests/\S+::.+?) {word}", output, re.MULTILINE)]
    counts = collections.Counter(word.lower() for word, _ in ended)
    return {"counts": dict(counts), "failed": sorted({test for word, test in ended if word in ("FAILED", "ERROR")})}


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
