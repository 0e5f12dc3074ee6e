"""Templates: rows of every kind as messages and answers, and bad rows refused on one line with their place."""

from __future__ import annotations

import json
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from fastalign.config import Data, config_from_dict
from fastalign.data.tally import Tally
from fastalign.data.templates import TEMPLATES, TaskExample, TaskReader, bio_spans, join_tokens
from fastalign.errors import ConfigError, DataError, FastalignError

Written = Callable[..., str]
SLOTS = {
    "lang": "en",
    "id": "1",
    "tokens": ["wake", "me", "at", "nine", "am", "on", "Friday"],
    "slots": ["O", "O", "O", "B-time", "I-time", "O", "B-date"],
    "intent": "alarm/set",
}
NER = {"lang": "en", "tokens": ["Al", "Zaman", "met", "Ani"], "tags": ["B-ORG", "I-ORG", "O", "B-PER"]}


@pytest.fixture
def write(tmp_path: Path) -> Written:
    def write(*rows: dict, name: str = "task.jsonl") -> str:
        path = tmp_path / name
        path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
        return str(path)

    return write


def reader(**task: Any) -> TaskReader:
    return TaskReader(config_from_dict({"task": task}).task)


def texts(example: TaskExample) -> list[tuple[str, str]]:
    return [(message["role"], message["content"]) for message in example.messages]


def read(path: Data, **task: Any) -> list[list[tuple[str, str]]]:
    return [texts(example) for example in reader(**task).read(path, "task.data")]


def refusal(path: str, **task: Any) -> str:
    with pytest.raises(FastalignError) as caught:
        read(path, **task)
    assert str(caught.value).isprintable() and len(str(caught.value)) < 600
    return str(caught.value)


def test_prompt_and_response(write):
    path = write({"prompt": "Hi {x}", "response": " {y} "}, {"prompt": "", "response": "b", "lang": "de"})
    examples = reader().read(path, "task.data")
    assert texts(examples[0]) == [("user", "Hi {x}"), ("assistant", " {y} ")]
    assert [(example.language, example.raw, example.where) for example in examples] == [
        ("und", False, f"{path}, line 1"),
        ("de", False, f"{path}, line 2"),
    ]
    assert read(path, system="Be {brief}.")[0][0] == ("system", "Be {brief}.")


def test_messages(write):
    turns = [
        {"role": "user", "content": "a"},
        {"role": "assistant", "content": "b", "weight": 1},
        {"role": "user", "content": "c"},
        {"role": "assistant", "content": "d"},
    ]
    own = [{"role": "system", "content": "own"}, *turns[:2]]
    path = write({"messages": turns, "language": "sw"}, {"messages": own, "prompt": "x", "response": "y"})
    assert read(path) == [
        [("user", "a"), ("assistant", "b"), ("user", "c"), ("assistant", "d")],
        [("system", "own"), ("user", "a"), ("assistant", "b")],
    ]
    assert reader().read(path, "k")[0].language == "sw"
    given = read(path, system="given")
    assert given[0][:2] == [("system", "given"), ("user", "a")]
    assert given[1] == [("system", "own"), ("user", "a"), ("assistant", "b")], "a row's own system message stays"


def test_prefix_and_text_hold_their_markup(write):
    """Rows of the reference: the prompt as the chat template wrote it, and the answer with its end."""
    row = {"prefix": "<|user|>\n\nhi<|eot|>\n<|assistant|>\n\n", "text": "hello<|eot|>", "text_parallel_0": "x"}
    [example] = reader(system="left out").read(write(row), "k")
    assert example.raw
    assert texts(example) == [("user", row["prefix"]), ("assistant", row["text"])]


def test_slots(write):
    path = write(SLOTS, {**SLOTS, "slots": ["O"] * 7, "intent": None}, {**SLOTS, "intent": "x", "slots": ["O"] * 7})
    examples = read(path, template="slots")
    assert examples[0][0] == ("system", TEMPLATES["slots"].system)
    assert examples[0][1:] == [
        ("user", "wake me at nine am on Friday"),
        ("assistant", "intent: alarm/set; time: nine am; date: Friday"),
    ]
    assert [example[-1][1] for example in examples[1:]] == ["None", "intent: x"]


def test_ner(write):
    path = write(NER, {**NER, "tags": ["O"] * 4})
    examples = read(path, template="ner")
    assert "of the types ORG, PER in the text" in examples[0][0][1]
    assert examples[0][1] == ("user", "Al Zaman met Ani")
    results = [json.loads(example[-1][1]) for example in examples]
    assert results == [
        {"Results": [{"type": "ORG", "text": "Al Zaman"}, {"type": "PER", "text": "Ani"}]},
        {"Results": []},
    ]
    chinese = {"lang": "zh", "tokens": ["北京", '"', "好"], "tags": ["B-LOC", "I-LOC", "O"]}
    assert read(write(chinese), template="ner")[0][-1][1] == '{"Results": [{"type": "LOC", "text": "北京\\""}]}'


def test_types_are_those_of_the_training_data(write):
    """A held-out row gets the prompt that the model was trained with, whatever types its own file has."""
    both = reader(template="ner")
    both.read(write(NER), "task.data")
    [example] = both.read(write({**NER, "tags": ["B-LOC", "I-LOC", "O", "O"]}, name="eval.jsonl"), "task.eval_data")
    assert "of the types ORG, PER in" in texts(example)[0][1]
    two = [write(NER), write({**NER, "tags": ["O", "O", "B-MISC-X", "I-LOC"]}, name="b.jsonl")]
    assert read(two, template="ner")[0][0] == read(two, template="ner")[1][0]
    assert "of the types LOC, MISC-X, ORG, PER in" in read(two, template="ner")[0][0][1]


def test_translation(write):
    path = write(
        {"lang": "de-AT", "en": "one", "text": "eins"},
        {"source": "two", "target": "mbili", "source_lang": "en", "target_lang": "sw"},
        {"_id": 3, "en": "three", "yy": "tri", "no": "tre"},
    )
    examples = reader(template="translation").read(path, "k")
    assert [texts(example) for example in examples] == [
        [("system", "Translate from German to English."), ("user", "eins"), ("assistant", "one")],
        [("system", "Translate from English to Swahili."), ("user", "two"), ("assistant", "mbili")],
        [("system", "Translate from yy to English."), ("user", "tri"), ("assistant", "three")],
        [("system", "Translate from Norwegian to English."), ("user", "tre"), ("assistant", "three")],
    ]
    assert [example.language for example in examples] == ["de-AT", "sw", "yy", "no"]
    only = reader(template="translation", languages=["sw", "no"]).read(path, "k")
    assert [example.language for example in only] == ["sw", "no"]


def test_the_texts_of_a_template_can_be_replaced(write):
    path = write({**SLOTS, "answer": "lost", "n": 3})
    assert read(path, template="slots", system="", prompt='{"text": {text}, {n}}', response="{{answer}}")[0] == [
        ("user", '{"text": wake me at nine am on Friday, 3}'),
        ("assistant", "{intent: alarm/set; time: nine am; date: Friday}"),
    ]
    assert read(path, template="slots", system="{types} {intent}")[0][0] == ("system", "date, time alarm/set")
    pair = write({"lang": "de", "en": "one", "text": "eins"})
    assert read(pair, template="translation", system="", prompt="{source_language}>{target_language}: {text}")[0] == [
        ("user", "German>English: eins"),
        ("assistant", "one"),
    ]


def test_custom(write):
    path = write({"q": "{a} {b c} {} {q}", "a": "x", "n": 1.5, "lang": "de"})
    task = {"template": "custom", "prompt": "Q: {q} {b c} {}", "response": "A: {a} {n}"}
    assert read(path, **task) == [
        [("user", "Q: {a} {b c} {} {q} {b c} {}"), ("assistant", "A: x 1.5")]  # what a field holds is text
    ]
    assert read(path, **task, system="In {lang}")[0][0] == ("system", "In de")
    message = refusal(path, **{**task, "prompt": "{question}"})
    assert "no field {question}" in message and "there are: q, a, n, lang" in message
    with pytest.raises(ConfigError):
        read(path, **{**task, "prompt": "{question}"})
    for value in (None, ["a"], {"b": 1}, float("nan"), float("inf")):
        assert "line 1: the field {a} must be text or a number" in refusal(
            write({"q": "x", "a": value, "n": 1}), **task
        )
    assert "line 1: the answer is empty" in refusal(
        write({"q": "x", "a": " ", "n": ""}), **{**task, "response": "{a}{n}"}
    )


def test_languages(write):
    path = write(*({**NER, "lang": lang} for lang in ("en", "no", "id", "no")))
    assert [e.language for e in reader(template="ner", languages=["no", "id"]).read(path, "k")] == ["no", "id", "no"]
    assert "task.languages: 'de' is not in task.data; there: en, id, no" in refusal(
        path, template="ner", languages=["en", "de"]
    )


def test_rows_of_other_languages_are_counted(write):
    path = write(*({**NER, "lang": lang} for lang in ("en", "no", "id", "no")))
    tally = Tally()
    both = TaskReader(config_from_dict({"task": {"template": "ner", "languages": ["no"]}}).task, tally)
    assert len(both.read(path, "task.data")) == 2
    assert tally.lines() == [
        f"task.data: 2 of 4 rows left out: task.languages does not name their language ({path}, line 1; line 3)"
    ]
    assert tally.as_dict()["files"]["task.data"][0]["rows"] == 4


def test_a_translation_knows_its_line_and_counts_what_is_empty(write):
    good = {"lang": "de", "en": "one", "text": "eins"}
    path = write(good, {**good, "text": "\ufeff"}, good)
    tally = Tally()
    examples = TaskReader(config_from_dict({"task": {"template": "translation"}}).task, tally).read(path, "task.data")
    assert [example.where for example in examples] == [f"{path}, line 1", f"{path}, line 3"]
    assert tally.lines() == [f"task.data: 1 of 3 pairs skipped: a side is empty ({path}, line 2)"]
    assert tally.as_dict()["files"]["task.data"][0]["rows"] == 3


def test_types_beyond_number_are_not_listed(write):
    path = write(*({**NER, "tags": [f"B-{i}-{k}" for k in range(4)]} for i in range(300)))
    assert "task.data: 1,200 types of labels are too many to list in every prompt" in refusal(path, template="ner")
    assert len(read(path, template="ner", system="Find the names.")) == 300


@pytest.mark.parametrize(
    ("template", "row", "words"),
    [
        ("chat", {}, "found keys none; known kinds: prompt + response, messages, prefix + text"),
        ("chat", {"question": "a"}, "found keys question ('a'); known kinds"),
        ("chat", SLOTS, "set task.template: slots or ner"),
        ("chat", {"prompt": "a", "response": None}, "response must be text, not None"),
        ("chat", {"prompt": [1], "response": "b"}, "prompt must be text, not [1]"),
        ("chat", {"prompt": "a", "response": " \n"}, "the answer (response) is empty"),
        ("chat", {"prefix": "a", "text": ""}, "the answer (text) is empty"),
        ("chat", {"prompt": "a", "response": "b", "lang": ["de"]}, "the language must be text such as de, not ['de']"),
        ("chat", {"prompt": "a", "response": "b", "lang": ""}, "the language must be text"),
        ("chat", {"prompt": "a", "response": "\u200b\0"}, "the answer (response) is empty"),
        (
            "chat",
            {"prompt": "a", "response": "b", "lang": "d\x1be"},
            "the language must be text such as de, not 'd\\x1be'",
        ),
        ("chat", {"k" * 10_000: 1}, "line 2: found keys kkk"),
        ("chat", {f"k{i}": 1 for i in range(100_000)}, "found keys k0 (1), k1 (1), k2"),
        ("chat", {"prompt": ["\x1b" * 10_000], "response": "b"}, "prompt must be text, not ['"),
        ("chat", {"messages": [{"role": "user", "content": "a"}] * 1001}, "1,001 messages, more than 1,000"),
        ("chat", {"messages": "hi"}, "messages must be a list, not 'hi'"),
        ("chat", {"messages": []}, "must begin with a prompt and end with the assistant's answer"),
        ("chat", {"messages": [{"role": "user", "content": "a"}]}, "end with the assistant's answer"),
        ("chat", {"messages": [{"role": "assistant", "content": "a"}]}, "must begin with a prompt"),
        ("chat", {"messages": [{"role": "assistant", "content": "a"}] * 2}, "must begin with a prompt"),
        ("chat", {"messages": [{"role": "user", "content": "a"}] * 2}, "end with the assistant's answer"),
        ("chat", {"messages": ["a"]}, "every message needs a role and a content"),
        ("chat", {"messages": [{"from": "human", "value": "a"}]}, "every message needs a role and a content"),
        ("chat", {"messages": [{"role": "user", "content": [{"type": "text"}]}]}, "both text"),
        (
            "chat",
            {"messages": [{"role": "user", "content": "a"}, {"role": "assistant", "content": ""}]},
            "an answer of the assistant is empty",
        ),
        ("slots", {"prompt": "a", "response": "b"}, "no lang, slots, tokens; found keys prompt ('a'), response ('b')"),
        (
            "slots",
            NER,
            "(see task.template); map them, e.g. columns: {lang: lang, tokens: tokens, slots: tags}",
        ),
        ("slots", {**SLOTS, "tokens": "wake me"}, "tokens must be a list of text, not 'wake me'"),
        ("slots", {**SLOTS, "slots": 5}, "slots must be a list of text, not 5"),
        ("slots", {**SLOTS, "slots": SLOTS["slots"][1:]}, "7 tokens but 6 slots"),
        ("slots", {**SLOTS, "tokens": [], "slots": []}, "there is no text in the tokens"),
        ("slots", {**SLOTS, "tokens": [""] * 7}, "there is no text in the tokens"),
        ("slots", {**SLOTS, "intent": 4}, "intent must be text, not 4"),
        ("slots", {**SLOTS, "lang": 4}, "the language must be text such as de, not 4"),
        ("ner", {**NER, "tags": [0, 1, 0, 2]}, "tags must be a list of text, not [0, 1, 0, 2]"),
        ("ner", {**NER, "tags": ["O", "O", "O", "S-PER"]}, "'S-PER' is not a BIO tag"),
        ("ner", {**NER, "tags": ["O", "O", "O", "B-"]}, "'B-' is not a BIO tag"),
        ("ner", {**NER, "tags": ["O", "O", "O", "_"]}, "'_' is not a BIO tag"),
        ("ner", {**NER, "tags": ["O", "O", "O", None]}, "tags must be a list of text"),
    ],
)
def test_bad_rows_are_named_with_their_line(write, template, row, words):
    good = {"chat": {"prompt": "a", "response": "b"}, "slots": SLOTS, "ner": NER}[template]
    path = write(good, row)
    message = refusal(path, template=template)
    assert message.startswith(f"{path}, line 2: ")
    assert words in message


def test_bad_rows_of_held_out_data_are_named_too(write):
    both = reader(template="slots")
    both.read(write(SLOTS), "task.data")
    with pytest.raises(DataError, match=r"eval\.jsonl, line 1: 'x' is not a BIO tag"):
        both.read(write({**SLOTS, "slots": ["x"] * 7}, name="eval.jsonl"), "task.eval_data")


def test_null_columns_of_other_kinds_are_no_matter(write):
    """Parquet files hold every column in every row."""
    rows = [{"messages": None, "prompt": None, "response": None, "prefix": "a", "text": "b"}]
    assert read(write(*rows)) == [[("user", "a"), ("assistant", "b")]]
    assert reader(template="slots").read(write({**SLOTS, "lang": None, "language": "de"}), "k")[0].language == "de"


@pytest.mark.parametrize(
    ("tags", "spans"),
    [
        ("O O", []),
        ("B-a I-a O B-b", [("a", 0, 2), ("b", 3, 4)]),
        ("B-a B-a", [("a", 0, 1), ("a", 1, 2)]),
        ("I-a I-a I-b", [("a", 0, 2), ("b", 2, 3)]),
        ("B-a O I-a", [("a", 0, 1), ("a", 2, 3)]),
        ("B-a I-b I-a", [("a", 0, 1), ("b", 1, 2), ("a", 2, 3)]),
        ("B-a-b I-a-b", [("a-b", 0, 2)]),
    ],
)
def test_bio_spans(tags, spans):
    assert bio_spans(tags.split()) == spans


def test_join_tokens():
    assert join_tokens(["a", "b"], "de-muc") == "a b"
    assert join_tokens(["显示", "Taylor", "Swift", "的", "歌", "3", "4", "."], "zh") == "显示Taylor Swift的歌3 4."
    for language in ("ja", "zh_Hans", "zho_Hant", "tha_Thai", "km"):
        assert join_tokens(["ก", "ข"], language) == "กข"
    assert join_tokens(["가", "나"], "ko") == "가 나"


def test_many_rows_in_seconds(write):
    path = write(*(SLOTS for _ in range(30_000)))
    started = time.perf_counter()
    assert len(reader(template="slots").read(path, "k")) == 30_000
    assert time.perf_counter() - started < 12  # measured: 1.2 s
