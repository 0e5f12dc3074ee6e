"""Many runs on several ranks in one launch: importing the libraries takes longer than a run of a tiny model.

As a module it is run by a launcher, on every rank: it trains the configurations of a JSON file one after another, in
one process group. `on_ranks` is the other side, for tests.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Mapping, Sequence
from contextlib import nullcontext
from pathlib import Path
from typing import Any
from unittest import mock

import torch

from benchmarks.rank_runs import forget

ROOT = Path(__file__).resolve().parents[1]
ENVIRONMENT = {
    **os.environ,
    "PYTHONPATH": f"{ROOT}{os.pathsep}{ROOT / 'kernels'}",
    "PYTHONUNBUFFERED": "1",
    "OMP_NUM_THREADS": "1",
    "DS_ACCELERATOR": "cpu",
    "PATH": f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}",
}
TORCHRUN = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2", "-m"]
DEEPSPEED = ["deepspeed", "--num_accelerators", "2", "--module"]


def on_ranks(cases: Mapping[str, Mapping[str, Any]], folder: Path, launcher: Sequence[str] = TORCHRUN) -> None:
    """Train these configurations on two ranks; what fails is told by the test that misses its results.

    Args:
        cases: by name, ``{"config": nested dictionary, "break": name in fastalign.training.trainer, or absent}``. What
            is named there does nothing during that run, which may fail.
        folder: for the list of cases, and what the ranks print.
    """
    (folder / "cases.json").write_text(json.dumps(list(cases.values())), encoding="utf-8")
    with (folder / "log").open("w") as log:
        command = [*launcher, "tests.rank_cases", str(folder / "cases.json")]
        subprocess.run(command, stdout=log, stderr=subprocess.STDOUT, env=ENVIRONMENT, cwd=ROOT, timeout=600)


def tail(folder: Path) -> str:
    """The end of what the ranks printed."""
    return (folder / "log").read_text(errors="replace")[-3000:]


def main() -> None:
    from fastalign.config import config_from_dict
    from fastalign.training import trainer
    from fastalign.training.run import train

    torch.set_num_threads(1)
    for case in json.loads(Path(sys.argv[-1]).read_text(encoding="utf-8")):
        broken = case.get("break")
        try:
            with mock.patch.object(trainer, broken, lambda model: torch.zeros(())) if broken else nullcontext():
                train(config_from_dict(case["config"]))
        except RuntimeError:
            if not broken:
                raise
        forget()


if __name__ == "__main__":
    main()
