"""What every benchmark here shares: device, where numbers come from, fair timing, peak memory, the CSV."""

from __future__ import annotations

import contextlib
import csv
import datetime
import platform
import re
import subprocess
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
import transformers

HERE = Path(__file__).resolve().parent
DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
ON_GPU = DEVICE.type == "cuda"
_GIT = ("git", "-C", str(HERE), "describe", "--always", "--dirty", "--exclude=*", "--abbrev=12")


def device_name() -> str:
    """Model name of the GPU or the processor."""
    if ON_GPU:
        return torch.cuda.get_device_name(DEVICE)
    with contextlib.suppress(OSError):
        if found := re.search(r"model name\s*: (.+)", Path("/proc/cpuinfo").read_text(encoding="utf-8")):
            return found[1]
    return platform.machine()


def provenance() -> dict[str, Any]:
    """The columns that say where a number comes from; `commit` is empty outside a git checkout."""
    commit = ""
    with contextlib.suppress(OSError, subprocess.SubprocessError):
        commit = subprocess.run(_GIT, capture_output=True, text=True, check=True, timeout=10).stdout.strip()
    return {
        "date": datetime.datetime.now(datetime.timezone.utc).strftime("%Y-%m-%dT%H:%M:%SZ"),
        "commit": commit,
        "device": device_name(),
        "threads": torch.get_num_threads(),
        "torch": torch.__version__,
        "transformers": transformers.__version__,
    }


Step = Callable[[], Any]


def interleaved_ms(steps: Mapping[str, Step], reset: Step, rounds: int, seconds: float) -> dict[str, list[float]]:
    """Milliseconds of every step in every round; after `seconds` no further round begins, but 3 there are.

    Each round runs every step once, `reset` untimed after it, and begins with another one, so that a drift of
    the machine hits all alike and none always follows the same other. Compare within rounds.
    """
    order, end = list(steps), time.perf_counter() + seconds
    times: dict[str, list[float]] = {name: [] for name in order}
    for done in range(rounds):
        if done >= 3 and time.perf_counter() > end:
            break
        for name in order:
            _wait()
            start = time.perf_counter()
            steps[name]()
            _wait()
            times[name].append((time.perf_counter() - start) * 1e3)
            reset()
        order = order[1:] + order[:1]
    return times


def _wait() -> None:
    if ON_GPU:
        torch.cuda.synchronize(DEVICE)


def peak_bytes(step: Step, reset: Step) -> int | None:
    """Peak memory of one step above what was in use before it; None on a CPU without Linux's /proc.

    On a GPU what the allocator gave out. On the CPU the high-water mark of the resident set: call it in a
    fresh process, because memory that an earlier step left on the heap would go unnoticed. (VmHWM, because
    ru_maxrss begins with what the parent process had.)
    """
    reset()
    if ON_GPU:
        torch.cuda.reset_peak_memory_stats(DEVICE)
        before = torch.cuda.memory_allocated(DEVICE)
        step()
        reset()
        return torch.cuda.max_memory_allocated(DEVICE) - before
    try:
        Path("/proc/self/clear_refs").write_text("5", encoding="ascii")  # forget the mark of what came before
        before = _resident("VmRSS")
        step()
        return _resident("VmHWM") - before
    except OSError:
        return None


def _resident(key: str) -> int:
    found = re.search(rf"{key}:\s*(\d+) kB", Path("/proc/self/status").read_text(encoding="utf-8"))
    return int(found[1]) * 1024 if found else 0


def append_rows(name: str, rows: Sequence[Mapping[str, Any]], root: Path) -> Path:
    """Append rows to `root`/<device>/`name`.csv; the device is `cpu` or the GPU's model, never the host."""
    device = re.sub(r"[^a-z0-9]+", "-", device_name().lower()).strip("-") if ON_GPU else "cpu"
    path = root / device / f"{name}.csv"
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("a+", newline="", encoding="utf-8") as file:
        file.seek(0)
        header = next(csv.reader(file), None)
        if header not in (None, [*rows[0]]):
            raise SystemExit(f"{path} has other columns than this version writes: move it away")
        writer = csv.DictWriter(file, [*rows[0]])
        if header is None:
            writer.writeheader()
        writer.writerows(rows)
    return path
