"""Data of one's own: mappings of columns, data sets with configurations and splits, and every refusal of them.

Data sets are folders as they lie on a hub, read by the real `datasets`; only what a hub itself answers is made up.
"""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import datasets
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from datasets.exceptions import DatasetNotFoundError

from fastalign.config import DataSource, TaskConfig, config_from_dict, config_text, config_to_dict, load_config
from fastalign.data.files import Row
from fastalign.data.parallel import read_pairs
from fastalign.data.sources import read_sources
from fastalign.data.tally import Tally
from fastalign.data.templates import TaskExample, TaskReader
from fastalign.errors import ConfigError, DataError
from fastalign.training.resume import run_record

QA = [{"question": f"where is {i}?", "answer": f"at {i}", "meta": {"id": i, "topic": "places"}} for i in range(6)]


@pytest.fixture(scope="module")
def opus(tmp_path_factory: pytest.TempPathFactory) -> str:
    """A parallel data set with two configurations of two splits, as the hubs have them."""
    folder = tmp_path_factory.mktemp("opus")
    lines = ["---", "configs:"]
    for name in ("de-en", "en-fr"):
        (folder / name).mkdir()
        lines += [f"- config_name: {name}", "  data_files:"]
        for split, count in (("train", 8), ("test", 3)):
            first, second = name.split("-")
            rows = [
                {"id": f"{i}", "translation": {c: f"{split} {c} {i}" for c in (first, second)}} for i in range(count)
            ]
            pq.write_table(pa.Table.from_pylist(rows), folder / name / f"{split}.parquet")
            lines.append(f"  - {{split: {split}, path: {name}/{split}.parquet}}")
    (folder / "README.md").write_text("\n".join([*lines, "---", ""]))
    return str(folder)


@pytest.fixture
def folder(tmp_path: Path) -> str:
    """A data set without configurations and with one split, which is not called train."""
    (tmp_path / "set").mkdir()
    write(tmp_path / "set" / "test.jsonl", QA)
    return str(tmp_path / "set")


def write(path: Path, rows: list[dict]) -> str:
    path.write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows), encoding="utf-8")
    return str(path)


def rows_of(**source: Any) -> list[Row]:
    return [row for found in read_sources(DataSource(**source), "task.data") for row in found.rows]


def examples(**source: Any) -> list[TaskExample]:
    return TaskReader(TaskConfig()).read(DataSource(**source), "task.data")


def refusal(**source: Any) -> str:
    """What reading the source says, on one line."""
    with pytest.raises(DataError) as caught:
        read_sources(DataSource(**source), "task.data")
    assert "\n" not in str(caught.value)
    return str(caught.value)


def of_pairs(rows: list[dict], tmp_path: Path, **source: Any) -> str:
    with pytest.raises(DataError) as caught:
        read_pairs(DataSource(path=write(tmp_path / "x.jsonl", rows), **source), "to_english", "alignment.data")
    return str(caught.value)


def of_task(rows: list[dict], tmp_path: Path, template: Any = "chat", **source: Any) -> str:
    with pytest.raises(DataError) as caught:
        spec = DataSource(path=write(tmp_path / "x.jsonl", rows), **source)
        TaskReader(TaskConfig(template=template)).read(spec, "task.data")
    return str(caught.value)


def test_columns_are_taken_under_our_names_and_the_others_left_out(tmp_path: Path) -> None:
    path = write(tmp_path / "qa.jsonl", QA)
    columns = {"prompt": "question", "response": "answer", "lang": {"value": "de"}, "_n": "meta.id"}
    assert rows_of(path=path, columns=columns)[2] == {
        "prompt": "where is 2?", "response": "at 2", "lang": "de", "_n": 2
    }  # fmt: skip
    [first, *_] = examples(path=path, columns=columns)
    assert first.language == "de" and first.where == f"{path}, line 1"
    assert [message["content"] for message in first.messages] == ["where is 0?", "at 0"]


def test_nested_columns_lists_and_names_with_dots(tmp_path: Path) -> None:
    rows = [{"a.b": 1, "a": {"b": 2, "c.d": {"e": 3}}, "answers": {"text": ["x", "y"]}}]
    columns = {"one": "a.b", "two": "a.c.d.e", "three": "answers.text.1", "four": "a"}
    assert rows_of(path=write(tmp_path / "n.jsonl", rows), columns=columns) == [
        {"one": 1, "two": 3, "three": "y", "four": {"b": 2, "c.d": {"e": 3}}}
    ]


def test_a_column_that_some_rows_lack_is_lacking_there(tmp_path: Path) -> None:
    rows = [{"t": {"de": "eins", "en": "one"}}, {"t": None}, {"t": {"de": "zwei"}}]
    path = write(tmp_path / "s.jsonl", rows)
    assert rows_of(path=path, columns={"de": "t.de", "en": "t.en"}) == [{"de": "eins", "en": "one"}, {}, {"de": "zwei"}]


def test_two_columns_of_any_names_are_a_pair(tmp_path: Path) -> None:
    path = write(tmp_path / "p.jsonl", [{"german": "eins", "english": "one", "n": 1}] * 2)
    [pair, _] = read_pairs(DataSource(path=path, columns={"de": "german", "en": "english"}), "to_english", "k")
    assert (pair.source, pair.target, pair.source_lang, pair.target_lang) == ("eins", "one", "de", "en")


def test_several_sources_of_several_kinds_in_one_list(tmp_path: Path, opus: str) -> None:
    mapped = DataSource(path=write(tmp_path / "a.jsonl", [{"g": "eins", "e": "one"}]), columns={"de": "g", "en": "e"})
    plain = write(tmp_path / "b.jsonl", [{"fr": "deux", "en": "two"}])
    for name, text in (("c.de", "drei\n"), ("c.en", "three\n")):
        (tmp_path / name).write_text(text)
    texts = DataSource(path=[str(tmp_path / "c.de"), str(tmp_path / "c.en")])
    pairs = read_pairs([mapped, plain, texts, DataSource(path=opus, name="en-fr", split="test")], "to_english", "k")
    assert [pair.source for pair in pairs[:4]] == ["eins", "deux", "drei", "test fr 0"] and len(pairs) == 6
    half = [str(tmp_path / "c.de"), DataSource(path=str(tmp_path / "c.en"), columns={"en": "en"})]
    with pytest.raises(DataError, match="cannot tell what"):
        read_sources(half, "k")


def test_opus_style_rows_need_no_mapping(opus: str, tmp_path: Path) -> None:
    [source] = read_sources(DataSource(path=opus, name="de-en"), "k")
    assert len(source.rows) == 8 and source.where(3) == f"{opus} (de-en), row 4"
    pairs = read_pairs(DataSource(path=opus, name="de-en", split="test"), "to_english", "k")
    assert [(pair.source, pair.target) for pair in pairs][:2] == [
        ("test de 0", "test en 0"),
        ("test de 1", "test en 1"),
    ]
    path = write(tmp_path / "t.jsonl", [{"translation": {"de": "eins", "en": "one"}, "score": 0.5}])
    assert read_pairs(path, "to_english", "k")[0].source == "eins"
    assert "the 'de' sentence must be text" in of_pairs([{"translation": {"de": 1, "en": "a"}}], tmp_path)


def test_splits_slices_and_the_only_split(opus: str, folder: str) -> None:
    assert len(rows_of(path=opus, name="de-en", split="train[:5]")) == 5
    assert len(rows_of(path=opus, name="de-en", split="train+test")) == 11
    assert rows_of(path=folder) == QA, "test is the only split"
    assert len(examples(path=folder, columns={"prompt": "question", "response": "answer"})) == 6


def test_a_folder_that_has_changed_is_read_anew(folder: str) -> None:
    times = os.stat(f"{folder}/test.jsonl")
    assert rows_of(path=folder)[0]["answer"] == "at 0"
    write(Path(folder) / "test.jsonl", [{**QA[0], "answer": "at 9"}, *QA[1:]])
    os.utime(f"{folder}/test.jsonl", ns=(times.st_atime_ns, times.st_mtime_ns))
    assert rows_of(path=folder)[0]["answer"] == "at 9"


def test_class_labels_are_read_as_their_names(tmp_path: Path) -> None:
    features = datasets.Features(
        {
            "words": datasets.List(datasets.Value("string")),
            "ner_tags": datasets.List(datasets.ClassLabel(names=["O", "B-PER", "I-PER"])),
            "label": datasets.ClassLabel(names=["bad", "good"]),
        }
    )
    rows = [{"words": ["Ada", "Byron", "slept"], "ner_tags": [1, 2, 0], "label": 1}, {"words": ["x"], "ner_tags": [0]}]
    table = datasets.Dataset.from_list([{"label": -1, **row} for row in rows], features=features)
    (tmp_path / "ner").mkdir()
    table.to_parquet(str(tmp_path / "ner" / "train.parquet"))
    found = rows_of(path=str(tmp_path / "ner"))
    assert found[0] == {"words": ["Ada", "Byron", "slept"], "ner_tags": ["B-PER", "I-PER", "O"], "label": "good"}
    assert found[1]["label"] == -1, "a row without a label"
    columns = {"lang": {"value": "en"}, "tokens": "words", "tags": "ner_tags"}
    [first, _] = TaskReader(TaskConfig(template="ner")).read(
        DataSource(path=str(tmp_path / "ner"), columns=columns), "k"
    )
    assert json.loads(first.messages[-1]["content"]) == {"Results": [{"type": "PER", "text": "Ada Byron"}]}


def test_a_custom_template_takes_columns_as_they_are_or_mapped(tmp_path: Path) -> None:
    path = write(tmp_path / "qa.jsonl", QA)
    for columns, prompt in ((None, "{question}"), ({"q": "question", "answer": "answer"}, "{q}")):
        reader = TaskReader(TaskConfig(template="custom", prompt=prompt, response="{answer}"))
        [first, *_] = reader.read(DataSource(path=path, columns=columns), "k")
        assert [message["content"] for message in first.messages] == ["where is 0?", "at 0"]


def test_a_column_that_is_not_there_is_refused_with_those_that_are(tmp_path: Path) -> None:
    path = write(tmp_path / "qa.jsonl", [{"question": None}, *QA])
    message = refusal(path=path, columns={"prompt": "qestion", "response": "answer"})
    assert message.startswith(
        f"task.data.columns: no column 'qestion' (did you mean 'question'?) in {path}; there are: "
    )
    assert "question ('where is 0?'), answer ('at 0'), meta.id (0), meta.topic ('places')" in message
    message = refusal(path=path, columns={"prompt": "question", "response": "meta.name"})
    assert "no column 'meta.name'" in message
    message = refusal(path=write(tmp_path / "l.jsonl", [{"text": "x" * 999, "n" * 999: 1}]), columns={"prompt": "p"})
    assert "text ('xxxxxxxxxxxxxxxx...xxxxxxxx'), nnn" in message and len(message) < 400


@pytest.mark.parametrize(
    ("row", "proposed"),
    [
        ({"question": "a", "answer": "b"}, "columns: {prompt: question, response: answer}"),
        ({"instruction": "a", "input": "", "output": "b"}, "columns: {prompt: instruction, response: output}"),
        ({"id": "7", "Text": "a", "Label": "b"}, "columns: {prompt: Text, response: Label}"),
        ({"doc_id": "7", "one": "a", "two": "b"}, "columns: {prompt: one, response: two}"),
        ({"x": {"q_text": "a"}, "y": "b"}, "columns: {prompt: x.q_text, response: y}"),
        ({"conversations": [{"role": "user", "content": "a"}]}, "columns: {messages: conversations}"),
        ({"on": "a", "answer": "b"}, "columns: {prompt: 'on', response: answer}"),
    ],
)
def test_rows_that_fit_no_task_are_refused_with_a_proposal(row: dict, proposed: str, tmp_path: Path) -> None:
    message = of_task([row], tmp_path)
    assert "x.jsonl, line 1: found keys " in message and "known kinds: prompt + response" in message
    assert all(f"{name} (" in message or f"{name}." in message for name in row)
    assert message.endswith(f"; map them, e.g. {proposed}")
    columns = load_config(overrides=["task.data={path: x, " + proposed + "}"]).task.data
    assert isinstance(columns, DataSource) and columns.columns
    first = next(iter(row))
    with pytest.raises(DataError) as caught:
        TaskReader(TaskConfig()).read(DataSource(path=str(tmp_path / "x.jsonl"), columns={"prompt": first}), "k")
    assert f"found keys {first}" in str(caught.value), "also where they are mapped they are shown as the file has them"


def test_rows_of_labels_are_refused_with_a_proposal(tmp_path: Path) -> None:
    message = of_task([{"words": ["a"], "ner_tags": ["O"], "language": "de"}], tmp_path, template="ner")
    assert "no lang, tags, tokens; found keys words (['a']), ner_tags (['O']), language ('de')" in message
    assert message.endswith("; map them, e.g. columns: {lang: language, tokens: words, tags: ner_tags}")
    message = of_task([{"words": ["a"], "slot_labels": ["O"]}], tmp_path, template="slots")
    assert message.endswith("columns: {lang: {value: en}, tokens: words, slots: slot_labels}")


@pytest.mark.parametrize(
    ("row", "said"),
    [
        ({"question": "a", "answer": "b"}, ["question ('a'), answer ('b')", "no telling which languages question and"]),
        ({"text_1": "a", "text_2": "b"}, ["{<language of text_1>: text_1, <language of text_2>: text_2}"]),
        (
            {"sentence1": "a", "sentence2": "b", "score": 1.5},
            ["score (1.5)", "sentence1 and sentence2 are in: say it, e.g. columns"],
        ),
        ({"German": "a", "english": "b"}, ["map them, e.g. columns: {de: German, en: english}"]),
        ({"text_de": "a", "text_en": "b", "id": "1"}, ["columns: {de: text_de, en: text_en}"]),
        ({"english": "a", "foreign": "b"}, ["no telling which languages foreign are", "en: english}"]),
        ({"src": "a", "tgt": "b"}, ["there is no English", "no telling which languages src and tgt are in"]),
        (
            {"src": "a", "tgt": "b", "src_lang": "de", "tgt_lang": "en"},
            ["columns: {source: src, target: tgt, source_lang: src_lang, target_lang: tgt_lang}"],
        ),
        ({"source": "a", "target": "b"}, ["needs source_lang and target_lang", "source_lang: {value: de}"]),
        ({"translation": {"German": "a", "English": "b"}}, ["{de: translation.German, en: translation.English}"]),
        ({"label": 1}, ["found keys label (1); known kinds"]),
    ],
)
def test_pairs_whose_languages_cannot_be_told_are_refused(row: dict, said: list[str], tmp_path: Path) -> None:
    message = of_pairs([row], tmp_path)
    assert all(part in message for part in said), message


def test_a_proposal_with_a_blank_in_it_is_no_mapping_yet(tmp_path: Path) -> None:
    message = of_pairs([{"text_1": "a", "text_2": "b"}], tmp_path)
    columns = load_config(overrides=["task.data={path: x, " + message[message.rindex("columns:") :] + "}"]).task.data
    assert isinstance(columns, DataSource)
    assert "found keys text_1 ('a'), text_2 ('b') as " in of_pairs(
        [{"text_1": "a", "text_2": "b"}], tmp_path, columns=columns.columns
    )


def test_configurations_and_splits_that_are_not_there_are_listed(opus: str, folder: str) -> None:
    assert "has several configurations; give one as name: de-en, en-fr" in refusal(path=opus)
    assert "has no configuration 'de-fr'; there are: de-en, en-fr" in refusal(path=opus, name="de-fr")
    assert "has no split 'dev'; there are: train, test" in refusal(path=opus, name="de-en", split="dev")
    assert "has no split 'dev'; there are: train, test" in refusal(path=opus, name="de-en", split="train+dev[:5]")
    assert "Unrecognized instruction format" in refusal(path=opus, name="de-en", split="train[:x]")
    assert "has no split 'train'; there are: test" in refusal(path=folder, split="train")
    shutil.copy(f"{folder}/test.jsonl", f"{folder}/validation.jsonl")
    assert "has no split 'train'; there are: " in refusal(path=folder)


def test_options_of_data_sets_have_no_effect_on_files(tmp_path: Path) -> None:
    path = write(tmp_path / "a.jsonl", QA)
    for option in ("name", "split", "revision"):
        message = refusal(path=path, **{option: "train"})
        assert message.startswith(f"task.data.{option}: ") and "is a file and has no" in message
    assert "hub ids read owner/name" in refusal(path="opus", name="de-en")


def test_folders_that_are_no_data_set(tmp_path: Path) -> None:
    for name, files in (("empty", {}), ("pictures", {"a.xyz": "x"}), ("broken", {"train.parquet": "x"})):
        (tmp_path / name).mkdir()
        for file, text in files.items():
            (tmp_path / name / file).write_text(text)
        message = refusal(path=str(tmp_path / name))
        assert "is a folder without a data set that can be loaded (" in message and "name its files, e.g. " in message
    (tmp_path / "script").mkdir()
    (tmp_path / "script" / "script.py").write_text("raise SystemExit")
    assert "has a loading script, which `datasets` does not run" in refusal(path=str(tmp_path / "script"))


def raising(error: Exception) -> Callable:
    def load(*_: Any, **__: Any) -> Any:
        raise error

    return load


@pytest.mark.parametrize(
    ("error", "said"),
    [
        (DatasetNotFoundError("Dataset 'a/b' is a gated dataset on the Hub."), ["is gated", "hf auth login"]),
        (DatasetNotFoundError("Dataset 'a/b' doesn't exist on the Hub or cannot be accessed."), ["check the spelling",
         "private", "HF_TOKEN"]),
        (DatasetNotFoundError("Revision 'x' doesn't exist for dataset 'a/b' on the Hub."), ["Revision 'x' doesn't"]),
        (RuntimeError("Dataset scripts are no longer supported, but found b.py"), ["loading script", "refs/convert"]),
        (ConnectionError("Couldn't reach 'a/b' on the Hub (x)"), ["hf download a/b --repo-type", "path: FOLDER"]),
        (OSError("first line\nsecond line"), ["OSError: first line second line"]),
    ],
)  # fmt: skip
def test_what_a_hub_answers_is_told_on_a_line(error: Exception, said: list[str], monkeypatch: Any) -> None:
    monkeypatch.setattr(datasets, "load_dataset", raising(error))
    message = refusal(path="a/b")
    assert message.startswith("task.data: 'a/b' ") and all(part in message for part in said), message


def test_offline_and_unreachable_are_told_apart(monkeypatch: Any) -> None:
    assert "HF_HUB_OFFLINE forbids to ask the hub" in refusal(path="some/thing"), "asked through `datasets` itself"
    from fastalign.data import sets

    monkeypatch.setattr(sets, "may_ask_hub", lambda: True)
    assert "the hub cannot be reached" in refusal(path="some/thing")


def test_name_split_and_revision_reach_the_hub(monkeypatch: Any) -> None:
    asked: list[Any] = []

    def load(path: str, **options: Any) -> Any:
        asked.append((path, options))
        return datasets.Dataset.from_list([{"a": 1}])

    monkeypatch.setattr(datasets, "load_dataset", load)
    [source] = read_sources(DataSource(path="a/b", name="n", split="s", revision="r"), "k")
    assert asked == [("a/b", {"name": "n", "split": "s", "revision": "r"})]
    assert source.where(0) == "a/b (n, s), row 1"


@pytest.mark.parametrize(
    ("data", "said"),
    [
        ({"path": "a", "colums": {}}, "unknown key task.data.colums (did you mean 'columns'?); known: path, name"),
        (["b", {"path": "a", "spilt": "x"}], "unknown key task.data[1].spilt (did you mean 'split'?)"),
        ({"path": 3}, "task.data.path must be text or a list of text, not 3"),
        ({"name": "de-en"}, "task.data.path must be a file, a pattern, a folder or a hub id"),
        ({"path": []}, "task.data.path must be"),
        ({"path": "a", "split": ""}, "task.data.split must be null or a text that is not empty"),
        ({"path": "a", "columns": ["x"]}, "task.data.columns must be keys and values or null"),
        (
            {"path": "a", "columns": {"lang": {"val": "de"}}},
            "columns.lang must be the name of a column, or {value: ...",
        ),
        (
            {"path": "a", "columns": {"lang": {"value": ["de"]}}},
            "columns.lang must be the name of a column, or {value: .",
        ),
        ({"path": "a", "columns": {"lang": 3}}, "task.data.columns.lang must be the name of a column"),
        ({"path": "a", "columns": {"lang": {"value": "de"}}}, "of one column at least"),
        ({"path": "a", "columns": {"prompt": " "}}, "task.data.columns.prompt must be the name of a column"),
        (
            {"path": "https://u:secret@x.org/a.jsonl"},
            "task.data.path: 'https://***@x.org/a.jsonl' holds an access token",
        ),
        (3, "task.data must be text or a data source or a list of"),
    ],
)
def test_mappings_are_checked_when_the_configuration_is_read(data: Any, said: str) -> None:
    with pytest.raises(ConfigError) as caught:
        config_from_dict({"task": {"data": data}})
    assert said in str(caught.value)


def test_a_source_is_written_and_read_back(tmp_path: Path) -> None:
    source = DataSource(path="a/b", name="no", columns={"prompt": "q", "lang": {"value": "de"}})
    config = config_from_dict({"task": {"data": ["x.jsonl", source]}, "alignment": {"eval_data": {"path": "y"}}})
    (tmp_path / "c.yaml").write_text(config_text(config), encoding="utf-8")
    assert load_config(tmp_path / "c.yaml") == config == config_from_dict(config_to_dict(config))
    assert config.task.data == ["x.jsonl", source] and config.alignment.eval_data == DataSource(path="y")


def test_what_decides_the_rows_counts_for_a_resume(opus: str, tmp_path: Path) -> None:
    def content(**source: Any) -> Any:
        data = DataSource(**source)
        tally = Tally()
        read_sources(data, "task.data", tally)
        return run_record(config_from_dict({"task": {"data": data}}), tally.as_dict()["files"], 1)["data"]["task.data"]

    base = content(path=opus, name="de-en")
    copy = shutil.copytree(opus, tmp_path / "copy")
    assert content(path=str(copy), name="de-en", split="train") == base, "the same rows of another folder"
    mapped = content(path=opus, name="de-en", columns={"de": "translation.de", "en": "translation.en"})
    others = [
        content(path=opus, name="en-fr"),
        content(path=opus, name="de-en", split="test"),
        content(path=opus, name="de-en", split="train[:7]"),
        mapped,
        content(path=opus, name="de-en", columns={"en": "translation.de", "de": "translation.en"}),
    ]
    assert len({str(each) for each in [base, *others]}) == 6
    file = write(tmp_path / "a.jsonl", QA)
    assert content(path=file) != content(path=file, columns={"prompt": "question", "response": "answer"})


def test_the_tally_keeps_the_mapping(tmp_path: Path) -> None:
    tally, columns = Tally(), {"prompt": "question", "lang": {"value": "de"}}
    read_sources(DataSource(path=write(tmp_path / "a.jsonl", QA), columns=columns), "task.data", tally)
    [file] = tally.as_dict()["files"]["task.data"]
    assert file["rows"] == 6 and file["columns"] == columns and len(file["sha256"]) == 64


def test_class_labels_are_the_same_in_a_file_in_its_folder_and_in_a_nested_column(tmp_path: Path) -> None:
    label = datasets.ClassLabel(names=["bad", "good"])
    features = datasets.Features({"text": datasets.Value("string"), "label": label, "by": {"ada": label}})
    table = datasets.Dataset.from_list([{"text": "x", "label": 1, "by": {"ada": 0}}], features=features)
    (tmp_path / "set").mkdir()
    table.to_parquet(str(tmp_path / "set" / "train.parquet"))
    wanted = [{"text": "x", "label": "good", "by": {"ada": "bad"}}]
    assert rows_of(path=str(tmp_path / "set")) == wanted
    assert rows_of(path=str(tmp_path / "set" / "train.parquet")) == wanted
