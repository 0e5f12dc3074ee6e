"""Templates: how a row of task data becomes messages and an answer.

A template is a system message, a prompt and a response with ``{fields}``, and a function that computes the fields
of a row. The three texts can each be replaced from the config; braces that enclose anything but a single word
(JSON in a prompt) are left alone, and what a field holds is never searched for further fields. To add a template,
write its fields function and add it to `TEMPLATES`.

=========== ============================================ ======================================================
template    rows                                         answer
=========== ============================================ ======================================================
chat        {prompt, response}, {messages}               the response, or every turn of the assistant
            {prefix, text}                               the text; both hold the chat's markup already
custom      any columns, {word} names one                as `task.response` says
slots       {lang, tokens, slots, intent}, BIO tags      ``intent: alarm/set; datetime: at nine; ...`` or ``None``
ner         {lang, tokens, tags}, BIO tags               ``{"Results": [{"type": "PER", "text": "..."}, ...]}``
translation every kind of sentence pair or N-way row     the target; N-way and {lang, en, text} rows: the English
=========== ============================================ ======================================================
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace

from fastalign.config import Data, TaskConfig
from fastalign.data.columns import listed_columns, proposal_for_task
from fastalign.data.files import Row, Source
from fastalign.data.languages import LANGUAGE_NAMES
from fastalign.data.parallel import Pair, is_english, pairs_of
from fastalign.data.sources import read_sources
from fastalign.data.tally import Tally
from fastalign.data.text import has_text, is_language, listed, quoted
from fastalign.errors import ConfigError, DataError

Message = dict[str, str]
FIELD = re.compile(r"\{(\w+)\}")
OTHER_LANGUAGES = "rows left out: task.languages does not name their language"
MOST_MESSAGES = 1_000  # the chat template is applied at every turn, so the time grows with the square
MOST_TYPES = 1_000  # that a prompt lists, and every prompt does
TAG = re.compile(r"O|[BI]-.+")
NO_SPACES = {  # languages written without spaces between words, also by their codes of three letters
    *(
        "zh",
        "ja",
        "th",
        "lo",
        "km",
        "my",
        "bo",
        "zho",
        "cmn",
        "yue",
        "wuu",
        "jpn",
        "tha",
        "lao",
        "khm",
        "mya",
        "bod",
    ),
}


@dataclass(frozen=True)
class TaskExample:
    """Messages that end with the assistant's answer, and the language of the row.

    Attributes:
        raw: two messages whose texts hold the chat's markup already: they are joined as they are.
        where: the row's file and line, for messages.
    """

    messages: list[Message]
    language: str
    raw: bool = False
    where: str = ""


@dataclass(frozen=True)
class Template:
    """Texts with ``{fields}`` and the function that computes the fields of a row (None: the row's columns)."""

    columns: frozenset[str]
    system: str = ""
    prompt: str = ""
    response: str = "{answer}"
    fields: Callable[[Row, Sequence[str]], dict[str, str]] | None = None
    labels: str | None = None  # column of BIO tags, whose types the prompt may list as {types}


class TaskReader:
    """Reads task rows and puts them through the configured template.

    The label types that a prompt may list as ``{types}`` are those of the first file read, the training data,
    so that held-out rows get the same prompt. What is read and left out goes to `tally`.
    """

    def __init__(self, config: TaskConfig, tally: Tally | None = None):
        texts = {name: getattr(config, name) for name in ("system", "prompt", "response")}
        texts = {name: text for name, text in texts.items() if text is not None}
        self.config, self.tally = config, tally
        self.template = replace(TEMPLATES[config.template], **texts)
        self.types: list[str] | None = None

    def read(self, spec: Data, key: str) -> list[TaskExample]:
        """All rows of `spec` in the wanted languages; `key` names the setting in messages.

        Raises:
            DataError: unreadable files, rows the template cannot use, no row in a wanted language.
            ConfigError: a text of the user's names a field that does not exist.
        """
        return self._examples(read_sources(spec, key, self.tally), key, self.tally)

    def block(self, source: Source, number: int, first_row: int, key: str, tally: Tally) -> list[TaskExample]:
        """The examples of block `number` of a stream; only the first one must hold one of the wanted languages.

        The label types are those of the first block.
        """
        return self._examples([source], key, tally, number)

    def _examples(
        self, sources: Sequence[Source], key: str, tally: Tally | None, block: int | None = None
    ) -> list[TaskExample]:
        if self.config.template == "translation":
            pairs = pairs_of(sources, "as_written", key, tally, block=block)
            examples = [_translation(self.template, pair) for pair in pairs]
        else:
            tags = {tag for source in sources for tag in _checked_tags(source, self.template)}
            if self.types is None:
                self.types = self._listed_types({tag[2:] for tag in tags if tag != "O"}, key)
            examples = [
                _example(self.template, row, self.types, source.where(i), source.unmapped or row)
                for source in sources
                for i, row in enumerate(source.rows)
            ]
        if self.config.languages is None:
            return examples
        found = {example.language for example in examples}
        missing = [language for language in self.config.languages if language not in found]
        if missing and (block is None or (block == 0 and len(missing) == len(self.config.languages))):
            there = listed(sorted(found), 20)
            part = key if block is None else f"the first rows of {key}, which is streamed as it is written"
            raise DataError(f"task.languages: {quoted(missing[0])} is not in {part}; there: {there}")
        return _of_languages(self.config.languages, examples, key, tally)

    def _listed_types(self, types: set[str], key: str) -> list[str]:
        texts = (self.template.system, self.template.prompt, self.template.response)
        if len(types) > MOST_TYPES and any("{types}" in text for text in texts):
            raise DataError(
                f"{key}: {len(types):,} types of labels are too many to list in every prompt (at most {MOST_TYPES:,}); "
                "correct the tags, or set task.system without {types}"
            )
        return sorted(types)


def _of_languages(
    wanted: Sequence[str], examples: list[TaskExample], key: str, tally: Tally | None
) -> list[TaskExample]:
    if tally is not None:
        tally.out_of(key, OTHER_LANGUAGES, len(examples))
        for example in examples:
            if example.language not in wanted:
                tally.add(key, OTHER_LANGUAGES, example.where)
    return [example for example in examples if example.language in wanted]


def bio_spans(tags: Sequence[str]) -> list[tuple[str, int, int]]:
    """(type, first, end) of every span; an I- that continues nothing opens one."""
    spans: list[tuple[str, int, int]] = []
    for i, tag in enumerate(tags):
        prefix, _, kind = tag.partition("-")
        if prefix == "I" and spans and spans[-1][0] == kind and spans[-1][2] == i:
            spans[-1] = (kind, spans[-1][1], i + 1)
        elif prefix in ("B", "I") and kind:
            spans.append((kind, i, i + 1))
    return spans


def join_tokens(tokens: Sequence[str], language: str) -> str:
    """Tokens as running text: spaces between words, none in scripts that have none (but between Latin words)."""
    if re.split("[-_]", language)[0] not in NO_SPACES:
        return " ".join(tokens)
    text = ""
    for token in tokens:
        apart = (
            text and token and text[-1].isascii() and token[0].isascii() and text[-1].isalnum() and token[0].isalnum()
        )
        text += f" {token}" if apart else token
    return text


def _slot_fields(row: Row, types: Sequence[str]) -> dict[str, str]:
    tokens, language = row["tokens"], row["lang"]
    items = [f"intent: {row['intent']}"] if row.get("intent") else []
    items += [f"{kind}: {join_tokens(tokens[a:b], language)}" for kind, a, b in bio_spans(row["slots"])]
    return {
        "text": join_tokens(tokens, language),
        "types": ", ".join(types),
        "answer": "; ".join(items) or "None",
    }


def _ner_fields(row: Row, types: Sequence[str]) -> dict[str, str]:
    tokens, language = row["tokens"], row["lang"]
    entities = [{"type": kind, "text": join_tokens(tokens[a:b], language)} for kind, a, b in bio_spans(row["tags"])]
    answer = json.dumps({"Results": entities}, ensure_ascii=False)
    return {"text": join_tokens(tokens, language), "types": ", ".join(types), "answer": answer}


def _translation(template: Template, pair: Pair) -> TaskExample:
    def name(code: str) -> str:
        return LANGUAGE_NAMES.get(code) or LANGUAGE_NAMES.get(re.split("[-_]", code)[0], code)

    fields = {
        "text": pair.source,
        "source_language": name(pair.source_lang),
        "target_language": name(pair.target_lang),
        "answer": pair.target,
    }
    other = pair.target_lang if is_english(pair.source_lang) else pair.source_lang
    return _render(template, fields, other, pair.where)


TEMPLATES: dict[str, Template] = {
    "chat": Template(columns=frozenset()),
    "custom": Template(columns=frozenset()),
    "slots": Template(
        columns=frozenset({"lang", "tokens", "slots"}),
        system="You are a voice assistant. Find the intent and the slots of what the user says. Answer with "
        "'type: value' items joined by '; ', or with None.",
        prompt="{text}",
        fields=_slot_fields,
        labels="slots",
    ),
    "ner": Template(
        columns=frozenset({"lang", "tokens", "tags"}),
        system="Find the named entities of the types {types} in the text. Answer with JSON: "
        'an object with the key "Results", a list of objects with "type" and "text".',
        prompt="{text}",
        fields=_ner_fields,
        labels="tags",
    ),
    "translation": Template(
        columns=frozenset(),
        system="Translate from {source_language} to {target_language}.",
        prompt="{text}",
    ),
}


def _checked_tags(source: Source, template: Template) -> Iterable[str]:
    """All tags of a file whose rows are in order; none where the template needs none."""
    if template.labels is not None:
        for i, row in enumerate(source.rows):
            yield from _checked_row(template, template.labels, row, source.where(i), source.unmapped or row)


def _checked_row(template: Template, labels: str, row: Row, where: str, there: Row) -> list[str]:
    missing = template.columns - row.keys()
    if missing:
        raise DataError(
            f"{where}: no {', '.join(sorted(missing))}; found keys {listed_columns(there)}; this template needs "
            f"{', '.join(sorted(template.columns))} (see task.template){proposal_for_task(there, template.columns)}"
        )
    tokens, tags = row["tokens"], row[labels]
    for name, value in (("tokens", tokens), (labels, tags)):
        if not isinstance(value, list) or not all(isinstance(item, str) for item in value):
            raise DataError(f"{where}: {name} must be a list of text, not {quoted(value)}")
    if not any(map(has_text, tokens)):
        raise DataError(f"{where}: there is no text in the tokens")
    if len(tokens) != len(tags):
        raise DataError(f"{where}: {len(tokens)} tokens but {len(tags)} {labels}")
    odd = next((tag for tag in tags if not TAG.fullmatch(tag)), None)
    if odd is not None:
        raise DataError(f"{where}: {quoted(odd)} is not a BIO tag; these are O, B-<type> and I-<type>")
    if not isinstance(row.get("intent", ""), (str, type(None))):
        raise DataError(f"{where}: intent must be text, not {quoted(row['intent'])}")
    return tags


def _example(template: Template, row: Row, types: Sequence[str], where: str, there: Row) -> TaskExample:
    """The example of a row; `there`: its columns as the file has them, for messages."""
    language = next((row[name] for name in ("lang", "language") if row.get(name) is not None), "und")
    if not is_language(language):
        raise DataError(f"{where}: the language must be text such as de, not {quoted(language)}")
    if template.fields is not None:
        return _render(template, {**row, **template.fields({**row, "lang": language}, types)}, language, where)
    if template.prompt:
        return _render(template, row, language, where)
    messages, raw = _conversation(row, where, there)
    if template.system and not raw and messages[0]["role"] != "system":
        messages = [{"role": "system", "content": template.system}, *messages]
    return TaskExample(messages, language, raw, where)


def _conversation(row: Row, where: str, there: Row) -> tuple[list[Message], bool]:
    """Messages of rows that are conversations already, and whether their texts hold the markup already.

    `messages` wins over prompt and response, those over prefix and text.
    """
    if row.get("messages") is not None:
        return _messages(row["messages"], where), False
    for question, answer in (("prompt", "response"), ("prefix", "text")):
        if question in row and answer in row and (row[question], row[answer]) != (None, None):
            for name in (question, answer):
                if not isinstance(row[name], str):
                    raise DataError(f"{where}: {name} must be text, not {quoted(row[name])}")
            if not has_text(row[answer]):
                raise DataError(f"{where}: the answer ({answer}) is empty")
            messages = [
                {"role": "user", "content": row[question]},
                {"role": "assistant", "content": row[answer]},
            ]
            return messages, question == "prefix"
    raise DataError(
        f"{where}: found keys {listed_columns(there)}; known kinds: prompt + response, messages, prefix + text; for "
        f"tokens with slots or tags set task.template: slots or ner{proposal_for_task(there, ())}"
    )


def _messages(messages: object, where: str) -> list[Message]:
    if not isinstance(messages, list):
        raise DataError(f"{where}: messages must be a list, not {quoted(messages)}")
    if len(messages) > MOST_MESSAGES:
        raise DataError(f"{where}: {len(messages):,} messages, more than {MOST_MESSAGES:,}; cut the conversation up")
    for message in messages:
        good = isinstance(message, dict) and isinstance(message.get("role"), str)
        if not good or not isinstance(message.get("content"), str):
            raise DataError(f"{where}: every message needs a role and a content, both text")
        if message["role"] == "assistant" and not has_text(message["content"]):
            raise DataError(f"{where}: an answer of the assistant is empty")
    if len(messages) < 2 or messages[-1]["role"] != "assistant" or messages[0]["role"] == "assistant":
        raise DataError(f"{where}: messages must begin with a prompt and end with the assistant's answer to learn")
    return [{"role": message["role"], "content": message["content"]} for message in messages]


def _render(template: Template, fields: Row, language: str, where: str) -> TaskExample:
    def value(match: re.Match[str]) -> str:
        name = match[1]
        if name not in fields:
            raise ConfigError(f"task template: no field {{{name}}} in {where}; there are: {listed(fields)}")
        number = isinstance(fields[name], (int, float)) and math.isfinite(fields[name])
        if not (number or isinstance(fields[name], str)):
            raise DataError(f"{where}: the field {{{name}}} must be text or a number, not {quoted(fields[name])}")
        return str(fields[name])

    texts = (("system", template.system), ("user", template.prompt), ("assistant", template.response))
    messages = [{"role": role, "content": FIELD.sub(value, text)} for role, text in texts]
    if not has_text(messages[-1]["content"]):
        raise DataError(f"{where}: the answer is empty")
    return TaskExample(messages if template.system else messages[1:], language, where=where)
