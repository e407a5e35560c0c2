"""The program in two processes, as its users start it: torchrun, `-m vidaccel` and its words.

As `-m tests.train.torchrun` it is `-m vidaccel` that then looks whether the group's threads ended with the group: one
that is left may want the interpreter while that ends, which aborts a training that is done; once in many runs, and so
in none that a test could wait for.
"""

import os
import runpy
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parents[2]


def under_torchrun(*words: str) -> subprocess.CompletedProcess:
    """Runs `vidaccel` with `words`; fails as one of the processes does."""
    launch = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2", "-m", __name__]
    path = os.pathsep.join(filter(None, (str(ROOT), os.environ.get("PYTHONPATH"))))
    done = subprocess.run([*launch, *words], env=os.environ | {"PYTHONPATH": path}, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return done


def gloo_threads() -> list[str]:
    """Names of the threads of this process that are gloo's, where the system tells."""
    names = [path.read_text().strip() for path in Path("/proc/self/task").glob("*/comm")]
    return [name for name in names if "gloo" in name]


if __name__ == "__main__":
    sys.argv[0] = "vidaccel"
    try:
        runpy.run_module("vidaccel", run_name="__main__", alter_sys=True)
    except SystemExit as ended:
        if ended.code:
            raise
    assert not gloo_threads()
