"""What an adapter of the demo can do with commands it has never read: their intents and their slots."""

from __future__ import annotations

import json
from collections import defaultdict
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

from fastalign.demo.conversation import INTENTS, SLOTS, kinds, spans

Row = Mapping[str, Any]
ROWS = 60  # of the test set, per language


def scores(base: Path, adapter: Path, test: Path) -> dict[str, dict[str, float]]:
    """Score the adapted model on the first `ROWS` rows of each language.

    The answers are chosen greedily among those that a question has, each after the model's own earlier answers.

    Args:
        base: folder of the model. adapter: folder of the adapter. test: file of labelled rows in all languages.

    Returns:
        ``{"intent_accuracy": {language: share}, "slot_f1": {language: micro F1 of exact spans and their slots}}``.
    """
    from peft import PeftModel
    from transformers import AutoModelForCausalLM, AutoTokenizer

    model = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(base), str(adapter)).eval()
    chosen: dict[str, list[Row]] = defaultdict(list)
    for row in map(json.loads, test.read_text(encoding="utf-8").splitlines()):
        if len(chosen[row["lang"]]) < ROWS:
            chosen[row["lang"]].append(row)
    found: dict[str, dict[str, float]] = {"intent_accuracy": {}, "slot_f1": {}}
    for language, rows in chosen.items():
        intents, slots = predict(model, AutoTokenizer.from_pretrained(base), rows)
        right = sum(intent == row["intent"] for intent, row in zip(intents, rows, strict=True))
        found["intent_accuracy"][language] = right / len(rows)
        found["slot_f1"][language] = f1([spans(kinds(row)) for row in rows], [spans(answer) for answer in slots])
    return found


def f1(gold: Sequence[set[Any]], predicted: Sequence[set[Any]]) -> float:
    """Micro-averaged: 2 x hits / (found + there), over all rows."""
    hits = sum(len(there & found) for there, found in zip(gold, predicted, strict=True))
    return 2 * hits / max(1, sum(map(len, gold)) + sum(map(len, predicted)))


@torch.no_grad()
def predict(model: Any, tokenizer: Any, rows: Sequence[Row]) -> tuple[list[str], list[list[str]]]:
    """The intent of each row, and the slot of each of its words."""

    def ids(text: str) -> list[int]:
        return tokenizer(f" {text}", add_special_tokens=False)["input_ids"]

    def ask(prompts: Sequence[list[int]], answers: Mapping[str, str]) -> list[str]:
        """The likeliest of the answers, by its first token, which is appended to the prompts with the end token."""
        first = torch.tensor([ids(word)[0] for word in answers.values()])
        width = max(map(len, prompts))
        batch = torch.tensor([[*prompt, *[tokenizer.pad_token_id] * (width - len(prompt))] for prompt in prompts])
        mask = torch.tensor([[1] * len(prompt) + [0] * (width - len(prompt)) for prompt in prompts])
        last = torch.tensor([len(prompt) - 1 for prompt in prompts])
        states = model.get_base_model().model(input_ids=batch, attention_mask=mask).last_hidden_state
        logits = model.get_output_embeddings()(states[torch.arange(len(prompts)), last])[:, first]
        chosen = [[*answers][i] for i in logits.argmax(dim=1).tolist()]
        for prompt, answer in zip(prompts, chosen, strict=True):
            prompt += [*ids(answers[answer]), tokenizer.eos_token_id]
        return chosen

    prompts = [[tokenizer.bos_token_id, *ids(" ".join(row["tokens"]))] for row in rows]
    intents = ask(prompts, INTENTS)
    slots: list[list[str]] = [[] for _ in rows]
    for i in range(max(len(row["tokens"]) for row in rows)):
        live = [j for j, row in enumerate(rows) if i < len(row["tokens"])]
        for j in live:
            prompts[j] += ids(rows[j]["tokens"][i])
        for j, answer in zip(live, ask([prompts[j] for j in live], SLOTS), strict=True):
            slots[j].append(answer)
    return intents, slots
