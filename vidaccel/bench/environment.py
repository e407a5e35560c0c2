"""What a benchmark ran on: enough to tell whether two results may be compared."""

import importlib.metadata
import platform
import re
import subprocess
from pathlib import Path
from typing import Any

import torch

PACKAGES = ("vidaccel", "torch", "diffusers", "transformers", "triton", "torchao")


def environment(device: torch.device | str) -> dict[str, Any]:
    """Device, processor, threads, versions and commit, as results.schema.json describes them."""
    device = torch.device(device)
    return {
        "device": torch.cuda.get_device_name(device) if device.type == "cuda" else device.type,
        "cpu": cpu_model(),
        "threads": torch.get_num_threads(),
        "platform": platform.platform(),
        "python": platform.python_version(),
        "cuda": torch.version.cuda,
        "versions": {name: _version(name) for name in PACKAGES},
        "commit": commit(),
    }


def cpu_model(cpuinfo: Path = Path("/proc/cpuinfo")) -> str:
    """The processor's name; where Linux does not tell it, what Python knows of it."""
    if cpuinfo.is_file() and (name := re.search(r"^model name\s*:\s*(.+)$", cpuinfo.read_text(), re.MULTILINE)):
        return name[1].strip()
    return platform.processor() or platform.machine()


def commit(checkout: Path = Path(__file__).parents[2]) -> str | None:
    """Commit of the checkout that the package runs from, "-dirty" behind it if files are changed; None outside one."""
    if not (checkout / ".git").exists():
        return None
    try:
        asked = ["git", "-C", str(checkout), "describe", "--always", "--dirty", "--abbrev=40", "--exclude=*"]
        return subprocess.run(asked, capture_output=True, text=True, check=True).stdout.strip()
    except (OSError, subprocess.CalledProcessError):  # no git on this machine, or a checkout that is not ours to read
        return None


def _version(package: str) -> str | None:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None
