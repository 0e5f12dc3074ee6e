"""Compile every kernel for every supported GPU on a machine that has none, and judge what came out.

    python -m fastalign_kernels.compile [--arch 80 90] [--kernel NAME] [--json] [--jobs N] [--keep DIR]

The configurations are not listed anywhere, they are recorded: the host functions run on `meta` tensors over a sweep
of shapes, dtypes and flags while Triton believes in a GPU of the wanted architecture, and the hook that Triton calls
before it compiles writes down what it was about to do: types, constants, which pointers and strides are multiples of
16, launch options. Each distinct request is then compiled in a pool of processes.

Exit status: 0 all is well; 1 a row spills registers, cannot be launched, has a product of matrices without matrix
instructions or does not compile; 2 nothing was compiled. Registers and spills are what `ptxas -v` reports of the very
call that makes the binary; matrix instructions are counted in the PTX that it was given.
"""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import importlib
import io
import itertools
import json
import os
import re
import struct
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from concurrent.futures.process import BrokenProcessPool
from multiprocessing import get_context
from pathlib import Path
from typing import Any

from fastalign_kernels._dispatch import HAS_TRITON, interpreting
from fastalign_kernels._launches import SWEEPS, Launch, chip, configuration, quiet, record

# Shared memory one block may ask for, in KiB (CUDA C++ Programming Guide, technical specifications per compute
# capability: the opt-in maximum).
SHARED_KIB = {80: 163, 86: 99, 89: 99, 90: 227, 100: 227, 120: 99}
REGISTERS = 65536  # of a multiprocessor, on all of them
TENSOR_MEMORY = 512  # columns, on 100
THREADS = 1024  # of a block

MATRIX = re.compile(r"\b(wgmma\.mma_async|tcgen05\.mma|mma\.sync)\.")


@dataclasses.dataclass
class Row:
    """What became of one launch. Sizes are in bytes, registers per thread; `error` is set where nothing was made."""

    kernel: str
    configuration: dict[str, str]
    arch: int
    registers: int = 0
    threads: int = 0
    shared: int = 0
    tensor_memory: int = 0  # columns
    stack: int = 0
    spill_stores: int = 0
    spill_loads: int = 0
    dots: int = 0
    scalar_dots: int = 0  # done by ordinary multiply-adds
    matrix: dict[str, int] = dataclasses.field(default_factory=dict)
    code: int = 0
    seconds: float = 0.0
    error: str | None = None
    problems: list[str] = dataclasses.field(default_factory=list)


def describe(
    archs: Sequence[int] = tuple(SHARED_KIB),
    kernel: str = "",
    jobs: int | None = None,
    keep: Path | None = None,
    progress: Callable[[int, int], None] = lambda done, total: None,
) -> list[dict[str, Any]]:
    """Compile and judge; one dictionary (the fields of `Row`) per kernel, configuration and architecture.

    Args:
        archs: compute capabilities, from those of `SHARED_KIB`.
        kernel: only kernels with this in their name (`masked_mean_pool._pool`); all if empty.
        jobs: processes; None: as many as there are cores.
        keep: folder for the PTX, TTGIR, SASS and cubin of every row.
        progress: called with the number of rows done and of all rows.
    """
    launches = [launch for launch in record(SWEEPS, archs) if kernel in launch.kernel]
    rows = measure(launches, jobs, keep, progress)
    return [dataclasses.asdict(row) for row in rows]


def measure(
    launches: Sequence[Launch],
    jobs: int | None = None,
    keep: Path | None = None,
    progress: Callable[[int, int], None] = lambda done, total: None,
) -> list[Row]:
    """Compile each launch in a pool of processes; the judged rows in the order of the launches."""
    rows: dict[int, Row] = {}
    jobs = min(jobs or os.cpu_count() or 1, max(1, len(launches)))
    context = get_context("fork")  # the children have imported everything, and use nothing that minds
    with tempfile.TemporaryDirectory() as cache:  # a cache of our own: every row is really compiled
        with ProcessPoolExecutor(jobs, context) as pool, contextlib.suppress(BrokenProcessPool):
            waiting = {pool.submit(_build, launch, cache, keep, i): i for i, launch in enumerate(launches)}
            for future in as_completed(waiting):
                rows[waiting[future]] = future.result()
                progress(len(rows), len(launches))
        # The compiler can crash its process and with it the pool: what is left goes each into a process of its own.
        for i, launch in enumerate(launches):
            if i not in rows:
                with ProcessPoolExecutor(1, context) as pool:
                    try:
                        rows[i] = pool.submit(_build, launch, cache, keep, i).result()
                    except BrokenProcessPool:
                        rows[i] = Row(launch.kernel, configuration(launch), launch.arch, error="the compiler crashed")
                progress(len(rows), len(launches))
    for row in rows.values():
        row.problems = judge(row)
    return [rows[i] for i in range(len(launches))]


def judge(row: Row) -> list[str]:
    """What is wrong with a row, in words; empty if nothing is."""
    if row.error:
        return [row.error]
    problems = []
    limit = SHARED_KIB[row.arch] * 1024
    if row.spill_stores or row.spill_loads:
        problems.append(f"spills: {row.spill_stores} bytes stored, {row.spill_loads} loaded")
    if row.shared > limit:
        problems.append(f"shared memory {row.shared} bytes, sm_{row.arch} has {limit}")
    if row.tensor_memory > TENSOR_MEMORY:
        problems.append(f"tensor memory {row.tensor_memory} columns, there are {TENSOR_MEMORY}")
    # A warp gets its registers in steps of 8 per thread.
    if row.threads > THREADS or -(-row.registers // 8) * 8 * row.threads > REGISTERS:
        problems.append(f"{row.threads} threads of {row.registers} registers do not fit a multiprocessor")
    if row.dots and (row.scalar_dots or not row.matrix):
        problems.append(f"{row.scalar_dots or row.dots} of its dots do not use matrix instructions")
    return problems


def _build(launch: Launch, cache: str, keep: Path | None, number: int) -> Row:
    """Compile one launch in this process, and read off what was made."""
    from triton import knobs

    row = Row(launch.kernel, configuration(launch), launch.arch)
    began, log = time.perf_counter(), io.StringIO()
    with knobs.cache.scope(), knobs.nvidia.scope(), quiet(), chip(launch.arch), contextlib.redirect_stdout(log):
        knobs.cache.dir = cache
        knobs.nvidia.dump_ptxas_log = True
        try:
            made = getattr(importlib.import_module(launch.module), launch.name).preload(launch.request)
            _read(row, made, log.getvalue())
        except Exception as error:  # whatever the compiler throws belongs in the row
            row.error = _one_line(error)
        else:
            if keep is not None:
                stem = keep / f"{launch.kernel}-sm{launch.arch}-{number:04}"
                for suffix in ("ttgir", "ptx"):
                    Path(f"{stem}.{suffix}").write_text(made.asm[suffix], encoding="utf-8")
                Path(f"{stem}.cubin").write_bytes(made.asm["cubin"])
                disassemble = [knobs.nvidia.nvdisasm.path, "-c", f"{stem}.cubin"]
                sass = subprocess.run(disassemble, check=True, capture_output=True)  # it has warnings for each
                Path(f"{stem}.sass").write_bytes(sass.stdout)
    row.seconds = round(time.perf_counter() - began, 3)
    return row


def _read(row: Row, made: Any, log: str) -> None:
    registers = re.findall(r"Used (\d+) registers", log)
    spills = re.findall(r"(\d+) bytes stack frame, (\d+) bytes spill stores, (\d+) bytes spill loads", log)
    if not registers or not spills:
        raise RuntimeError("ptxas did not say what the kernel uses")
    # Several: functions that were not inlined.
    row.registers = max(map(int, registers))
    row.stack, row.spill_stores, row.spill_loads = (sum(map(int, column)) for column in zip(*spills, strict=True))
    row.threads = 32 * made.metadata.num_warps
    row.shared = made.metadata.shared + max(map(int, re.findall(r"(\d+) bytes smem", log)), default=0)
    row.tensor_memory = made.metadata.tmem_size or 0
    row.dots = len(re.findall(r"\btt\.dot(?:_scaled)?\b", made.asm["ttir"]))
    row.scalar_dots = _scalar_dots(made.asm["ttgir"])
    for name in MATRIX.findall(made.asm["ptx"]):
        row.matrix[name] = row.matrix.get(name, 0) + 1
    row.code = _code_bytes(made.asm["cubin"])


def _scalar_dots(ttgir: str) -> int:
    """Dots whose result is laid out in blocks: those are computed one multiply-add at a time."""
    layouts = re.findall(r"\btt\.dot\b.*-> tensor<[^>]*?, (#\w+)>", ttgir)
    blocked = set(re.findall(r"^(#\w+) = #ttg\.blocked\b", ttgir, re.MULTILINE))
    return sum(layout in blocked for layout in layouts)


def _code_bytes(cubin: bytes) -> int:
    """Size of the machine code alone: the executable sections of the ELF file."""
    (offset,), (size, number) = struct.unpack_from("<Q", cubin, 0x28), struct.unpack_from("<HH", cubin, 0x3A)
    headers = (struct.unpack_from("<IIQQQQ", cubin, offset + i * size) for i in range(number))
    return sum(length for _, _, flags, _, _, length in headers if flags & 4)  # SHF_EXECINSTR


def _one_line(error: BaseException) -> str:
    """The reason, which the compiler gives last, and where it is; the source stands between."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    cause = f"{_one_line(error.__cause__)} " if error.__cause__ else ""
    where = f" ({lines[0].rstrip(':')})" if len(lines) > 1 and lines[0].startswith("at ") else ""
    return cause or f"{type(error).__name__}: {lines[-1] if lines else ''}{where}"


def table(rows: Sequence[dict[str, Any]]) -> str:
    """A block per kernel: what all its rows share once, then a line per configuration and architecture."""
    lines = []
    for kernel, group in itertools.groupby(rows, key=lambda row: row["kernel"]):
        group = list(group)
        first = group[0]["configuration"]
        varies = [name for name in first if any(row["configuration"][name] != first[name] for row in group)]
        shared = ", ".join(f"{name} {value}" for name, value in first.items() if name not in varies)
        lines += ["", f"{kernel}: {shared}"]
        texts = [", ".join(f"{name} {row['configuration'][name]}" for name in varies) or "-" for row in group]
        width = max(len(text) for text in (*texts, "configuration"))
        lines.append(f"  {'configuration':{width}}  arch    regs  shared  spilled  code    matrix")
        for row, text in zip(group, texts, strict=True):
            spilled = f"{row['spill_stores']}/{row['spill_loads']}"
            matrix = ", ".join(f"{name} {count}" for name, count in row["matrix"].items()) or "-"
            verdict = f"   WRONG: {'; '.join(row['problems'])}" if row["problems"] else ""
            lines.append(
                f"  {text:{width}}  sm_{row['arch']:<4} {row['registers']:4}  {row['shared']:6}  {spilled:>7}"
                f"  {row['code']:6}  {matrix}{verdict}"
            )
    return "\n".join(lines)


def summary(rows: Sequence[dict[str, Any]]) -> str:
    """One line: how many, the most of each thing that is scarce, and whether all is well."""
    wrong = sum(bool(row["problems"]) for row in rows)
    spilling = sum(bool(row["spill_stores"] or row["spill_loads"]) for row in rows)
    return (
        f"{len(rows)} rows, {len({row['kernel'] for row in rows})} kernels, "
        f"worst registers {max(row['registers'] for row in rows)}, worst shared {max(row['shared'] for row in rows)}, "
        f"spills {spilling}: {f'{wrong} rows are WRONG' if wrong else 'ok'}"
    )


def _progress(done: int, total: int) -> None:
    if sys.stderr.isatty():
        print(f"\r{done} of {total} compiled", end="\n" if done == total else "", file=sys.stderr, flush=True)


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        prog="python -m fastalign_kernels.compile",
        description="Compile every kernel for every supported GPU on a machine that has none, and judge what came out.",
    )
    known = ", ".join(map(str, SHARED_KIB))
    add = parser.add_argument
    add("--arch", type=int, nargs="+", choices=SHARED_KIB, metavar="CC", help=f"of {known}; default: all")
    add("--kernel", default="", metavar="NAME", help="only kernels with this in their name")
    add("--json", action="store_true", help="rows as JSON on stdout, the summary on stderr")
    add("--jobs", type=int, metavar="N", help="processes; default: one per core")
    add("--keep", type=Path, metavar="DIR", help="folder for the TTGIR, PTX, SASS and cubin of each row")
    options = parser.parse_args(arguments)
    obstacle = None
    if not HAS_TRITON:
        obstacle = "Triton is not installed, so there is nothing to compile"
    elif interpreting():
        obstacle = "TRITON_INTERPRET is set, and what is interpreted cannot be compiled; unset it"
    if obstacle:
        print(f"fastalign_kernels.compile: {obstacle}", file=sys.stderr)
        return 2
    import triton

    if options.keep is not None:
        options.keep.mkdir(parents=True, exist_ok=True)
    began = time.perf_counter()
    rows = describe(options.arch or tuple(SHARED_KIB), options.kernel, options.jobs, options.keep, _progress)
    if not rows:
        print(f"fastalign_kernels.compile: no kernel has {options.kernel!r} in its name", file=sys.stderr)
        return 2
    end = f"Triton {triton.__version__}, {time.perf_counter() - began:.0f} s: {summary(rows)}"
    if options.json:
        print(json.dumps(rows, indent=1))
        print(end, file=sys.stderr)
    else:
        print(table(rows), end, sep="\n\n")
    return int(any(row["problems"] for row in rows))


if __name__ == "__main__":
    sys.exit(main())
