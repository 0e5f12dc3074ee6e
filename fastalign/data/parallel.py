"""Sentence pairs: from rows of any known kind to `Pair`s, and which of them mean the same."""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

from fastalign.data.files import Row, Source, read_sources
from fastalign.errors import DataError

UNKNOWN = "und"  # ISO 639: undetermined
LANGUAGE = re.compile(r"[a-z]{2,3}([-_][A-Za-z0-9]{1,8})*")
KNOWN_KINDS = (
    "{lang, en, text}; {source, target, source_lang, target_lang}; {text_parallel_0, text_parallel_1}; or one key a "
    "language such as {de, en, fr}, where keys that begin with _ are metadata"
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
        """The key of results: the source language where the target is English, else ``source-target``."""
        if is_english(self.target_lang):
            return self.source_lang
        return f"{self.source_lang}-{self.target_lang}"


def is_english(language: str) -> bool:
    """Whether a language code is English, in any variety."""
    return re.split("[-_]", language.lower())[0] in ("en", "eng")


def read_pairs(spec: str | Sequence[str], pairs: str | list[list[str]], key: str) -> list[Pair]:
    """All pairs of the wanted languages in the files, in file order.

    Args:
        spec: path(s) or a hub id.
        pairs: ``to_english``; ``[[source, target], ...]``; or ``as_written``, which keeps the direction of rows that
            have one, {source, target} and {text_parallel_0, text_parallel_1}, and is ``to_english`` for the others.
        key: name of the setting, for messages.

    Raises:
        DataError: unreadable files, rows of an unknown kind, a language or a pair that is not there, no usable pair.
    """
    sentences: list[tuple[str, str, str, str]] = []  # source, target, source_lang, target_lang
    rows: list[int] = []  # which row a pair comes from
    seen: set[str] = set()
    row_number = 0
    for source in read_sources(spec, key):
        for i, row in enumerate(source.rows):
            texts, directed = _sentences(row, source, i)
            seen.update(language for language, text in texts if text)
            for pair in _wanted(texts, directed, pairs):
                sentences.append(pair)
                rows.append(row_number)
            row_number += 1
    there = ", ".join(sorted(seen)) or "none"
    if not isinstance(pairs, str):
        found = {(pair[2], pair[3]) for pair in sentences}
        for source_lang, target_lang in pairs:
            for language in (source_lang, target_lang):
                if language not in seen:
                    raise DataError(f"alignment.pairs: language {language!r} is not in {key}; there: {there}")
            if (source_lang, target_lang) not in found:
                raise DataError(f"alignment.pairs: no row of {key} has both {source_lang!r} and {target_lang!r}")
    if not sentences:
        english = not isinstance(pairs, str) or any(map(is_english, seen)) or not seen
        hint = "" if english else "; there is no English, so name the languages, e.g. alignment.pairs: [[de, fr]]"
        raise DataError(f"{key}: no pair of non-empty sentences{hint} (languages: {there})")
    meanings = meaning_ids(rows, sentences)
    return [Pair(*sentence, meaning) for sentence, meaning in zip(sentences, meanings, strict=True)]


def _sentences(row: Row, source: Source, i: int) -> tuple[list[tuple[str, str]], bool]:
    """(language, sentence) of all that is a translation of each other in a row, and whether a pair's order counts.

    The kind of a row is decided on its full set of keys: `id` is Indonesian in an N-way row and a name in a pair.
    A missing sentence is an empty one.
    """
    keys = row.keys()
    texts: list[tuple[Any, Any]]
    directed = False
    if {"lang", "en", "text"} <= keys:
        texts = [(row["lang"], row["text"]), ("en", row["en"])]
    elif {"source", "target"} <= keys:
        directed = True
        texts = [(row.get(f"{side}_lang"), row[side]) for side in ("source", "target")]
        if not all(language for language, _ in texts):
            raise DataError(f"{source.where(i)}: a row with source and target needs source_lang and target_lang")
    elif {"text_parallel_0", "text_parallel_1"} <= keys:
        directed = True
        texts = [(row.get("lang") or UNKNOWN, row["text_parallel_0"]), ("en", row["text_parallel_1"])]
    else:
        texts = [(language, text) for language, text in row.items() if not language.startswith("_")]
        if not texts or not all(LANGUAGE.fullmatch(language) for language, _ in texts):
            raise DataError(f"{source.where(i)}: found keys {', '.join(keys) or 'none'}; known kinds: {KNOWN_KINDS}")
    for language, text in texts:
        if not isinstance(language, str):
            raise DataError(f"{source.where(i)}: a language must be text such as de, not {language!r:.60}")
        if not (text is None or isinstance(text, str)):
            raise DataError(
                f"{source.where(i)}: the {language!r} sentence must be text, not {text!r:.60} "
                "(keys of metadata begin with _)"
            )
    return [(language, (text or "").strip()) for language, text in texts], directed


def _wanted(
    texts: list[tuple[str, str]], directed: bool, pairs: str | list[list[str]]
) -> Iterable[tuple[str, str, str, str]]:
    if pairs == "as_written" and directed:
        (source_lang, source), (target_lang, target) = texts
        if source and target:
            yield source, target, source_lang, target_lang
        return
    texts = [(language, text) for language, text in texts if text]
    if isinstance(pairs, str):
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

    for row, sentence in zip(rows, sentences, strict=True):
        for side in sentence[:2]:
            parent[root(side)] = root(row)
    numbers: dict[int | str, int] = {}
    return [numbers.setdefault(root(row), len(numbers)) for row in rows]
