"""Pooling and InfoNCE in one step, against the mean and the softmax written out in plain PyTorch."""

from __future__ import annotations

import itertools
import math
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch.profiler import ProfilerActivity, profile

import fastalign_kernels
from fastalign_kernels.reference import info_nce, masked_mean_pool
from fastalign_kernels.reference import pooled_info_nce as twin

# The twin alone, as where Triton is not installed, and through the operator; the kernels, in the interpreter.
BACKENDS = ["twin", "torch", "triton"]
over_backends = pytest.mark.parametrize("backend", BACKENDS)
CHOICES = {
    "plain": {},
    "reverse": {"reverse": True},
    "symmetric": {"symmetric": True},
    "symmetric, reverse": {"symmetric": True, "reverse": True},
    "no source": {"detach": "source"},
    "no target": {"detach": "target"},
    "reverse, no source": {"reverse": True, "detach": "source"},
    "reverse, no target": {"reverse": True, "detach": "target"},
    "symmetric, no source": {"symmetric": True, "detach": "source"},
    "skip": {"skip_first": True, "reverse": True},
}
with_choices = pytest.mark.parametrize("choice", CHOICES)


def pooled_info_nce(hidden, mask=None, *, backend: str, **options: Any) -> torch.Tensor:
    if backend == "twin":
        return twin.pooled_info_nce(hidden, mask, **options)
    return fastalign_kernels.pooled_info_nce(hidden, mask, backend=backend, **options)


def written_out(hidden, mask: Any = None, *, temperature, cast=None, **options: Any) -> torch.Tensor:
    """In plain PyTorch that autograd sees through, in the dtype of `hidden`; `cast` rounds the rows of length 1."""
    cuts = options.get("cu_seqlens")
    if cuts is not None:
        rows = [hidden[start:stop] for start, stop in itertools.pairwise(cuts.tolist())]
    else:
        rows = [row[keep.bool()] for row, keep in zip(hidden, mask, strict=True)]
    if options.get("skip_first"):
        rows = [row[1:] if len(row) > 1 else row for row in rows]
    sources, targets = torch.stack([row.mean(0) if len(row) else row.sum(0) for row in rows]).chunk(2)
    if options.get("detach") == "source":
        sources = sources.detach()
    if options.get("detach") == "target":
        targets = targets.detach()
    units = [F.normalize(half, dim=1) for half in (sources, targets)]
    units = [unit if cast is None else unit.to(cast).to(unit.dtype) for unit in units]
    logits = units[0] @ units[1].T / temperature
    if options.get("source_ids") is not None:
        same = options["source_ids"].unsqueeze(1) == options["target_ids"].unsqueeze(0)
        logits = logits.masked_fill(same.fill_diagonal_(False), -math.inf)
    own = torch.arange(len(logits))
    ways = [F.cross_entropy(way, own) for way in (logits, logits.T)]
    if options.get("symmetric"):
        return (ways[0] + ways[1]) / 2
    return ways[1] if options.get("reverse") else ways[0]


def states(pairs: int, tokens: int, width: int, dtype=torch.float64, seed=0, sink=0.0) -> tuple[torch.Tensor, ...]:
    """(2N, T, D) with a mask of right padding that keeps 2 tokens or more, and the flat form of the same rows."""
    generator = torch.Generator().manual_seed(seed)
    meaning = torch.randn(pairs, 1, width, generator=generator, dtype=torch.float64).repeat(2, 1, 1)
    hidden = meaning + torch.randn(2 * pairs, tokens, width, generator=generator, dtype=torch.float64)
    hidden[:, 0, 0] += sink
    lengths = torch.randint(min(2, tokens), tokens + 1, (2 * pairs,), generator=generator)
    mask = torch.arange(tokens) < lengths.unsqueeze(1)
    hidden = hidden.to(dtype)
    return hidden, mask, hidden[mask], F.pad(lengths.cumsum(0), (1, 0))


def results(function, hidden, temperature, *mask, upstream=1.0, **options) -> list[torch.Tensor]:
    """The loss and the gradients of the states and of the temperature, in fp64."""
    parts = [torch.as_tensor(part).detach().clone().requires_grad_() for part in (hidden, temperature)]
    loss = function(parts[0], *mask, temperature=parts[1], **options)
    grads = torch.autograd.grad(loss, parts, torch.full_like(loss, upstream), materialize_grads=True)
    assert all(grad.dtype == part.dtype for grad, part in zip(grads, parts, strict=True))
    return [part.detach().double() for part in (loss, *grads)]


IDS = {"source_ids": torch.tensor([0, 1, 2, 0, 4]), "target_ids": torch.tensor([7, 0, 2, 1, 0])}


@over_backends
@pytest.mark.parametrize("ids", [{}, IDS], ids=["", "ids"])
@with_choices
def test_the_formula(backend, choice, ids):
    dtype, tight = (torch.float32, 1e-4) if backend == "triton" else (torch.float64, 1e-12)
    hidden, mask, flat, ends = states(5, 4, 6, dtype)
    options = {**CHOICES[choice], **ids}
    for x, given, cuts in ((hidden, (mask,), {}), (flat, (), {"cu_seqlens": ends})):
        expected = results(written_out, x.double(), 0.3, *given, upstream=7.0, **cuts, **options)
        found = results(pooled_info_nce, x, 0.3, *given, upstream=7.0, backend=backend, **cuts, **options)
        for one, other in zip(found, expected, strict=True):
            torch.testing.assert_close(one, other, rtol=tight, atol=tight)
        if cuts:
            half = int(ends[5])
            still = {"source": found[1][:half], "target": found[1][half:], None: torch.zeros(1)}
            assert (still[options.get("detach")] == 0).all() and found[1].abs().max() > 1e-3


@pytest.mark.parametrize("backend", [name for name in BACKENDS if name != "triton"])
@with_choices
def test_gradients(backend, choice):
    hidden, mask, flat, ends = states(3, 3, 2)
    temperature = torch.tensor(0.5, dtype=torch.float64, requires_grad=True)
    options: dict[str, Any] = {"precision": "fast", "backend": backend, **CHOICES[choice]}  # in fp64, fast is exact
    side = options.pop("detach", None)
    for x, given, cuts in ((hidden, (mask,), {}), (flat, (), {"cu_seqlens": ends})):
        half = 3 if given else int(ends[3])

        def loss(moving, temperature, x=x, given=given, cuts=cuts, half=half):
            """As a function of the half that is not detached."""
            rows = moving if side is None else torch.cat([x[:half], moving] if side == "source" else [moving, x[half:]])
            return pooled_info_nce(rows, *given, temperature=temperature, detach=side, **cuts, **options)

        part = {"source": slice(half, None), "target": slice(half), None: slice(None)}[side]
        torch.autograd.gradcheck(loss, (x[part].clone().requires_grad_(), temperature))


@over_backends
@pytest.mark.parametrize("choice", ["plain", "symmetric", "skip"])
@pytest.mark.parametrize("shape", [(1, 1, 96), (9, 37, 100), (13, 5, 256), (4, 129, 96)])
@pytest.mark.parametrize("sink", [0.0, 600.0])
def test_errs_no_more_than_plain_pytorch(backend, shape, choice, sink):
    """Against fp64: twice its error in the loss, three times in the gradients, or the last few bits; worst of three."""
    variants = [*itertools.product((torch.float32, torch.float16, torch.bfloat16), ("exact", "fast"))]
    if backend == "triton":  # bf16 products are wrong in Triton's interpreter
        variants = [(torch.float32, "exact"), (torch.float16, "exact")]
    options: dict[str, Any] = CHOICES[choice]
    for dtype, precision in variants:
        cast = torch.bfloat16 if precision == "fast" else None
        worst = torch.zeros(3, 3)
        for seed in range(3):
            hidden, mask, *_ = states(*shape, dtype=dtype, seed=seed, sink=sink)
            truth = results(written_out, hidden.double(), 0.1, mask, upstream=1000.0, **options)
            plain = results(
                lambda h, *rest, cast=cast, **o: written_out(h.float(), *rest, cast=cast, **o),
                hidden, 0.1, mask, upstream=1000.0, **options,
            )  # fmt: skip
            found = results(
                pooled_info_nce, hidden, 0.1, mask, upstream=1000.0, precision=precision, backend=backend, **options
            )
            for i, (true, one, other) in enumerate(zip(truth, found, plain, strict=True)):
                # A cosine of 1 is off by 2 ** -24 in fp32, the logits by that much over the temperature, and the slope
                # in the temperature, for an upstream gradient of 1000, by that much over its square.
                size = max(float(true.abs().max()), (10, 0, 1e5)[i])
                floor = 4 * size * torch.finfo(dtype if i == 1 else torch.float32).eps
                errors = torch.tensor([(one - true).abs().max(), (other - true).abs().max(), floor])
                worst[i] = worst[i].maximum(errors)
        for i, (one, other, floor) in enumerate(worst.tolist()):
            assert one <= (3 if i else 2) * other + floor, (dtype, precision, i, one, other, floor)


@over_backends
@pytest.mark.parametrize("choice", ["reverse", "symmetric"])
def test_rows_without_tokens_and_what_does_not_count(backend, choice):
    hidden, mask, flat, ends = states(4, 5, 6, torch.float32)
    hidden.masked_fill_(~mask.unsqueeze(2), math.nan)
    mask[2] = False
    hidden[2] = math.nan
    flat = torch.cat([torch.full((2, 6), math.nan), flat, torch.full((1, 6), math.inf)])
    ends = ends + 2
    ends[1] = ends[2]  # the second row is empty
    for x, given, cuts in ((hidden, (mask,), {}), (flat, (), {"cu_seqlens": ends})):
        expected = results(written_out, x.double(), 0.3, *given, **cuts, **CHOICES[choice])
        found = results(pooled_info_nce, x, 0.3, *given, backend=backend, **cuts, **CHOICES[choice])
        for one, other in zip((found[0], found[2]), (expected[0], expected[2]), strict=True):
            torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-5)
        assert found[1].isfinite().all() and (found[1][x.isfinite().logical_not()] == 0).all()
        x[-2 if cuts else 0, ..., 0] = math.nan  # this one counts
        assert pooled_info_nce(x, *given, temperature=0.3, backend=backend, **cuts).isnan()


@over_backends
def test_only_what_is_needed(backend):
    hidden, mask, *_ = states(5, 4, 6, torch.float32)
    _, *expected = results(pooled_info_nce, hidden, 0.3, mask, backend=backend)
    for wanted in itertools.product((False, True), repeat=2):
        parts = [x.clone().requires_grad_(want) for x, want in zip((hidden, torch.tensor([0.3])), wanted, strict=True)]
        with torch.no_grad():
            assert not pooled_info_nce(parts[0], mask, temperature=parts[1], backend=backend).requires_grad
        loss = pooled_info_nce(parts[0], mask, temperature=parts[1], backend=backend)
        assert loss.requires_grad == any(wanted)
        if any(wanted):
            loss.backward()
        for part, want, grad in zip(parts, wanted, expected, strict=True):
            assert (part.grad is not None) == want
            if part.grad is not None:
                torch.testing.assert_close(part.grad.double().view(grad.shape), grad, rtol=1e-5, atol=1e-6)


@over_backends
def test_backward_twice_scaled_views_and_autocast(backend):
    hidden, mask, *_ = states(5, 7, 6, torch.float32)
    wide = hidden.transpose(0, 2).contiguous().transpose(0, 2).requires_grad_()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        loss, same = (pooled_info_nce(wide, mask, temperature=0.1, symmetric=True, backend=backend) for _ in range(2))
    assert loss.dtype == torch.float32 and torch.equal(loss, same)
    torch.testing.assert_close(loss, written_out(wide, mask, temperature=0.1, symmetric=True))
    once, again = (torch.autograd.grad(loss, wide, retain_graph=True)[0] for _ in range(2))
    [scaled] = torch.autograd.grad(loss, wide, torch.tensor(1024.0))
    assert torch.equal(once, again) and once.is_contiguous()
    torch.testing.assert_close(scaled, once * 1024)
    _, grad, _ = results(pooled_info_nce, hidden, 0.1, mask, symmetric=True, backend=backend)
    torch.testing.assert_close(once.double(), grad, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("backend", [name for name in BACKENDS if name != "triton"])
def test_fast_is_passed_on(backend):
    hidden, mask, *_ = states(5, 4, 64, torch.float32)
    fast, exact = (
        pooled_info_nce(hidden, mask, temperature=0.1, precision=word, backend=backend) for word in ("fast", "exact")
    )
    halves = masked_mean_pool.masked_mean_pool(hidden, mask).chunk(2)
    assert torch.equal(fast, info_nce.info_nce(*halves, temperature=0.1, precision="fast"))
    assert fast != exact


def test_no_gradient_work_for_a_detached_half(monkeypatch):
    hidden, mask, *_ = states(5, 4, 6)
    asked = []
    original = info_nce.loss_and_gradients

    def noted(*args, needs, **options):
        asked.append(needs)
        return original(*args, needs=needs, **options)

    monkeypatch.setattr(info_nce, "loss_and_gradients", noted)
    for reverse, side in itertools.product((False, True), ("source", "target")):
        hidden.requires_grad_()
        twin.pooled_info_nce(hidden, mask, temperature=0.1, reverse=reverse, detach=side)
    assert asked == [(False, True, False), (True, False, False), (True, False, False), (False, True, False)]


def test_memory(monkeypatch):
    """A chunk of the states, a panel of the matrix; their gradient only in the backward."""
    monkeypatch.setattr(masked_mean_pool, "CHUNK_BYTES", 64 * 1024)
    monkeypatch.setattr(info_nce, "PANEL_BYTES", 64 * 1024)
    hidden = states(256, 16, 16, torch.float32)[0].requires_grad_()
    mask = torch.ones(512, 16, dtype=torch.bool)

    def peak(step) -> int:
        with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as recorded:
            step()
        events: Any = recorded.profiler
        changes = (event.nbytes() for event in events.kineto_results.events() if event.name() == "[memory]")
        return max(itertools.accumulate(changes, initial=0))

    size, pooled = hidden.numel() * 4, 512 * 16 * 4
    assert pooled <= peak(lambda: twin.pooled_info_nce(hidden, mask, temperature=0.1)) < 5 * pooled + 128 * 1024 < size
    loss = twin.pooled_info_nce(hidden, mask, temperature=0.1)
    assert size <= peak(loss.backward) < size + 3 * pooled


@over_backends
def test_errors(backend):
    x, mask, ids = torch.ones(4, 3, 5), torch.ones(4, 3), torch.arange(2)
    mistakes: list[tuple[type[Exception], str, dict[str, Any]]] = [
        (ValueError, "need 2N rows.*got 3", {"hidden": x[:3], "mask": mask[:3]}),
        (ValueError, "need 2N rows.*got 3", {"hidden": x[0], "mask": None, "cu_seqlens": torch.tensor([0, 1, 2, 3])}),
        (ValueError, r"mask \(N, T\)", {"mask": mask[:3]}),
        (TypeError, "hidden must be floating point", {"hidden": x.long()}),
        (ValueError, "not both", {"cu_seqlens": torch.tensor([0, 1, 2])}),
        (ValueError, "within the 3 tokens", {"hidden": x[0], "mask": None, "cu_seqlens": torch.tensor([0, 1, 9])}),
        (ValueError, "detach must be None, 'source' or 'target', not 'both'", {"detach": "both"}),
        (ValueError, "detach must be None, 'source' or 'target', not False", {"detach": False}),
        (ValueError, "precision must be", {"precision": "bf16"}),
        (ValueError, "finite and above 0", {"temperature": 0}),
        (ValueError, "finite and above 0", {"temperature": torch.tensor(math.nan)}),
        (ValueError, "one number", {"temperature": torch.ones(2)}),
        (TypeError, "must be a number", {"temperature": "0.1"}),
        (ValueError, "or neither", {"source_ids": ids}),
        (ValueError, r"source_ids must be \(2,\), got \(4,\)", {"source_ids": torch.arange(4), "target_ids": ids}),
        (TypeError, "target_ids must be integers", {"source_ids": ids, "target_ids": ids / 1}),
    ]
    for kind, match, wrong in mistakes:
        with pytest.raises(kind, match=match):
            pooled_info_nce(backend=backend, **{"hidden": x, "mask": mask, "temperature": 0.1, **wrong})
    for module, word in ((fastalign_kernels, "cuda"), (twin, "cuda"), (twin, "triton")):
        with pytest.raises(ValueError, match="this is the PyTorch twin" if word == "triton" else "backend must be"):
            module.pooled_info_nce(x, mask, temperature=0.1, backend=word)
