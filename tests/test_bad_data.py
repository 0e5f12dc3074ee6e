"""Data files of every kind of badness, through the command line: one line that says what, where and how to mend it."""

from __future__ import annotations

import copy
import gzip
import json
import os
from collections.abc import Callable
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import yaml

from fastalign.cli import main

TASK = [{"prompt": f"set alarm {i}", "response": "yes", "lang": "en"} for i in range(12)]
PAIRS = [{"en": f"rain {i}", "de": f"regen {i}", "fr": f"pluie {i}"} for i in range(12)]
ROWS = {"task": TASK, "alignment": PAIRS}
BLANK = "\u200b \0"


@pytest.fixture
def config_file(raw_config: dict, tmp_path: Path) -> Path:
    raw = copy.deepcopy(raw_config)
    raw["training"].update(max_steps=2, disable_tqdm=True)
    path = tmp_path / "config.yaml"
    path.write_text(yaml.safe_dump(raw), encoding="utf-8")
    return path


@pytest.fixture
def train(config_file: Path, capsys: pytest.CaptureFixture) -> Callable[..., tuple[int, list[str]]]:
    """Runs the command; (exit code, lines on stderr)."""

    def train(*overrides: str) -> tuple[int, list[str]]:
        capsys.readouterr()
        code = main(["train", str(config_file), *overrides])
        return code, capsys.readouterr().err.splitlines()

    return train


@pytest.fixture
def refuse(train: Callable, tmp_path: Path) -> Callable[..., str]:
    """The one line of a command that is refused; nothing is written."""

    def refuse(*overrides: str) -> str:
        code, lines = train(*overrides)
        lines = [line for line in lines if line.startswith("fastalign:") or "Traceback" in line]
        assert code == 2 and len(lines) == 1, (code, lines)
        assert not (tmp_path / "out").exists()
        assert len(lines[0]) < 700 and lines[0].isprintable()
        return lines[0]

    return refuse


def jsonl(rows: list) -> bytes:
    return "".join(json.dumps(row) + "\n" for row in rows).encode()


def parquet(path: Path, rows: list) -> bytes:
    pq.write_table(pa.Table.from_pylist(rows), path)
    return path.read_bytes()


def write(path: Path, content: bytes | list) -> str:
    path.write_bytes(content if isinstance(content, bytes) else jsonl(content))
    return str(path)


FILES: dict[str, tuple[str, Callable[[bytes], bytes], list[str]]] = {
    # name: (file, what is done to good rows, what the line must say)
    "empty": ("x.jsonl", lambda good: b"", ["x.jsonl holds no rows"]),
    "only blank lines": ("x.jsonl", lambda good: b"\n \r\n\n", ["x.jsonl holds no rows"]),
    "compressed nothing": ("x.jsonl.gz", lambda good: gzip.compress(b""), ["x.jsonl.gz holds no rows"]),
    "a header and no rows": ("x.tsv", lambda good: b"en\tde\n", ["x.tsv holds no rows"]),
    "no header": ("x.tsv", lambda good: b"", ["x.tsv, line 1", "header"]),
    "cut in the last line": ("x.jsonl", lambda good: good[:-12], ["x.jsonl, line 12", "not JSON", "cut off?"]),
    "a compressed file cut off": ("x.jsonl.gz", lambda good: gzip.compress(good)[:-9], ["x.jsonl.gz, line", "cut off"]),
    "damaged compression": (
        "x.jsonl.gz",
        lambda good: gzip.compress(good)[:40] + b"\xff\xff" + gzip.compress(good)[42:],
        ["x.jsonl.gz, line", "damaged"],
    ),
    "compressed without saying so": ("x.jsonl", gzip.compress, ["line 1: not UTF-8", "let its name end in .gz"]),
    "Latin-1": ("x.jsonl", lambda good: good + b'{"en": "caf\xe9"}\n', ["x.jsonl, line 13: not UTF-8"]),
    "UTF-16": ("x.jsonl", lambda good: good.decode().encode("utf-16"), ["line 1: not UTF-8", "looks like UTF-16"]),
    "a row that is not JSON": ("x.jsonl", lambda good: good + b"hello\n" + good, ["x.jsonl, line 13: not JSON"]),
    "a row that is a list": ("x.jsonl", lambda good: good + b"[1]\n", ["x.jsonl, line 13: must be an object"]),
    "a row that is a number": ("x.jsonl", lambda good: good + b"17\n", ["line 13: must be an object", "not 17"]),
    "one array": ("x.json", lambda good: b"[" + b",".join(good.split(b"\n")[:3]) + b"]", ["line 1", "not an array"]),
    "half a surrogate": ("x.jsonl", lambda good: good + b'{"en": "\\ud83d"}\n', ["line 13", "surrogate pair"]),
    "a key twice": ("x.jsonl", lambda good: good + b'{"en": "a", "en": "b"}\n', ["line 13", "'en' appears twice"]),
    "wrong columns": ("x.jsonl", lambda good: good + b'{"question": "a"}\n', ["line 13: found", "question", "known"]),
    "no columns": ("x.jsonl", lambda good: good + b"{}\n", ["line 13: found", "known kinds"]),
    "brackets without end": ("x.jsonl", lambda good: good + b"[" * 100_000, ["line 13: not JSON"]),
    "an endless number": ("x.jsonl", lambda good: good + b'{"en": 1' + b"0" * 9999 + b"}", ["line 13: not JSON"]),
    "a key of 10 kB": ("x.jsonl", lambda good: b'{"' + b"K" * 10_000 + b'": 1}', ["line 1: found", "KKK...KKK"]),
    "100,000 keys": (
        "x.jsonl",
        lambda good: jsonl([{f"K{i}": "a" for i in range(100_000)}]),
        ["line 1: found", "K0 ('a'), K1", "(100,000 in all)"],
    ),
    "keys that drive a terminal": ("x.jsonl", lambda good: b'{"\\u001b[2JK": 1}', ["line 1: found", "\\x1b[2JK"]),
    "no parquet": ("x.parquet", lambda good: good, ["x.parquet cannot be read as parquet"]),
    "an unknown ending": ("x.csv", lambda good: good, ["cannot tell what", "x.csv", ".jsonl"]),
}


@pytest.mark.parametrize("stream", ROWS)
@pytest.mark.parametrize("name", FILES)
def test_bad_files(name: str, stream: str, refuse: Callable, tmp_path: Path) -> None:
    file, spoil, said = FILES[name]
    path = write(tmp_path / file, spoil(jsonl(ROWS[stream])))
    line = refuse(f"{stream}.data={path}")
    assert all(part in line for part in said), line


@pytest.mark.parametrize("stream", ROWS)
def test_a_parquet_file_that_was_cut_off(stream: str, refuse: Callable, tmp_path: Path) -> None:
    whole = parquet(tmp_path / "whole.parquet", ROWS[stream])
    for size in (0, 3, len(whole) // 2, len(whole) - 5):
        path = write(tmp_path / "x.parquet", whole[:size])
        assert "x.parquet cannot be read as parquet, perhaps damaged or cut off (" in refuse(f"{stream}.data={path}")


@pytest.mark.parametrize("stream", ROWS)
def test_names_that_are_no_file(stream: str, refuse: Callable, tmp_path: Path) -> None:
    (tmp_path / "link.jsonl").symlink_to(tmp_path / "gone.jsonl")
    (tmp_path / "folder.jsonl").mkdir()
    cases = {
        f"{tmp_path}/none.jsonl": "does not exist",
        f"{tmp_path}/*.jsonl.xz": "no file matches",
        f"{tmp_path}/link.jsonl": "is a link to a file that does not exist",
        f"{tmp_path}/folder.jsonl": "is a folder",
        f"{tmp_path}": "is a folder",
        "/dev/null": "is not a regular file",
    }
    if hasattr(os, "mkfifo"):
        os.mkfifo(tmp_path / "pipe.jsonl")
        cases[f"{tmp_path}/pipe.jsonl"] = "is not a regular file"
    for path, said in cases.items():
        line = refuse(f"{stream}.data={path}")
        assert f"{stream}.data: " in line and said in line, line
    assert "holds a NUL" in refuse(f'{stream}.data="a\\0b.jsonl"')
    assert "\\x1b[2J" in refuse(f'{stream}.data="a\\x1b[2J.jsonl"')


@pytest.mark.parametrize("stream", ROWS)
def test_a_file_that_may_not_be_read(stream: str, refuse: Callable, tmp_path: Path) -> None:
    path = write(tmp_path / "x.jsonl", ROWS[stream])
    os.chmod(path, 0)
    if os.access(path, os.R_OK):
        pytest.skip("this user may read everything")
    assert "cannot be read (Permission denied)" in refuse(f"{stream}.data={path}")


PAIR_ROWS: dict[str, tuple[list, list[str], list[str]]] = {
    # name: (rows, overrides, what the line must say)
    "a language that is not in the data": (PAIRS, ["alignment.pairs=[[xx, en]]"], ["'xx' is not in", "de, en, fr"]),
    "a pair that is in no row": (
        [*PAIRS, {"it": "tre", "en": "three"}],
        ["alignment.pairs=[[de, en], [it, de]]"],
        ["no row of alignment.data has both 'it' and 'de'"],
    ),
    "no English": ([{"de": "eins", "fr": "un"}] * 9, [], ["there is no English", "alignment.pairs: [[de, fr]]"]),
    "only one language": ([{"en": f"one {i}"} for i in range(9)], [], ["no pair of sentences (languages: en)"]),
    "most pairs with an empty side": (
        [*PAIRS[:2], *({"en": "one", "de": BLANK} for _ in range(9))],
        [],
        [
            "9 of 11 rows give no pair, because a side is empty",
            "x.jsonl, line 3; line 4; line 5; ...",
            "fill them in, remove them",
        ],
    ),
    "a sentence that is no text": ([*PAIRS, {"en": 1, "de": "a"}], [], ["line 13: the 'en' sentence must be text"]),
    "a language of 10 kB": (
        [{"lang": "x" * 10_000, "en": "a", "text": "b"}],
        [],
        ["line 1: a language must", "..."],
    ),
}


@pytest.mark.parametrize("name", PAIR_ROWS)
def test_pairs_that_cannot_be_aligned(name: str, refuse: Callable, tmp_path: Path) -> None:
    rows, overrides, said = PAIR_ROWS[name]
    line = refuse(f"alignment.data={write(tmp_path / 'x.jsonl', rows)}", *overrides)
    assert all(part in line for part in said), line


TASK_ROWS: dict[str, tuple[list, list[str], list[str]]] = {
    "an empty answer": ([*TASK, {"prompt": "a", "response": BLANK}], [], ["line 13: the answer (response) is empty"]),
    "half a conversation": (
        [*TASK, {"messages": [{"role": "user", "content": "a"}]}],
        [],
        ["line 13: messages must begin with a prompt and end with the assistant's answer"],
    ),
    "a language that is not in the data": (TASK, ["task.languages=[xx]"], ["'xx' is not in task.data; there: en"]),
    "another template's rows": (TASK, ["task.template=ner"], ["line 1: no tags, tokens; found keys prompt ('set"]),
    "tags that do not fit": (
        [{"lang": "en", "tokens": ["a", "b"], "tags": ["O"]}],
        ["task.template=ner"],
        ["line 1: 2 tokens but 1 tags"],
    ),
    "a field that is not there": (
        TASK,
        ["task.template=custom", "task.prompt='{question}'", "task.response='{response}'"],
        ["no field {question} in", "line 1; there are: prompt, response, lang"],
    ),
    "prompts beyond the context": (
        [*TASK, {"prompt": "rain " * 500, "response": "yes"}, *TASK, {"prompt": "sun " * 300, "response": "no"}],
        [],
        ["task.data: 2 of 26 rows have a prompt", "context of 128 tokens", "x.jsonl, line 13; line 26)", "shorten"],
    ),
}


@pytest.mark.parametrize("name", TASK_ROWS)
def test_task_rows_that_cannot_be_learnt(name: str, refuse: Callable, tmp_path: Path) -> None:
    rows, overrides, said = TASK_ROWS[name]
    line = refuse(f"task.data={write(tmp_path / 'x.jsonl', rows)}", *overrides)
    assert all(part in line for part in said), line


def test_held_out_files_are_no_exception(refuse: Callable, tmp_path: Path) -> None:
    for stream in ROWS:
        path = write(tmp_path / f"{stream}.jsonl", b'{"a": ')
        assert f"{stream}.jsonl, line 1: not JSON" in refuse(f"{stream}.eval_data={path}")


ODD = {
    "right to left": "שלום עולם مرحبا \u202eabc\u202c",
    "combining marks": "e\u0301\u0316\u0323" * 9,
    "emoji": "\U0001f469\u200d\U0001f469\u200d\U0001f467 \U0001f1e9\U0001f1ea \U0001f44b\U0001f3fd",
    "controls": "a\0b\x1b[31mc\x07\x7f",
    "other line ends": "a\u2028b\u2029c\x85d\x0ce",
    "private and unassigned": "\ue000\U000f0000\u0378",
}


@pytest.mark.parametrize("name", ODD)
def test_odd_texts_are_texts(name: str, train: Callable, tmp_path: Path) -> None:
    task = write(tmp_path / "t.jsonl", [*TASK, {"prompt": ODD[name], "response": ODD[name], "lang": "xx"}])
    pairs = write(tmp_path / "p.jsonl", [*PAIRS, *({"en": ODD[name], "xx": f"{ODD[name]} {i}"} for i in range(3))])
    code, lines = train(f"task.data={task}", f"alignment.data={pairs}")
    assert code == 0, lines
    rows = json.loads((tmp_path / "out" / "summary.json").read_text())["data"]["rows"]
    assert not any("skipped" in reason for counts in rows.values() for reason in counts)


def test_byte_order_marks_and_windows_line_ends(train: Callable, tmp_path: Path) -> None:
    files = [
        write(tmp_path / f"{k}.jsonl", b"\xef\xbb\xbf" + jsonl(v).replace(b"\n", b"\r\n")) for k, v in ROWS.items()
    ]
    code, lines = train(f"task.data={files[0]}", f"alignment.data={files[1]}")
    assert code == 0, lines


@pytest.mark.timeout(120)
def test_lines_of_a_megabyte_are_cut_and_counted(train: Callable, tmp_path: Path) -> None:
    task = write(tmp_path / "t.jsonl", [*TASK, {"prompt": "a", "response": "x " * 2**19}])
    pairs = write(tmp_path / "p.jsonl", [*PAIRS, {"en": "y" * 2**20, "de": "regen"}])
    code, lines = train(f"task.data={task}", f"alignment.data={pairs}")
    assert code == 0, lines
    assert f"task.data: 1 of 13 rows cut: longer than 128 tokens ({task}, line 13)" in lines
    assert any(line.startswith("alignment.data: 1 of 38 different sentences cut: longer than 128") for line in lines)


def test_what_is_left_out_is_said_before_the_training_and_recorded(train: Callable, tmp_path: Path) -> None:
    task = write(tmp_path / "t.jsonl", [*TASK, *({**row, "lang": "de"} for row in TASK[:2])])
    pairs = write(tmp_path / "p.jsonl", [*PAIRS, {"en": "one", "de": BLANK, "xx": ""}, {"it": "tre", "fr": "trois"}])
    code, lines = train(f"task.data={task}", f"alignment.data={pairs}", "task.languages=[en]")
    assert code == 0, lines
    told = [
        f"task.data: 2 of 14 rows left out: task.languages does not name their language ({task}, line 13; line 14)",
        f"alignment.data: 1 of 14 rows skipped: no English beside another language ({pairs}, line 14)",
        f"alignment.data: 2 of 26 pairs skipped: a side is empty ({pairs}, line 13)",
        "alignment.data: no pair for xx: all its sentences are empty",
        "alignment.data: no pair for it: no sentence in it has English beside it",
    ]
    assert [line for line in lines if line in told] == told
    data = json.loads((tmp_path / "out" / "summary.json").read_text())["data"]
    assert {key: sum(counts.values()) for key, counts in data["rows"].items()} == {"task.data": 2, "alignment.data": 3}
    assert data["files"]["task.data"][0]["rows"] == 14 and len(data["files"]["task.data"][0]["sha256"]) == 64
