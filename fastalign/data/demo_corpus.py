"""The corpus of ``make demo``: commands to a voice assistant, with slots, in six languages.

Every sentence pattern and slot value is in one of three disjoint sets: ``task`` (labelled English to train
on), ``align`` (translations to align on) and ``test`` (labelled rows of every language). So the pattern and
the values of a test row are read neither with labels nor with a translation, only in the plain text of their
language. That mixes patterns and values of all sets, but never test values alone in a test pattern.

Everything is a pure function of its arguments. The only source of chance is `random.Random.random`, the one
method whose numbers Python promises to keep.
"""

from __future__ import annotations

import json
import random
import re
from collections.abc import Iterable, Sequence
from functools import cache
from itertools import product
from pathlib import Path
from typing import Any, Literal, NamedTuple, TypeVar

from fastalign.data.demo_phrases import LANGUAGES, PARTITIONS, PATTERNS, VALUES
from fastalign.errors import DataError

__all__ = ["LANGUAGES", "parallel_rows", "plain_text", "task_rows", "write"]

Words = tuple[str, ...]
T = TypeVar("T")


class Phrase(NamedTuple):
    """A pattern or a slot value: the intent or slot type it belongs to, its set, its words per language."""

    kind: str
    partition: str
    words: dict[str, Words]


class Meaning(NamedTuple):
    """A sentence without its language: a pattern, and a value for every slot in it."""

    pattern: Phrase
    values: dict[str, Phrase]

    @property
    def partitions(self) -> set[str]:
        """The sets that its pattern and its values come from."""
        return {self.pattern.partition, *(value.partition for value in self.values.values())}

    def tokens(self, language: str) -> list[str]:
        """The words of the sentence."""
        return [word for word, _ in self._tagged(language)]

    def tags(self, language: str) -> list[str]:
        """A BIO tag for each of `tokens`."""
        return [tag for _, tag in self._tagged(language)]

    def text(self, language: str) -> str:
        """The sentence."""
        return " ".join(self.tokens(language))

    def _tagged(self, language: str) -> Iterable[tuple[str, str]]:
        for word in self.pattern.words[language]:
            slot = slot_name(word)
            if slot is None:
                yield word, "O"
            else:
                for i, part in enumerate(self.values[slot].words[language]):
                    yield part, f"{'I' if i else 'B'}-{slot}"


def task_rows(split: Literal["train", "test"], languages: Sequence[str], n: int, seed: int) -> list[dict[str, Any]]:
    """`n` labelled rows per language; rows with the same id are translations of one another.

    Which meanings are drawn, and their ids, do not depend on `languages`.

    Raises:
        DataError: an unknown split or language, or more rows than there are.
    """
    if split not in ("train", "test"):
        raise DataError(f"the demo corpus has the splits train and test, not {split!r}")
    for language in languages:
        _check(language)
    pool = meanings("task" if split == "train" else "test")
    return [
        {
            "id": f"{split}-{number:04d}",
            "lang": language,
            "tokens": meaning.tokens(language),
            "slots": meaning.tags(language),
            "intent": meaning.pattern.kind,
        }
        for number, meaning in _draw(pool, n, f"{seed} {split}", f"{split} rows per language")
        for language in languages
    ]


def parallel_rows(n: int, seed: int) -> list[dict[str, str]]:
    """`n` sentences, each in all languages.

    Raises:
        DataError: more than there are.
    """
    return [
        {"_id": f"align-{number:04d}", **{language: meaning.text(language) for language in LANGUAGES}}
        for number, meaning in _draw(meanings("align"), n, f"{seed} align", "parallel rows")
    ]


def plain_text(language: str, n: int, seed: int) -> list[str]:
    """`n` sentences of one language, from all patterns and values; other languages draw other meanings.

    Raises:
        DataError: an unknown language, or more sentences than there are.
    """
    _check(language)
    pool = [meaning for meaning in meanings(*PARTITIONS) if meaning.partitions != {"test"}]
    drawn = _draw(pool, n, f"{seed} plain {language}", "plain sentences per language")
    return [meaning.text(language) for _, meaning in drawn]


def write(
    folder: str | Path,
    seed: int = 0,
    *,
    train: int = 550,
    test: int = 120,
    parallel: int = 600,
    text: int = 4000,
) -> dict[str, Path]:
    """Writes the whole corpus into `folder`, made if need be.

    Args:
        folder: where to.
        seed: of all the draws.
        train: labelled rows, in English only.
        test: labelled rows, per language.
        parallel: rows of six translations.
        text: plain sentences, per language.

    Returns:
        The path of ``task.train``, ``task.test``, ``parallel`` and ``lm.<lang>``.
    """
    contents: dict[str, str] = {
        "task.train.jsonl": _jsonl(task_rows("train", ["en"], train, seed)),
        "task.test.jsonl": _jsonl(task_rows("test", LANGUAGES, test, seed)),
        "parallel.jsonl": _jsonl(parallel_rows(parallel, seed)),
    }
    for language in LANGUAGES:
        contents[f"lm.{language}.txt"] = "".join(f"{line}\n" for line in plain_text(language, text, seed))
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    for name, content in contents.items():
        (folder / name).write_bytes(content.encode("utf-8"))  # bytes: the same line ends on every system
    return {Path(name).stem: folder / name for name in contents}


def slot_name(word: str) -> str | None:
    """The slot that a word of a pattern stands for; None where it stands for itself."""
    return word[1:-1] if word.startswith("{") else None


@cache
def phrases(table: Literal["patterns", "values"]) -> tuple[Phrase, ...]:
    """All records of one of the two tables, in its order."""
    blocks = PATTERNS if table == "patterns" else VALUES
    found: list[Phrase] = []
    for kind, block in blocks.items():
        for record in re.sub(r"\n\s*\|", " |", block).strip().splitlines():
            partition, _, forms = record.partition(": ")
            words = [tuple(form.split()) for form in forms.split("|")]
            assert partition in PARTITIONS and len(words) == len(LANGUAGES) and all(words), record
            found.append(Phrase(kind, partition, dict(zip(LANGUAGES, words, strict=True))))
    return tuple(found)


@cache
def meanings(*partitions: str) -> tuple[Meaning, ...]:
    """Every pattern with every combination of values, all from the named sets, in the order of the tables."""
    found: list[Meaning] = []
    for pattern in phrases("patterns"):
        if pattern.partition in partitions:
            slots = [slot for slot in map(slot_name, pattern.words["en"]) if slot is not None]
            choices = [
                [value for value in phrases("values") if value.kind == slot and value.partition in partitions]
                for slot in slots
            ]
            found += [Meaning(pattern, dict(zip(slots, values, strict=True))) for values in product(*choices)]
    return tuple(found)


def _draw(pool: Sequence[T], n: int, seed: str, what: str) -> list[tuple[int, T]]:
    """`n` different (number, member) of `pool` in random order."""
    if not 0 <= n <= len(pool):
        raise DataError(f"the demo corpus has at most {len(pool)} {what}, not {n}")
    rng = random.Random(seed)  # a string: hashed by random itself, so the same in every process
    return sorted(enumerate(pool), key=lambda _: rng.random())[:n]


def _check(language: str) -> None:
    if language not in LANGUAGES:
        raise DataError(f"the demo corpus has the languages {', '.join(LANGUAGES)}, not {language!r}")


def _jsonl(rows: Iterable[dict[str, Any]]) -> str:
    return "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)
