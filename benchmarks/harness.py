"""What every benchmark here shares: device, where numbers come from, fair timing, peak memory, the CSV."""

from __future__ import annotations

import contextlib
import csv
import datetime
import itertools
import platform
import re
import subprocess
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
import transformers
from torch.profiler import ProfilerActivity, profile

HERE = Path(__file__).resolve().parent
DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
ON_GPU = DEVICE.type == "cuda"
Step = Callable[[], Any]
_GIT = ("git", "-C", str(HERE), "describe", "--always", "--dirty", "--exclude=*", "--abbrev=12")


def device_name() -> str:
    """Of the GPU or the processor, never of the host."""
    if ON_GPU:
        return torch.cuda.get_device_name(DEVICE)
    cpuinfo = Path("/proc/cpuinfo")
    found = re.search(r"model name\s*: (.+)", cpuinfo.read_text(encoding="utf-8")) if cpuinfo.exists() else None
    return found[1] if found else platform.machine()


def provenance() -> dict[str, Any]:
    """The columns that say where a number comes from; `commit` is empty outside a git checkout."""
    commit = ""
    with contextlib.suppress(OSError):
        commit = subprocess.run(_GIT, capture_output=True, text=True).stdout.strip()
    return {
        "date": datetime.datetime.now(datetime.timezone.utc).strftime("%Y-%m-%dT%H:%M:%SZ"),
        "commit": commit,
        "device": device_name(),
        "threads": torch.get_num_threads(),
        "torch": torch.__version__,
        "transformers": transformers.__version__,
    }


def interleaved_ms(steps: Mapping[str, Step], reset: Step, rounds: int, seconds: float) -> dict[str, list[float]]:
    """Milliseconds of every step in every round; after `seconds` no further round begins, but 5 there are.

    A round runs every step once, each with `reset` untimed after it, and begins with another one than the last
    round, so that a drift of the machine hits all alike. Compare within rounds.
    """
    wait: Step = torch.cuda.synchronize if ON_GPU else lambda: None
    order, end = list(steps), time.perf_counter() + seconds
    times: dict[str, list[float]] = {name: [] for name in order}
    for done in range(rounds):
        if done >= 5 and time.perf_counter() > end:
            break
        for name in order:
            wait()
            start = time.perf_counter()
            steps[name]()
            wait()
            times[name].append((time.perf_counter() - start) * 1e3)
            reset()
        order = order[1:] + order[:1]
    return times


def peak_bytes(step: Step, reset: Step) -> int:
    """Peak of the bytes in tensors during one step, above those before it, as PyTorch's allocators count them.

    On the CPU through the profiler: the same in every run, unlike the resident set of a process, which depends on
    what malloc keeps. (With a malloc told to keep nothing, the two agreed within 4%.)
    """
    reset()
    if ON_GPU:
        torch.cuda.reset_peak_memory_stats(DEVICE)
        before = torch.cuda.memory_allocated(DEVICE)
        step()
        return torch.cuda.max_memory_allocated(DEVICE) - before
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as recorded:
        step()
    events: Any = recorded.profiler
    changes = (event.nbytes() for event in events.kineto_results.events() if event.name() == "[memory]")
    return max(itertools.accumulate(changes, initial=0))


def append_rows(name: str, rows: Sequence[Mapping[str, Any]], root: Path) -> Path:
    """Append rows to `root`/<device>/`name`.csv, where the device is `cpu` or the name of the GPU."""
    device = re.sub(r"[^a-z0-9]+", "-", device_name().lower()).strip("-") if ON_GPU else "cpu"
    path = root / device / f"{name}.csv"
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("a+", newline="", encoding="utf-8") as file:
        file.seek(0)
        header = next(csv.reader(file), None)
        if header not in (None, [*rows[0]]):
            raise SystemExit(f"{path} has other columns than this version writes: move it away")
        csv.writer(file).writerows([] if header else [[*rows[0]]])
        csv.writer(file).writerows(row.values() for row in rows)
    return path
