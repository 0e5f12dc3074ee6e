"""What a forward and backward need in memory, and what is there."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch

from fastalign.errors import FastalignError


def activation_bytes(
    model_config: Any, rows: int, width: int, layers: int, itemsize: int, *, checkpointing: bool, logits: bool
) -> int:
    """Predicted peak of the tensors that one forward and backward hold above weights, gradients and optimizer.

    Per token, a block with fused attention keeps about 7 D for norms, residuals and projections, 2 D_kv for keys
    and values, and 4 F for the gated feed-forward; with checkpointing it keeps its input only, and one block at a
    time is live. Logits are held with their gradient, and in fp32 for the loss. Measured on Llamas (see the test)
    this is right within a third; attention that is not fused needs rows x heads x width**2 a layer more.

    Args:
        model_config: of the text decoder, from transformers.
        rows, width: shape of the padded batch.
        layers: blocks that run.
        itemsize: bytes of a number in the activations.
        checkpointing: whether activations are recomputed.
        logits: whether the head runs.
    """
    hidden = model_config.hidden_size
    heads = getattr(model_config, "num_attention_heads", None) or 1
    head = getattr(model_config, "head_dim", None) or hidden // heads
    keys = (getattr(model_config, "num_key_value_heads", None) or heads) * head
    inner = getattr(model_config, "intermediate_size", None) or 4 * hidden
    block = itemsize * (7 * hidden + 2 * keys + 4 * inner)
    per_token = itemsize * hidden * layers + block if checkpointing else block * layers
    if logits:
        per_token += model_config.vocab_size * (2 * itemsize + 4)
    return rows * width * per_token


def free_bytes(device: torch.device) -> int:
    """Memory that a process can still get: of the GPU, with what PyTorch holds back, or of the machine."""
    if device.type == "cuda":
        held_back = torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
        return torch.cuda.mem_get_info(device)[0] + held_back
    import psutil

    return psutil.virtual_memory().available


def is_out_of_memory(error: BaseException) -> bool:
    """Whether an exception says that memory has run out, on a GPU or on the CPU; not one that was told already."""
    if isinstance(error, FastalignError):
        return False
    if isinstance(error, (torch.OutOfMemoryError, MemoryError)):
        return True
    signs = ("out of memory", "can't allocate memory", "CUBLAS_STATUS_ALLOC_FAILED")
    return isinstance(error, RuntimeError) and any(sign.lower() in str(error).lower() for sign in signs)


@contextmanager
def told_out_of_memory(tell: Callable[[str], FastalignError]) -> Iterator[None]:
    """Raises what `tell` makes of the first line of the error where memory runs out; lets all else pass."""
    try:
        yield
    except (MemoryError, RuntimeError) as error:
        if not is_out_of_memory(error):
            raise
        raise tell(first_line(error)) from error


def gigabytes(count: float) -> str:
    """``1.23 GB``; below a gigabyte in MB."""
    return f"{count / 1e9:.2f} GB" if count >= 1e9 else f"{count / 1e6:.0f} MB"


def first_line(error: BaseException) -> str:
    """The first sentence of an error, at most 100 characters."""
    lines = str(error).strip().splitlines() or [type(error).__name__]
    return lines[0].split(". GPU")[0].rstrip(".")[:100]
