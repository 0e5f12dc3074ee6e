"""Masked mean pooling against a mean taken row by row."""

from __future__ import annotations

import pytest
import torch

from fastalign_kernels.reference.masked_mean_pool import masked_mean_pool


def row_by_row(hidden: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
    rows = []
    for states, keep in zip(hidden.double(), mask, strict=True):
        kept = [state for state, flag in zip(states, keep.tolist(), strict=True) if flag]
        rows.append(sum(kept) / len(kept) if kept else torch.zeros(hidden.shape[2], dtype=torch.float64))
    return torch.stack(rows)


def states(rows: int, tokens: int, width: int, dtype=torch.float64) -> torch.Tensor:
    return torch.randn(rows, tokens, width, generator=torch.Generator().manual_seed(0), dtype=torch.float64).to(dtype)


PATTERNS = {
    "all": [[1, 1, 1, 1], [1, 1, 1, 1], [1, 1, 1, 1]],
    "right padding": [[1, 1, 1, 0], [1, 0, 0, 0], [1, 1, 1, 1]],
    "left padding": [[0, 1, 1, 1], [0, 0, 0, 1], [1, 1, 1, 1]],
    "first left out": [[0, 1, 1, 0], [0, 1, 0, 0], [0, 1, 1, 1]],
    "holes": [[1, 0, 1, 0], [0, 1, 0, 1], [1, 0, 0, 1]],
    "an empty row": [[1, 0, 1, 0], [0, 0, 0, 0], [1, 0, 0, 1]],
    "empty": [[0] * 4] * 3,
}


@pytest.mark.parametrize("pattern", PATTERNS)
@pytest.mark.parametrize(
    "mask_dtype", [torch.int64, torch.int32, torch.uint8, torch.bool, torch.float32, torch.bfloat16]
)
def test_any_mask_of_any_dtype(pattern, mask_dtype):
    hidden, mask = states(3, 4, 5), torch.tensor(PATTERNS[pattern]).to(mask_dtype)
    pooled = masked_mean_pool(hidden, mask)
    torch.testing.assert_close(pooled, row_by_row(hidden, mask), rtol=1e-14, atol=1e-14)


def test_any_number_but_zero_marks_a_token_with_weight_1():
    hidden = states(2, 3, 4)
    odd = torch.tensor([[0.0, 2.5, -1.0], [1e-30, 0.0, 0.5]])
    torch.testing.assert_close(masked_mean_pool(hidden, odd), masked_mean_pool(hidden, odd != 0))


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), -float("inf")])
def test_what_stands_in_tokens_that_do_not_count_has_no_influence(bad):
    mask = torch.tensor(PATTERNS["an empty row"])
    hidden = states(3, 4, 5)
    spoilt = hidden.masked_fill((mask == 0).unsqueeze(2), bad).requires_grad_()
    pooled = masked_mean_pool(spoilt, mask)
    torch.testing.assert_close(pooled, row_by_row(hidden, mask), rtol=1e-14, atol=1e-14)
    (pooled * torch.arange(1.0, 6.0)).sum().backward()
    share = mask / mask.sum(1, keepdim=True).clamp(min=1)
    assert spoilt.grad is not None
    torch.testing.assert_close(spoilt.grad, share.unsqueeze(2) * torch.arange(1.0, 6.0).double())


@pytest.mark.parametrize("pattern", PATTERNS)
def test_gradients(pattern):
    hidden = states(3, 4, 2).requires_grad_()
    torch.autograd.gradcheck(lambda h: masked_mean_pool(h, torch.tensor(PATTERNS[pattern])), (hidden,))


@pytest.mark.parametrize(
    ("dtype", "expected"),
    [
        (torch.bfloat16, torch.float32),
        (torch.float16, torch.float32),
        (torch.float32, torch.float32),
        (torch.float64, torch.float64),
    ],
)
def test_dtypes(dtype, expected):
    hidden = states(3, 4, 5, dtype).requires_grad_()
    pooled = masked_mean_pool(hidden, torch.tensor(PATTERNS["holes"]))
    assert pooled.dtype == expected
    pooled.sum().backward()
    assert hidden.grad is not None and hidden.grad.dtype == dtype


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_is_added_up_in_fp32(dtype):
    """An outlier of 500 beside values below one, and more tokens than bf16 can count."""
    hidden = 0.01 * states(2, 1000, 3, torch.float32) + 0.3
    hidden[:, 0] = 500
    hidden = hidden.to(dtype)
    mask = torch.ones(2, 1000)
    pooled = masked_mean_pool(hidden, mask)
    torch.testing.assert_close(pooled.double(), row_by_row(hidden, mask), rtol=1e-5, atol=0)  # measured: 3e-7
    coarse = hidden.sum(1) / 1000  # a sum that is half precision in the end
    assert ((coarse.double() - row_by_row(hidden, mask)).abs() > 1e-4).any()


def test_sums_beyond_the_range_of_fp16():
    hidden = torch.full((1, 64, 2), 60_000.0, dtype=torch.float16)
    torch.testing.assert_close(masked_mean_pool(hidden, torch.ones(1, 64)), torch.full((1, 2), 60_000.0))


def test_views_and_empty_shapes():
    hidden = states(4, 3, 5).transpose(0, 1)
    mask = torch.tensor(PATTERNS["holes"])
    torch.testing.assert_close(masked_mean_pool(hidden, mask), row_by_row(hidden, mask))
    assert masked_mean_pool(torch.zeros(0, 4, 5), torch.zeros(0, 4)).shape == (0, 5)
    assert torch.equal(masked_mean_pool(torch.zeros(2, 0, 5), torch.zeros(2, 0)), torch.zeros(2, 5))


def test_errors():
    hidden = states(3, 4, 5)
    for mask in (torch.ones(3, 5), torch.ones(4), torch.ones(3, 4, 1), torch.ones(4, 3), torch.ones(1, 4)):
        with pytest.raises(ValueError, match=r"need hidden \(N, T, D\) and mask \(N, T\)"):
            masked_mean_pool(hidden, mask)
    with pytest.raises(ValueError, match="need hidden"):
        masked_mean_pool(hidden[0], torch.ones(4, 5))
    with pytest.raises(TypeError, match="floating point"):
        masked_mean_pool(hidden.long(), torch.ones(3, 4))
