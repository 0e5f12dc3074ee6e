"""From text to token ids: prompts with answers, exact at their boundary, and sentences with their pooling mask."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Literal

import torch

from fastalign.data.templates import Message, TaskExample
from fastalign.errors import ConfigError, DataError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

IGNORE_INDEX = -100  # label of a token that is not learnt


def adds_bos(tokenizer: PreTrainedTokenizerBase) -> bool:
    """Whether the tokenizer puts its beginning-of-sequence token before every text."""
    return tokenizer.bos_token_id is not None and tokenizer("a")["input_ids"][0] == tokenizer.bos_token_id


@dataclass
class PromptTokenizer:
    """Turns messages into token ids and labels.

    Prompt and answer are tokenized apart and their ids joined. The prompt's ids are therefore those that a user's
    program has when it asks for the answer, whatever a tokenizer would merge across the boundary, and exactly the
    answer's tokens carry labels. The answer ends with the token that ends a turn in the chat template, or with EOS.

    Args:
        tokenizer: of the base model.
        chat_template: ``auto`` (the tokenizer's own, plain text where it has none), ``none``, or a jinja file.
        max_length: longer rows lose the beginning of their prompt, then the end of their answer.
    """

    tokenizer: PreTrainedTokenizerBase
    chat_template: str = "auto"
    max_length: int = 1024

    def __post_init__(self) -> None:
        self.truncated = 0  # rows cut so far
        added = self.tokenizer.added_tokens_decoder
        self._specials = {*self.tokenizer.all_special_ids, *(i for i, token in added.items() if token.special)}
        self._template: str | None = None
        if self.chat_template not in ("auto", "none"):
            try:
                self._template = Path(self.chat_template).read_text(encoding="utf-8")
            except (OSError, UnicodeDecodeError) as error:
                raise ConfigError(f"task.chat_template: {self.chat_template!r} cannot be read ({error})") from None
        self._chat = self._template is not None or (self.chat_template == "auto" and bool(self.tokenizer.chat_template))

    def __call__(self, example: TaskExample) -> tuple[list[int], list[int]]:
        """(input_ids, labels) of one example, equally long; labels are `IGNORE_INDEX` outside the answers."""
        input_ids: list[int] = []
        labels: list[int] = []
        segments = self._segments(example.messages)
        for i, (text, is_answer) in enumerate(segments):
            special = not self._chat and i == 0  # a chat template writes its own special tokens
            ids = self.tokenizer(text, add_special_tokens=special)["input_ids"]
            if special and len(ids) > 1 and ids[-1] == self.tokenizer.eos_token_id:
                ids = ids[:-1]  # some tokenizers end every text
            learnt = 0
            if is_answer:
                ids, learnt = self._end(ids)
                if i == len(segments) - 1:
                    ids = ids[:learnt]
            input_ids += ids
            labels += ids[:learnt] + [IGNORE_INDEX] * (len(ids) - learnt)
        return self._cut(input_ids, labels)

    def prompt_ids(self, messages: Sequence[Message]) -> list[int]:
        """Token ids of a prompt without its answer, as `__call__` gives them: what to generate from."""
        input_ids, labels = self(TaskExample([*messages, {"role": "assistant", "content": "."}], "und"))
        return input_ids[: next(i for i, label in enumerate(labels) if label != IGNORE_INDEX)]

    def _segments(self, messages: list[Message]) -> list[tuple[str, bool]]:
        """The conversation as text, cut where the assistant begins and ends."""
        if not self._chat:
            prompt = "\n\n".join(message["content"] for message in messages[:-1])
            return [(prompt + "\n", False), (messages[-1]["content"], True)]
        segments: list[tuple[str, bool]] = []
        done = ""
        for i, message in enumerate(messages):
            if message["role"] != "assistant":
                continue
            prompt = self._apply(messages[:i], generate=True)
            full = self._apply(messages[: i + 1], generate=False)
            if not full.startswith(prompt):  # the template writes past turns otherwise than the present one
                full = prompt + message["content"]
            if not prompt.startswith(done):  # it also rewrites the history: learn this turn only
                segments, done = [], ""
            segments += [(prompt[len(done) :], False), (full[len(prompt) :], True)]
            done = full
        return segments

    def _apply(self, messages: list[Message], generate: bool) -> str:
        try:
            return self.tokenizer.apply_chat_template(
                messages, tokenize=False, add_generation_prompt=generate, chat_template=self._template
            )
        except Exception as error:  # jinja's own errors, and whatever a template raises
            if messages and messages[0]["role"] == "system" and len(messages) > 1:  # many templates know no system role
                first = {**messages[1], "content": f"{messages[0]['content']}\n\n{messages[1]['content']}"}
                return self._apply([first, *messages[2:]], generate)
            roles = ", ".join(message["role"] for message in messages)
            raise DataError(f"the chat template does not take messages with the roles {roles}: {error}") from None

    def _end(self, ids: list[int]) -> tuple[list[int], int]:
        """The answer's ids and how many of them are learnt: up to the token that ends the turn, EOS if there is none."""
        if self._chat:
            end = len(ids)
            while end and ids[end - 1] not in self._specials:
                end -= 1
            if end and not self.tokenizer.decode(ids[end:]).strip():  # after it the template writes white space at most
                return ids, end
        if self.tokenizer.eos_token_id is not None:
            ids = [*ids, self.tokenizer.eos_token_id]
        return ids, len(ids)

    def _cut(self, input_ids: list[int], labels: list[int]) -> tuple[list[int], list[int]]:
        excess = len(input_ids) - self.max_length
        if excess <= 0:
            return input_ids, labels
        self.truncated += 1
        prompt = next((i for i, label in enumerate(labels) if label != IGNORE_INDEX), len(labels))
        keep = 1 if input_ids[0] == self.tokenizer.bos_token_id else 0
        cut = min(excess, prompt - keep)
        input_ids, labels = input_ids[:keep] + input_ids[keep + cut :], labels[:keep] + labels[keep + cut :]
        return input_ids[: self.max_length], labels[: self.max_length]


@dataclass
class SentenceTokenizer:
    """Turns sentences into a padded batch with the mask of the tokens that are pooled.

    The first token of a causal model is an attention sink whose state has a norm of hundreds; averaged in, it makes
    all cosines 1. ``auto`` leaves the BOS out of the mean; where a tokenizer adds none, a sacrificial token takes the
    sink's role and is left out instead. A sentence of a single token keeps it.

    Args:
        tokenizer: of the base model, with a padding token.
        skip_first_token: ``auto``, True (skip whatever is first) or False (pool every token, as in the paper).
        pooling: ``mean`` over the tokens, or ``last`` token only.
        max_length: tokens kept of a sentence.
    """

    tokenizer: PreTrainedTokenizerBase
    skip_first_token: bool | Literal["auto"] = "auto"
    pooling: Literal["mean", "last"] = "mean"
    max_length: int = 256

    def __post_init__(self) -> None:
        tokenizer = self.tokenizer
        self._sacrifice: list[int] = []
        if self.skip_first_token == "auto" and not adds_bos(tokenizer):
            for candidate in (tokenizer.bos_token_id, tokenizer.eos_token_id, tokenizer.pad_token_id):
                if candidate is not None:
                    self._sacrifice = [candidate]
                    break

    def __call__(self, texts: Sequence[str]) -> dict[str, torch.Tensor]:
        """input_ids, attention_mask, pool_mask: (N, T) int64, padded on the right."""
        room = self.max_length - len(self._sacrifice)
        rows = self.tokenizer(list(texts), truncation=True, max_length=room)["input_ids"]
        rows = [self._sacrifice + ids for ids in rows]
        batch = pad(rows, self.tokenizer.pad_token_id or 0)
        mask = torch.zeros_like(batch)
        pool = torch.zeros_like(batch)
        for i, ids in enumerate(rows):
            mask[i, : len(ids)] = 1
            first = 1 if self.skip_first_token and len(ids) > 1 else 0
            pool[i, len(ids) - 1 if self.pooling == "last" else first : len(ids)] = 1
        return {"input_ids": batch, "attention_mask": mask, "pool_mask": pool}


def pad(rows: Sequence[Sequence[int]], value: int) -> torch.Tensor:
    """(N, T) int64 with `value` to the right of the shorter rows."""
    width = max((len(row) for row in rows), default=0)
    return torch.tensor([[*row, *[value] * (width - len(row))] for row in rows], dtype=torch.int64)
