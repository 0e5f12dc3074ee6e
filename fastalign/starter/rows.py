"""What kind of rows the user's files hold, which keys of the config read them, and how long they are."""

from __future__ import annotations

import math
import re
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

from fastalign.config import Data, DataSource, TaskConfig
from fastalign.config.dialect import load_yaml
from fastalign.data.columns import (
    LANGUAGES,
    MESSAGES,
    PROMPTS,
    RESPONSES,
    TAGS,
    TOKENS,
    first_values,
    proposal_for_pairs,
)
from fastalign.data.files import SUFFIXES, Row, plain_suffix
from fastalign.data.languages import LANGUAGE_NAMES
from fastalign.data.parallel import Pair, is_english, read_pairs
from fastalign.data.sources import read_sources
from fastalign.data.templates import TaskExample, TaskReader
from fastalign.data.text import listed
from fastalign.data.tokenization import PromptTokenizer, SentenceTokenizer
from fastalign.errors import DataError

SAMPLED = 2_000  # rows whose length is measured
QUANTILE = 0.995
ROUND = 64  # tokens
BYTES_A_TOKEN = 3  # of UTF-8, where there is no tokenizer to ask; a careful guess
MARKUP = 32  # tokens that a chat template may add to a row
# Columns that together make up a prompt, in this order. Otherwise there has to be one alone.
TOGETHER = (("instruction", "input"), ("context", "question"), ("premise", "hypothesis"))


@dataclass(frozen=True)
class Found:
    """What one stream can read.

    Attributes:
        data: for the config.
        keys: of the section beside `data`, each with the reason for it.
        rows: that a training would see, held-out ones included.
        languages: of the rows, or directions of the pairs; ``und`` where a row names none.
        left_out: columns that are not used.
    """

    data: Data
    keys: dict[str, tuple[Any, str]]
    rows: Sequence[TaskExample] | Sequence[Pair]
    languages: Counter[str]
    left_out: list[str] = field(default_factory=list)


def find_task(paths: Sequence[str], key: str) -> Found:
    """Reads the task rows in whatever template suits them.

    Raises:
        DataError: files that cannot be read, or columns that could mean several things.
    """
    files = _listed(paths)
    row = first_values([row for source in read_sources(_spec(files), key) for row in source.rows])
    found = _task_keys(row)
    keys, columns = found or ({}, None)
    data = _spec(files, columns)
    settings = {name: value for name, (value, _) in keys.items()}
    try:
        examples = TaskReader(TaskConfig(data=data, **settings)).read(data, key)
    except DataError as error:
        if found is not None:
            raise
        how = "task.data: {path: ..., columns: {prompt: ..., response: ...}}, or task.template: custom"
        raise DataError(f"{error}; init cannot choose: leave out --task-data and write into its file {how}") from None
    used = {*(columns or {}).values(), *_fields(settings)}
    left_out = [name for name in row if used and name not in used and not name.startswith("_")]
    return Found(data, keys, examples, Counter(example.language for example in examples), left_out)


def find_pairs(paths: Sequence[str], key: str) -> Found:
    """Reads the sentence pairs, with English where there is any.

    Raises:
        DataError: files that cannot be read, or columns whose languages cannot be told.
    """
    files = _listed(paths)
    sources = read_sources(_spec(files), key)
    try:
        return _pairs(_spec(files), key)
    except DataError as error:
        columns = _mapping(sources[0].rows[0])
        if columns is None:
            how = "alignment.data: {path: ..., columns: {de: ..., en: ...}}"
            raise DataError(
                f"{error}; init cannot choose: leave out --parallel and write into its file {how}"
            ) from None
        return _pairs(_spec(files, columns), key)


def task_length(found: Found, tokenizer: Any | None, context: int | None) -> tuple[int, str]:
    """`max_length` and the reason for it.

    Args:
        tokenizer: of the model, or None to guess by the bytes of the texts.
        context: tokens that the model can see at once, if known.
    """
    examples: list[Any] = _sampled(found.rows)
    if tokenizer is None:
        texts = ["".join(message["content"] for message in example.messages) for example in examples]
        return _rounded([MARKUP + _guess(text) for text in texts], context, "guessed from the bytes of the texts")
    prompts = PromptTokenizer(tokenizer, max_length=2**24)
    return _rounded([len(prompts(example)[0]) for example in examples], context)


def pair_length(found: Found, tokenizer: Any | None, context: int | None) -> tuple[int, str]:
    """As `task_length`, of sentences."""
    pairs: list[Any] = _sampled(found.rows)
    texts = [text for pair in pairs for text in (pair.source, pair.target)]
    if tokenizer is None:
        return _rounded([2 + _guess(text) for text in texts], context, "guessed from the bytes of the texts")
    sentences = SentenceTokenizer(tokenizer, max_length=2**24)
    return _rounded([int(sentences([text])["attention_mask"].sum()) for text in texts], context)


def counted(languages: Counter[str]) -> str:
    """``de 1,200, en 300``: the commonest first."""
    return listed((f"{name} {count:,}" for name, count in languages.most_common()), 6)


def _listed(paths: Sequence[str]) -> list[str]:
    """Aligned text files side by side, where a reader looks for them."""
    return sorted(paths) if any(plain_suffix(path) not in SUFFIXES for path in paths) else list(paths)


def _spec(paths: list[str], columns: dict[str, Any] | None = None) -> Data:
    """As the config names them."""
    path = paths[0] if len(paths) == 1 else paths
    if columns:
        return DataSource(path=path, columns=columns)
    return path if isinstance(path, str) else [*paths]


def _task_keys(row: Row) -> tuple[dict[str, tuple[Any, str]], dict[str, Any] | None] | None:
    """(keys of the section with reasons, mapping of columns) of rows with these columns; None where it is not plain."""
    for needed in ({"messages"}, {"prompt", "response"}, {"prefix", "text"}):
        if needed <= row.keys():
            return {}, None
    return _tagged(row) or _translated(row) or _asked(row)


def _tagged(row: Row) -> tuple[dict[str, tuple[Any, str]], dict[str, Any] | None] | None:
    tokens, language = _one_of(TOKENS, row), _one_of(LANGUAGES, row)
    template, ours = ("slots", "slots") if {"slots", "slot_tags", "intent"} & row.keys() else ("ner", "tags")
    tags = _one_of(TAGS[ours], row)
    if tokens is None or tags is None or not isinstance(row[tokens], list):
        return None
    keys = {"template": (template, "the rows have tokens and tags")}
    names = {"lang": language, "tokens": tokens, ours: tags, **({"intent": "intent"} if "intent" in row else {})}
    if language is None or all(name == column for name, column in names.items()):
        return keys, None  # without a language the reader says what is missing
    return keys, names


def _translated(row: Row) -> tuple[dict[str, tuple[Any, str]], None] | None:
    kinds = ({"source", "target", "source_lang", "target_lang"}, {"lang", "en", "text"})
    nested = isinstance(row.get("translation"), dict)
    directed = any(kind <= row.keys() for kind in (*kinds, {"text_parallel_0", "text_parallel_1"}))
    if nested or directed or len(_languages(row)) >= 2:
        return {"template": ("translation", "the rows are sentence pairs")}, None
    return None


def _asked(row: Row) -> tuple[dict[str, tuple[Any, str]], dict[str, Any] | None] | None:
    """Prompt and response under other names, where no other column could be meant."""
    talk = [name for name in row if name.lower() in MESSAGES and isinstance(row[name], list)]
    language = _one_of(LANGUAGES, row)
    lang = {"lang": language} if language else {}
    if len(talk) == 1:
        return {}, {"messages": talk[0], **lang}
    there = {name.lower(): name for name, value in row.items() if isinstance(value, (str, int, float))}
    answers = [there[name] for name in RESPONSES if name in there]
    prompts = [there[name] for name in PROMPTS if name in there and isinstance(row[there[name]], str)]
    for names in TOGETHER:
        if {there.get(name) for name in names} == {*prompts}:
            prompts = [there[name] for name in names]
            break
    else:
        prompts = prompts if len(prompts) == 1 else []
    beside = (value for name, value in row.items() if name not in (*prompts, *answers))
    if not prompts or len(answers) != 1 or any(isinstance(value, (list, dict)) for value in beside):
        return None
    if len(prompts) == 1 and isinstance(row[answers[0]], str):
        return {}, {"prompt": prompts[0], "response": answers[0], **lang}
    if not all(re.fullmatch(r"\w+", name) for name in (*prompts, *answers)):
        return None
    text = "\n\n".join(f"{{{name}}}" for name in prompts)
    return {
        "template": ("custom", "your columns, put together below"),
        "prompt": (text, "better with a word on what to do"),
        "response": (f"{{{answers[0]}}}", ""),
    }, None


def _pairs(spec: Data, key: str) -> Found:
    try:
        pairs, wanted = read_pairs(spec, "to_english", key), {}
    except DataError:
        rows = [row for source in read_sources(spec, key) for row in source.rows]
        explicit = _without_english(rows)
        if not explicit:
            raise
        pairs, wanted = read_pairs(spec, explicit, key), {"pairs": (explicit, "there is no English")}
    return Found(spec, wanted, pairs, Counter(pair.direction for pair in pairs))


def _without_english(rows: Sequence[Row]) -> list[list[str]]:
    """The pairs as they are written, or each language with the commonest one; none where English is there."""
    if all({"source", "target"} <= row.keys() for row in rows):
        written = Counter((str(row.get("source_lang")), str(row.get("target_lang"))) for row in rows)
        found = [list(pair) for pair in written]
    else:
        counts = Counter(language for row in rows for language in _languages(row))
        pivot = next((language for language, _ in counts.most_common(1)), "")
        found = [[language, pivot] for language in counts if language != pivot]
    return [] if any(is_english(language) for pair in found for language in pair) else found


def _languages(row: Row) -> list[str]:
    """Keys of an N-way row; none where one of them is no language that we know."""
    row = row["translation"] if isinstance(row.get("translation"), dict) else row
    names = [name for name in row if not name.startswith("_")]
    return names if all(re.split("[-_]", name)[0] in LANGUAGE_NAMES for name in names) else []


def _mapping(row: Row) -> dict[str, Any] | None:
    """The columns that the readers would propose for pairs, where they leave nothing open."""
    proposal = proposal_for_pairs(row).partition("columns: ")[2]
    try:
        columns = load_yaml(proposal)
    except ValueError:  # cut, because it is long
        return None
    return columns if isinstance(columns, dict) and not any("<" in name for name in columns) else None


def _one_of(wanted: Sequence[str], row: Row) -> str | None:
    return next((name for name in wanted if name in row), None)


def _fields(settings: dict[str, Any]) -> set[str]:
    texts = (settings.get("prompt"), settings.get("response"))
    return {name for text in texts if text for name in re.findall(r"\{(\w+)\}", text)}


def _sampled(rows: Sequence[Any]) -> list[Any]:
    step = max(1, len(rows) // SAMPLED)
    return list(rows[::step])


def _guess(text: str) -> int:
    return math.ceil(len(text.encode("utf-8", "replace")) / BYTES_A_TOKEN)


def _rounded(lengths: list[int], context: int | None, how: str = "") -> tuple[int, str]:
    longest = sorted(lengths)[math.ceil(QUANTILE * len(lengths)) - 1]
    room = min(ROUND * math.ceil(longest / ROUND), context or 2**24)
    why = f"{100 * QUANTILE:g}% have at most {longest:,} tokens" + (f", {how}" if how else "")
    return room, why + (f"; the model's context is {context:,}" if context is not None and longest > context else "")
