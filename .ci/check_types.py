"""Type errors of pyright in vidaccel/, file by file: .ci/type_errors.json says how many there may be, and only shrinks.

A file with more errors than that fails, with all of its errors. A file with fewer has its number lowered.
"""

import json
import subprocess
import sys
from collections import Counter
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
ALLOWED = Path(__file__).with_name("type_errors.json")


def found() -> list[tuple[str, str]]:
    """(file, line and message) of each error."""
    settings = ["--project", str(ROOT / "pyproject.toml")]  # or it takes those of a folder above
    command = [sys.executable, "-m", "pyright", "--outputjson", "--pythonpath", sys.executable, *settings]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    try:
        report = json.loads(done.stdout)
    except json.JSONDecodeError:
        raise SystemExit(f"pyright did not run: {done.stderr or done.stdout}") from None
    return [
        (
            Path(each["file"]).relative_to(ROOT).as_posix(),
            f"{each['range']['start']['line'] + 1}: {each['message'].splitlines()[0]} ({each.get('rule', 'syntax')})",
        )
        for each in report["generalDiagnostics"]
        if each["severity"] == "error" and Path(each["file"]).is_relative_to(ROOT)  # it reads imports elsewhere as well
    ]


def main() -> int:
    errors = found()
    counts, allowed = Counter(file for file, _ in errors), json.loads(ALLOWED.read_text())
    worse = {file for file, count in counts.items() if count > allowed.get(file, 0)}
    for file, error in errors:
        if file in worse:
            print(f"{file}:{error}")
    for file in sorted(worse):
        print(f"error: {file} has {counts[file]} type errors, where it may have {allowed.get(file, 0)}")
    fewer = {file: min(counts[file], count) for file, count in allowed.items() if counts[file]}
    if fewer != allowed:
        ALLOWED.write_text(json.dumps(fewer, indent=4, sort_keys=True) + "\n")
        print(f"{sum(allowed.values()) - sum(fewer.values())} type errors fewer: {ALLOWED.name} says so now, commit it")
    print(f"{sum(counts.values())} type errors, {sum(fewer.values())} allowed")
    return bool(worse)


if __name__ == "__main__":
    sys.exit(main())
