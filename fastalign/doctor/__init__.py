"""What this machine can run, what will be used, and why; also where libraries are missing or broken.

Every library is tried in a child process of its own (`trials`, run by `children`), so that this one answers whatever
they do, and imports none of them itself. Nothing is fetched or sent.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from typing import Any

from fastalign.config.checks import installed_version
from fastalign.doctor.children import Answer, ask_all
from fastalign.doctor.machine import nvidia_gpus, this_machine
from fastalign.doctor.parts import PARTS, oldest, row, untried
from fastalign.doctor.verdict import conclusion, device_rows, disk_rows, problems
from fastalign.doctor.words import table

__all__ = ["LIMIT", "doctor", "table"]

LIMIT = 60.0
SLOWEST_FIRST = ("training", "peft", "bitsandbytes", "transformers")


def doctor(parts: Sequence[str] | None = None, limit: float = LIMIT) -> dict[str, Any]:
    """Try every part of a run on this machine.

    Args:
        parts: only these of `PARTS`; torch is always among them.
        limit: seconds that each part may take; one that takes longer is broken.

    Returns:
        rows: of each part `part`, `version`, `state` (``ok``, ``missing``, ``broken``, ``not needed here``,
        ``not tried``), `use`, `why` and `mend` (a command, or None). versions: by package. machine: Python, memory
        and disk. device: what training runs on, None where it cannot. gpus: what torch sees of each. kernels:
        `backend`, `why`, and `problem` (None, or how their trial failed). conclusion: lines. problems: of what no
        run is possible without; empty if all is well.
    """
    names = [name for name in PARTS if parts is None or name in (*parts, "torch")]
    here, driver, floors = this_machine(), nvidia_gpus(), oldest()
    answers = _answers(names, limit)
    rows = [row(name, answers[name], answers, floors) for name in names]
    devices = device_rows(answers, driver)
    rows[1:1] = devices
    rows += disk_rows(here, answers)
    kernels = answers.get("kernels", Answer("not tried"))
    backend = {key: kernels.facts.get(key) for key in ("backend", "why", "problem")}
    if kernels.state != "ok":
        backend["problem"] = kernels.why or kernels.state
    training = answers.get("training", Answer("not tried"))
    wrong = problems(rows)
    return {
        "machine": here,
        "versions": {"python": here["python"], "fastalign": installed_version(), **_versions(rows)},
        "device": training.facts.get("device"),
        "gpus": answers["torch"].facts.get("gpus", []),
        "kernels": backend,
        "rows": rows,
        "conclusion": conclusion(rows, answers, here, driver, floors, wrong),
        "problems": wrong,
    }


def _answers(names: Sequence[str], limit: float) -> dict[str, Answer]:
    """torch, and what does without it, first: if torch hangs, it is not waited for again and again."""
    if sys.stderr.isatty():
        print(f"trying {len(names)} parts, each in a process of its own ...", file=sys.stderr)
    answers = ask_all([name for name in names if not PARTS[name].needs_torch], limit)
    rest = [name for name in names if PARTS[name].needs_torch]
    if answers["torch"].state == "ok":
        rest.sort(key=lambda name: SLOWEST_FIRST.index(name) if name in SLOWEST_FIRST else len(SLOWEST_FIRST))
        return answers | ask_all(rest, limit)
    return answers | {name: untried(name) for name in rest}


def _versions(rows: Sequence[dict[str, Any]]) -> dict[str, str | None]:
    return {row["part"]: row["version"] for row in rows if row["part"] in PARTS and PARTS[row["part"]].package}
