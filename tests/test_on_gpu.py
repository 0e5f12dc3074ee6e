"""The kernels on a GPU: 16-bit input, real sizes, launches, memory. The same lines run small in the interpreter.

`make gpu` runs them on the GPU, with TRITON_INTERPRET=0.
"""

from __future__ import annotations

import importlib
import shutil
from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import pytest
import torch
import torch.nn.functional as F

import fastalign_kernels as kernels
from fastalign_kernels._dispatch import interpreting

loss_module = importlib.import_module("fastalign_kernels.info_nce")

Tensors = tuple[torch.Tensor, ...]
FLOATS = [torch.float32, torch.float16, torch.bfloat16]


@pytest.fixture(params=["cpu", pytest.param("cuda", marks=pytest.mark.gpu)])
def device(request: pytest.FixtureRequest) -> Iterator[torch.device]:
    if request.param == "cuda" and (not torch.cuda.is_available() or interpreting()):
        pytest.skip("needs a CUDA device and TRITON_INTERPRET=0")
    if request.param == "cpu" and not interpreting():
        pytest.skip("needs TRITON_INTERPRET=1")
    yield torch.device(request.param)
    if request.param == "cuda":
        torch.cuda.empty_cache()


def states(device: torch.device, *shape: int, dtype=torch.float32, seed=0) -> torch.Tensor:
    """Noise with a few dimensions that dominate, as in the middle layers of a language model."""
    generator = torch.Generator(device).manual_seed(seed)
    noise = torch.randn(shape, generator=generator, device=device)
    noise[..., :2] = 20 * noise[..., :2] + 50
    return noise.to(dtype)


def pairs(device: torch.device, size: int, targets: int, width: int, offset: int = 0, dtype=torch.float32) -> Tensors:
    source, target = states(device, size, width), states(device, targets, width, seed=1)
    target[offset : offset + size] += 2 * source
    return source.to(dtype), target.to(dtype)


def result(function: Callable[..., torch.Tensor], *inputs: torch.Tensor) -> Tensors:
    """Value and gradients, for an upstream gradient that is not 1."""
    leaves = [x.detach().clone().requires_grad_() for x in inputs]
    value = function(*leaves)
    value.backward(torch.linspace(0.5, 1.5, value.numel(), device=value.device).reshape(value.shape).to(value.dtype))
    return value.detach(), *(x.grad for x in leaves if x.grad is not None)


def off(found: torch.Tensor, truth: torch.Tensor) -> float:
    return ((found.double() - truth).norm() / truth.norm()).item()


def check(found: Tensors, plain: Tensors, truth: Tensors, floor: float) -> None:
    """Twice what plain PyTorch errs in the value, three times in a gradient, but for a floor of a few roundings."""
    assert len(found) == len(plain) == len(truth)
    for place, (ours, theirs, true) in enumerate(zip(found, plain, truth, strict=True)):
        assert ours.dtype == theirs.dtype or place == 0
        allowed = max(floor, (3 if place else 2) * off(theirs, true))
        assert off(ours, true) <= allowed, f"{place}: {off(ours, true):.2e}, plain PyTorch {off(theirs, true):.2e}"


@pytest.mark.parametrize("dtype", FLOATS, ids=str)
@pytest.mark.parametrize("normalize", [False, True])
def test_pool(device, dtype, normalize):
    shapes = [(64, 128, 4096), (5, 4096, 1000), (2, 16384, 4096)] if device.type == "cuda" else [(5, 37, 100)]
    for rows, tokens, width in shapes:
        hidden = states(device, rows, tokens, width, dtype=dtype)
        lengths = torch.linspace(0, tokens, rows, device=device).long()
        mask = (torch.arange(tokens, device=device) < lengths.unsqueeze(1)).long()
        mask[-1, 1::3] = 0

        def plain(x: torch.Tensor, mask=mask) -> torch.Tensor:
            weights = mask.unsqueeze(2).to(torch.promote_types(x.dtype, torch.float32))
            mean = (x.to(weights.dtype) * weights).sum(1) / weights.sum(1).clamp(min=1)
            return F.normalize(mean, dim=1) if normalize else mean

        def ours(x: torch.Tensor, mask=mask) -> torch.Tensor:
            return kernels.masked_mean_pool(x, mask, normalize=normalize, backend="triton")

        found = result(ours, hidden)
        check(found, result(plain, hidden), result(plain, hidden.double()), floor=5e-7)
        assert (found[1][mask == 0] == 0).all()
        starts = F.pad(lengths.cumsum(0), (1, 0))
        flat = hidden[torch.arange(tokens, device=device) < lengths.unsqueeze(1)]
        for backend in ("cpu", device.type):  # where the row starts live
            both = [
                kernels.masked_mean_pool(flat, cu_seqlens=starts.to(backend), skip_first=True, backend=name)
                for name in ("triton", "torch")
            ]
            torch.testing.assert_close(*both, rtol=1e-5, atol=1e-5)


def plain_info_nce(
    source: torch.Tensor,
    target: torch.Tensor,
    *,
    temperature,
    symmetric,
    target_offset,
    source_ids,
    target_ids,
    round_to=None,
) -> torch.Tensor:
    unit = [F.normalize(x, dim=1).to(round_to or x.dtype) for x in (source, target)]
    logits = (unit[0] @ unit[1].T).to(source.dtype) / temperature
    own = torch.arange(len(source), device=source.device) + target_offset
    if source_ids is not None:
        others = own.unsqueeze(1) != torch.arange(len(target), device=source.device)
        logits = logits.masked_fill((source_ids.unsqueeze(1) == target_ids) & others, -torch.inf)
    loss = F.cross_entropy(logits, own)
    return (loss + F.cross_entropy(logits.T, own)) / 2 if symmetric else loss


@pytest.mark.parametrize("regime", ["fused", "dense", "panels"])
@pytest.mark.parametrize("precision", ["exact", "fast"])
@pytest.mark.parametrize("symmetric", [False, True])
def test_info_nce(device, regime, precision, symmetric, monkeypatch):
    big = device.type == "cuda"
    sizes = {"fused": [(1, 1, 96), (64, 64, 4096), (200, 256, 1000)], "dense": [(1000, 1300, 4096)]}
    if not big:
        sizes = {"fused": [(5, 9, 100)], "dense": [(40, 41, 96)]}
    monkeypatch.setattr(loss_module, "PANEL_BYTES", 2**20 if big else 41 * 8 * 16)
    for size, targets, width in sizes.get(regime, sizes["dense"]):
        targets, offset = (size, 0) if symmetric else (targets, (targets - size) // 2)
        ids = torch.arange(targets, device=device) // 2
        options: dict[str, Any] = {"target_offset": offset, "symmetric": symmetric}
        for temperature, source_ids, target_ids in ((0.1, None, None), (0.02, ids[offset : offset + size], ids)):
            options |= {"temperature": temperature, "source_ids": source_ids, "target_ids": target_ids}
            inputs = pairs(device, size, targets, width, offset)
            plain = partial(plain_info_nce, **options)
            rounded = partial(plain, round_to=torch.bfloat16) if precision == "fast" else plain
            ours = partial(kernels.info_nce, precision=precision, backend="triton", **options)
            with loss_module.forced_regime(regime):
                found, again = result(ours, *inputs), result(ours, *inputs)
            truth = result(plain, *(x.double() for x in inputs))
            assert all(torch.equal(a, b) for a, b in zip(found, again, strict=True)), "not the same bits"
            if size == 1:
                assert not any(part.any() for part in found)  # there is nothing to tell apart
                continue
            check(found, result(rounded, *inputs), truth, floor=3e-7 / temperature)


@pytest.mark.parametrize("dtype", FLOATS, ids=str)
def test_pooled_info_nce(device, dtype):
    size, tokens, width = (64, 64, 4096) if device.type == "cuda" else (5, 7, 100)
    hidden = states(device, 2 * size, tokens, width, dtype=dtype)
    hidden[size:] += hidden[:size]
    mask = torch.arange(tokens, device=device) < torch.linspace(1, tokens, 2 * size, device=device).unsqueeze(1)

    def run(x: torch.Tensor, backend: str) -> torch.Tensor:
        return kernels.pooled_info_nce(
            x, mask, temperature=0.1, skip_first=True, symmetric=True, reverse=True, detach="source", backend=backend
        )

    found, twin, truth = (
        result(lambda x, name=name: run(x, name), x)
        for x, name in ((hidden, "triton"), (hidden, "torch"), (hidden.double(), "torch"))
    )
    check(found, twin, truth, floor=3e-6)
    assert not found[1][:size].any()


def test_compiled(device):
    hidden = states(device, 8, 5, 64, dtype=torch.bfloat16)

    def run(x: torch.Tensor) -> torch.Tensor:
        return kernels.pooled_info_nce(x * 2, None, temperature=0.1, backend="triton") + kernels.info_nce(
            kernels.masked_mean_pool(x, backend="triton"), x[:, 0], temperature=0.1, precision="fast", backend="triton"
        )

    able = device.type == "cuda" or shutil.which("g++")
    compiled = torch.compile(run, fullgraph=True, backend="inductor" if able else "aot_eager")
    for ours, expected in zip(result(compiled, hidden), result(run, hidden), strict=True):
        torch.testing.assert_close(ours, expected, rtol=1e-2, atol=1e-3)


@pytest.mark.gpu
def test_five_launches():
    hidden = states(torch.device("cuda"), 128, 64, 4096, dtype=torch.bfloat16).requires_grad_()
    mask = torch.ones(128, 64, dtype=torch.long, device="cuda")

    def step() -> None:
        kernels.pooled_info_nce(hidden, mask, temperature=0.1, backend="triton").backward()
        hidden.grad = None

    step()
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as recorded:
        step()
        torch.cuda.synchronize()
    launched = [event.name for event in recorded.events() or () if event.device_type.name == "CUDA"]
    ours = [name for name in launched if name.startswith("_")]
    assert sorted(ours) == ["_gram", "_gradients", "_pool", "_spread", "_weights"]
    assert len(launched) <= 6, launched  # the sixth: the 1 that backward() starts from


@pytest.mark.gpu
def test_memory_of_a_large_batch():
    """At most 1 GB beyond inputs and gradients for 32768 pairs in both directions."""
    if torch.cuda.get_device_properties(0).total_memory < 12e9:
        pytest.skip("needs a GPU of 12 GB")
    few = [x.requires_grad_() for x in pairs(torch.device("cuda"), 1000, 1000, 4096, dtype=torch.bfloat16)]
    kernels.info_nce(*few, temperature=0.1, precision="fast", backend="triton").backward()  # library workspaces stay
    source, target = (x.requires_grad_() for x in pairs(torch.device("cuda"), 32768, 32768, 4096, dtype=torch.bfloat16))
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    kernels.info_nce(source, target, temperature=0.1, symmetric=True, precision="fast", backend="triton").backward()
    peak = torch.cuda.max_memory_allocated() - before
    gradients = 2 * source.numel() * source.element_size()
    assert peak - gradients <= 1e9, f"{(peak - gradients) / 1e9:.2f} GB"


@pytest.mark.gpu
def test_in_a_cuda_graph():
    hidden = states(torch.device("cuda"), 16, 9, 256, dtype=torch.bfloat16).requires_grad_()

    def step() -> tuple[torch.Tensor, torch.Tensor]:
        loss = kernels.pooled_info_nce(hidden, None, temperature=0.1, backend="triton")
        return loss.detach(), torch.autograd.grad(loss, hidden)[0]

    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        expected = step()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph, stream=stream):
        captured = step()
    graph.replay()
    torch.cuda.synchronize()
    torch.testing.assert_close(captured, expected, rtol=0, atol=0)
