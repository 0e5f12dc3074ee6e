"""Sentence pairs: from rows of any known kind to `Pair`s, and which of them mean the same."""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

from fastalign.config import Data
from fastalign.data.columns import listed_columns, proposal_for_pairs
from fastalign.data.files import Row, Source
from fastalign.data.languages import LANGUAGE_NAMES
from fastalign.data.sources import read_sources
from fastalign.data.tally import Tally, listed_places
from fastalign.data.text import has_text, is_language, listed, quoted
from fastalign.errors import DataError

EMPTY = "pairs skipped: a side is empty"
UNKNOWN = "und"  # ISO 639: undetermined
LANGUAGE = re.compile(r"[a-z]{2,3}([-_][A-Za-z0-9]{1,8})*")
KNOWN_KINDS = (
    "{lang, en, text}; {source, target, source_lang, target_lang}; {text_parallel_0, text_parallel_1}; {translation: "
    "{de, en}}; or one key a language such as {de, en, fr}, where keys that begin with _ are metadata"
)


@dataclass(frozen=True, slots=True)
class Pair:
    """A sentence and its translation. Pairs with equal `meaning` are not each other's negatives.

    Attributes:
        where: the row's file and line, for messages.
    """

    source: str
    target: str
    source_lang: str
    target_lang: str
    meaning: int
    where: str = ""

    @property
    def direction(self) -> str:
        """The key of results: the source language where the target is English, else ``source-target``."""
        if is_english(self.target_lang):
            return self.source_lang
        return f"{self.source_lang}-{self.target_lang}"


def is_english(language: str) -> bool:
    """Whether a language code is English, in any variety."""
    return re.split("[-_]", language.lower())[0] in ("en", "eng")


def read_pairs(spec: Data, pairs: str | list[list[str]], key: str, tally: Tally | None = None) -> list[Pair]:
    """All pairs of the wanted languages in the files, in file order.

    A pair with an empty side is left out. What is left out, and the languages without any pair, go to `tally`. In a
    TSV of more than two languages an empty cell is a sentence that is not there.

    Args:
        spec: path(s), a hub id, or a `DataSource`.
        pairs: ``to_english``; ``[[source, target], ...]``; or ``as_written``, which keeps the direction of rows that
            have one, {source, target} and {text_parallel_0, text_parallel_1}, and is ``to_english`` for the others.
        key: name of the setting, for messages.
        tally: of what is read and left out.

    Raises:
        DataError: unreadable files, rows of an unknown kind, a language or a pair that is not there, no usable pair,
            an empty side in all pairs of most rows.
    """
    return pairs_of(read_sources(spec, key, tally), pairs, key, tally)


def pairs_of(
    sources: Sequence[Source],
    pairs: str | list[list[str]],
    key: str,
    tally: Tally | None = None,
    *,
    block: int | None = None,
    first_meaning: int = 0,
) -> list[Pair]:
    """As `read_pairs`, of what is read already.

    Args:
        block: number of the block whose rows these are, of a stream: none of them has to hold every language, and
            only the first one has to hold usable pairs. None: they are all rows.
        first_meaning: number to begin with.
    """
    reader = _PairReader(pairs, key, Tally() if tally is None else tally)
    for source in sources:
        for i in range(len(source.rows)):
            reader.read(source, i)
    reader.check(block)
    meanings = meaning_ids(reader.rows, reader.sentences)
    return [
        Pair(*sentence, first_meaning + meaning, where)
        for sentence, meaning, where in zip(reader.sentences, meanings, reader.places, strict=True)
    ]


class PairBlocks:
    """Makes pairs of the blocks of a stream. Pairs of equal meaning are found within a block."""

    types: list[str] | None = None

    def __init__(self, pairs: str | list[list[str]]):
        self.pairs = pairs

    def block(self, source: Source, number: int, first_row: int, key: str, tally: Tally) -> list[Pair]:
        """The pairs of a block; a meaning has its number in every pass over the stream, and no other block has it."""
        return pairs_of([source], self.pairs, key, tally, block=number, first_meaning=first_row)


class _PairReader:
    """The pairs read so far, which rows they come from, and what became of the other rows."""

    def __init__(self, pairs: str | list[list[str]], key: str, tally: Tally):
        self.pairs, self.key, self.tally = pairs, key, tally
        self.sentences: list[tuple[str, str, str, str]] = []  # source, target, source_lang, target_lang
        self.rows: list[int] = []  # the number of each pair's row
        self.places: list[str] = []
        self.named: dict[str, bool] = {}  # every language of a row, and whether it has a sentence that is not empty
        self.row_number = self.paired_rows = 0
        self.empty_places: list[str] = []  # of each pair with an empty side
        self.empty_rows: list[str] = []  # rows that have no other pairs
        self.first: Row = {}  # with the columns as the file has them
        wanted = "English beside another language" if isinstance(pairs, str) else "pair of alignment.pairs"
        self.unpaired = f"rows skipped: no {wanted}"

    def read(self, source: Source, i: int) -> None:
        """Take the pairs of row `i`."""
        self.first = self.first or source.unmapped or source.rows[i]
        texts, directed = _sentences(source.rows[i], source, i)
        for language, text in texts:
            self.named[language] = self.named.get(language, False) or bool(text)
        if source.has_columns and len(texts) > 2:
            texts = [(language, text) for language, text in texts if text]
        where = source.where(i)
        wanted = [*_wanted(texts, directed, self.pairs)]
        for pair in wanted:
            if pair[0] and pair[1]:
                self.sentences.append(pair)
                self.rows.append(self.row_number)
                self.places.append(where)
            else:
                self.empty_places.append(where)
        if not wanted:
            self.tally.add(self.key, self.unpaired, where)
        elif not any(source_text and target_text for source_text, target_text, *_ in wanted):
            self.empty_rows.append(where)
        self.paired_rows += bool(wanted)
        self.row_number += 1

    def check(self, block: int | None) -> None:
        """DataError if this is not what was asked for; else what was left out goes to the tally."""
        if block is None:
            self._check_languages()
        if not block:
            self._check_pairs()
        for where in self.empty_places:
            self.tally.add(self.key, EMPTY, where)
        self.tally.out_of(self.key, EMPTY, len(self.sentences) + len(self.empty_places))
        self.tally.out_of(self.key, self.unpaired, self.row_number)
        if isinstance(self.pairs, str) and block is None:
            self._note_languages_without_a_pair()

    def _check_pairs(self) -> None:
        if 2 * len(self.empty_rows) > self.paired_rows:
            places = listed_places(self.empty_rows)
            raise DataError(
                f"{self.key}: {len(self.empty_rows):,} of {self.paired_rows:,} rows give no pair, because a side is "
                f"empty ({places}); fill them in, remove them, or leave out the key of a language that has no "
                "translation"
            )
        indonesian = [pair[side] for pair in self.sentences for side in (0, 1) if pair[2 + side] == "id"]
        codes = sum(" " not in text and any(map(str.isdigit, text)) for text in indonesian)
        if 2 * codes > len(indonesian):
            raise DataError(
                f"{self.key}: the key id is Indonesian, and holds {quoted(indonesian[0])} and the like, which are no "
                "sentences; call it _id, so that it is metadata"
            )
        if not self.sentences:
            raise DataError(f"{self.key}: no pair of sentences{self._hint()} (languages: {self._there()})")

    def _check_languages(self) -> None:
        if isinstance(self.pairs, str):
            return
        found = {(pair[2], pair[3]) for pair in self.sentences}
        for source_lang, target_lang in self.pairs:
            for language in (source_lang, target_lang):
                if not self.named.get(language):
                    why = "has only empty sentences in" if language in self.named else "is not in"
                    raise DataError(
                        f"alignment.pairs: language {quoted(language)} {why} {self.key}; there: {self._there()}"
                    )
            if (source_lang, target_lang) not in found:
                both = f"both {quoted(source_lang)} and {quoted(target_lang)}"
                raise DataError(f"alignment.pairs: no row of {self.key} has {both}")

    def _there(self) -> str:
        return listed(sorted(language for language, filled in self.named.items() if filled), 20) or "none"

    def _hint(self) -> str:
        if any(map(is_english, self.named)):
            return ""
        if self.pairs == "as_written":
            return "; there is no English, and only rows with source and target may do without"
        languages = "name the languages, e.g. alignment.pairs: [[de, fr]]"
        if any(code in LANGUAGE_NAMES for name in self.named for code in re.split("[-_]", name)[:1]):
            return f"; there is no English, so {languages}"
        mapped = proposal_for_pairs(self.first)
        return f"; there is no English, so {languages}, or if these are no languages{mapped.removeprefix(';')}"

    def _note_languages_without_a_pair(self) -> None:
        paired = {language for pair in self.sentences for language in pair[2:]}
        reasons: dict[str, list[str]] = {}
        for language, filled in self.named.items():
            if language not in paired:
                english = is_english(language)
                beside = "its rows have another English" if english else "no sentence in it has English beside it"
                reasons.setdefault(beside if filled else "all its sentences are empty", []).append(language)
        for why, languages in reasons.items():
            self.tally.note(self.key, f"no pair for {listed(sorted(languages), 20)}: {why}")


def _sentences(row: Row, source: Source, i: int) -> tuple[list[tuple[str, str]], bool]:
    """(language, sentence) of all that is a translation of each other in a row, and whether a pair's order counts.

    The kind of a row is decided on its full set of keys: `id` is Indonesian in an N-way row and a name in a pair.
    A sentence without a character to see is an empty one. Null is too, but in an N-way row it is a key that is not
    there: parquet has no other way to say so.
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
            raise DataError(
                f"{source.where(i)}: a row with source and target needs source_lang and target_lang, or add them by "
                "columns: {source: source, target: target, source_lang: {value: de}, target_lang: {value: en}}"
            )
    elif {"text_parallel_0", "text_parallel_1"} <= keys:
        directed = True
        texts = [(row.get("lang") or UNKNOWN, row["text_parallel_0"]), ("en", row["text_parallel_1"])]
    else:
        if _is_nested(row):
            row = row["translation"]
        names = [language for language in row if not language.startswith("_")]
        if not names or not all(map(LANGUAGE.fullmatch, names)):
            there = source.unmapped or row
            keys_as = f" as {listed(keys)}" if source.unmapped else ""
            raise DataError(
                f"{source.where(i)}: found keys {listed_columns(there)}{keys_as}; known kinds: {KNOWN_KINDS}"
                f"{proposal_for_pairs(there)}"
            )
        texts = [(language, row[language]) for language in names if row[language] is not None]
    for language, text in texts:
        if not is_language(language):
            raise DataError(f"{source.where(i)}: a language must be text such as de, not {quoted(language)}")
        if not (text is None or isinstance(text, str)):
            raise DataError(
                f"{source.where(i)}: the {quoted(language)} sentence must be text, not {quoted(text)} "
                f"(keys of metadata begin with _){proposal_for_pairs(source.unmapped or row)}"
            )
    return [(language, text.strip() if text and has_text(text) else "") for language, text in texts], directed


def _is_nested(row: Row) -> bool:
    """Whether the languages are one level down, as in the parallel data sets of the hubs."""
    texts = row.get("translation")
    return isinstance(texts, dict) and bool(texts) and all(LANGUAGE.fullmatch(str(name)) for name in texts)


def _wanted(
    texts: list[tuple[str, str]], directed: bool, pairs: str | list[list[str]]
) -> Iterable[tuple[str, str, str, str]]:
    """The pairs that are asked for; a side may be empty."""
    if pairs == "as_written" and directed:
        (source_lang, source), (target_lang, target) = texts
        yield source, target, source_lang, target_lang
    elif isinstance(pairs, str):
        english = [(language, text) for language, text in texts if is_english(language)]
        if english:
            english_lang, english_text = next((entry for entry in english if entry[1]), english[0])
            for language, text in texts:
                if not is_english(language):
                    yield text, english_text, language, english_lang
    else:
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
