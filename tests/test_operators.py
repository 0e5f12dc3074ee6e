"""The kernels as operators of torch, in Triton's interpreter: what is launched, registered, compiled, written."""

from __future__ import annotations

import importlib
from typing import Any

import pytest
import torch

import fastalign_kernels as kernels
from fastalign_kernels._dispatch import interpreting, use_triton, why_not_triton

pool_module = importlib.import_module("fastalign_kernels.masked_mean_pool")
loss_module = importlib.import_module("fastalign_kernels.info_nce")
pooled_module = importlib.import_module("fastalign_kernels.pooled_info_nce")
regimes = importlib.import_module("fastalign_kernels.regimes")
fused = importlib.import_module("fastalign_kernels.regimes.fused")
panels = importlib.import_module("fastalign_kernels.regimes.panels")

KERNELS = {
    pool_module: ["_pool", "_finish", "_spread"],
    fused: ["_gram", "_weights", "_gradients"],
    panels: ["_own", "_column_sums", "_panel"],
    regimes: ["_project"],
}
OPERATORS = torch.ops.fastalign

pytestmark = pytest.mark.skipif(not interpreting(), reason="on a GPU, tests/test_on_gpu.py does this")


@pytest.fixture
def launched(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Names of the kernels launched since, in order."""
    names: list[str] = []

    class Counted:
        def __init__(self, name: str, kernel: Any) -> None:
            self.name, self.kernel = name, kernel

        def __getitem__(self, grid: tuple[int, ...]) -> Any:
            names.append(self.name)
            return self.kernel[grid]

    for module, of_module in KERNELS.items():
        for name in of_module:
            monkeypatch.setattr(module, name, Counted(name, getattr(module, name)))
    return names


def states(*shape: int, dtype=torch.float32, seed=0) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)).to(dtype)


def some_mask(rows: int, tokens: int) -> torch.Tensor:
    return torch.rand(rows, tokens, generator=torch.Generator().manual_seed(1)) < 0.6


def pooled_loss(
    hidden: torch.Tensor, mask: torch.Tensor | None, backend: str = "triton", **options: Any
) -> torch.Tensor:
    return kernels.pooled_info_nce(hidden, mask, temperature=0.1, skip_first=True, backend=backend, **options)


def test_what_is_launched(launched, monkeypatch):
    hidden, mask = states(8, 5, 40).requires_grad_(), some_mask(8, 5)
    kernels.masked_mean_pool(hidden, mask, backend="triton").sum().backward()
    assert launched == ["_pool", "_spread"]

    launched.clear()
    source, target = states(4, 40).requires_grad_(), states(4, 40, seed=1)
    loss = kernels.info_nce(source, target, temperature=0.1, backend="triton")
    assert launched == ["_gram", "_weights", "_gradients", "_project"]
    loss.backward()
    assert len(launched) == 4, "the gradient is there since the forward"

    launched.clear()
    pooled_loss(hidden, mask).backward()
    assert launched == ["_pool", "_gram", "_weights", "_gradients", "_spread"]  # the whole objective: five

    launched.clear()
    with torch.no_grad():
        pooled_loss(hidden, mask)
        kernels.info_nce(source, target, temperature=0.1, backend="triton")
    assert launched == ["_pool", "_gram", "_weights", "_gram", "_weights"]

    launched.clear()
    monkeypatch.setattr(loss_module, "PANEL_BYTES", 4 * 8 * 2)  # two rows at a time
    with loss_module.forced_regime("panels"):
        kernels.info_nce(source, target, temperature=0.1, symmetric=True, backend="triton")
    assert launched == ["_own", *["_column_sums"] * 2, *["_panel", "_project"] * 2]

    launched.clear()
    for backend in ("torch", "auto"):  # on the CPU both are the twin
        pooled_loss(hidden, mask, backend)
        kernels.info_nce(source, target, temperature=0.1, backend=backend)
        kernels.masked_mean_pool(hidden, mask, backend=backend)
    assert launched == []


def test_the_backward_makes_nothing_but_the_gradient():
    """An output without a gradient would get one of zeros: a launch, and memory, for each."""
    hidden, source, target = (states(*shape).requires_grad_() for shape in ((8, 5, 40), (4, 40), (4, 40)))
    for value, leaves in (
        (pooled_loss(hidden, some_mask(8, 5)), [hidden]),
        (kernels.info_nce(source, target, temperature=0.1, backend="triton"), [source, target]),
        (kernels.masked_mean_pool(hidden, backend="triton"), [hidden]),
    ):
        upstream = torch.ones_like(value)
        with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as recorded:
            torch.autograd.grad(value, leaves, upstream)
        names = {event.name for event in recorded.events() or ()}
        assert len(names) > 2 and not names & {"aten::zeros", "aten::fill_", "aten::zero_", "aten::clone"}


@pytest.mark.parametrize("backend", ["torch", "triton"])
def test_a_second_derivative_is_refused(backend):
    hidden = states(8, 5, 40).requires_grad_()
    for loss in (
        pooled_loss(hidden, None, backend),
        kernels.info_nce(hidden[:4, 0], hidden[4:, 0], temperature=0.1, backend=backend),
        kernels.masked_mean_pool(hidden, normalize=True, backend=backend).sum(),
    ):
        (grad,) = torch.autograd.grad(loss.square(), hidden, create_graph=True)
        with pytest.raises(RuntimeError, match=r"autograd formula|not require grad|differentiat"):
            torch.autograd.grad(grad.sum(), hidden)


@pytest.mark.parametrize("backend", ["torch", "triton"])
def test_opcheck(backend):
    hidden, mask, starts = states(8, 5, 40), some_mask(8, 5), torch.tensor([0, 3, 3, 9])
    flat, ids = states(9, 40), torch.tensor([0, 1, 2, 1])
    tau, needs = torch.tensor(0.1), [True, True, True]

    def check(operator: Any, *arguments: Any) -> None:
        arguments = tuple(
            x.clone().requires_grad_() if torch.is_tensor(x) and x.is_floating_point() else x for x in arguments
        )
        torch.library.opcheck(operator, arguments)

    for normalize in (False, True):
        check(OPERATORS.masked_mean_pool.default, hidden, mask, None, True, normalize, backend)
        check(OPERATORS.masked_mean_pool.default, flat, None, starts, False, normalize, backend)
    check(OPERATORS.info_nce.default, hidden[:4, 0], hidden[4:, 0], tau, True, 0, ids, ids, False, needs, backend)
    check(OPERATORS.info_nce.default, hidden[:2, 0], hidden[:4, 1], tau, False, 1, None, None, True, needs, backend)
    half = hidden.bfloat16()  # two dtypes: each gradient has its own
    check(OPERATORS.info_nce.default, half[:4, 0], hidden[4:, 0], tau, False, 0, None, None, False, needs, backend)
    for regime in ("fused", "dense"):  # they leave different things for the backward
        with loss_module.forced_regime(regime):
            check(
                OPERATORS.pooled_info_nce.default,
                *(hidden, mask, None, tau, True, True, True, ids, ids, False, needs, backend),
            )


@pytest.mark.parametrize("backend", ["torch", "triton"])
def test_one_graph_under_torch_compile(backend):
    def both(hidden: torch.Tensor, mask: torch.Tensor, tau: torch.Tensor) -> torch.Tensor:
        pooled = kernels.masked_mean_pool(hidden, mask, normalize=True, backend=backend)
        loss = kernels.info_nce(pooled[:3], pooled, temperature=tau, target_offset=2, precision="fast", backend=backend)
        return loss + kernels.pooled_info_nce(hidden, mask, temperature=0.2, symmetric=True, backend=backend)

    results = []
    for function in (both, torch.compile(both, fullgraph=True, backend="aot_eager")):
        hidden, tau = states(8, 5, 40).requires_grad_(), torch.tensor(0.1, requires_grad=True)
        with torch.autocast("cpu", dtype=torch.bfloat16):
            loss = function(hidden, some_mask(8, 5), tau)
        loss.backward()
        results.append((loss.detach(), hidden.grad, tau.grad))
    torch.testing.assert_close(results[0], results[1], rtol=0, atol=0)


@pytest.mark.parametrize("regime", ["fused", "dense", "panels"])
@pytest.mark.parametrize("splits", [1, 3])
def test_every_number_is_written(regime, splits, monkeypatch):
    """Fresh memory full of NaN changes nothing."""

    def run() -> list[torch.Tensor]:
        hidden, tau = states(74, 9, 40).requires_grad_(), torch.tensor(0.1, requires_grad=True)
        with loss_module.forced_regime(regime):
            loss = pooled_loss(hidden, some_mask(74, 9), symmetric=True)
            source = states(37, 40).requires_grad_()
            loss = loss + kernels.info_nce(source, states(50, 40, seed=2), temperature=tau, backend="triton")
        flat = states(9, 40, seed=3).requires_grad_()
        pooled = kernels.masked_mean_pool(
            flat, cu_seqlens=torch.tensor([2, 3, 3, 8]), skip_first=True, normalize=True, backend="triton"
        )
        loss = loss + pooled.square()[0].sum() + pooled.sum()
        loss.backward()
        return [loss.detach(), *(x.grad for x in (hidden, tau, source, flat) if x.grad is not None)]

    monkeypatch.setattr(loss_module, "PANEL_BYTES", 50 * 8 * 16)
    monkeypatch.setattr(pool_module, "TOKENS_PER_SPLIT", 9 // splits)
    monkeypatch.setattr(pool_module, "multiprocessors", lambda device: 1000)
    clean = run()
    assert len(clean) == 5

    def poisoned(make: Any) -> Any:
        def wrapper(*args: Any, **kwargs: Any) -> torch.Tensor:
            made = make(*args, **kwargs)
            return made.fill_(float("nan") if made.is_floating_point() else 77)

        return wrapper

    monkeypatch.setattr(torch, "empty", poisoned(torch.empty))
    monkeypatch.setattr(torch, "empty_like", poisoned(torch.empty_like))
    monkeypatch.setattr(torch.Tensor, "new_empty", poisoned(torch.Tensor.new_empty))
    torch.testing.assert_close(run(), clean, rtol=0, atol=0)


def test_long_rows_are_shared_out(monkeypatch):
    hidden, mask, grad = states(2, 129, 100), some_mask(2, 129), states(2, 100)
    mask[:, 60:90] = False
    whole = pool_module.pool(hidden, mask, None, True, False)
    monkeypatch.setattr(pool_module, "multiprocessors", lambda device: 1000)
    monkeypatch.setattr(pool_module, "TOKENS_PER_SPLIT", 10)
    assert pool_module._plan(hidden, mask, None).splits == 12
    shared = pool_module.pool(hidden, mask, None, True, False)
    torch.testing.assert_close(shared, whole, rtol=1e-6, atol=1e-6)
    unused = torch.empty(0)
    arguments = (unused, shared[1], shared[2], unused, mask, None, hidden.shape, torch.float32)
    spread = pool_module.spread(grad, *arguments)
    monkeypatch.undo()
    torch.testing.assert_close(spread, pool_module.spread(grad, *arguments), rtol=0, atol=0)


def test_rows_more_than_2_to_the_31_elements_apart():
    apart = 2**31 + 64
    far = torch.empty(apart + 64, dtype=torch.bfloat16).as_strided(
        (2, 1, 64), (apart, 64, 1)
    )  # untouched pages cost nothing
    far[0], far[1] = 1, 3
    assert kernels.masked_mean_pool(far, backend="triton")[:, 0].tolist() == [1, 3]
    near = far.clone()
    loss = {name: pooled_loss(hidden, None).item() for name, hidden in (("far", far), ("near", near))}
    assert loss["far"] == loss["near"]
    assert kernels.info_nce(far[1:, 0], far[:1, 0], temperature=1.0, backend="triton").item() == 0


def test_the_choice_of_backend():
    cpu = torch.device("cpu")
    assert why_not_triton(cpu) is None  # in the interpreter
    assert not use_triton("auto", torch.empty(1)) and use_triton("triton", torch.empty(1))
    for wrong, message in (("cuda", "backend must be"), (None, "backend must be")):
        with pytest.raises(ValueError, match=message):
            use_triton(wrong, torch.empty(1))  # type: ignore[arg-type]
    assert "not torch.float64" in str(why_not_triton(cpu, torch.float64))
    with pytest.raises(ValueError, match=r"cannot be used here.*float64.*leave it at 'auto'"):
        kernels.masked_mean_pool(states(2, 2, 2).double(), backend="triton")
    assert kernels.masked_mean_pool(states(2, 2, 2).double()).dtype == torch.float64
