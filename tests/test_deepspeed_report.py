"""docs/deepspeed-stale-gradients/: its script shows what its README says of the DeepSpeed that is installed."""

from __future__ import annotations

import re
import subprocess
import sys

import pytest

from tests.launches import free_port
from tests.rank_cases import ENVIRONMENT, ROOT

REPORT = ROOT / "docs" / "deepspeed-stale-gradients"
TORCHRUN = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2"]


def deepspeed_launcher() -> list[str]:
    """On a free port: its default is the same for every launch on a machine."""
    return ["deepspeed", "--num_accelerators", "2", "--master_port", str(free_port())]


def verdicts(table: str) -> dict[str, list[str]]:
    """Of every configuration what the cells say of it, without their numbers."""
    rows = [re.split(r"  +", line) for line in table.splitlines() if line.startswith("zero")]
    return {name: [re.sub(r"^[\d.]+ ", "", cell) for cell in cells] for name, *cells in rows}


def told() -> dict[str, dict[str, list[str]]]:
    """What the README says, by the options of the script."""
    text = (REPORT / "README.md").read_text(encoding="utf-8")
    as_it_is, in_part = [verdicts(table) for table in re.findall(r"^```text\n(.*?)^```", text, flags=re.M | re.S)]
    mended = {name: ["right"] * 3 for name in as_it_is}
    return {"": as_it_is, "--mend": mended, "--mend set_local_grad": in_part}


@pytest.mark.slow
@pytest.mark.parametrize("options", ["", "--mend", "--mend set_local_grad"])
def test_what_the_report_says_is_so(options: str) -> None:
    """Where DeepSpeed is mended, the script is right without options: then report and remedies can go."""
    launcher = TORCHRUN if options else deepspeed_launcher()
    command = [*launcher, str(REPORT / "reproduce.py"), *options.split()]
    done = subprocess.run(command, capture_output=True, text=True, env=ENVIRONMENT, timeout=600)
    found = verdicts(done.stdout)
    assert found, done.stderr[-3000:]
    if not options and found == told()["--mend"]:
        pytest.fail(f"DeepSpeed is mended: docs/{REPORT.name} can go, and what fastalign/training does against it")
    assert found == told()[options]
    assert done.returncode == (0 if options == "--mend" else 1)
