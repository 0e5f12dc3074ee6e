"""What every benchmark here shares: device, where numbers come from, fair timing, peak memory, the CSV.

What only a GPU has (events, a flushed L2, CUDA graphs, counted launches) is in one small function each, so that a
measure that a machine does not offer costs its own cell of the table and nothing else.
"""

from __future__ import annotations

import csv
import datetime
import functools
import gc
import importlib.metadata
import itertools
import os
import platform
import re
import subprocess
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch.profiler import ProfilerActivity, profile

os.environ.setdefault("KINETO_LOG_LEVEL", "99")  # the profiler else tells stderr whenever it starts and stops
HERE = Path(__file__).resolve().parent
DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
ON_GPU = DEVICE.type == "cuda"
if not ON_GPU:
    os.environ.setdefault("DS_ACCELERATOR", "cpu")  # DeepSpeed guesses otherwise, and says so where JSON is expected
ROUNDS = 5  # so many there are, however slow
WARM_UP = 0.1  # seconds a step runs before its first time counts
Step = Callable[[], Any]
_GIT = ("git", "-C", str(HERE), "describe", "--always", "--dirty", "--exclude=*", "--abbrev=12")


def device_name() -> str:
    """Of the GPU or the processor, never of the host."""
    if ON_GPU:
        return torch.cuda.get_device_name(DEVICE)
    cpuinfo = Path("/proc/cpuinfo")
    found = re.search(r"model name\s*: (.+)", cpuinfo.read_text(encoding="utf-8")) if cpuinfo.exists() else None
    return found[1] if found else platform.machine()


def output_of(*command: str) -> str:
    """What a command prints; empty where there is no such command or it fails."""
    try:
        result = subprocess.run(command, capture_output=True, text=True, timeout=20)
    except (OSError, subprocess.TimeoutExpired):
        return ""
    return result.stdout.strip() if result.returncode == 0 else ""


def version(package: str) -> str:
    """Of an installed package, without importing it; empty where it is not installed."""
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return ""


def driver() -> str:
    """Of the GPU; empty without one, or where nothing on the machine says."""
    if not ON_GPU:
        return ""
    if said := output_of("nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"):
        return said.splitlines()[0]
    loaded = Path("/proc/driver/nvidia/version")
    found = re.search(r"\s(\d+\.[\d.]+)\s", loaded.read_text(encoding="utf-8")) if loaded.exists() else None
    return found[1] if found else ""


def provenance() -> dict[str, Any]:
    """The columns that say where a number comes from; `commit` is empty outside a git checkout."""
    return {
        "date": datetime.datetime.now(datetime.timezone.utc).strftime("%Y-%m-%dT%H:%M:%SZ"),
        "commit": output_of(*_GIT),
        "device": device_name(),
        "driver": driver(),
        "threads": torch.get_num_threads(),
        "torch": torch.__version__,
        "triton": version("triton"),
        "transformers": version("transformers"),
    }


def interleaved_ms(steps: Mapping[str, Step], reset: Step, rounds: int, seconds: float) -> dict[str, list[float]]:
    """Milliseconds of every step in every round; after `seconds` no further round begins, but ROUNDS there are.

    A round runs every step once, each with `reset` untimed after it, and begins with another one than the last
    round, so that a drift of the machine hits all alike. Compare within rounds.
    """
    wait: Step = torch.cuda.synchronize if ON_GPU else lambda: None
    order, end = list(steps), time.perf_counter() + seconds
    times: dict[str, list[float]] = {name: [] for name in order}
    for done in range(rounds):
        if done >= ROUNDS and time.perf_counter() > end:
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


@functools.cache
def l2_flush() -> Step:
    """Drives everything out of the L2 of the GPU, and leaves nothing there that has still to be written back.

    A buffer of twice the L2 is zeroed, then read: the zeros would else go to memory at the cost of the next step.
    """
    size = getattr(torch.cuda.get_device_properties(DEVICE), "L2_cache_size", 0) or 64 << 20
    buffer = torch.empty(2 * size // 4, device=DEVICE)

    def flush() -> None:
        buffer.zero_()
        buffer.sum()

    return flush


def event_ms(steps: Mapping[str, Step], rounds: int, seconds: float) -> dict[str, list[float]]:
    """As `interleaved_ms`, by the clock of the GPU: CUDA events around each step, the L2 flushed before it.

    While the flush runs, the processor can run ahead by as much; a step whose launches take it longer is still bound
    by them, as it is in training. `graph_ms` is free of that.
    """
    flush = l2_flush()
    for step in steps.values():
        warm, begun = 0, time.perf_counter()
        while warm < 2 or time.perf_counter() - begun < WARM_UP:
            step()
            torch.cuda.synchronize()
            warm += 1
    order, end = list(steps), time.perf_counter() + seconds
    events: dict[str, list[tuple[torch.cuda.Event, torch.cuda.Event]]] = {name: [] for name in order}
    for done in range(rounds):
        if done >= ROUNDS and time.perf_counter() > end:
            break
        for name in order:
            start, stop = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
            flush()
            start.record()
            steps[name]()
            stop.record()
            events[name].append((start, stop))
        torch.cuda.synchronize()
        order = order[1:] + order[:1]
    return {name: [start.elapsed_time(stop) for start, stop in pairs] for name, pairs in events.items()}


def times_ms(steps: Mapping[str, Step], rounds: int, seconds: float) -> dict[str, list[float]]:
    """Milliseconds of every step in every round, by the best clock of the device; warmed up."""
    if ON_GPU:
        return event_ms(steps, rounds, seconds)
    for step in steps.values():
        step()
    return interleaved_ms(steps, lambda: None, rounds, seconds)


def graph_ms(step: Step, rounds: int, seconds: float) -> list[float]:
    """Milliseconds of a replay of the step as a CUDA graph: what is left when launches cost the processor nothing.

    Raises whatever PyTorch raises where the step cannot be captured, for example because it reads a value back.
    """
    beside = torch.cuda.Stream()
    beside.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(beside):  # what is made at first use must not be made during the capture
        for _ in range(3):
            step()
    torch.cuda.current_stream().wait_stream(beside)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        step()
    return event_ms({"graph": graph.replay}, rounds, seconds)["graph"]


def launches(step: Step) -> int:
    """What a step puts on the GPU, as PyTorch's profiler sees it: kernels, and also copies and fills."""
    for _ in range(2):  # the first profile of a process can miss its beginning
        with profile(activities=[ProfilerActivity.CPU, ProfilerActivity.CUDA]) as recorded:
            step()
            torch.cuda.synchronize()
    count = sum(on_gpu(event) for event in recorded.events() or ())
    if not count:
        raise RuntimeError("the profiler saw no kernel")
    return count


def on_gpu(event: Any) -> bool:
    """Whether an event of the profiler is work of the GPU; a range with a name is shown there, too, but is none."""
    return event.device_type.name == "CUDA" and not getattr(event, "is_user_annotation", False)


def machine_rates(quick: bool = False) -> dict[str, float]:
    """The most that this device reaches, now, in a copy (bytes read and written) and a square GEMM of random numbers.

    The roofs of every benchmark, as columns: `copy_gb_s`, `gemm_bf16_tflop_s`, and `gemm_fp32_tflop_s` without TF32.
    The copied buffer is several times the last cache; the GEMM is 8192 wide on a GPU, 2048 on the CPU.
    """
    torch.set_float32_matmul_precision("highest")
    size, width = (1 << 30, 8192) if ON_GPU else (1 << 28, 2048)
    rounds, seconds = 50, 1.0
    if quick:
        size, width, rounds, seconds = 1 << 22, 256, 5, 0.0
    source, target = torch.zeros((2, size), dtype=torch.uint8, device=DEVICE).unbind()
    rates = {"copy_gb_s": 2 * size / 1e6 / best_ms(functools.partial(target.copy_, source), rounds, seconds)}
    del source, target
    for name, dtype in ("bf16", torch.bfloat16), ("fp32", torch.float32):
        left, right = (torch.randn(width, width, device=DEVICE).to(dtype) for _ in range(2))
        ms = best_ms(functools.partial(torch.matmul, left, right), rounds, seconds)
        rates[f"gemm_{name}_tflop_s"] = 2 * width**3 / 1e9 / ms
    return {name: round(rate, 3) for name, rate in rates.items()}


def best_ms(step: Step, rounds: int, seconds: float) -> float:
    return min(times_ms({"": step}, rounds, seconds)[""])


def peak_bytes(step: Step, reset: Step) -> int:
    """Peak of the bytes in tensors during one step, above those before it, as PyTorch's allocators count them.

    On the CPU through the profiler: the same in every run, unlike the resident set of a process, which depends on
    what malloc keeps. (With a malloc told to keep nothing, the two agreed within 4%.)
    """
    reset()
    gc.collect()  # what was dropped before must not be freed during the step
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


def take_gradients(weights: Mapping[str, torch.nn.Parameter]) -> dict[str, torch.Tensor]:
    """The gradients that there are, by name; the weights have none afterwards."""
    found = {name: weight.grad for name, weight in weights.items() if weight.grad is not None}
    for weight in weights.values():
        weight.grad = None
    return found


def folder(root: Path = HERE / "results") -> Path:
    """Of the results of this device: `root`/cpu, or the name of the GPU."""
    return root / (re.sub(r"[^a-z0-9]+", "-", device_name().lower()).strip("-") if ON_GPU else "cpu")


def append_rows(name: str, rows: Sequence[Mapping[str, Any]], root: Path) -> Path:
    """Append rows to `name`.csv in the folder of this device.

    A column that the file does not have yet is empty in the rows that are there.
    """
    path, columns = folder(root) / f"{name}.csv", [*rows[0]]
    path.parent.mkdir(parents=True, exist_ok=True)
    before, there = [], []
    if path.exists():
        with path.open(newline="", encoding="utf-8") as file:
            reader = csv.DictReader(file)
            before, there = list(reader), list(reader.fieldnames or [])
    if gone := [column for column in there if column not in columns]:
        raise SystemExit(f"{path} has columns that this version does not write ({', '.join(gone)}): move it away")
    if there == columns:
        with path.open("a", newline="", encoding="utf-8") as file:
            csv.DictWriter(file, columns).writerows(rows)
        return path
    new = path.with_suffix(".new")
    with new.open("w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, columns, restval="")
        writer.writeheader()
        writer.writerows([*before, *rows])
    new.replace(path)
    return path
