"""Running a benchmark in a process of its own, shared by the tests of benchmarks."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

BENCHMARKS = Path(__file__).resolve().parents[1] / "benchmarks"


def run(*command: str, timeout: int = 120, **environment: str) -> subprocess.CompletedProcess[str]:
    """Python with the arguments `command`, to which benchmarks, package and kernels of this tree can be imported."""
    root = BENCHMARKS.parent
    paths = [str(BENCHMARKS), str(root), str(root / "kernels"), os.environ.get("PYTHONPATH", "")]
    ours = {"PYTHONPATH": os.pathsep.join(filter(None, paths)), "OMP_NUM_THREADS": "1"}
    variables = {**os.environ, **environment, **ours}
    return subprocess.run([sys.executable, *command], capture_output=True, text=True, env=variables, timeout=timeout)
