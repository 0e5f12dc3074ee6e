"""The ahead-of-time table: every kernel is in it, and what it is to refuse it refuses."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from fastalign_kernels._dispatch import HAS_TRITON

pytestmark = pytest.mark.skipif(not HAS_TRITON, reason="Triton is not installed")

COMMAND = ("-m", "fastalign_kernels.compile")
KERNELS = Path(__file__).parent.parent / "kernels"

# Kernels with one fault each, and one with none: `product` needs 128 KiB of shared memory, which sm_80 has.
TOYS = """
import torch, triton, triton.language as tl

@triton.jit
def copied(x, SIZE: tl.constexpr):
    i = tl.arange(0, SIZE)
    values = tl.load(x + i)
    tl.store(x + i, values * tl.sum(values, 0))

@triton.jit
def product(x, y, z, K, PRECISION: tl.constexpr, BLOCK: tl.constexpr, BLOCK_K: tl.constexpr):
    i = tl.arange(0, BLOCK)
    total = tl.zeros([BLOCK, BLOCK], tl.float32)
    for start in range(0, K, BLOCK_K):
        k = start + tl.arange(0, BLOCK_K)
        a = tl.load(x + i[:, None] * K + k[None, :])
        b = tl.load(y + k[:, None] * BLOCK + i[None, :])
        total = tl.dot(a, b, total, input_precision=PRECISION)
    tl.store(z + i[:, None] * BLOCK + i[None, :], total)

@triton.jit
def broken(x):
    tl.store(x, nothing_of_that_name)

def empty(*shape, dtype=torch.float32):
    return torch.empty(shape, dtype=dtype, device="meta")

def fine():
    copied[(1,)](empty(1024), SIZE=1024)

def spills():
    copied[(1,)](empty(16384), SIZE=16384, num_warps=1)

def shared(dtype=torch.float16, block=128, block_k=64, precision="tf32"):
    x, y, z = empty(block, 1024, dtype=dtype), empty(1024, block, dtype=dtype), empty(block, block)
    product[(1,)](x, y, z, 1024, PRECISION=precision, BLOCK=block, BLOCK_K=block_k, num_warps=8, num_stages=5)

def scalar():
    shared(torch.float32, 32, 32, "ieee")

def wrong():
    broken[(1,)](empty(1))
"""
JUDGE = """
import json, toys
from fastalign_kernels.compile import measure, record
launches = record((toys.fine, toys.spills, toys.shared, toys.scalar, toys.wrong), (80, 86))
crash = launches[0]._replace(module="dies")
rows = measure([crash, *launches], jobs=2)
print(json.dumps([[r.kernel, r.arch, r.configuration.get("PRECISION"), r.configuration["num_warps"], r.problems,
                   r.dots, r.matrix, r.code, r.threads] for r in rows]))
"""
COUNT = """
import ast, importlib, json, pkgutil
import fastalign_kernels
from fastalign_kernels.compile import SHARED_KIB, SWEEPS, record
from triton.runtime.jit import JITFunction

kernels = {}
for module in pkgutil.walk_packages(fastalign_kernels.__path__, "fastalign_kernels."):
    for value in vars(importlib.import_module(module.name)).values():
        if isinstance(value, JITFunction):
            kernels[f"{value.module}.{value.__name__}"] = value
todo = [f"{launch.module}.{launch.name}" for launch in record(SWEEPS, [90])]
launched, reached = set(todo), set()
while todo:
    name = todo.pop()
    if name not in reached:
        reached.add(name)
        for node in ast.walk(kernels[name].parse()):
            called = isinstance(node, ast.Name) and kernels[name].fn.__globals__.get(node.id)
            if isinstance(called, JITFunction):
                todo.append(f"{called.module}.{called.__name__}")
print(json.dumps([sorted(kernels), sorted(launched), sorted(reached)]))
"""


def run(*arguments: str, folder: Path | None = None, **variables: str) -> subprocess.CompletedProcess[str]:
    """Python in a process of its own: in this one Triton interprets."""
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"} | variables
    paths = [os.environ.get("PYTHONPATH", ""), str(KERNELS), str(folder or "")]
    environment["PYTHONPATH"] = os.pathsep.join(path for path in paths if path)
    return subprocess.run([sys.executable, *arguments], env=environment, capture_output=True, text=True, check=False)


def answer(code: str, folder: Path | None = None) -> list:
    done = run("-c", code, folder=folder)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


def test_every_kernel_is_in_the_table() -> None:
    kernels, launched, reached = answer(COUNT)
    assert len(kernels) >= 3 and launched
    assert set(kernels) == set(reached), "kernels without a row: see SWEEPS in _launches.py"


def test_what_is_refused(tmp_path: Path) -> None:
    (tmp_path / "toys.py").write_text(TOYS)
    (tmp_path / "dies.py").write_text("import os\nos.abort()\n")
    rows = {(kernel, arch, precision, warps): rest for kernel, arch, precision, warps, *rest in answer(JUDGE, tmp_path)}
    problems = {key: "; ".join(rest[0]) for key, rest in rows.items()}
    assert problems["dies.broken", 80, None, "4"] == "the compiler crashed"
    for arch in (80, 86):
        assert problems["toys.copied", arch, None, "4"] == ""
        assert "spills: " in problems["toys.copied", arch, None, "1"]
        assert "do not use matrix instructions" in problems["toys.product", arch, "ieee", "8"]
        assert problems["toys.broken", arch, None, "4"].startswith("CompilationError: NameError")
    assert problems["toys.product", 80, "tf32", "8"] == ""
    assert "shared memory" in problems["toys.product", 86, "tf32", "8"]
    _, dots, matrix, code, threads = rows["toys.product", 80, "tf32", "8"]
    assert dots == 1 and matrix["mma.sync"] > 0 and code > 1000 and threads == 256


def test_judge_on_what_no_small_kernel_shows() -> None:
    from fastalign_kernels.compile import Row, judge

    assert judge(Row("k", {}, 90, registers=128, threads=512, shared=227 * 1024)) == []
    assert "do not fit" in judge(Row("k", {}, 90, registers=129, threads=512))[0]
    assert "tensor memory" in judge(Row("k", {}, 100, registers=32, threads=128, tensor_memory=1024))[0]
    assert (
        "matrix" in judge(Row("k", {}, 90, registers=32, threads=128, dots=2, scalar_dots=1, matrix={"mma.sync": 8}))[0]
    )


def test_table_of_one_architecture() -> None:
    done = run(*COMMAND, "--arch", "90", "--kernel", "masked_mean_pool", "--json")
    assert done.returncode == 0, done.stderr
    rows = json.loads(done.stdout)
    assert {row["kernel"].rpartition(".")[2] for row in rows} >= {"_pool", "_finish", "_spread"}
    assert all(row["arch"] == 90 and 0 < row["registers"] <= 255 and row["code"] > 0 for row in rows)
    assert len({json.dumps([row["kernel"], row["configuration"]]) for row in rows}) == len(rows)
    for dtype in ("fp32", "bf16", "fp16"):
        assert any(row["configuration"].get("hidden") == dtype for row in rows)
    assert done.stderr.splitlines()[-1].endswith("spills 0: ok")


def test_table_as_text_and_what_is_kept(tmp_path: Path) -> None:
    done = run(*COMMAND, "--arch", "80", "120", "--kernel", "masked_mean_pool._finish", "--keep", str(tmp_path))
    assert done.returncode == 0 and not done.stderr, done.stderr
    lines = [line for line in done.stdout.splitlines() if " sm_80 " in line or " sm_120 " in line]
    assert lines and f"{len(lines)} rows, 1 kernels, " in done.stdout.splitlines()[-1]
    for suffix in ("ttgir", "ptx", "sass", "cubin"):
        assert len(list(tmp_path.glob(f"*.{suffix}"))) == len(lines)


def test_one_line_where_nothing_can_be_compiled() -> None:
    without = "import sys; sys.modules['triton'] = None; from fastalign_kernels.compile import main; sys.exit(main([]))"
    for done, words in (
        (run(*COMMAND, TRITON_INTERPRET="1"), "TRITON_INTERPRET"),
        (run(*COMMAND, "--kernel", "no_such_kernel", "--arch", "80"), "'no_such_kernel'"),
        (run("-c", without), "not installed"),
    ):
        assert done.returncode == 2 and not done.stdout
        assert len(done.stderr.splitlines()) == 1 and words in done.stderr, done.stderr


@pytest.mark.slow
def test_the_whole_table() -> None:
    done = run(*COMMAND)
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr
    assert done.stdout.splitlines()[-1].endswith("spills 0: ok")
