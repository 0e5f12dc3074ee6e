"""The alignment stream: sentence pairs, InfoNCE on their pooled states at middle layers."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import nn

from fastalign.config import AlignmentConfig
from fastalign.data.parallel import Pair
from fastalign.data.sampling import Sampler
from fastalign.data.tokenization import SentenceTokenizer
from fastalign.errors import ConfigError
from fastalign.model.early_exit import hidden_at
from fastalign.objectives.info_nce import alignment_loss
from fastalign.streams.base import MicroBatch, Stream, my_share, sum_over_ranks


class AlignmentStream(Stream):
    """Both sides of all pairs of a micro-batch go through one forward that stops at the highest layer.

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
        train: Sequence[Pair],
        held_out: Sequence[Pair],
        tokenizer: SentenceTokenizer,
        sampler: Sampler,
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
        self.micro_batch_size = config.micro_batch_size or max(2, -(-config.batch_size // accumulation))
        if self.rows_per_step // -(-self.rows_per_step // self.micro_batch_size) < 2:
            raise ConfigError(
                f"alignment: {self.rows_per_step} pairs in micro-batches of {self.micro_batch_size} leave one pair "
                "without negatives; raise alignment.batch_size or set alignment.micro_batch_size"
            )

    def collate(self, rows: Sequence[int]) -> MicroBatch:
        return self._collate([self.train[i] for i in rows])

    def loss(self, model: nn.Module, micro_batch: MicroBatch) -> torch.Tensor:
        return self._objective(model, micro_batch) * (micro_batch.items / self.rows_per_step)

    @property
    def can_evaluate(self) -> bool:
        return len(self.held_out) > 1

    @torch.no_grad()
    def evaluate(self, model: nn.Module, device: torch.device) -> dict[str, float]:
        """``eval_alignment_loss``: the objective on the held-out pairs, always in the same batches."""
        if not self.can_evaluate:
            return {}
        size = self.micro_batch_size
        batches = [self.held_out[i : i + size] for i in range(0, len(self.held_out), size)]
        if len(batches) > 1 and len(batches[-1]) < size:
            batches.pop()  # fewer negatives would make it easier
        total = pairs = 0.0
        for i, counts in my_share(len(batches)):
            micro_batch = self._collate(batches[i]).to(device)
            loss = self._objective(model, micro_batch).item()
            if counts:
                total, pairs = total + loss * micro_batch.items, pairs + micro_batch.items
        total, pairs = sum_over_ranks([total, pairs], device)
        return {f"eval_{self.name}_loss": total / pairs}

    def _objective(self, model: nn.Module, micro_batch: MicroBatch) -> torch.Tensor:
        """Mean over the pairs of the micro-batch, weighted over the layers."""
        config, inputs = self.config, micro_batch.inputs
        states = hidden_at(model, self.layers, input_ids=inputs["input_ids"], attention_mask=inputs["attention_mask"])
        losses = [
            alignment_loss(
                hidden,
                inputs["pool_mask"],
                temperature=config.temperature,
                direction=config.direction,
                detach=config.detach,
                meaning=inputs["meaning"] if config.mask_equal_meaning else None,
            )
            for hidden in states
        ]
        return torch.stack([weight * loss for weight, loss in zip(self.layer_weights, losses, strict=True)]).sum()

    def _collate(self, pairs: Sequence[Pair]) -> MicroBatch:
        """Sources in the first half of the rows, their targets in the second."""
        inputs = self.tokenizer([pair.source for pair in pairs] + [pair.target for pair in pairs])
        inputs["meaning"] = torch.tensor([pair.meaning for pair in pairs])
        return MicroBatch(inputs, tokens=int(inputs["attention_mask"].sum()), items=len(pairs))
