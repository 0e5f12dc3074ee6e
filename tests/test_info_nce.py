"""InfoNCE: the loss written out in loops over plain numbers, gradients from a dense version in fp64."""

from __future__ import annotations

import functools
import importlib
import itertools
import math
from typing import Any
from unittest import mock

import pytest
import torch
import torch.nn.functional as F
from torch.profiler import ProfilerActivity, profile
from torch.utils._python_dispatch import TorchDispatchMode

import fastalign_kernels
from fastalign_kernels.reference import info_nce as twin

# The twin alone, as where Triton is not installed, and through the operator; the kernels, in the interpreter.
BACKENDS = ["twin", "torch", "triton"]
REGIMES = ("dense", "panels")  # of the kernels; by itself "triton" is "fused" at these sizes
over_backends = pytest.mark.parametrize("backend", BACKENDS)
over_regimes = pytest.mark.parametrize("backend", [*BACKENDS, *REGIMES])
kernels_module = importlib.import_module("fastalign_kernels.info_nce")
both_ways = pytest.mark.parametrize("symmetric", [False, True])


def info_nce(source, target, *, backend: str, **options: Any) -> torch.Tensor:
    if backend == "twin":
        return twin.info_nce(source, target, **options)
    if backend in REGIMES:
        few_rows = mock.patch.object(kernels_module, "PANEL_BYTES", 16 * 8 * len(target))
        with few_rows, kernels_module.forced_regime(backend):
            return fastalign_kernels.info_nce(source, target, backend="triton", **options)
    return fastalign_kernels.info_nce(source, target, backend=backend, **options)


def written_out(source, target, temperature, symmetric=False, target_offset=0, **ids: Any) -> float:
    """mean_i -log(exp(c_i,own / t) / sum_j exp(c_ij / t)), without the j != own of equal ids."""

    def cosine(a: list[float], b: list[float]) -> float:
        dot = math.fsum(x * y for x, y in zip(a, b, strict=True))
        lengths = math.sqrt(math.fsum(x * x for x in a)) * math.sqrt(math.fsum(y * y for y in b))
        return dot / lengths if lengths else 0.0

    s, t = source.double().tolist(), target.double().tolist()
    total = 0.0
    for swapped in (False, True) if symmetric else (False,):
        for i in range(len(s)):
            own = i + target_offset
            terms = []
            for j in range(len(t)):
                row, column = (j, i) if swapped else (i, j)
                if j == own or not ids or ids["source_ids"][row] != ids["target_ids"][column]:
                    terms.append(cosine(s[row], t[column]) / temperature)
            positive = cosine(s[i], t[own]) / temperature
            total += math.log(math.fsum(math.exp(term - positive) for term in terms)) / len(s)
    return total / (2 if symmetric else 1)


def dense(source, target, *, temperature, symmetric=False, target_offset=0, compute=None, cast=None, **ids):
    """Plain PyTorch with the whole matrix, in the dtype `compute`; `cast` rounds the rows of length 1."""

    def unit(rows: torch.Tensor) -> torch.Tensor:
        rows = rows.to(compute or rows.dtype)
        squares = rows.square().sum(1, keepdim=True)
        rows = rows / torch.where(squares > 0, squares, 1).sqrt()
        return rows if cast is None else rows.to(cast).to(rows.dtype)

    logits = unit(source) @ unit(target).T / temperature
    own = torch.arange(len(source)) + target_offset
    if ids:
        same = ids["source_ids"].unsqueeze(1) == ids["target_ids"].unsqueeze(0)
        same[torch.arange(len(source)), own] = False
        logits = logits.masked_fill(same, -math.inf)
    loss = F.cross_entropy(logits, own)
    return (loss + F.cross_entropy(logits.T, own)) / 2 if symmetric else loss


def states(size: int, width: int, dtype=torch.float64, seed=0, noise=0.7, more=0) -> tuple[torch.Tensor, torch.Tensor]:
    """Translations of each other, the first on row `more` // 2 of the targets."""
    generator = torch.Generator().manual_seed(seed)
    target = torch.randn(size + more, width, generator=generator, dtype=torch.float64)
    own = target[more // 2 : more // 2 + size]
    source = own + noise * torch.randn(size, width, generator=generator, dtype=torch.float64)
    return source.to(dtype), target.to(dtype)


def leaves(*parts: Any) -> list[Any]:
    return [torch.as_tensor(part).detach().clone().requires_grad_() for part in parts]


def results(function, parts, upstream: Any = 1.0, **options) -> list[torch.Tensor]:
    """The loss and the gradients of source, target and temperature, in fp64, by one backward."""
    source, target, temperature = leaves(*parts)
    loss = function(source, target, temperature=temperature, **options)
    (loss * upstream).backward()
    grads = [part.grad for part in (source, target, temperature)]
    assert all(grad.dtype == part.dtype for grad, part in zip(grads, (source, target, temperature), strict=True))
    return [part.detach().double() for part in (loss, *grads)]


class Products(TorchDispatchMode):
    """How many products of matrices."""

    count = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.count += func.overloadpacket.__name__ in ("mm", "addmm", "addmm_", "bmm")
        return func(*args, **(kwargs or {}))


@over_backends
@pytest.mark.parametrize("temperature", [0.05, 1.0, 10.0])
@pytest.mark.parametrize(("size", "width", "more"), [(1, 1, 0), (2, 3, 0), (33, 17, 0), (1, 4, 6), (9, 5, 8)])
def test_the_formula(backend, size, width, more, temperature):
    dtype, tight = (torch.float32, 1e-5) if backend not in ("twin", "torch") else (torch.float64, 1e-12)
    source, target = states(size, width, dtype, more=more)
    ids = {"source_ids": torch.arange(size) % 5, "target_ids": torch.arange(size + more) * 3 % 7}
    for symmetric, named in itertools.product((False,) if more else (False, True), ({}, ids)):
        options: dict[str, Any] = {"symmetric": symmetric, "target_offset": more // 2, **named}
        expected = written_out(source, target, temperature, **options)
        for function in (dense, functools.partial(info_nce, backend=backend)):
            loss = function(source, target, temperature=temperature, **options)
            assert loss.shape == () and loss.dtype == dtype
            assert loss.item() == pytest.approx(expected, rel=tight, abs=tight)


CASES: dict[str, dict[str, Any]] = {
    "one pair": {"size": 1, "width": 37},
    "one of many": {"size": 1, "more": 128, "width": 96, "temperature": 0.05},
    "odd": {"size": 37, "width": 100, "symmetric": True},
    "odd, one way": {"size": 65, "width": 96},
    "odd, both ways": {"size": 65, "width": 37, "symmetric": True},
    "more targets": {"size": 37, "more": 93, "width": 256, "temperature": 0.5},
    "cold": {"size": 64, "width": 64, "temperature": 0.01},
    "cold, both ways": {"size": 37, "width": 64, "temperature": 0.01, "symmetric": True},
    "warm": {"size": 64, "width": 100, "temperature": 2.0, "symmetric": True},
    "ids": {"size": 64, "width": 96, "ids": 9, "symmetric": True},
    "ids, more targets": {"size": 37, "more": 40, "width": 64, "ids": 5},
    "certain": {"size": 64, "width": 64, "noise": 0.05, "temperature": 0.05, "symmetric": True},
    "two meanings": {"size": 37, "width": 64, "ids": 2, "symmetric": True},
    "a sink": {"size": 37, "width": 96, "sink": 600.0, "symmetric": True},
    "opposite": {"size": 37, "width": 64, "sink": 60.0, "facing": -1, "temperature": 0.01, "symmetric": True},
}
CASES_OF_REGIMES = ("one pair", "odd", "more targets", "cold, both ways", "ids, more targets", "a sink", "opposite")


def case(dtype, seed, *, size, width, more=0, temperature=0.1, symmetric=False, ids=0, noise=0.7, sink=0.0, facing=1):
    source, target = states(size, width, seed=seed, noise=noise, more=more)
    source[:, 0] += sink
    target[:, 0] += sink * facing
    parts = source.to(dtype), target.to(dtype), temperature
    options: dict[str, Any] = {"symmetric": symmetric, "target_offset": more // 2}
    if ids:
        generator = torch.Generator().manual_seed(seed)
        options["source_ids"] = torch.randint(ids, (size,), generator=generator)
        options["target_ids"] = torch.randint(ids, (size + more,), generator=generator, dtype=torch.int32)
    return parts, options


@pytest.mark.parametrize(
    ("backend", "name"), [*itertools.product(BACKENDS, CASES), *itertools.product(REGIMES, CASES_OF_REGIMES)]
)
def test_errs_no_more_than_plain_pytorch(backend, name):
    """Against fp64: twice its error in the loss, three times in the gradients, or the last few bits.

    The mean of some draws, because the error of one number can be 0 by chance.
    """
    draws = 3 if backend == "triton" else 4
    variants = [*itertools.product((torch.float32, torch.float16, torch.bfloat16), ("exact", "fast"))]
    if backend == "triton":  # bf16 products are wrong in Triton's interpreter
        variants = [(torch.float32, "exact"), (torch.float16, "exact")]
    elif backend in REGIMES:
        variants = [(torch.float32, "exact"), (torch.float32, "fast")]
    for dtype, precision in variants:
        cast = torch.bfloat16 if precision == "fast" else None
        errors = torch.zeros(4, 3)
        for seed in range(draws):
            parts, options = case(dtype, seed, **CASES[name])
            truth = results(dense, [torch.as_tensor(part).double() for part in parts], 1000, **options)
            plain = results(dense, parts, 1000, compute=torch.float32, cast=cast, **options)
            with torch.autocast("cpu", dtype=torch.bfloat16):  # which must not reach the products
                mine = results(info_nce, parts, 1000, precision=precision, backend=backend, **options)
            for i, (true, one, other) in enumerate(zip(truth, mine, plain, strict=True)):
                # A cosine of 1 is off by 2 ** -24 in fp32, and so the logits by that much over the temperature.
                size = max(float(true.abs().max()), 0 if i else 1 / parts[2])
                floor = 4 * size * torch.finfo(dtype if i in (1, 2) else torch.float32).eps
                errors[i] += torch.tensor([(one - true).abs().max(), (other - true).abs().max(), floor])
        for i, (one, other, floor) in enumerate(errors.tolist()):
            assert one <= (3 if i else 2) * other + floor, (dtype, precision, i, one, other, floor)


@pytest.mark.parametrize("backend", [name for name in BACKENDS if name != "triton"])
@pytest.mark.parametrize("options", [{}, {"more": 5}, {"symmetric": True}])
@pytest.mark.parametrize("ids", [0, 3])
def test_gradients(backend, options, ids):
    (source, target, _), named = case(torch.float64, 0, size=6, width=3, ids=ids, **options)
    temperature = torch.tensor([0.5], dtype=torch.float64)
    torch.autograd.gradcheck(
        lambda s, t, temperature: info_nce(s, t, temperature=temperature, precision="fast", backend=backend, **named),
        leaves(source, target, temperature),  # in fp64, fast is exact
    )


@both_ways
def test_one_panel_or_many(monkeypatch, symmetric):
    """Many panels need no more products, but for the column softmaxes of both ways, which need a fourth."""
    whole = twin.PANEL_BYTES
    for name in ("odd", "ids", "two meanings") if symmetric else ("odd, one way", "more targets", "ids, more targets"):
        parts, options = case(torch.float64, 0, **CASES[name])
        options["symmetric"] = symmetric
        found = []
        for size in (whole, 2_000):
            monkeypatch.setattr(twin, "PANEL_BYTES", size)
            with Products() as products:
                found.append((results(twin.info_nce, parts, **options), products.count))
        for one, many in zip(found[0][0], found[1][0], strict=True):
            torch.testing.assert_close(many, one, rtol=1e-12, atol=1e-12 * float(one.abs().max()))
        panels, rest = divmod(found[1][1], 4 if symmetric else 3)
        assert found[0][1] == 3 and panels > 4 and rest == 0


@both_ways
def test_memory_stays_far_below_the_matrix(monkeypatch, symmetric):
    size, budget, rows = 1024, 512 * 1024, 1024 * 8 * 4
    parts = leaves(*states(size, 8, torch.float32))
    monkeypatch.setattr(twin, "PANEL_BYTES", budget)
    for precision, named in itertools.product(("exact", "fast"), (False, True)):
        ids = torch.arange(size) if named else None
        options: dict[str, Any] = {"symmetric": symmetric, "source_ids": ids, "target_ids": ids, "precision": precision}
        with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as recorded:
            twin.info_nce(*parts, temperature=0.1, **options).backward()
        events: Any = recorded.profiler
        changes = (event.nbytes() for event in events.kineto_results.events() if event.name() == "[memory]")
        peak = max(itertools.accumulate(changes, initial=0))
        assert budget / 2 + 3 * rows < peak < budget + 5 * rows < size * size


def test_fast_rounds_the_operands_of_every_product():
    """Rows of length 1 and softmax weights, these before the factor that all have in common."""
    for name, directions in (("odd", 2), ("odd, one way", 1)):
        (source, target, temperature), options = case(torch.float32, 0, **CASES[name])
        units = [F.normalize(part.double()) for part in (source, target)]
        s, t = (unit.bfloat16().double() for unit in units)
        logits = s @ t.T / temperature
        weights = logits.softmax(1) + (logits.softmax(0) if directions == 2 else 0)
        weights.diagonal().sub_(directions)
        rounded, scale = weights.bfloat16().double(), 1 / (len(s) * temperature * directions)
        _, *found, slope = results(twin.info_nce, (source, target, temperature), precision="fast", **options)
        products = rounded @ t, rounded.T @ s
        for grad, part, unit, product in zip(found, (source, target), units, products, strict=True):
            along = (product * unit).sum(1, keepdim=True) * unit
            expected = scale * (product - along) / part.double().norm(dim=1, keepdim=True)
            assert (grad - expected).norm() < 1e-4 * expected.norm()
        torch.testing.assert_close(slope, -scale * (weights * logits).sum(), rtol=1e-5, atol=0)  # no product there


@over_backends
def test_only_what_is_needed(backend):
    parts, options = case(torch.float32, 0, **CASES["ids"])
    _, *expected = results(info_nce, parts, backend=backend, **options)
    for wanted in itertools.product((False, True), repeat=3):
        inputs = [torch.as_tensor(part).clone().requires_grad_(want) for part, want in zip(parts, wanted, strict=True)]
        with torch.no_grad():
            assert not info_nce(*inputs[:2], temperature=inputs[2], backend=backend, **options).requires_grad
        loss = info_nce(*inputs[:2], temperature=inputs[2], backend=backend, **options)
        assert loss.requires_grad == any(wanted)
        if any(wanted):
            loss.backward()
        for part, want, grad in zip(inputs, wanted, expected, strict=True):
            assert (part.grad is not None) == want
            if part.grad is not None:
                torch.testing.assert_close(part.grad.double(), grad, rtol=1e-5, atol=1e-6)


def test_no_gradient_work_without_a_gradient(monkeypatch):
    monkeypatch.setattr(twin, "PANEL_BYTES", 8 * 8 * 8)
    source, target, temperature = leaves(*states(8, 4), 0.1)
    for needed, symmetric, count in ((False, False, 1), (False, True, 2), (True, False, 3), (True, True, 2 * 4)):
        with Products() as products, torch.set_grad_enabled(needed):
            twin.info_nce(source, target, temperature=temperature, symmetric=symmetric)
        assert products.count == count


@over_backends
@both_ways
def test_backward_twice_scaled_and_same_bits(backend, symmetric):
    parts = leaves(*states(9, 5, torch.float32), 0.1)
    options: dict[str, Any] = {"temperature": parts[2], "symmetric": symmetric, "backend": backend}
    loss, same = (info_nce(*parts[:2], **options) for _ in range(2))
    once, again = (torch.autograd.grad(found, parts, retain_graph=True) for found in (loss, same))
    assert torch.equal(loss, same) and all(map(torch.equal, once, again))
    for factor in (1.0, 1e3, -1e-3):
        again = torch.autograd.grad(loss, parts, torch.tensor(factor), retain_graph=True)
        torch.testing.assert_close(again, [one * factor for one in once])


@over_backends
def test_fp16_gradients_survive_where_they_are_scaled(backend):
    """Unscaled, they are below the smallest number of fp16."""
    source, target = (1000 * part for part in states(64, 64, torch.float16, noise=0.1))
    mine = results(info_nce, (source, target, 0.1), 2.0**24, backend=backend)
    truth = results(dense, (source.double(), target.double(), 0.1), 2.0**24)
    for one, true in zip(mine[1:3], truth[1:3], strict=True):
        assert true.abs().max() < 1
        torch.testing.assert_close(one, true, rtol=1e-2, atol=1e-3 * float(true.abs().max()))


@over_regimes
@both_ways
def test_one_meaning_has_nothing_to_tell_apart(backend, symmetric):
    source, target = states(5, 4, torch.float32)
    ids = torch.full((5,), -7)
    for size, named in ((1, {}), (5, {"source_ids": ids, "target_ids": ids})):
        found = results(info_nce, (source[:size], target[:size], 0.1), backend=backend, symmetric=symmetric, **named)
        assert all((part == 0).all() for part in found)


@over_backends
@pytest.mark.parametrize("scale", [1e-35, 1e-20, 1e3, 1e15, 1e25, 3e37])
def test_length_does_not_matter(backend, scale):
    """Squares of the states of these lengths overflow, or vanish, in fp32."""
    source, target = states(8, 16, torch.float32)
    if backend == "triton" and scale > 1e15:
        assert info_nce(source * scale, target * scale, temperature=0.1, backend=backend).isnan()
        return
    if backend == "triton" and scale < 1e-15:  # too small to be told from rows of zeros
        loss, *grads = results(info_nce, (source * scale, target * scale, 0.1), backend=backend)
        assert loss.item() == pytest.approx(math.log(8))
        assert all(grad.isfinite().all() for grad in grads)
        return
    plain = results(info_nce, (source, target, 0.1), backend=backend)
    upstream = scale if 1e-30 < scale < 1e30 else 1.0  # so that the gradient itself stays within fp32
    scaled = results(info_nce, (source * scale, target * scale, 0.1), upstream, backend=backend)
    assert scaled[0].item() == pytest.approx(plain[0].item(), rel=1e-5)
    if upstream != 1:
        torch.testing.assert_close(scaled[1:3], plain[1:3], rtol=1e-4, atol=1e-6)


@over_regimes
@both_ways
def test_rows_of_zeros_have_cosine_0_and_a_gradient_as_of_length_1(backend, symmetric):
    source, target = states(4, 3, torch.float32)
    source[1] = 0
    target[2] = 0
    mine = results(info_nce, (source, target, 0.1), symmetric=symmetric, backend=backend)
    truth = results(dense, (source.double(), target.double(), 0.1), symmetric=symmetric)
    assert mine[1][1].abs().max() > 0.1
    torch.testing.assert_close(mine, truth, rtol=1e-4, atol=1e-5)


@over_regimes
@both_ways
@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
def test_nan_and_infinity_make_the_loss_nan(backend, bad, symmetric):
    source, target = states(5, 3, torch.float32)
    ids = torch.zeros(5, dtype=torch.int64)
    for side, named in itertools.product((0, 1), ({}, {"source_ids": ids, "target_ids": ids})):
        pair = source.clone(), target.clone()
        pair[side][3, 1] = bad
        assert info_nce(*pair, temperature=0.1, symmetric=symmetric, backend=backend, **named).isnan()
    further = torch.cat([target, torch.full((1, 3), bad)])  # hidden from every source
    target_ids = torch.tensor([1, 2, 3, 4, 5, 0])
    assert info_nce(source, further, temperature=0.1, source_ids=ids, target_ids=target_ids, backend=backend).isnan()


@over_backends
def test_views_and_one_tensor_on_both_sides(backend):
    wide = torch.randn(6, 40, generator=torch.Generator().manual_seed(0))
    parts = wide[:, ::2].T, wide[:, 1::2].T, 0.1
    copies = *(part.contiguous() for part in parts[:2]), 0.1
    for one, other in zip(
        *(results(info_nce, x, symmetric=True, backend=backend) for x in (parts, copies)), strict=True
    ):
        torch.testing.assert_close(one, other, rtol=1e-5, atol=1e-6)
    [x] = leaves(wide)
    info_nce(x, x, temperature=0.1, backend=backend).backward()
    _, *expected = results(info_nce, (wide, wide, 0.1), backend=backend)
    torch.testing.assert_close(x.grad.double(), expected[0] + expected[1], rtol=1e-5, atol=1e-6)
    assert info_nce(wide.half(), wide.bfloat16(), temperature=0.1, backend=backend).dtype == torch.float32


@over_backends
def test_errors(backend):
    x, ids, meta = torch.ones(4, 3), torch.arange(4), torch.ones(4, 3, device="meta")
    mistakes: list[tuple[type[Exception], str, dict[str, Any]]] = [
        (ValueError, r"\(N, D\).*\(3,\)", {"source": x[0]}),
        (ValueError, r"\(M, D\).*\(4, 2\)", {"target": x[:, :2]}),
        *((ValueError, "D above 0", {"source": y, "target": y}) for y in (x[:0], x[:, :0])),
        (ValueError, r"as many targets.*\(3, 3\)", {"target": x[:3]}),
        (ValueError, r"symmetric needs.*\(3, 3\)", {"source": x[:3], "symmetric": True}),
        *((TypeError, "floating point.*int64", {side: x.long()}) for side in ("source", "target")),
        (ValueError, "one device.*meta", {"target": meta}),
        (ValueError, "from 0 to M - N = 0, not 1", {"target_offset": 1}),
        (ValueError, "from 0 to M - N = 1, not -1", {"source": x[:3], "target_offset": -1}),
        (TypeError, "target_offset.*float", {"target_offset": 0.0}),
        *((ValueError, "finite and above 0", {"temperature": t}) for t in (0, -1.0, math.nan, math.inf)),
        (ValueError, "finite and above 0", {"temperature": torch.tensor(0.0)}),
        (ValueError, r"one number.*\(2,\)", {"temperature": torch.ones(2)}),
        (TypeError, "floating point.*int64", {"temperature": torch.tensor(1)}),
        *((TypeError, "must be a number", {"temperature": t}) for t in ("0.1", True, None)),
        (ValueError, "temperature must be on.*meta", {"temperature": torch.ones(1, device="meta")}),
        *((ValueError, "or neither", {side: ids}) for side in ("source_ids", "target_ids")),
        (ValueError, r"source_ids must be \(4,\), got \(3,\)", {"source_ids": ids[:3], "target_ids": ids}),
        (ValueError, r"target_ids must be \(4,\), got \(4, 1\)", {"source_ids": ids, "target_ids": ids[:, None]}),
        (TypeError, "target_ids must be integers.*float32", {"source_ids": ids, "target_ids": ids.float()}),
        (TypeError, "source_ids must be integers.*bool", {"source_ids": ids > 1, "target_ids": ids}),
        (ValueError, "source_ids must be on cpu.*meta", {"source_ids": ids.to("meta"), "target_ids": ids}),
        (ValueError, "precision.*'exakt'", {"precision": "exakt"}),
    ]
    for kind, match, wrong in mistakes:
        arguments: dict[str, Any] = {"source": x, "target": x, "temperature": 0.1, **wrong}
        with pytest.raises(kind, match=match):
            info_nce(backend=backend, **arguments)
    for function, word in ((fastalign_kernels.info_nce, "cuda"), (twin.info_nce, "cuda"), (twin.info_nce, "triton")):
        with pytest.raises(ValueError, match="this is the PyTorch twin" if word == "triton" else "backend must be"):
            function(x, x, temperature=0.1, backend=word)
