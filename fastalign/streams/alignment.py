"""The alignment stream: sentence pairs, InfoNCE on their pooled states at middle layers."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

import torch
from torch import nn

from fastalign.config import AlignmentConfig
from fastalign.data.parallel import Pair
from fastalign.data.sampling import Sampler
from fastalign.data.streaming import StreamedRows
from fastalign.data.tokenization import SentenceTokenizer
from fastalign.model.early_exit import hidden_at
from fastalign.model.encode import pooled_at
from fastalign.objectives.info_nce import alignment_loss, alignment_loss_of_vectors
from fastalign.streams.base import MicroBatch, Stream, my_share, rank_and_world_size, sum_over_ranks, with_other_ranks
from fastalign.streams.gradient_cache import GradientCache


class AlignmentStream(Stream):
    """Both sides of all pairs of a micro-batch go through one forward that stops at the highest layer.

    All pairs of an optimizer step are each other's negatives, those of this rank or of all ranks; where they take
    several micro-batches, through cached gradients.

    Args:
        train, held_out: pairs.
        tokenizer: makes a padded batch of sentences.
        sampler: order of `train`.
        config: temperature, direction, weight and so on.
        layers: resolved indices, 1 to L.
        accumulation: forwards of the task in an optimizer step; sets the default micro-batch.
    """

    name = "alignment"

    def __init__(
        self,
        train: Sequence[Pair] | StreamedRows,
        held_out: Sequence[Pair],
        tokenizer: SentenceTokenizer,
        sampler: Sampler | StreamedRows,
        config: AlignmentConfig,
        layers: Sequence[int],
        *,
        accumulation: int,
    ):
        self.train, self.held_out, self.tokenizer, self.sampler = train, held_out, tokenizer, sampler
        self.config, self.layers = config, list(layers)
        weights = config.layer_weights or [1.0] * len(layers)
        self.layer_weights = [weight / sum(weights) for weight in weights]
        self.weight = config.weight
        self.rows_per_step = config.batch_size
        self.micro_batch_size = config.micro_batch_size or -(-config.batch_size // accumulation)
        self.blocks = max(layers)
        self.memory_keys = (
            f"lower alignment.micro_batch_size (now {self.micro_batch_size}; the gradient stays the same)",
            f"lower alignment.max_length (now {config.max_length})",
        )
        self._cache = GradientCache(self._vectors, self._contrast)

    @staticmethod
    def language(row: Pair) -> str:
        return row.direction

    def begin_step(self, model: nn.Module, micro_batches: Sequence[MicroBatch]) -> None:
        """Where one forward does not hold all pairs: what every pair's vectors owe to all the others."""
        if len(micro_batches) > 1:
            self._cache.fill(model, micro_batches)
        else:
            self._cache.clear()

    def loss(self, model: nn.Module, micro_batch: MicroBatch) -> torch.Tensor:
        if micro_batch in self._cache:
            return self._cache.loss(model, micro_batch)
        if self._over_ranks:
            return self._contrast(self._vectors(model, micro_batch), [micro_batch])
        inputs, settings = micro_batch.inputs, self._settings(micro_batch.inputs["meaning"])
        states = hidden_at(model, self.layers, input_ids=inputs["input_ids"], attention_mask=inputs["attention_mask"])
        return self._over_layers(alignment_loss(layer, inputs["pool_mask"], **settings) for layer in states)

    @property
    def can_evaluate(self) -> bool:
        return len(self.held_out) > 1

    @torch.no_grad()
    def evaluate(self, model: nn.Module, device: torch.device) -> dict[str, float]:
        """``eval_alignment_loss``: the objective on the held-out pairs, always in the same batches."""
        if not self.can_evaluate:
            return {}
        size = self.rows_per_step * (rank_and_world_size()[1] if self._over_ranks else 1)
        batches = [self.held_out[i : i + size] for i in range(0, len(self.held_out), size)]
        if len(batches) > 1 and len(batches[-1]) < size:
            batches.pop()  # fewer negatives would make it easier
        total = pairs = 0.0
        for i, counts in my_share(len(batches)):
            rows = range(0, len(batches[i]), self.micro_batch_size)
            parts = [self._collate(batches[i][j : j + self.micro_batch_size]).to(device) for j in rows]
            vectors = torch.cat([self._vectors(model, part) for part in parts], dim=-2)
            loss = self._objective(vectors, _meaning(parts)).item()
            if counts:
                total, pairs = total + loss * len(batches[i]), pairs + len(batches[i])
        total, pairs = sum_over_ranks([total, pairs], device)
        return {f"eval_{self.name}_loss": total / pairs}

    def _vectors(self, model: nn.Module, micro_batch: MicroBatch) -> torch.Tensor:
        """Sentence vectors (layers, 2, n, D), fp32: sources, then targets."""
        pooled = pooled_at(model, self.layers, micro_batch.inputs)
        return torch.stack(pooled).unflatten(1, (2, micro_batch.items))

    @property
    def _over_ranks(self) -> bool:
        """Whether the pairs of the other ranks are negatives, too."""
        return self.config.negatives == "world" and rank_and_world_size()[1] > 1

    def _contrast(self, vectors: torch.Tensor, micro_batches: Sequence[MicroBatch]) -> torch.Tensor:
        """The loss of this rank's vectors (layers, 2, n, D), among those of all ranks where these are negatives.

        Then its value is that over the pairs of all ranks, and its gradient, with respect to this rank's vectors, is
        world size times as large: the mean over the ranks, which their wrapper takes, is then the whole gradient.
        """
        meaning = _meaning(micro_batches)
        if not self._over_ranks:
            return self._objective(vectors, meaning)
        loss = self._objective(with_other_ranks(vectors, dim=-2), with_other_ranks(meaning))
        return loss + (rank_and_world_size()[1] - 1) * (loss - loss.detach())

    def _objective(self, vectors: torch.Tensor, meaning: torch.Tensor) -> torch.Tensor:
        """The loss of vectors (layers, 2, N, D): mean over the pairs, weighted over the layers."""
        settings = self._settings(meaning)
        return self._over_layers(
            alignment_loss_of_vectors(sources, targets, **settings) for sources, targets in vectors
        )

    def _over_layers(self, losses: Iterable[torch.Tensor]) -> torch.Tensor:
        return torch.stack([weight * loss for weight, loss in zip(self.layer_weights, losses, strict=True)]).sum()

    def _settings(self, meaning: torch.Tensor) -> dict[str, Any]:
        """Of the objective, for pairs of these meanings."""
        config = self.config
        return {
            "temperature": config.temperature,
            "direction": config.direction,
            "detach": config.detach,
            "meaning": meaning if config.mask_equal_meaning else None,
        }

    def _collate(self, rows: Sequence[Pair]) -> MicroBatch:
        """Sources in the first half of the batch, their targets in the second."""
        inputs = self.tokenizer([pair.source for pair in rows] + [pair.target for pair in rows])
        inputs["meaning"] = torch.tensor([pair.meaning for pair in rows])
        return MicroBatch(inputs, tokens=int(inputs["attention_mask"].sum()), items=len(rows))


def _meaning(micro_batches: Sequence[MicroBatch]) -> torch.Tensor:
    return torch.cat([micro_batch.inputs["meaning"] for micro_batch in micro_batches])
