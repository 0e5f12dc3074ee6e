"""Sentence vectors: the pooled states of a middle layer."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import torch

from fastalign.data.tokenization import SentenceTokenizer
from fastalign.errors import ConfigError
from fastalign.model.early_exit import hidden_at
from fastalign_kernels import masked_mean_pool

if TYPE_CHECKING:
    from torch import nn
    from transformers import PreTrainedTokenizerBase


def pooled_at(model: nn.Module, layers: Sequence[int], batch: dict[str, torch.Tensor]) -> list[torch.Tensor]:
    """Sentence vectors of one batch at several layers, from one forward that stops at the highest.

    Args:
        model: a causal model, in whatever wraps it.
        layers: indices, 1 to L.
        batch: input_ids, attention_mask and pool_mask, each (N, T), as `SentenceTokenizer` makes them.

    Returns:
        One (N, D) fp32 tensor per layer.
    """
    inputs = {"input_ids": batch["input_ids"], "attention_mask": batch["attention_mask"]}
    return [masked_mean_pool(state, batch["pool_mask"]) for state in hidden_at(model, list(layers), **inputs)]


@torch.no_grad()
def encode(
    model: nn.Module,
    tokenizer: PreTrainedTokenizerBase | SentenceTokenizer,
    texts: Sequence[str],
    layer: int,
    batch_size: int = 32,
) -> torch.Tensor:
    """Sentence vectors of texts at a layer, pooled as in training: mean of the tokens, the first one left out.

    Args:
        model: a causal model, in whatever wraps it; its training mode is left as it was found.
        tokenizer: the model's, or a `SentenceTokenizer` for other pooling.
        texts: N sentences.
        layer: index, 1 to L.
        batch_size: sentences per forward; they are sorted by length, so that little is padded.

    Returns:
        (N, D) fp32 on the CPU, in the order of `texts`.

    Raises:
        ConfigError: `layer` is out of range. ModelError: the model is not a supported decoder.
        TypeError: `texts` is one text.
    """
    if not isinstance(tokenizer, SentenceTokenizer):
        tokenizer = SentenceTokenizer(tokenizer)
    if isinstance(texts, str):
        raise TypeError("texts must be a list of sentences, not one text")
    device = next(model.parameters()).device
    order = sorted(range(len(texts)), key=lambda i: len(texts[i]), reverse=True)
    vectors: list[torch.Tensor] = [torch.empty(0)] * len(texts)
    training = model.training
    model.eval()
    try:
        for start in range(0, len(order), batch_size):
            chosen = order[start : start + batch_size]
            batch = {name: part.to(device) for name, part in tokenizer([texts[i] for i in chosen]).items()}
            for i, vector in zip(chosen, pooled_at(model, [layer], batch)[0].cpu(), strict=True):
                vectors[i] = vector
    finally:
        model.train(training)
    return torch.stack(vectors) if vectors else torch.empty(0, 0)


def resolve_layer(spec: int | float | str, num_layers: int) -> int:
    """A layer index from the config's ``alignment.layer``: an index, a fraction of the depth, or ``middle``.

    Raises:
        ConfigError: the index is outside 1..num_layers.
    """
    if spec == "middle":
        spec = 0.5
    index = max(1, round(spec * num_layers)) if isinstance(spec, float) else spec
    if not isinstance(index, int) or not 1 <= index <= num_layers:
        raise ConfigError(f"alignment.layer: {spec} is outside 1..{num_layers}, the layers of this model")
    return index
