"""Columns of other names: taking them as ours, and telling a user which there are and how to map them."""

from __future__ import annotations

import itertools
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace
from typing import Any

from fastalign.config import nearest
from fastalign.config.dialect import dump_yaml
from fastalign.data.files import Row, Source
from fastalign.data.languages import LANGUAGE_NAMES
from fastalign.data.text import has_text, quoted, shown
from fastalign.errors import DataError

SAMPLED = 100  # rows that are looked at for columns to show
SHOWN = 12  # columns that a message shows
LONGEST_NAME = 40  # of a column in a proposal
IDENTIFIER = re.compile(r"_?(id|uid|uuid|guid|url|.*[_.](id|url))")
DEEPEST = 3  # dots in a column that is shown
CODES = {name.lower(): code for code, name in LANGUAGE_NAMES.items()} | {code: code for code in LANGUAGE_NAMES}
PROMPTS = ("prompt", "question", "instruction", "input", "query", "source", "text", "utterance", "sentence", "context")
RESPONSES = ("response", "answer", "output", "completion", "target", "label", "intent", "summary", "reply", "solution")
MESSAGES = ("messages", "conversations", "conversation", "chat", "dialog", "dialogue")
TOKENS, LANGUAGES = ("tokens", "words", "toks"), ("lang", "language", "locale", "lang_code")
TAGS = {"slots": ("slots", "slot_tags", "labels", "tags"), "tags": ("tags", "ner_tags", "labels", "ner")}
_ABSENT = object()


def select(source: Source, columns: Mapping[str, Any], key: str, all_there: bool = True) -> Source:
    """The source with our keys instead of its columns, those that are mapped.

    Args:
        columns: our key to their column, with dots into nested ones, or to ``{"value": constant}``.
        key: name of the setting, for messages.
        all_there: whether every column must be in some row.

    Raises:
        DataError: it is in none.
    """
    constants = {ours: theirs["value"] for ours, theirs in columns.items() if not isinstance(theirs, str)}
    named = {ours: theirs for ours, theirs in columns.items() if isinstance(theirs, str)}
    rows: list[Row] = []
    missing = set(named.values())
    for row in source.rows:
        values = {ours: _value(row, theirs) for ours, theirs in named.items()}
        values = {ours: value for ours, value in values.items() if value is not _ABSENT}
        missing -= {named[ours] for ours in values}
        rows.append({ours: constants[ours] if ours in constants else values[ours] for ours in columns
                     if ours in constants or ours in values})  # fmt: skip
    there = first_values(source.rows)
    if missing and all_there:
        column = min(missing)
        raise DataError(
            f"{key}.columns: no column {quoted(column)}{nearest(column, there)} in {source.name}; there are: "
            f"{listed_columns(there)}"
        )
    return replace(source, rows=rows, unmapped=there)


def listed_columns(row: Row) -> str:
    """The columns of a row, nested ones with dots, each with its value, cut: for messages."""
    columns = [*itertools.islice(_columns(row), SHOWN)]
    words = [f"{shown(name, 40)} ({quoted(value, 24)})" for name, value in columns]
    more = f", ... ({len(row):,} in all)" if len(columns) == SHOWN and len(row) > SHOWN else ""
    return ", ".join(words) + more or "none"


def proposal_for_pairs(row: Row) -> str:
    """``; e.g. columns: {...}``, as far as the names of the columns tell, or an empty string."""
    texts = _texts(row)
    codes = [name for name in texts if re.search(r"lang|locale", name.lower()) and _language(name) is None]
    texts = [name for name in texts if name not in codes]
    if len(texts) < 2:
        return ""
    if len(codes) == 2:
        return _proposal(dict(zip(("source", "target", "source_lang", "target_lang"), texts[:2] + codes, strict=True)))
    languages: dict[str, str] = {}
    for name in texts:
        languages.setdefault(_language(name) or f"<{name}>", name)
    known = {language: name for language, name in languages.items() if language in LANGUAGE_NAMES}
    if len(known) >= 2:
        return _proposal(known)
    unknown = [name for language, name in languages.items() if language not in known][: 2 - len(known)]
    sides = {f"<language of {name}>": name for name in unknown}
    lead = f"no telling which languages {' and '.join(sides.values())} are in: say it"
    return _proposal({**sides, **known}, lead)


def proposal_for_task(row: Row, needs: Iterable[str]) -> str:
    """As `proposal_for_pairs`, for the keys that a template needs; none: a conversation or prompt and response."""
    needs = set(needs)
    if needs:
        values = dict(_few_columns(row))
        mapping: dict[str, Any] = {"lang": _first(LANGUAGES, values) or {"value": "en"}}
        mapping["tokens"] = _first(TOKENS, values)
        mapping |= {name: _first(TAGS[name], values) for name in TAGS if name in needs}
        return _proposal(mapping) if all(mapping.values()) else ""
    talk = _first(MESSAGES, {name: value for name, value in row.items() if isinstance(value, list)})
    if talk is not None and talk != "messages":
        return _proposal({"messages": talk})
    texts = _texts(row)
    response = _first(RESPONSES, texts)
    prompt = _first(PROMPTS, [name for name in texts if name != response])
    prompt = prompt or next((name for name in texts if name != response), None)
    response = response or next((name for name in texts if name != prompt), None)
    return _proposal({"prompt": prompt, "response": response}) if prompt and response else ""


def _texts(row: Row) -> list[str]:
    """Columns of text, without those of identifiers."""
    names = [name for name, value in _few_columns(row) if isinstance(value, str) and has_text(value)]
    return [name for name in names if not IDENTIFIER.fullmatch(name.lower())]


def _few_columns(row: Row) -> list[tuple[str, Any]]:
    """The first columns with names that a user could write."""
    columns = itertools.islice(_columns(row), SAMPLED)
    return [(name, value) for name, value in columns if len(name) <= LONGEST_NAME and name.isprintable()]


def _proposal(columns: Mapping[str, Any], lead: str = "map them") -> str:
    return f"; {lead}, e.g. columns: {shown(dump_yaml(dict(columns), one_line=True).strip(), 200)}"


def _value(row: Any, column: str) -> Any:
    """What is in a column, or `_ABSENT`; a whole name wins over one with dots, a number counts into a list."""
    if isinstance(row, Mapping) and column in row:
        return row[column]
    head, dot, rest = column.partition(".")
    while dot:
        inner = _ABSENT
        if isinstance(row, Mapping) and head in row:
            inner = _value(row[head], rest)
        elif isinstance(row, list) and head.isdecimal() and int(head) < len(row):
            inner = _value(row[int(head)], rest)
        if inner is not _ABSENT:
            return inner
        more, dot, rest = rest.partition(".")
        head = f"{head}.{more}"
    if isinstance(row, list) and column.isdecimal() and int(column) < len(row):
        return row[int(column)]
    return _ABSENT


def first_values(rows: Sequence[Row]) -> Row:
    """For each column of the first rows the first value that is not empty."""
    values: Row = {}
    for row in rows[:SAMPLED]:
        for name, value in row.items():
            if name not in values or values[name] in (None, "", [], {}):
                values[name] = value
    return values


def _columns(row: Row, prefix: str = "", depth: int = 0) -> Iterable[tuple[str, Any]]:
    for name, value in row.items():
        if isinstance(value, dict) and value and depth < DEEPEST:
            yield from _columns(value, f"{prefix}{name}.", depth + 1)
        else:
            yield f"{prefix}{name}", value


def _language(column: str) -> str | None:
    """The code of the language that a column's name holds: ``german``, ``text_de``, ``en-sentence``."""
    parts = re.findall(r"[^\W\d_]+", column.lower())
    if parts == ["id"]:
        return None
    return next((CODES[part] for part in reversed(parts) if part in CODES), None)


def _first(wanted: Sequence[str], names: Iterable[str]) -> str | None:
    """The first of the wanted names that is there, whatever its case; or one that ends in it."""
    there = {name.lower(): name for name in names}
    for name in wanted:
        if name in there:
            return there[name]
    return next((there[other] for name in wanted for other in there if re.search(rf"[_.]{name}s?$", other)), None)
