"""Masked mean pooling against a mean taken row by row, token by token."""

from __future__ import annotations

import itertools
import math
from typing import Any

import pytest
import torch
from torch.profiler import ProfilerActivity, profile

import fastalign_kernels
from fastalign_kernels.reference import masked_mean_pool as twin

# The twin alone, as where Triton is not installed, and through the operator; the kernels, in the interpreter.
BACKENDS = ["twin", "torch", "triton"]
over_backends = pytest.mark.parametrize("backend", BACKENDS)
OPTIONS = [{"skip_first": skip, "normalize": scaled} for skip in (False, True) for scaled in (False, True)]
with_options = pytest.mark.parametrize("options", OPTIONS, ids=["plain", "normalize", "skip", "skip-normalize"])

PATTERNS = {
    "all": [[1, 1, 1, 1], [1, 1, 1, 1], [1, 1, 1, 1]],
    "right padding": [[1, 1, 1, 0], [1, 0, 0, 0], [1, 1, 1, 1]],
    "left padding": [[0, 1, 1, 1], [0, 0, 0, 1], [1, 1, 1, 1]],
    "holes": [[1, 0, 1, 0], [0, 1, 0, 1], [1, 0, 0, 1]],
    "an empty row": [[1, 0, 1, 0], [0, 0, 0, 0], [1, 0, 0, 1]],
    "empty": [[0] * 4] * 3,
}
CUTS = {
    "whole": [0, 4, 9, 12],
    "one token": [0, 1, 2, 12],
    "empty rows": [0, 0, 5, 5, 12, 12],
    "tokens of nobody": [2, 5, 9],
    "nothing": [3, 3],
}


def masked_mean_pool(hidden, mask=None, *, backend: str, **options: Any) -> torch.Tensor:
    if backend == "twin":
        return twin.masked_mean_pool(hidden, mask, **options)
    return fastalign_kernels.masked_mean_pool(hidden, mask, backend=backend, **options)


def row_by_row(hidden, mask=None, cu_seqlens=None, skip_first=False, normalize=False) -> torch.Tensor:
    """In plain PyTorch that autograd sees through, in the dtype of `hidden`."""
    if cu_seqlens is not None:
        rows = [[hidden[t] for t in range(start, stop)] for start, stop in itertools.pairwise(cu_seqlens.tolist())]
    else:
        flags = torch.ones(hidden.shape[:2]) if mask is None else mask
        rows = [[state for state, flag in zip(*row, strict=True) if flag] for row in zip(hidden, flags, strict=True)]
    means = []
    for row in rows:
        kept = row[1:] if skip_first and len(row) > 1 else row
        mean = torch.stack(kept).mean(0) if kept else hidden.new_zeros(hidden.shape[-1])
        means.append(mean / mean.square().sum().sqrt() if normalize and mean.any() else mean)
    return torch.stack(means) + 0 * hidden.sum()  # so that there is a gradient


def states(*shape: int, dtype=torch.float64, seed=0) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(shape, generator=generator, dtype=torch.float64).to(dtype)


def results(function, hidden, *given, **options) -> tuple[torch.Tensor, torch.Tensor]:
    """The means and the gradient of a weighted sum of them, in fp64."""
    hidden = hidden.detach().clone().requires_grad_()
    pooled = function(hidden, *given, **options)
    (pooled * torch.linspace(1, 3, pooled.numel()).view(pooled.shape).to(pooled)).sum().backward()
    assert hidden.grad.dtype == hidden.dtype
    return pooled.detach().double(), hidden.grad.double()


def assert_same(found, expected, **tolerance) -> None:
    for one, other in zip(found, expected, strict=True):
        torch.testing.assert_close(one, other, **tolerance)


def precise(backend: str) -> tuple[torch.dtype, dict[str, float]]:
    return (torch.float32, {"rtol": 1e-5, "atol": 1e-5}) if backend == "triton" else (torch.float64, EXACT)


EXACT = {"rtol": 1e-13, "atol": 1e-13}


@over_backends
@with_options
@pytest.mark.parametrize("pattern", PATTERNS)
def test_any_mask_of_any_dtype(backend, pattern, options):
    dtype, tolerance = precise(backend)
    hidden, numbers = states(3, 4, 5, dtype=dtype), torch.tensor(PATTERNS[pattern])
    expected = results(row_by_row, hidden.double(), numbers, **options)
    for mask_dtype in (torch.int64, torch.int32, torch.uint8, torch.bool, torch.float32, torch.bfloat16):
        mask = numbers.to(mask_dtype)
        assert_same(results(masked_mean_pool, hidden, mask, backend=backend, **options), expected, **tolerance)
    if pattern == "all":
        assert_same(results(masked_mean_pool, hidden, backend=backend, **options), expected, **tolerance)


@over_backends
@with_options
@pytest.mark.parametrize("cuts", CUTS)
def test_rows_one_after_the_other(backend, cuts, options):
    dtype, tolerance = precise(backend)
    hidden, ends = states(12, 5, dtype=dtype), torch.tensor(CUTS[cuts])
    expected = results(row_by_row, hidden.double(), cu_seqlens=ends, **options)
    for cu_seqlens in (ends, ends.int(), torch.stack([ends, ends], 1)[:, 0]):
        found = results(masked_mean_pool, hidden, cu_seqlens=cu_seqlens, backend=backend, **options)
        assert_same(found, expected, **tolerance)


@over_backends
def test_any_number_but_zero_marks_a_token_with_weight_1(backend):
    hidden = states(2, 3, 4, dtype=torch.float32)
    odd = torch.tensor([[0.0, 2.5, -1.0], [1e-30, -0.0, math.nan]])
    expected = masked_mean_pool(hidden, torch.tensor([[0, 1, 1], [1, 0, 1]]), backend=backend)
    torch.testing.assert_close(masked_mean_pool(hidden, odd, backend=backend), expected)


@over_backends
@with_options
@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
def test_what_stands_in_tokens_that_do_not_count_has_no_influence(backend, bad, options):
    mask, hidden = torch.tensor(PATTERNS["an empty row"]), states(3, 4, 5, dtype=torch.float32)
    ends, flat = torch.tensor([2, 5, 5, 9]), states(12, 5, dtype=torch.float32)
    for states_, counts, given in ((hidden, mask, {"mask": mask}), (flat, None, {"cu_seqlens": ends})):
        counts = (torch.arange(12) >= 2) & (torch.arange(12) < 9) if counts is None else counts.clone()
        if options["skip_first"]:
            counts[([0, 2], [0, 0]) if states_ is hidden else [2, 5]] = 0
        spoilt = states_.masked_fill((counts == 0).unsqueeze(-1), bad)
        expected = results(row_by_row, states_.double(), **given, **options)
        found = results(masked_mean_pool, spoilt, **given, backend=backend, **options)
        assert_same(found, expected, rtol=1e-5, atol=1e-5)


@over_backends
@with_options
def test_nan_in_a_token_that_counts_spoils_its_row_alone(backend, options):
    hidden = states(3, 4, 5, dtype=torch.float32)
    hidden[1, 2, 3] = math.nan
    for x, given in ((hidden, {}), (hidden.flatten(0, 1), {"cu_seqlens": torch.tensor([0, 4, 8, 12])})):
        x.requires_grad_()
        pooled = masked_mean_pool(x, **given, backend=backend, **options)
        [grad] = torch.autograd.grad(pooled.sum(), x)
        assert pooled[1].isnan().all() if options["normalize"] else pooled[1, 3].isnan()
        assert pooled[[0, 2]].isfinite().all() and grad.view(3, 4, 5)[[0, 2]].isfinite().all()


@over_backends
@pytest.mark.parametrize("shape", [(1, 1, 96), (2, 37, 100), (3, 129, 256), (5, 8, 1)])
@with_options
def test_errs_no_more_than_plain_pytorch(backend, shape, options):
    """Twice its error at most (three times in the gradient), or the last few bits, with a sink of 600 in one token."""
    dtypes = [torch.float32, torch.float16, torch.bfloat16]
    for dtype, seed in itertools.product(dtypes[:2] if backend == "triton" else dtypes, range(3)):
        hidden = states(*shape, seed=seed)
        hidden[:, 0, 0] = 600
        hidden = hidden.to(dtype)
        mask = torch.randint(4, shape[:2], generator=torch.Generator().manual_seed(seed))
        truth = results(row_by_row, hidden.double(), mask, **options)
        plain = results(lambda h, m, **o: row_by_row(h.float(), m, **o), hidden, mask, **options)
        found = results(masked_mean_pool, hidden, mask, backend=backend, **options)
        for i, (true, one, other) in enumerate(zip(truth, found, plain, strict=True)):
            floor = 4 * torch.finfo(dtype if i else torch.float32).eps * true.abs().max()
            assert (one - true).abs().max() <= (3 if i else 2) * (other - true).abs().max() + floor


@over_backends
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_is_added_up_in_fp32(backend, dtype):
    """An outlier of 500 beside values below one, and more tokens than bf16 can count."""
    hidden = 0.01 * states(2, 1000, 3, dtype=torch.float32) + 0.3
    hidden[:, 0] = 500
    hidden = hidden.to(dtype)
    exact = hidden.double().mean(1)
    for x, given in ((hidden, {}), (hidden.flatten(0, 1), {"cu_seqlens": torch.tensor([0, 1000, 2000])})):
        pooled = masked_mean_pool(x, **given, backend=backend)
        assert pooled.dtype == torch.float32
        torch.testing.assert_close(pooled.double(), exact, rtol=1e-5, atol=0)  # measured: 3e-7
    coarse = hidden.sum(1) / 1000  # a sum that is half precision in the end
    assert ((coarse.double() - exact).abs() > 1e-4).any()
    large = torch.full((1, 64, 2), 60_000.0, dtype=torch.float16)  # their sum is beyond fp16
    assert (masked_mean_pool(large, backend=backend) == 60_000).all()


@over_backends
@pytest.mark.parametrize("scale", [1e-30, 1e25, 1e37])
def test_the_norm_of_large_and_small_means(backend, scale):
    """Their squares overflow, or vanish, in fp32."""
    hidden = states(3, 4, 5, dtype=torch.float32)
    plain, large = (results(masked_mean_pool, x, normalize=True, backend=backend) for x in (hidden, hidden * scale))
    torch.testing.assert_close(large[0], plain[0], rtol=1e-5, atol=1e-6)
    if scale < 1e30:
        torch.testing.assert_close(large[1] * scale, plain[1], rtol=1e-4, atol=1e-6)


@over_backends
def test_a_mean_of_zeros_stays_and_has_a_gradient_as_of_norm_1(backend):
    hidden = states(2, 2, 5, dtype=torch.float32)
    hidden[1, 1] = -hidden[1, 0]
    pooled, grad = results(masked_mean_pool, hidden, normalize=True, backend=backend)
    assert (pooled[1] == 0).all()
    torch.testing.assert_close(grad[1], torch.linspace(1, 3, 10).double()[5:].expand(2, 5) / 2)


@pytest.mark.parametrize("backend", [name for name in BACKENDS if name != "triton"])
@with_options
def test_gradients(backend, options):
    mask, ends = torch.tensor(PATTERNS["an empty row"]), torch.tensor(CUTS["tokens of nobody"])
    for shape, given in (((3, 4, 2), {"mask": mask}), ((3, 2, 2), {}), ((12, 2), {"cu_seqlens": ends})):
        hidden = states(*shape).requires_grad_()
        torch.autograd.gradcheck(lambda h, g=given: masked_mean_pool(h, **g, backend=backend, **options), (hidden,))


@over_backends
@with_options
def test_backward_twice_scaled_and_same_bits(backend, options):
    hidden = states(3, 7, 5, dtype=torch.float32).requires_grad_()
    flat = states(21, 5, dtype=torch.float32).requires_grad_()
    for x, given in ((hidden, {"mask": torch.ones(3, 7)}), (flat, {"cu_seqlens": torch.tensor([1, 8, 20])})):
        pooled = masked_mean_pool(x, **given, backend=backend, **options)
        assert torch.equal(pooled, masked_mean_pool(x, **given, backend=backend, **options))
        upstream = states(*pooled.shape, dtype=torch.float32, seed=1)
        once, again = (torch.autograd.grad(pooled, x, upstream, retain_graph=True)[0] for _ in range(2))
        [scaled] = torch.autograd.grad(pooled, x, upstream * 1024)
        assert torch.equal(once, again) and torch.equal(scaled, once * 1024)
        assert once.is_contiguous()
        with torch.no_grad():
            assert not masked_mean_pool(x, **given, backend=backend, **options).requires_grad


@over_backends
@with_options
def test_views_and_rows_without_tokens(backend, options):
    wide = states(4, 3, 10, dtype=torch.float32).transpose(0, 1)[..., ::2].requires_grad_()
    mask = torch.tensor(PATTERNS["holes"]).T.contiguous().T
    pooled = masked_mean_pool(wide, mask, backend=backend, **options)
    torch.testing.assert_close(pooled, row_by_row(wide, mask, **options))
    upstream = states(5, 3, dtype=torch.float32).T  # not contiguous either
    grads = [torch.autograd.grad(p, wide, upstream)[0] for p in (pooled, row_by_row(wide, mask, **options))]
    assert_same(grads[:1], grads[1:])
    assert grads[0].is_contiguous()
    for empty, given in ((torch.zeros(2, 0, 5), {}), (torch.zeros(0, 5), {"cu_seqlens": torch.zeros(3).int()})):
        empty.requires_grad_()
        pooled = masked_mean_pool(empty, **given, backend=backend, **options)
        assert torch.equal(pooled, torch.zeros(2, 5))
        assert torch.autograd.grad(pooled.sum(), empty)[0].shape == empty.shape


@with_options
def test_in_chunks(monkeypatch, options):
    """Of rows, and of the tokens of a row that is longer than a chunk."""
    hidden, mask = states(6, 29, 4), torch.rand(6, 29, generator=torch.Generator().manual_seed(0)) > 0.3
    flat, ends = states(100, 4), torch.tensor([0, 70, 70, 99])
    for x, given in ((hidden, {"mask": mask}), (hidden, {}), (flat, {"cu_seqlens": ends})):
        expected = results(row_by_row, x, **given, **options)
        for size in (1, 8 * 4 * 8, 29 * 4 * 8 * 2, 10**9):
            monkeypatch.setattr(twin, "CHUNK_BYTES", size)
            assert_same(results(twin.masked_mean_pool, x, **given, **options), expected, **EXACT)


@with_options
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_memory(monkeypatch, dtype, options):
    """No copy of the states: a chunk in the forward, and their gradient in the backward."""
    monkeypatch.setattr(twin, "CHUNK_BYTES", 64 * 1024)
    hidden = states(4, 1024, 64, dtype=dtype).requires_grad_()
    flat = hidden.detach().flatten(0, 1).requires_grad_()
    size = hidden.numel() * hidden.element_size()
    ends = torch.arange(5) * 1024
    for x, given in ((hidden, {"mask": torch.ones(4, 1024)}), (flat, {"cu_seqlens": ends})):

        def peak(step) -> int:
            with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as recorded:
                step()
            events: Any = recorded.profiler
            changes = (event.nbytes() for event in events.kineto_results.events() if event.name() == "[memory]")
            return max(itertools.accumulate(changes, initial=0))

        pooled = twin.masked_mean_pool(x, **given, **options)
        grad = torch.ones_like(pooled)
        rest = 80 * 1024  # the means, and what is 1 to 20 bytes a token
        assert 4 * 4 * 64 <= peak(lambda x=x, g=given: twin.masked_mean_pool(x, **g, **options)) < 128 * 1024 + rest
        assert size <= peak(lambda: pooled.backward(grad)) < size + rest  # noqa: B023


@over_backends
def test_errors(backend):
    x, mask, ends = states(3, 4, 5), torch.ones(3, 4), torch.tensor([0, 2, 5])
    flat = x.flatten(0, 1)
    mistakes: list[tuple[type[Exception], str, dict[str, Any]]] = [
        *(
            (ValueError, r"hidden \(N, T, D\) and mask \(N, T\), got \(3, 4, 5\) and", {"mask": torch.ones(shape)})
            for shape in ((3, 5), (4,), (3, 4, 1), (4, 3), (1, 4))
        ),
        *((ValueError, r"need hidden \(N, T, D\)", {"hidden": y, "mask": None}) for y in (flat, x[:0], x[..., :0])),
        (TypeError, "floating point, not torch.int64", {"hidden": x.long()}),
        (TypeError, "floating point, not torch.complex64", {"mask": mask + 1j}),
        (ValueError, "mask must be on cpu.*meta", {"mask": mask.to("meta")}),
        (ValueError, "not both", {"cu_seqlens": ends}),
        (ValueError, r"\(tokens, D\).*\(3, 4, 5\)", {"mask": None, "cu_seqlens": ends}),
    ]
    for shape in ((), (1,), (2, 2)):
        wrong = torch.zeros(shape, dtype=torch.int64)
        mistakes.append((ValueError, r"\(N \+ 1,\)", {"hidden": flat, "mask": None, "cu_seqlens": wrong}))
    for kind, match, cu_seqlens in (
        (TypeError, "int32 or int64, not torch.float32", ends.float()),
        (TypeError, "int32 or int64, not torch.uint8", ends.byte()),
        (ValueError, "cu_seqlens must be on the CPU or on cpu", ends.to("meta")),
        (ValueError, "within the 12 tokens, got -1 to 5", torch.tensor([-1, 5])),
        (ValueError, "within the 12 tokens, got 0 to 13", torch.tensor([0, 5, 13])),
        (ValueError, "row 1 goes from 7 to 5", torch.tensor([0, 7, 5, 12])),
    ):
        mistakes.append((kind, match, {"hidden": flat, "mask": None, "cu_seqlens": cu_seqlens}))
    for kind, match, wrong in mistakes:
        with pytest.raises(kind, match=match):
            masked_mean_pool(backend=backend, **{"hidden": x, "mask": mask, **wrong})
    for function, word in ((fastalign_kernels, "cuda"), (twin, "cuda"), (twin, "triton")):
        with pytest.raises(ValueError, match="this is the PyTorch twin" if word == "triton" else "backend must be"):
            function.masked_mean_pool(x, mask, backend=word)
