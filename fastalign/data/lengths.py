"""Which texts may have too many tokens, found without tokenizing those that are short beyond doubt."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

SLACK = 4  # tokens that a text may have more where it stands beside others
MARGIN = 4  # bytes that a normaliser such as NFKC may make of one byte of a letter outside ASCII
CHARACTERS = 1 << 20  # of a batch that is tokenized at once


def most_tokens(text: str) -> int:
    """Upper bound: no token covers less than a byte."""
    if text.isascii():
        return len(text) + SLACK
    plain = len(text.encode("ascii", "ignore"))
    return plain + MARGIN * (len(text.encode("utf-8", "replace")) - plain) + SLACK


def may_exceed(tokenizer: Any, rows: Sequence[Sequence[str]], rooms: Sequence[int]) -> list[int]:
    """Numbers of the rows whose texts, together, may have more tokens than the row's room."""
    suspects = [
        i for i, (texts, room) in enumerate(zip(rows, rooms, strict=True)) if sum(map(most_tokens, texts)) > room
    ]
    return [
        i
        for batch in _batches(suspects, rows)
        for i, count in zip(batch, _count(tokenizer, [rows[i] for i in batch]), strict=True)
        if count > rooms[i]
    ]


def _count(tokenizer: Any, rows: Sequence[Sequence[str]]) -> Iterator[int]:
    """Tokens of each row's texts, `SLACK` for each of them included."""
    texts = [text for row in rows for text in row]
    counts = map(len, tokenizer(texts, add_special_tokens=False, verbose=False)["input_ids"])
    for row in rows:
        yield sum(next(counts) + SLACK for _ in row)


def _batches(numbers: Sequence[int], rows: Sequence[Sequence[str]]) -> Iterator[list[int]]:
    batch: list[int] = []
    size = 0
    for i in numbers:
        batch.append(i)
        size += sum(map(len, rows[i]))
        if size > CHARACTERS:
            yield batch
            batch, size = [], 0
    if batch:
        yield batch
