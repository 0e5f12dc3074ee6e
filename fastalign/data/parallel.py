"""Sentence pairs: from rows of any known kind to `Pair`s, and which of them mean the same."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from fastalign.data.files import Row, Source, read_sources
from fastalign.errors import DataError

UNKNOWN = "und"  # ISO 639: undetermined
LANGUAGE = re.compile(r"[a-z]{2,3}([-_][A-Za-z0-9]{1,8})*")
KNOWN_KINDS = (
    "{lang, en, text}; {source, target, source_lang, target_lang}; {text_parallel_0, text_parallel_1}; "
    "or one key a language such as {de, en, fr}"
)


@dataclass(frozen=True, slots=True)
class Pair:
    """A sentence and its translation. Pairs with equal `meaning` are not each other's negatives."""

    source: str
    target: str
    source_lang: str
    target_lang: str
    meaning: int

    @property
    def direction(self) -> str:
        """The key of results: the other language where one side is English, else ``source-target``."""
        if is_english(self.target_lang):
            return self.source_lang
        return f"{self.source_lang}-{self.target_lang}"


def is_english(language: str) -> bool:
    """Whether a language code is English, in any variety."""
    return re.split("[-_]", language)[0] in ("en", "eng")


def read_pairs(spec: str | Sequence[str], pairs: str | list[list[str]], key: str) -> list[Pair]:
    """All pairs of the wanted languages in the files, in file order.

    Args:
        spec: path(s) or a hub id.
        pairs: ``to_english``, or ``[[source, target], ...]``.
        key: name of the setting, for messages.

    Raises:
        DataError: unreadable files, rows of an unknown kind, a language that is not there, no usable pair.
    """
    sentences: list[tuple[str, str, str, str]] = []  # source, target, source_lang, target_lang
    rows: list[int] = []  # which row a pair comes from
    seen: Counter[str] = Counter()
    row_number = 0
    for source in read_sources(spec, key):
        for i, row in enumerate(source.rows):
            texts = _sentences(row, source, i)
            seen.update(language for language, _ in texts)
            for pair in _wanted(texts, pairs):
                sentences.append(pair)
                rows.append(row_number)
            row_number += 1
    if pairs != "to_english":
        for wanted in pairs:
            for language in wanted:
                if language not in seen:
                    raise DataError(
                        f"alignment.pairs: language {language!r} is not in {key}; there: {', '.join(sorted(seen))}"
                    )
    if not sentences:
        hint = "" if pairs != "to_english" or any(map(is_english, seen)) else "; there is no English, so set alignment.pairs"
        raise DataError(f"{key}: no pair of non-empty sentences{hint} (languages: {', '.join(sorted(seen)) or 'none'})")
    meanings = meaning_ids(rows, sentences)
    return [Pair(*sentence, meaning) for sentence, meaning in zip(sentences, meanings)]


def _sentences(row: Row, source: Source, i: int) -> list[tuple[str, str]]:
    """(language, sentence) of everything in a row that is a translation of everything else in it.

    The kind of a row is decided on its full set of keys: `id` is Indonesian in an N-way row and a name in a pair.
    """
    keys = row.keys()
    if {"lang", "en", "text"} <= keys:
        texts = [(row["lang"], row["text"]), ("en", row["en"])]
    elif {"source", "target"} <= keys:
        texts = [(row.get("source_lang") or UNKNOWN, row["source"]), (row.get("target_lang") or UNKNOWN, row["target"])]
    elif {"text_parallel_0", "text_parallel_1"} <= keys:
        texts = [(row.get("lang") or UNKNOWN, row["text_parallel_0"]), ("en", row["text_parallel_1"])]
    else:
        texts = [(language, text) for language, text in row.items() if not language.startswith("_")]
        odd = [language for language, _ in texts if not LANGUAGE.fullmatch(language)]
        if odd or len(texts) < 2:
            raise DataError(f"{source.where(i)}: found keys {', '.join(map(str, keys))}; known kinds: {KNOWN_KINDS}")
    for language, text in texts:
        if not isinstance(language, str) or not (text is None or isinstance(text, str)):
            raise DataError(f"{source.where(i)}: the {language} sentence must be text, not {text!r:.60}")
    return [(language, text.strip()) for language, text in texts if text and text.strip()]


def _wanted(
    texts: list[tuple[str, str]], pairs: str | list[list[str]]
) -> Iterable[tuple[str, str, str, str]]:
    if pairs == "to_english":
        english = next(((language, text) for language, text in texts if is_english(language)), None)
        if english is not None:
            for language, text in texts:
                if not is_english(language):
                    yield text, english[1], language, english[0]
        return
    by_language = dict(texts)
    for source, target in pairs:
        if source in by_language and target in by_language:
            yield by_language[source], by_language[target], source, target


def meaning_ids(rows: Sequence[int], sentences: Sequence[tuple[str, ...]]) -> list[int]:
    """A number per pair, equal for pairs that share the row or a sentence on either side, directly or by a chain.

    Args:
        rows: the row each pair comes from.
        sentences: (source, target, ...) of each pair.
    """
    parent: dict[int | str, int | str] = {}

    def root(node: int | str) -> int | str:
        parent.setdefault(node, node)
        while parent[node] != node:
            parent[node] = parent[parent[node]]
            node = parent[node]
        return node

    for row, sentence in zip(rows, sentences):
        for side in sentence[:2]:
            parent[root(side)] = root(row)
    numbers: dict[int | str, int] = {}
    return [numbers.setdefault(root(row), len(numbers)) for row in rows]
