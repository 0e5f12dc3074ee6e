"""InfoNCE against its formula, written out in loops over plain numbers."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch

from fastalign_kernels.reference.info_nce import info_nce


def written_out(source, target, temperature, symmetric=False, source_ids: Any = None, target_ids: Any = None) -> float:
    """mean_i -log(exp(cos_ii / t) / sum_j exp(cos_ij / t)), without the j != i of equal ids."""

    def cosine(a: list[float], b: list[float]) -> float:
        dot = math.fsum(x * y for x, y in zip(a, b, strict=True))
        lengths = math.sqrt(math.fsum(x * x for x in a)) * math.sqrt(math.fsum(y * y for y in b))
        return dot / lengths if lengths else 0.0

    s, t = source.double().tolist(), target.double().tolist()
    size = len(s)
    total = 0.0
    for swapped in (False, True) if symmetric else (False,):
        for i in range(size):
            terms = []
            for j in range(size):
                row, column = (j, i) if swapped else (i, j)
                if i == j or source_ids is None or source_ids[row] != target_ids[column]:
                    terms.append(cosine(s[row], t[column]) / temperature)
            own = cosine(s[i], t[i]) / temperature
            total += math.log(math.fsum(math.exp(term - own) for term in terms)) / size
    return total / (2 if symmetric else 1)


def states(size: int, width: int, dtype=torch.float64, seed=0) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    source = torch.randn(size, width, generator=generator, dtype=torch.float64)
    target = source + 0.7 * torch.randn(size, width, generator=generator, dtype=torch.float64)
    return source.to(dtype), target.to(dtype)


@pytest.mark.parametrize("symmetric", [False, True])
@pytest.mark.parametrize("temperature", [0.05, 0.1, 1.0, 10.0])
@pytest.mark.parametrize(("size", "width"), [(1, 1), (2, 3), (7, 5), (33, 17)])
def test_the_formula(size, width, temperature, symmetric):
    source, target = states(size, width)
    loss = info_nce(source, target, temperature=temperature, symmetric=symmetric)
    assert loss.shape == () and loss.dtype == torch.float64
    assert loss.item() == pytest.approx(written_out(source, target, temperature, symmetric), rel=1e-12, abs=1e-12)


@pytest.mark.parametrize("symmetric", [False, True])
def test_pairs_of_equal_meaning_are_no_negatives(symmetric):
    source, target = states(9, 4)
    ids = torch.tensor([0, 1, 0, 2, 2, 3, 0, 4, 5])
    loss = info_nce(source, target, temperature=0.3, symmetric=symmetric, source_ids=ids, target_ids=ids)
    expected = written_out(source, target, 0.3, symmetric, ids.tolist(), ids.tolist())
    assert loss.item() == pytest.approx(expected, rel=1e-12)
    assert loss.item() < info_nce(source, target, temperature=0.3, symmetric=symmetric).item()


@pytest.mark.parametrize("symmetric", [False, True])
def test_ids_that_differ_between_the_sides(symmetric):
    source, target = states(6, 4)
    source_ids, target_ids = torch.tensor([0, 1, 2, 3, 4, 4]), torch.tensor([9, 0, 0, 3, 1, 5])
    loss = info_nce(source, target, temperature=0.3, symmetric=symmetric, source_ids=source_ids, target_ids=target_ids)
    expected = written_out(source, target, 0.3, symmetric, source_ids.tolist(), target_ids.tolist())
    assert loss.item() == pytest.approx(expected, rel=1e-12)
    swapped = written_out(source, target, 0.3, symmetric, target_ids.tolist(), source_ids.tolist())
    assert abs(expected - swapped) > 1e-3


def test_one_english_sentence_with_its_german_and_french():
    """The English target of the one is no negative of the other, and neither side is pushed away from it."""
    source, target = states(3, 4)
    target[2] = target[0]  # "Good morning." with Guten Morgen, and with Bonjour; Danke in between
    ids = torch.tensor([5, 8, 5])
    source.requires_grad_()
    loss = info_nce(source, target, temperature=0.1, source_ids=ids, target_ids=ids)
    loss.backward()
    cosines = torch.nn.functional.cosine_similarity(source.unsqueeze(1), target.unsqueeze(0), dim=2) / 0.1
    by_hand = 0.0
    for i, candidates in ((0, [0, 1]), (1, [0, 1, 2]), (2, [1, 2])):
        by_hand += (torch.logsumexp(cosines[i, candidates], 0) - cosines[i, i]).item() / 3
    assert loss.item() == pytest.approx(by_hand, rel=1e-12)
    assert source.grad is not None and source.grad.isfinite().all()
    two = info_nce(source[:2], target[:2], temperature=0.1)
    german = torch.logsumexp(cosines[0, [0, 1]], 0) - cosines[0, 0]
    spanish = torch.logsumexp(cosines[1, [0, 1]], 0) - cosines[1, 1]
    assert two.item() == pytest.approx(((german + spanish) / 2).item(), rel=1e-12)


@pytest.mark.parametrize("symmetric", [False, True])
@pytest.mark.parametrize("masked", [False, True])
def test_gradients(symmetric, masked):
    source, target = states(5, 3)
    ids = torch.tensor([0, 1, 0, 2, 1]) if masked else None
    torch.autograd.gradcheck(
        lambda s, t: info_nce(s, t, temperature=0.5, symmetric=symmetric, source_ids=ids, target_ids=ids),
        (source.requires_grad_(), target.requires_grad_()),
    )


def test_the_direction_is_from_source_to_target():
    source = torch.tensor([[1.0, 0.0], [0.0, 1.0]])
    target = torch.tensor([[1.0, 0.0], [1.0, 1e-3]])
    one, other = (info_nce(a, b, temperature=0.1).item() for a, b in ((source, target), (target, source)))
    assert one == pytest.approx(written_out(source, target, 0.1), rel=1e-5)
    assert abs(one - other) > 0.1
    both = info_nce(source, target, temperature=0.1, symmetric=True).item()
    assert both == pytest.approx((one + other) / 2, rel=1e-6)


@pytest.mark.parametrize("scale", [1e-35, 1e-20, 1.0, 1e3, 1e15, 1e25, 3e37])
def test_length_does_not_matter(scale):
    """Squares of the states of these lengths overflow, or vanish, in fp32."""
    source, target = states(8, 16, torch.float32)
    plain = info_nce(source, target, temperature=0.1)
    scaled = [source * scale, target * scale]
    for state in scaled:
        state.requires_grad_()
    loss = info_nce(*scaled, temperature=0.1)
    assert loss.item() == pytest.approx(plain.item(), rel=1e-5)
    loss.backward()
    source.requires_grad_()
    info_nce(source, target, temperature=0.1).backward()
    assert scaled[0].grad is not None and source.grad is not None
    if 1e-30 < scale < 1e30:  # beyond, the gradient itself leaves fp32
        torch.testing.assert_close(scaled[0].grad * scale, source.grad, rtol=1e-4, atol=1e-6)


def test_rows_of_zeros_have_cosine_0_and_a_finite_gradient():
    source, target = states(4, 3)
    source[1] = 0
    target[2] = 0
    source.requires_grad_()
    target.requires_grad_()
    loss = info_nce(source, target, temperature=0.1, symmetric=True)
    assert loss.item() == pytest.approx(written_out(source.detach(), target.detach(), 0.1, True), rel=1e-12)
    loss.backward()
    for side in (source, target):
        assert side.grad is not None and side.grad.abs().max() < 100


def test_one_pair_has_nothing_to_tell_apart():
    source, target = (state.requires_grad_() for state in states(1, 4))
    for symmetric in (False, True):
        loss = info_nce(source, target, temperature=0.1, symmetric=symmetric)
        assert loss.item() == 0
        loss.backward()
        assert source.grad is not None and (source.grad == 0).all()


def test_all_pairs_of_one_meaning_have_nothing_to_tell_apart():
    source, target = states(5, 4)
    ids = torch.zeros(5, dtype=torch.int64)
    assert info_nce(source, target, temperature=0.1, source_ids=ids, target_ids=ids).item() == 0


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
def test_works_in_fp32_also_under_autocast(dtype):
    """Cosines of 0.998 and 1 are one number in bf16."""
    source, target = states(16, 8, torch.float32)
    source, target = 20 + source.to(dtype).float(), 20 + target.to(dtype).float()
    source, target = source.to(dtype).requires_grad_(), target.to(dtype)
    expected = written_out(source.detach(), target, 0.05)
    for enabled in (False, True):
        with torch.autocast("cpu", dtype=torch.bfloat16, enabled=enabled):
            loss = info_nce(source, target, temperature=0.05)
        assert loss.dtype == torch.float32
        assert loss.item() == pytest.approx(expected, rel=2e-4)  # measured: 2e-5
    loss.backward()
    assert source.grad is not None and source.grad.dtype == dtype
    assert info_nce(source.double(), target, temperature=1.0).dtype == torch.float64


def test_no_side_effect_on_what_goes_in():
    source, target = states(4, 3)
    ids = torch.tensor([0, 1, 0, 2])
    before = [part.clone() for part in (source, target, ids)]
    info_nce(source, target, temperature=0.1, symmetric=True, source_ids=ids, target_ids=ids)
    assert all(torch.equal(part, old) for part, old in zip((source, target, ids), before, strict=True))


def test_errors():
    source, target = states(4, 3)
    ids = torch.arange(4)
    for bad in ((source[0], target[0]), (source, target[:3]), (source, target[:, :2]), (source[:0], target[:0])):
        with pytest.raises(ValueError, match=r"need source and target \(N, D\)"):
            info_nce(*bad, temperature=0.1)
    with pytest.raises(ValueError, match="need source and target"):
        info_nce(source[:, :0], target[:, :0], temperature=0.1)
    with pytest.raises(TypeError, match="floating point"):
        info_nce(source.long(), target, temperature=0.1)
    with pytest.raises(TypeError, match="floating point"):
        info_nce(source, target.long(), temperature=0.1)
    for temperature in (0.0, -1.0, float("nan")):
        with pytest.raises(ValueError, match="temperature must be above 0"):
            info_nce(source, target, temperature=temperature)
    for one in ({"source_ids": ids}, {"target_ids": ids}):
        with pytest.raises(ValueError, match="or neither"):
            info_nce(source, target, temperature=0.1, **one)  # type: ignore[arg-type]
    for wrong in (ids[:3], ids.unsqueeze(1)):
        with pytest.raises(ValueError, match=r"ids must be \(4,\)"):
            info_nce(source, target, temperature=0.1, source_ids=wrong, target_ids=ids)
        with pytest.raises(ValueError, match=r"ids must be \(4,\)"):
            info_nce(source, target, temperature=0.1, source_ids=ids, target_ids=wrong)
