"""What an adapter of the demo can do: which intent it finds the most likely for commands it has never read."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F

from fastalign.config import TaskConfig
from fastalign.data import demo_corpus
from fastalign.data.templates import TaskExample, TaskReader
from fastalign.data.tokenization import IGNORE_INDEX, PromptTokenizer, pad

ROWS = 60  # of the test set, per language


def intent_accuracy(base: Path, adapter: Path, test: Path) -> dict[str, float]:
    """Share of test commands per language whose intent the adapted model finds the most likely of all intents.

    Args:
        base: folder of the model. adapter: folder of the adapter. test: file of labelled rows in all languages.
    """
    from peft import PeftModel
    from transformers import AutoModelForCausalLM, AutoTokenizer

    tokenizer = PromptTokenizer(AutoTokenizer.from_pretrained(base))
    model = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(base), str(adapter)).eval()
    examples = TaskReader(TaskConfig(template="slots", system="")).read(str(test), "the demo's test set")
    intents = sorted({_intent(example) for example in examples})
    scores = {}
    for language in demo_corpus.LANGUAGES:
        chosen = [example for example in examples if example.language == language][:ROWS]
        likelihoods = torch.stack([_log_likelihood(model, tokenizer, chosen, intent) for intent in intents])
        found = [intents[i] for i in likelihoods.argmax(dim=0).tolist()]
        right = sum(intent == _intent(example) for intent, example in zip(found, chosen, strict=True))
        scores[language] = right / len(chosen)
    return scores


def _intent(example: TaskExample) -> str:
    """The first item of the answer, ``intent: ...``."""
    return example.messages[-1]["content"].split("; ")[0]


@torch.no_grad()
def _log_likelihood(
    model: Any, tokenizer: PromptTokenizer, examples: Sequence[TaskExample], answer: str
) -> torch.Tensor:
    """Log-probability (N,) of an answer to each of the prompts, its end not counted."""
    encoded = []
    for example in examples:
        messages = [*example.messages[:-1], {"role": "assistant", "content": answer}]
        ids, labels = tokenizer(replace(example, messages=messages))
        encoded.append((ids[:-1], labels[:-1]))
    ids = pad([ids for ids, _ in encoded], 0)
    mask = pad([[1] * len(ids) for ids, _ in encoded], 0)
    labels = pad([labels for _, labels in encoded], IGNORE_INDEX)[:, 1:]
    logits = model(input_ids=ids, attention_mask=mask).logits[:, :-1]
    return -F.cross_entropy(logits.transpose(1, 2), labels, ignore_index=IGNORE_INDEX, reduction="none").sum(dim=1)
