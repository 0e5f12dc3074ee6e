"""What can be told of a machine without any library: Python, memory, disk, environment, and what its driver says."""

from __future__ import annotations

import contextlib
import os
import platform
import shutil
import sys
from pathlib import Path
from typing import Any

from fastalign.doctor.children import run

OFFLINE = ("HF_HUB_OFFLINE", "TRANSFORMERS_OFFLINE", "HF_DATASETS_OFFLINE")
YES = ("1", "ON", "YES", "TRUE")
# A container's own limit: version 2, version 1.
LIMITS = ("/sys/fs/cgroup/memory.max", "/sys/fs/cgroup/memory/memory.limit_in_bytes")


def this_machine() -> dict[str, Any]:
    """Python, platform, processors, memory, the disk of this folder, and which offline variables are set."""
    return {
        "python": platform.python_version(),
        "executable": sys.executable,
        "platform": platform.platform(),
        "architecture": platform.machine(),
        "processors": len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count(),
        "memory": _memory(),
        "disk": usage(Path(".")),
        "offline": [name for name in OFFLINE if os.environ.get(name, "").upper() in YES],
    }


def usage(folder: Path) -> dict[str, Any]:
    """A folder, made or not: the free bytes of its disk, None where that cannot be told, and whether it is writable."""
    there = next((path for path in (folder, *folder.parents) if path.exists()), folder)
    free = None
    with contextlib.suppress(OSError):
        free = shutil.disk_usage(there).free
    return {"folder": str(folder), "free": free, "writable": os.access(there, os.W_OK)}


def nvidia_gpus(limit: float = 15) -> list[dict[str, str]]:
    """Name, driver and compute capability of each GPU that the driver knows, whatever PyTorch sees of it."""
    program = shutil.which("nvidia-smi")
    if program is None:
        return []
    keys = ("name", "driver", "capability")
    try:
        ended = run([program, "--query-gpu=name,driver_version,compute_cap", "--format=csv,noheader"], limit)
    except OSError:
        return []
    if ended.code != 0 or ended.late:
        return []
    rows = [[cell.strip() for cell in line.split(",")] for line in ended.out.splitlines()]
    return [dict(zip(keys, row, strict=True)) for row in rows if len(row) == len(keys)]


def _memory() -> dict[str, int | None]:
    """Bytes that there are and that are free, the limit of a container included; None where the system does not say."""
    found: dict[str, int | None] = {"total": None, "free": None}
    with contextlib.suppress(OSError, ValueError, IndexError):
        lines = dict(line.split(":", 1) for line in Path("/proc/meminfo").read_text(encoding="ascii").splitlines())
        for key, name in (("total", "MemTotal"), ("free", "MemAvailable")):
            if name in lines:
                found[key] = int(lines[name].split()[0]) * 1024
    if found["total"] is None:
        with contextlib.suppress(OSError, ValueError, AttributeError):
            found["total"] = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    for path in LIMITS:
        with contextlib.suppress(OSError, ValueError):  # `max`: none
            most = int(Path(path).read_text(encoding="ascii"))
            found = {key: most if value is None else min(value, most) for key, value in found.items()}
    return found
