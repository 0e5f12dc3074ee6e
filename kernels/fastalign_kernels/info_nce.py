"""InfoNCE on cosines, gradients made on the way: in a few small launches while all cosines stay in the L2 cache, on
library matrix products and panels of rows above.

    c[i, j] = <s_i, t_j> / (|s_i| |t_j|)
    loss = mean_i  logsumexp_j(c[i, j] / tau) - c[i, o + i] / tau        symmetric: the mean of this and of the columns'

Shapes: source (N, D), target (M, D), positive of row i at o + i; equal ids are left out of the sum. fp32 accumulation.
(Liu & Niehues 2025, arXiv 2502.14830; van den Oord et al. 2018, arXiv 1807.03748, eq. 4.)

With p the softmax and G = p - onehot (for columns too, if symmetric), W[i, j] = G[i, j] / (|s_i| |t_j|) and a constant
f = 1 / (N tau), the gradient needs no normalised vectors:

    u = W t,     d s_i = f (u_i - <u_i, s_i> s_i / |s_i|^2)          v = W^T s, d t_j likewise
    d tau = -f / tau * sum_ij G[i, j] c[i, j]

Never made: unit vectors, or anything by atomics: the same input gives the same bits. The products and W are made
- fused (`regimes/fused.py`): in the L2 cache, up to 256 rows a side, in three launches and a projection;
- dense (`regimes/panels.py`): in memory, all at once, by library matrix products: 6 N M D FLOPs;
- panels (the same file): some rows at a time, never more than PANEL_BYTES: 6 N M D, 8 N^2 D if symmetric.
Bytes of a panel of R rows: R M (4 + b), b = 2 (fast: bf16 operands) or 4 (exact). Operands are read by every panel.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence

import torch

from fastalign_kernels._dispatch import on_device, use_triton
from fastalign_kernels.reference import info_nce as reference
from fastalign_kernels.regimes import Problem, fused, panels

REGIMES = ("fused", "dense", "panels")
FUSED = fused.LIMIT  # a prediction until measured: `benchmarks/bench_info_nce.py --regimes` finds the crossover
PANEL_BYTES = 384 << 20  # just holds N = M = 8192 in fast

_forced: str | None = None


def regime(rows: int, targets: int, *, fast: bool) -> str:
    """Which of REGIMES a size gets."""
    if _forced is not None:
        return _forced
    if max(rows, targets) <= FUSED:
        return "fused"
    return "dense" if _panel_rows(rows, targets, fast) == rows else "panels"


@contextlib.contextmanager
def forced_regime(name: str) -> Iterator[None]:
    """For benchmarks and tests: this regime inside the `with`, whatever the size; `fused` up to its limit."""
    global _forced
    if name not in REGIMES:
        raise ValueError(f"no regime {name!r}, only {', '.join(REGIMES)}")
    before, _forced = _forced, name
    try:
        yield
    finally:
        _forced = before


def loss_and_gradients(
    source: torch.Tensor,
    target: torch.Tensor,
    temperature: float,
    *,
    symmetric: bool,
    target_offset: int,
    source_ids: torch.Tensor | None,
    target_ids: torch.Tensor | None,
    fast: bool,
    needs: Sequence[bool],
    grads: Sequence[torch.Tensor] | None = None,
    alongs: Sequence[torch.Tensor] | None = None,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    """The loss on Triton and its gradients for an upstream gradient of 1; same contract as the twin's.

    `grads`: where to write the gradients of source and target, contiguous, if not to new memory. `alongs`: leave their
    projection to the caller, see `regimes.fused.run`.
    """
    kept = [reference.gradient_dtype(x.dtype) for x in (source, target)]
    dtype = source.dtype if source.dtype == target.dtype else torch.float32
    source, target = (x.to(dtype) if x.stride(1) == 1 else x.to(dtype).contiguous() for x in (source, target))
    grad_source, grad_target = grads or (
        x.new_empty(x.shape if needed else 0, dtype=dtype)
        for x, needed, dtype in zip((source, target), needs, kept, strict=False)
    )
    unused = source.new_empty(0, dtype=torch.int64)
    problem = Problem(
        source=source,
        target=target,
        source_ids=unused if source_ids is None else source_ids.long().contiguous(),
        target_ids=unused if target_ids is None else target_ids.long().contiguous(),
        with_ids=source_ids is not None,
        grad_source=grad_source,
        grad_target=grad_target,
        for_source=needs[0],
        for_target=needs[1],
        for_temperature=needs[2],
        temperature=temperature,
        symmetric=symmetric,
        offset=target_offset,
    )
    name = regime(len(source), len(target), fast=fast)
    with on_device(source):
        if name == "fused":
            loss, slope = fused.run(problem, alongs)
        else:
            rows = len(source) if name == "dense" else _panel_rows(len(source), len(target), fast)
            with torch.autocast(source.device.type, enabled=False), _ieee_fp32():
                loss, slope = panels.run(problem, rows, torch.bfloat16 if fast else torch.float32)
    return loss, grad_source, grad_target, slope if needs[2] else slope.new_empty(0)


@contextlib.contextmanager
def _ieee_fp32() -> Iterator[None]:
    """No TF32 in library products, whatever the program around us allows."""
    matmul = torch.backends.cuda.matmul
    before = matmul.fp32_precision
    matmul.fp32_precision = "ieee"
    try:
        yield
    finally:
        matmul.fp32_precision = before


def _panel_rows(rows: int, targets: int, fast: bool) -> int:
    fitting = PANEL_BYTES // (targets * (4 + (2 if fast else 4)))
    return min(rows, max(fitting // 128 * 128, min(fitting, 128), 1))


@torch.library.custom_op("fastalign::info_nce", mutates_args=())
def _forward(
    source: torch.Tensor,
    target: torch.Tensor,
    temperature: torch.Tensor,
    symmetric: bool,
    target_offset: int,
    source_ids: torch.Tensor | None,
    target_ids: torch.Tensor | None,
    fast: bool,
    needs: Sequence[bool],
    backend: str,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    reference.check_temperature(tau := float(temperature))
    run = loss_and_gradients if use_triton(backend, source) else reference.loss_and_gradients
    return run(
        source,
        target,
        tau,
        symmetric=symmetric,
        target_offset=target_offset,
        source_ids=source_ids,
        target_ids=target_ids,
        fast=fast,
        needs=needs,
    )


@_forward.register_fake
def _(source, target, temperature, symmetric, target_offset, source_ids, target_ids, fast, needs, backend):
    dtype = torch.promote_types(torch.promote_types(source.dtype, target.dtype), torch.float32)
    scalar = source.new_empty((), dtype=dtype)
    grads = [
        x.new_empty(x.shape if needed else 0, dtype=reference.gradient_dtype(x.dtype))
        for x, needed in ((source, needs[0]), (target, needs[1]))
    ]
    return scalar, *grads, torch.empty_like(scalar) if needs[2] else scalar.new_empty(0)


def _save(ctx, inputs, output):
    ctx.set_materialize_grads(False)  # else every output without a gradient gets one, of zeros, in the backward
    source, target, temperature, *_, ctx.needs, _ = inputs
    ctx.mark_non_differentiable(*output[1:])
    ctx.likes = [(x.shape, x.dtype, x.device) for x in (source, target, temperature)]
    ctx.save_for_backward(*output[1:])


@torch.library.custom_op("fastalign::scaled", mutates_args=())
def scaled(grad: torch.Tensor, upstream: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """A gradient made in the forward, times the upstream one. It has no derivative: a second one is refused."""
    return (grad * upstream).to(dtype)


@scaled.register_fake
def _(grad, upstream, dtype):
    return torch.empty_like(grad, dtype=dtype)


def _differentiate(ctx, upstream, *_):
    if upstream is None:  # the loss was not used
        return (None,) * 10
    grads = [
        scaled(grad, upstream, dtype).to(device).reshape(shape) if needed else None
        for grad, (shape, dtype, device), needed in zip(ctx.saved_tensors, ctx.likes, ctx.needs, strict=True)
    ]
    return *grads, None, None, None, None, None, None, None


_forward.register_autograd(_differentiate, setup_context=_save)


def info_nce(
    source: torch.Tensor,
    target: torch.Tensor,
    *,
    temperature: float | torch.Tensor,
    symmetric: bool = False,
    target_offset: int = 0,
    source_ids: torch.Tensor | None = None,
    target_ids: torch.Tensor | None = None,
    precision: str = "exact",
    backend: str = "auto",
) -> torch.Tensor:
    """Contrastive loss: every source row has to find its own target row among all targets.

    Args:
        source: (N, D), floating point: rows are normalised here. Triton takes norms from 1e-15 to 1e15, the twin any; a
            norm too small for Triton makes a row of zeros (cosine 0 with all), one too large makes the loss NaN.
        target: (M, D), M >= N, for example the targets gathered from all ranks; row target_offset + i
            belongs to source row i.
        temperature: above 0; the cosines are divided by it. A tensor of one element can get a gradient; on a GPU its
            value is read back, which waits for the GPU.
        symmetric: the mean of the losses of both directions; needs M = N.
        source_ids, target_ids: (N,) and (M,) integers that name the meaning. Where they are equal, the target is no
            negative of the source. Both or neither.
        precision: `exact`: fp32 throughout, no TF32. `fast`: operands of the matrix products in bf16, accumulated in
            fp32; the cosines then err by about 1e-3 where few dimensions dominate.
        backend: `triton`, `torch` (the twin), or `auto`: Triton where it runs.

    Returns:
        A scalar in fp32 (fp64 for fp64 input, by the twin), the mean over the N rows and the directions. NaN if a row
        holds NaN or infinity. Can be differentiated once.

    Raises:
        ValueError: shapes, devices, ids or the temperature do not fit, or Triton cannot run here. TypeError: wrong
            dtypes. All before any kernel is launched.
    """
    reference.check(source, target, temperature, symmetric, target_offset, source_ids, target_ids, precision)
    temperature = torch.as_tensor(temperature, dtype=None if torch.is_tensor(temperature) else torch.float64)
    needs = [x.requires_grad and torch.is_grad_enabled() for x in (source, target, temperature)]
    fast = precision == "fast"
    return _forward(
        source, target, temperature, symmetric, target_offset, source_ids, target_ids, fast, needs, backend
    )[0]
