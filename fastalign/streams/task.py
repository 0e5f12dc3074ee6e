"""The task stream: prompts and answers, cross-entropy on the answer tokens."""

from __future__ import annotations

from collections.abc import Sequence
from typing import cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fastalign.data.sampling import Sampler
from fastalign.data.streaming import StreamedRows
from fastalign.data.templates import TaskExample
from fastalign.data.tokenization import IGNORE_INDEX, PromptTokenizer, pad
from fastalign.model.head import Head, through_head
from fastalign.model.sharding import has_shards
from fastalign.objectives.cross_entropy import ChunkedCrossEntropy
from fastalign.streams.base import MicroBatch, Stream, my_share, rank_and_world_size, sum_over_ranks


class TaskStream(Stream):
    """Cross-entropy per answer token, over all answer tokens of the optimizer step on all ranks.

    Args:
        train, held_out: examples.
        tokenizer: makes ids and labels of an example.
        sampler: order of `train`.
        micro_batch_size: rows of a forward. accumulation: forwards of an optimizer step.
        eval_batch_size: rows of a forward in evaluation.
        logits_memory: bytes that logits may take at once; under ZeRO-3 those of a forward's answers are made at once.
            None: those of all tokens exist, as the model gives them.
    """

    name = "task"

    def __init__(
        self,
        train: Sequence[TaskExample] | StreamedRows,
        held_out: Sequence[TaskExample],
        tokenizer: PromptTokenizer,
        sampler: Sampler | StreamedRows,
        *,
        micro_batch_size: int,
        accumulation: int,
        eval_batch_size: int,
        logits_memory: int | None,
    ):
        self.train, self.held_out, self.tokenizer, self.sampler = train, held_out, tokenizer, sampler
        self.micro_batch_size = micro_batch_size
        self.rows_per_step = micro_batch_size * accumulation
        self.eval_batch_size = eval_batch_size
        self.memory_keys = (
            f"lower training.per_device_train_batch_size (now {micro_batch_size}; multiply "
            "training.gradient_accumulation_steps to keep the step the same)",
            f"lower task.max_length (now {tokenizer.max_length})",
            *(["set task.logits_memory: 256MB (now whole)"] if logits_memory is None else []),
        )
        self.logits_memory = logits_memory
        self._in_chunks = None if logits_memory is None else ChunkedCrossEntropy(logits_memory)
        self._scale = 1.0  # ranks per answer token of the step

    @staticmethod
    def language(row: TaskExample) -> str:
        return row.language

    def begin_step(self, model: nn.Module, micro_batches: Sequence[MicroBatch]) -> None:
        answer_tokens = sum(micro_batch.items for micro_batch in micro_batches)
        device = micro_batches[0].inputs["input_ids"].device
        total = sum_over_ranks([answer_tokens], device)[0]
        self._scale = rank_and_world_size()[1] / max(total, 1.0)  # the wrappers average over ranks: undo that

    def loss(self, model: nn.Module, micro_batch: MicroBatch) -> torch.Tensor:
        return self._summed_cross_entropy(model, micro_batch) * self._scale

    @property
    def can_evaluate(self) -> bool:
        return bool(self.held_out)

    @torch.no_grad()
    def evaluate(self, model: nn.Module, device: torch.device) -> dict[str, float]:
        """``eval_task_loss``: cross-entropy per answer token of the held-out rows."""
        if not self.can_evaluate:
            return {}
        size = self.eval_batch_size
        total, tokens = 0.0, 0
        for i, counts in my_share(-(-len(self.held_out) // size)):
            micro_batch = self._collate(self.held_out[i * size : (i + 1) * size]).to(device)
            loss = self._summed_cross_entropy(model, micro_batch).item()
            if counts:
                total, tokens = total + loss, tokens + micro_batch.items
        total, tokens = sum_over_ranks([total, tokens], device)
        return {f"eval_{self.name}_loss": total / max(tokens, 1)}

    def _collate(self, rows: Sequence[TaskExample]) -> MicroBatch:
        encoded = [self.tokenizer(example) for example in rows]
        labels = pad([labels for _, labels in encoded], IGNORE_INDEX)
        inputs = {
            "input_ids": pad(
                [ids for ids, _ in encoded], cast("int | None", self.tokenizer.tokenizer.pad_token_id) or 0
            ),
            "attention_mask": pad([[1] * len(ids) for ids, _ in encoded], 0),
            "labels": labels,
        }
        return MicroBatch(inputs, tokens=sum(len(ids) for ids, _ in encoded), items=_learnt(labels))

    def _summed_cross_entropy(self, model: nn.Module, micro_batch: MicroBatch) -> Tensor:
        """Sum over the answer tokens, in fp32."""
        labels = micro_batch.inputs["labels"][:, 1:]
        learnt = labels != IGNORE_INDEX
        inputs = {name: micro_batch.inputs[name] for name in ("input_ids", "attention_mask")}
        if self._in_chunks is None:
            logits = model(**inputs, use_cache=False).logits
            return F.cross_entropy(logits[:, :-1][learnt].float(), labels[learnt], reduction="sum")
        in_chunks = self._in_chunks
        at_once = has_shards(model)

        def loss(states: Tensor, head: Head) -> Tensor:
            rows = states[:, :-1][learnt]
            if not at_once:
                return in_chunks(rows, labels[learnt], head)
            # ZeRO-3 gathers the head whenever it is called: on every rank once, however many answer tokens it has
            logits = head(torch.cat([rows, states[0, :1]]))[: len(rows)]
            return F.cross_entropy(logits.float(), labels[learnt], reduction="sum")

        return through_head(model, loss, **inputs, use_cache=False)


def _learnt(labels: torch.Tensor) -> int:
    return int((labels[:, 1:] != IGNORE_INDEX).sum())
