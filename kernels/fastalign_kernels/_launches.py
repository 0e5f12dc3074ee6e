"""Every way the kernels can be launched, found by launching them, on a machine without a GPU.

The host functions run on `meta` tensors over a sweep of shapes, dtypes and flags while Triton believes in a GPU of the
wanted architecture. The hook that Triton calls before it compiles notes what was asked for (types, constants, which
pointers and strides are multiples of 16, launch options) and calls it off, so nothing is compiled and nothing runs.
No list of configurations is kept: one that the code can no longer pick is no longer found.
"""

from __future__ import annotations

import contextlib
import importlib
import json
import warnings
from collections.abc import Callable, Iterable, Iterator
from itertools import product
from typing import Any, NamedTuple
from unittest import mock

import torch

PACKAGE = "fastalign_kernels"
FLOATS = (torch.float32, torch.bfloat16, torch.float16)
# Width of a row and where it lies: on 16 bytes; next to one another off them; in a view into wider rows, off them; and
# the width that Triton makes a constant of. Other mixtures of the same compile to the same code but for an instruction.
LAYOUTS = (*product(FLOATS, ((4096, 0), (4095, 0), (4096, 1))), (torch.float32, (1, 0)))


class Launch(NamedTuple):
    """One request to compile. Triton's `JITFunction.preload` takes it as it is, in any process."""

    module: str
    name: str
    arch: int
    request: str  # JSON: signature, constants, attributes, options

    @property
    def kernel(self) -> str:
        return f"{self.module.removeprefix(PACKAGE + '.')}.{self.name}"


def record(sweeps: Iterable[Callable[[], None]], archs: Iterable[int]) -> list[Launch]:
    """The distinct launches of the sweeps on each architecture, in order of kernels and configurations."""
    from triton import knobs

    found: dict[Launch, str] = {}

    def note(*, fn: Any, compile: Any, **_: Any) -> bool:
        launch = Launch(fn.module, fn.name, arch, compile["specialization_data"])
        if launch not in found:
            found[launch] = str(configuration(launch))
        return True  # Triton takes this as "compiled elsewhere, not to be launched"

    sweeps = tuple(sweeps)
    # Tensors of no device know no autocast, not even that it is off.
    autocast = mock.patch.object(torch, "autocast", lambda *_, **__: contextlib.nullcontext())
    with knobs.runtime.scope(), quiet(), autocast:
        knobs.runtime.jit_cache_hook = note
        for arch in archs:
            with chip(arch):
                for sweep in sweeps:
                    sweep()
    places = {text: place for place, text in enumerate(dict.fromkeys(found.values()))}
    return sorted(found, key=lambda launch: (launch.kernel, places[found[launch]], launch.arch))


def configuration(launch: Launch) -> dict[str, str]:
    """What Triton compiles for, parameter by parameter, and the launch options."""
    request = json.loads(launch.request)
    constants = {key[0]: value for key, value in zip(request["constant_keys"], request["constant_vals"], strict=True)}
    multiples = {key[0] for key, value in zip(request["attrs_keys"], request["attrs_vals"], strict=True) if value}
    parts = {}
    for index, (name, kind) in enumerate(request["signature"].items()):
        kind = str(kind)
        if index in constants:
            parts[name] = str(constants[index])
        elif kind.startswith("*"):
            parts[name] = kind[1:] + ("" if index in multiples else " unaligned")
        else:
            parts[name] = kind + (" %16" if index in multiples else "")
    options = {"num_warps": None, "num_stages": None, "num_ctas": 1, "maxnreg": None}
    return parts | {name: str(request["options"][name]) for name, usual in options.items()
                    if request["options"][name] != usual}  # fmt: skip


class _Chip:
    """What Triton asks a driver before it compiles."""

    def __init__(self, arch: int) -> None:
        self.arch = arch

    def get_current_target(self) -> Any:
        from triton.backends.compiler import GPUTarget

        return GPUTarget("cuda", self.arch, 32)

    def get_current_device(self) -> int:
        return self.arch  # a device per architecture, because Triton keeps the target of each device

    def get_current_stream(self, device: int) -> int:
        return 0


@contextlib.contextmanager
def chip(arch: int) -> Iterator[None]:
    """Triton believes in a GPU of this compute capability."""
    from triton.runtime import driver

    # Not set_active: without a GPU that cannot be undone.
    with mock.patch.object(driver, "_active", _Chip(arch)):
        yield


@contextlib.contextmanager
def quiet() -> Iterator[None]:
    """Triton 3.9 says in every process that a default of its will change."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="TRITON_DEFAULT_FP_FUSION")
        yield


def _empty(*shape: int, dtype: torch.dtype, cut: int = 0) -> torch.Tensor:
    """cut 1: a view into something larger, that does not begin on 16 bytes."""
    return torch.empty([size + cut for size in shape], dtype=dtype, device="meta")[(slice(cut, None),) * len(shape)]


def _masked_mean_pool() -> None:
    for dtype, (width, cut) in LAYOUTS:
        for masked in (None, torch.bool, torch.int64):
            mask = None if masked is None else _empty(4, 1000, dtype=masked, cut=cut)
            _pool_and_spread(_empty(4, 1000, width, dtype=dtype, cut=cut), mask, None)
        _pool_and_spread(_empty(1000, width, dtype=dtype, cut=cut), None, _empty(5, dtype=torch.int64, cut=cut))
    for dtype, masked in product(FLOATS, (torch.bool, torch.int64)):  # rows that are more than 2^31 elements apart
        _pool_and_spread(_empty(2, 2**20, 4096, dtype=dtype), _empty(2, 2**20, dtype=masked), None)
        _pool_and_spread(_empty(2**20, 2, 4096, dtype=dtype), _empty(2**20, 2, dtype=masked), None)


def _pool_and_spread(hidden: torch.Tensor, mask: torch.Tensor | None, starts: torch.Tensor | None) -> None:
    module = importlib.import_module(f"{PACKAGE}.masked_mean_pool")
    scale = _empty(1, dtype=torch.float32)
    for multiprocessors, normalize in ((1, False), (1000, False), (1000, True)):  # 1000: rows are split
        with mock.patch.object(module, "multiprocessors", return_value=multiprocessors):
            pooled, counts, firsts, norms = module.pool(hidden, mask, starts, False, normalize)
            module.spread(pooled, pooled, counts, firsts, norms, mask, starts, hidden.shape, hidden.dtype, scale)


def _info_nce() -> None:
    module = importlib.import_module(f"{PACKAGE}.info_nce")
    sizes = [("fused", 20, 2**power) for power in range(5, module.FUSED.bit_length())]
    sizes += product(("dense", "panels"), (2048,), (2048, 2049))
    for (dtype, (width, cut)), (regime, rows, targets) in product(LAYOUTS, sizes):
        source, target = (_empty(size, width, dtype=dtype, cut=cut) for size in (rows, targets))
        for fast, temperature in ((False, 1.0),) if regime == "fused" else product((False, True), (1.0, 0.01)):
            with module.forced_regime(regime), mock.patch.object(module, "PANEL_BYTES", 2**20):
                module.loss_and_gradients(
                    source, target, temperature, symmetric=rows == targets, target_offset=0, source_ids=None,
                    target_ids=None, fast=fast, needs=(True, True, True),
                )  # fmt: skip
    for dtype in (torch.bfloat16, torch.float16):  # two dtypes: read as fp32, each gradient in its own
        source, target = _empty(64, 4096, dtype=dtype), _empty(64, 4096, dtype=torch.float32)
        module.loss_and_gradients(
            source, target, 1.0, symmetric=False, target_offset=0, source_ids=None, target_ids=None, fast=False,
            needs=(True, True, True),
        )  # fmt: skip


def _pooled_info_nce() -> None:
    module = importlib.import_module(f"{PACKAGE}.pooled_info_nce")
    for width, pairs in product((4096, 4095), (5, 200)):  # the second half of an odd number of odd rows is off 16 bytes
        module.loss_and_gradients(
            _empty(2 * pairs, 100, width, dtype=torch.bfloat16), None, None, 1.0, skip_first=False, symmetric=True,
            reverse=False, source_ids=None, target_ids=None, fast=False, needs=(True, True, True),
        )  # fmt: skip


# One function per family of kernels, which calls the host functions so that each branch launches at least once. The
# tests fail if a jitted kernel is left out.
SWEEPS: tuple[Callable[[], None], ...] = (_masked_mean_pool, _info_nce, _pooled_info_nce)
