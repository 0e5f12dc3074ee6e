"""Templates: how a row of task data becomes messages and an answer.

A template is a system message, a prompt and a response with ``{fields}``, and a function that computes the fields
of a row. The three texts can each be replaced from the config; braces that enclose anything but a single word
(JSON in a prompt) are left alone. To add a template, write its fields function and add it to `TEMPLATES`.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace

from fastalign.config import TaskConfig
from fastalign.data.files import Row, Source, read_sources
from fastalign.data.parallel import Pair, read_pairs
from fastalign.errors import ConfigError, DataError

Message = dict[str, str]
NO_SPACES = ("zh", "ja", "th", "lo", "km", "my", "bo", "yue", "wuu")  # scripts written without spaces between words

LANGUAGE_NAMES = {
    "af": "Afrikaans", "am": "Amharic", "ar": "Arabic", "az": "Azerbaijani", "be": "Belarusian", "bg": "Bulgarian",
    "bn": "Bengali", "bs": "Bosnian", "ca": "Catalan", "ceb": "Cebuano", "cs": "Czech", "cy": "Welsh", "da": "Danish",
    "de": "German", "el": "Greek", "en": "English", "es": "Spanish", "et": "Estonian", "eu": "Basque", "fa": "Persian",
    "fi": "Finnish", "fil": "Filipino", "fr": "French", "ga": "Irish", "gl": "Galician", "gsw": "Swiss German",
    "gu": "Gujarati", "ha": "Hausa", "he": "Hebrew", "hi": "Hindi", "hr": "Croatian", "hu": "Hungarian",
    "hy": "Armenian", "id": "Indonesian", "ig": "Igbo", "is": "Icelandic", "it": "Italian", "ja": "Japanese",
    "jv": "Javanese", "ka": "Georgian", "kk": "Kazakh", "km": "Khmer", "kn": "Kannada", "ko": "Korean", "ky": "Kyrgyz",
    "lo": "Lao", "lt": "Lithuanian", "lv": "Latvian", "mk": "Macedonian", "ml": "Malayalam", "mn": "Mongolian",
    "mr": "Marathi", "ms": "Malay", "my": "Burmese", "nap": "Neapolitan", "nb": "Norwegian", "ne": "Nepali",
    "nl": "Dutch", "nn": "Norwegian Nynorsk", "no": "Norwegian", "pa": "Punjabi", "pl": "Polish", "ps": "Pashto",
    "pt": "Portuguese", "ro": "Romanian", "ru": "Russian", "si": "Sinhala", "sk": "Slovak", "sl": "Slovenian",
    "so": "Somali", "sq": "Albanian", "sr": "Serbian", "sv": "Swedish", "sw": "Swahili", "ta": "Tamil", "te": "Telugu",
    "th": "Thai", "tl": "Tagalog", "tr": "Turkish", "uk": "Ukrainian", "ur": "Urdu", "uz": "Uzbek",
    "vi": "Vietnamese", "yo": "Yoruba", "zh": "Chinese", "zu": "Zulu",
}  # fmt: skip


@dataclass(frozen=True)
class TaskExample:
    """Messages that end with the assistant's answer, and the language of the row."""

    messages: list[Message]
    language: str


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
    so that held-out rows get the same prompt.
    """

    def __init__(self, config: TaskConfig):
        texts = {name: getattr(config, name) for name in ("system", "prompt", "response")}
        texts = {name: text for name, text in texts.items() if text is not None}
        self.config = config
        self.template = replace(TEMPLATES[config.template], **texts)
        self.types: list[str] | None = None

    def read(self, spec: str | Sequence[str], key: str) -> list[TaskExample]:
        """All rows of `spec` (path(s) or a hub id) in the wanted languages; `key` names the setting in messages.

        Raises:
            DataError: unreadable files, rows the template cannot use, no row in a wanted language.
            ConfigError: a text of the user's names a field that does not exist.
        """
        if self.config.template == "translation":
            pairs = read_pairs(spec, "to_english", key)
            examples = [_render(self.template, _translation_fields(pair), pair.source_lang) for pair in pairs]
        else:
            sources = read_sources(spec, key)
            if self.types is None:
                self.types = sorted({kind for source in sources for kind in _types(source, self.template.labels)})
            examples = [
                _example(self.template, row, self.types, source, i)
                for source in sources
                for i, row in enumerate(source.rows)
            ]
        if self.config.languages is None:
            return examples
        found = {example.language for example in examples}
        for language in self.config.languages:
            if language not in found:
                raise DataError(f"task.languages: {language!r} is not in {key}; there: {', '.join(sorted(found))}")
        return [example for example in examples if example.language in self.config.languages]


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
        apart = text and token and text[-1].isascii() and token[0].isascii() and text[-1].isalnum() and token[0].isalnum()
        text += f" {token}" if apart else token
    return text


def _slot_fields(row: Row, types: Sequence[str]) -> dict[str, str]:
    tokens, language = row["tokens"], row["lang"]
    items = [f"intent: {row['intent']}"] if row.get("intent") else []
    items += [f"{kind}: {join_tokens(tokens[a:b], language)}" for kind, a, b in bio_spans(row["slots"])]
    return {"text": join_tokens(tokens, language), "types": ", ".join(types), "answer": "; ".join(items) or "None"}


def _ner_fields(row: Row, types: Sequence[str]) -> dict[str, str]:
    tokens, language = row["tokens"], row["lang"]
    entities = [{"type": kind, "text": join_tokens(tokens[a:b], language)} for kind, a, b in bio_spans(row["tags"])]
    answer = json.dumps({"Results": entities}, ensure_ascii=False)
    return {"text": join_tokens(tokens, language), "types": ", ".join(types), "answer": answer}


def _translation_fields(pair: Pair) -> dict[str, str]:
    def name(code: str) -> str:
        return LANGUAGE_NAMES.get(code) or LANGUAGE_NAMES.get(re.split("[-_]", code)[0], code)

    return {
        "text": pair.source,
        "source_language": name(pair.source_lang),
        "target_language": name(pair.target_lang),
        "answer": pair.target,
    }


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


def _types(source: Source, column: str | None) -> Iterable[str]:
    if column is not None:
        for row in source.rows:
            for tag in row.get(column) or ():
                if isinstance(tag, str) and tag[:2] in ("B-", "I-"):
                    yield tag[2:]


def _example(template: Template, row: Row, types: Sequence[str], source: Source, i: int) -> TaskExample:
    missing = template.columns - row.keys()
    if missing:
        raise DataError(
            f"{source.where(i)}: no {', '.join(sorted(missing))}; found {', '.join(row)}; this template needs "
            f"{', '.join(sorted(template.columns))} (see task.template)"
        )
    language = row.get("lang") or row.get("language") or "und"
    if template.labels is not None:
        tokens, tags = row["tokens"], row[template.labels]
        for name, value in (("tokens", tokens), (template.labels, tags)):
            if not isinstance(value, list) or not all(isinstance(item, str) for item in value):
                raise DataError(f"{source.where(i)}: {name} must be a list of text, not {value!r:.60}")
        if len(tokens) != len(tags) or not tokens:
            raise DataError(f"{source.where(i)}: {len(tokens)} tokens but {len(tags)} {template.labels}")
    if template.fields is not None:
        return _render(template, {**row, **template.fields(row, types)}, language)
    if template.prompt:
        return _render(template, row, language)
    return TaskExample(_chat_messages(row, template.system, source, i), language)


def _chat_messages(row: Row, system: str, source: Source, i: int) -> list[Message]:
    """Rows that are conversations already. `messages` wins over prompt/response, those over prefix/text."""
    if isinstance(row.get("messages"), list):
        messages = row["messages"]
        for message in messages:
            good = isinstance(message, dict) and isinstance(message.get("role"), str)
            if not good or not isinstance(message.get("content"), str):
                raise DataError(f"{source.where(i)}: every message needs a role and a content, both text")
        if not messages or messages[-1]["role"] != "assistant":
            raise DataError(f"{source.where(i)}: the last message must be the assistant's, the answer to learn")
        messages = [{"role": message["role"], "content": message["content"]} for message in messages]
    else:
        for question, answer in (("prompt", "response"), ("prefix", "text")):
            if isinstance(row.get(question), str) and isinstance(row.get(answer), str):
                messages = [{"role": "user", "content": row[question]}, {"role": "assistant", "content": row[answer]}]
                break
        else:
            raise DataError(
                f"{source.where(i)}: found {', '.join(row)}; known kinds: prompt + response, messages, prefix + text; "
                "for tokens with slots or tags set task.template: slots or ner"
            )
    if not messages[-1]["content"].strip():
        raise DataError(f"{source.where(i)}: the answer is empty")
    return [{"role": "system", "content": system}, *messages] if system else messages


def _render(template: Template, fields: Row, language: str) -> TaskExample:
    def fill(text: str) -> str:
        def value(match: re.Match[str]) -> str:
            if match[1] not in fields:
                raise ConfigError(f"task template: no field {{{match[1]}}}; there are: {', '.join(map(str, fields))}")
            return str(fields[match[1]])

        return re.sub(r"\{(\w+)\}", value, text)

    messages = [{"role": "user", "content": fill(template.prompt)}, {"role": "assistant", "content": fill(template.response)}]
    if template.system:
        messages.insert(0, {"role": "system", "content": fill(template.system)})
    return TaskExample(messages, language)
