"""The readers: every format and compression, and every bad file refused on one line with its place."""

from __future__ import annotations

import bz2
import gzip
import hashlib
import json
import lzma
import os
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from fastalign.config import Data
from fastalign.data import files
from fastalign.data.files import Row, plain_suffix
from fastalign.data.sources import read_sources
from fastalign.data.tally import Tally
from fastalign.errors import DataError


def arrow_codec(name: str) -> Callable[[bytes], bytes]:
    def compress(data: bytes) -> bytes:
        sink = pa.BufferOutputStream()
        with pa.CompressedOutputStream(sink, name) as stream:
            stream.write(data)
        return sink.getvalue().to_pybytes()

    return compress


COMPRESS: dict[str, Callable[[bytes], bytes]] = {
    "": bytes,
    ".gz": gzip.compress,
    ".xz": lzma.compress,
    ".bz2": bz2.compress,
    ".zst": arrow_codec("zstd"),
    ".lz4": arrow_codec("lz4"),
}
ROWS = [{"de": "größe\u2028日本", "en": "size\x85\x1c"}, {"en": "b", "de": "\U0001f600"}]
LINES = "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in ROWS).encode()


@pytest.fixture
def write(tmp_path: Path) -> Callable[[str, bytes | str], str]:
    def write(name: str, content: bytes | str) -> str:
        path = tmp_path / name
        path.write_bytes(content if isinstance(content, bytes) else content.encode())
        return str(path)

    return write


def rows_of(spec: Data) -> list[Row]:
    return [row for source in read_sources(spec, "task.data") for row in source.rows]


def refusal(spec: Data) -> str:
    with pytest.raises(DataError) as caught:
        read_sources(spec, "task.data")
    message = str(caught.value)
    assert message.isprintable() and len(message) < 500
    return message


@pytest.mark.parametrize("ending", COMPRESS)
@pytest.mark.parametrize("kind", ["jsonl", "ndjson", "json", "JSONL"])
def test_jsonl_in_every_compression(write, kind, ending):
    assert rows_of(write(f"a.{kind}{ending}", COMPRESS[ending](LINES))) == ROWS
    assert rows_of(write(f"b.{kind}{ending.upper()}", COMPRESS[ending](LINES))) == ROWS


@pytest.mark.parametrize("ending", COMPRESS)
def test_tsv_and_aligned_text_in_every_compression(write, ending):
    compress = COMPRESS[ending]
    assert rows_of(write(f"a.tsv{ending}", compress("de\ten\nja\u2028\tyes\n".encode()))) == [
        {"de": "ja\u2028", "en": "yes"}
    ]
    pair = [write(f"c.{lang}{ending}", compress(f"{lang} 1\n{lang}\u2028 2\n".encode())) for lang in ("de", "en")]
    assert rows_of(pair) == [{"de": "de 1", "en": "en 1"}, {"de": "de\u2028 2", "en": "en\u2028 2"}]


def test_the_locale_has_no_say(write):
    """A program in a locale of ASCII reads the same, compressed or not."""
    paths = [write(f"a.jsonl{ending}", compress(LINES)) for ending, compress in COMPRESS.items()]
    code = "import sys; from fastalign.data.sources import read_sources\n"
    code += "for source in read_sources(sys.argv[1:], 'k'): print(ascii(source.rows))"
    locale = {"LC_ALL": "C", "PYTHONCOERCECLOCALE": "0", "PYTHONUTF8": "0"}
    printed = subprocess.run(
        [sys.executable, "-c", code, *paths],
        env={**os.environ, "PYTHONPATH": os.pathsep.join(sys.path), **locale},
        capture_output=True,
        text=True,
        check=True,
    ).stdout
    assert printed.splitlines() == [ascii(ROWS)] * len(paths)


def test_only_newlines_end_a_line(write):
    """Line separators of Unicode, vertical tabs and lone carriage returns may stand inside a sentence."""
    odd = "a\u2028b\u2029c\x0bd\x0ce\x1cf\x85g\rh"
    [source] = read_sources(write("a.tsv", f"de\ten\n{odd}\tx\nb\ty\n"), "k")
    assert source.rows == [{"de": odd, "en": "x"}, {"de": "b", "en": "y"}]
    assert source.where(1).endswith("a.tsv, line 3")


def test_line_numbers_count_empty_lines(write):
    [source] = read_sources(write("a.jsonl", '\n{"a": 1}\n   \n\r\n{"a": 2}\n'), "k")
    assert source.rows == [{"a": 1}, {"a": 2}]
    assert [source.where(i)[-7:] for i in range(2)] == [", line 2"[1:], ", line 5"[1:]]
    [source] = read_sources(write("a.tsv", "a\tb\n\n1\t2\n\n"), "k")
    assert source.rows == [{"a": "1", "b": "2"}]
    assert source.where(0).endswith("a.tsv, line 3")
    assert "line 5: not JSON (Expecting ',' delimiter, column 9)" in refusal(
        write("b.jsonl", '\n{"a": 1}\n\n\n{"a": 1 2}\n')
    )


def test_byte_order_mark_and_windows_line_ends(write):
    for ending, compress in COMPRESS.items():
        assert rows_of(write(f"a.jsonl{ending}", compress(b'\xef\xbb\xbf{"a": 1}\r\n{"a": 2}\r\n'))) == [
            {"a": 1},
            {"a": 2},
        ]
        assert rows_of(write(f"a.tsv{ending}", compress(b"\xef\xbb\xbfde\ten\r\nja\tyes\r\n"))) == [
            {"de": "ja", "en": "yes"}
        ]


def test_no_line_end_at_the_end(write):
    assert rows_of(write("a.jsonl", '{"a": 1}\n{"a": 2}')) == [{"a": 1}, {"a": 2}]
    assert rows_of(write("a.tsv", "a\tb\nx\ty")) == [{"a": "x", "b": "y"}]


def test_tsv_takes_quotes_as_text_and_keeps_empty_cells(write):
    assert rows_of(write("a.tsv", 'de\ten\n"ja\t\n \t"yes"\n')) == [{"de": '"ja', "en": ""}, {"de": " ", "en": '"yes"'}]


def test_a_key_that_first_appears_late_in_a_large_file(write):
    """A schema inferred from the first megabytes would have no column for it."""
    row = json.dumps({"de": "x" * 1000, "en": "y" * 1000}) + "\n"
    path = write("a.jsonl", row * 8000 + '{"kk": "z", "en": "w", "_n": {"a": [1]}}\n')
    assert os.path.getsize(path) > 12 << 20
    rows = rows_of(path)
    assert len(rows) == 8001
    assert rows[-1] == {"kk": "z", "en": "w", "_n": {"a": [1]}}
    assert rows[0].keys() == {"de", "en"}


def test_a_changed_file_is_read_anew(write):
    """Also where its time and size are the same, as after unpacking an archive."""
    for name, compress in (("a.jsonl", bytes), ("a.jsonl.gz", gzip.compress)):
        for value in (1, 2):
            path = write(name, compress(f'{{"a": {value}}}\n'.encode()))
            os.utime(path, (1e9, 1e9))
            assert rows_of(path) == [{"a": value}]


def test_text_needs_no_library_and_no_cache(write, monkeypatch):
    """`datasets` takes a second to import and wants a folder to write to."""
    monkeypatch.setitem(sys.modules, "datasets", None)
    for ending, compress in COMPRESS.items():
        assert rows_of(write(f"a.jsonl{ending}", compress(LINES))) == ROWS


def test_parquet(tmp_path):
    rows = [
        {"messages": [{"role": "user", "content": "a"}], "n": 1, "kk": None},
        {"messages": None, "n": 2, "kk": "қ"},
    ]
    pq.write_table(pa.Table.from_pylist(rows), tmp_path / "a[1].parquet", row_group_size=1)
    [source] = read_sources(str(tmp_path / "a[1].parquet"), "k")
    assert source.rows == rows
    assert source.where(1).endswith("a[1].parquet, row 2")


@pytest.mark.parametrize(
    ("name", "content", "words"),
    [
        ("a.jsonl", b'{"a": 1}\n{"a": }\n', "a.jsonl, line 2: not JSON (Expecting value, column 7)"),
        ("a.jsonl", b'{"a": 1} {"a": 2}\n', "line 1: not JSON (Extra data"),
        ("a.jsonl", b'{"a": "x\ty"}\n', "line 1: not JSON (Invalid control character, column 9)"),
        ("a.jsonl", b'[{"a": 1}]\n', "line 1: must be an object such as {...}, not an array"),
        ("a.json", b'[\n  {"a": 1}\n]\n', "line 1: the JSON goes on over several lines"),
        ("a.json", b'{\n  "a": 1\n}\n', "line 1: the JSON goes on over several lines"),
        ("a.jsonl", b"null\n", "line 1: must be an object such as {...}, not None"),
        ("a.jsonl", b'"' + b"x" * 5000 + b'"\n', "line 1: must be an object such as {...}, not 'xxx"),
        ("a.jsonl", b'{"a": 1}\n{"a": "b', "line 2: not JSON (Unterminated string starting, column 7)"),
        ("a.jsonl", b'{"a": 1}\n{"a": "b', "it is the last line: is the file cut off?"),
        ("a.jsonl", b'{"a": 1}\n{"a": \n\n', "line 2: not JSON (Expecting value, column 7); each line must be one obj"),
        ("a.jsonl", b'{"a": 1}\n{"a": "\xc3', "line 2: not UTF-8 (unexpected end of data)"),
        ("a.jsonl", b'{"a": 1}\n\xef\xbb\xbf{"a": 1}\n', "line 2: not JSON (Unexpected UTF-8 BOM"),
        ("a.jsonl", b'{"a": 1}\r{"a": 1}\r', "line 1: not JSON (Extra data"),
        ("a.jsonl", b'{"\x1b[31m": 1, "\x1b[31m": 1}', "line 1: not JSON (Invalid control character"),
        ("a.jsonl", b'{"\\u001b": 1, "\\u001b": 1}', "line 1: the key '\\x1b' appears twice"),
        ("a.jsonl", b'{"' + b"k" * 10_000 + b'": 1, "' + b"k" * 10_000 + b'": 1}', "kkk...kkk"),
        ("a.jsonl", b'{"de": "a", "en": "b", "de": "c"}\n', "line 1: the key 'de' appears twice"),
        ("a.jsonl", b'{"a": [{"b": 1, "b": 1}]}\n', "line 1: the key 'b' appears twice"),
        ("a.jsonl", b'{"a": "ok"}\n{"a": "\\ud83d"}\n', "line 2: a text holds half of a surrogate pair"),
        ("a.jsonl", b'{"\\uDE00": "a"}\n', "line 1: a text holds half of a surrogate pair"),
        ("a.jsonl", b'{"a": ' + b"9" * 5000 + b"}\n", "line 1: not JSON that can be parsed"),
        ("a.jsonl", b'{"a": ' * 100_000 + b"\n", "line 1: not JSON that can be parsed"),
        ("a.jsonl", b'{"a": 1}\n' * 5000 + b'{"a": "\xe9"}\n', "line 5001: not UTF-8 (invalid continuation byte)"),
        ("a.jsonl", '{"a": 1}\n'.encode("utf-16"), "line 1: not UTF-8 (invalid start byte); it looks like UTF-16"),
        (
            "a.jsonl",
            gzip.compress(b'{"a": 1}\n', mtime=0),
            "line 1: not UTF-8 (invalid start byte); it looks compressed",
        ),
        ("a.jsonl", lzma.compress(b'{"a": 1}\n'), "it looks compressed"),
        ("a.jsonl", b"", "task.data: "),
        ("a.jsonl", b"\n\n", "a.jsonl holds no rows"),
        ("a.jsonl.gz", gzip.compress(b"", mtime=0), "a.jsonl.gz holds no rows"),
        ("a.jsonl.gz", b'{"a": 1}\n', "line 1: cannot be read, perhaps damaged or cut off (Not a gzipped file"),
        ("a.tsv", b"de\n", "a.tsv, line 1: a TSV needs a header"),
        ("a.tsv", b"de\tde\n", "a.tsv, line 1: a TSV needs a header"),
        ("a.tsv", b"de\t\n", "a.tsv, line 1: a TSV needs a header"),
        ("a.tsv", b"", "a.tsv, line 1: a TSV needs a header"),
        ("a.tsv", b"de\ten\n", "a.tsv holds no rows"),
        ("a.tsv", b"de\ten\nja\tyes\nnein\n", "a.tsv, line 3: 1 columns where the header has 2"),
        ("a.tsv", b"de\ten\nja\tyes\t\n", "a.tsv, line 2: 3 columns where the header has 2"),
        ("a.tsv", b"de\ten\nja\t\xff\n", "a.tsv, line 2: not UTF-8"),
        ("a.parquet", b"PAR1", "a.parquet cannot be read as parquet, perhaps damaged or cut off ("),
        ("a.parquet", b"", "a.parquet cannot be read as parquet, perhaps damaged or cut off ("),
        ("a.csv", b"a,b", "cannot tell what"),
        ("a.jsonl.zip", b"", "cannot tell what"),
        ("a", b"x", "cannot tell what"),
    ],
)
def test_bad_files(write, name, content, words):
    path = write(name, content)
    message = refusal(path)
    assert words in message
    assert path in message


@pytest.mark.parametrize("ending", [ending for ending in COMPRESS if ending])
def test_a_compressed_file_that_was_cut_off_or_is_something_else(write, ending):
    text = "".join(f'{{"a": {i * i}}}\n' for i in range(30_000)).encode()
    data = COMPRESS[ending](text)
    message = refusal(write(f"a.jsonl{ending}", data[: len(data) // 2]))
    assert "cut off" in message and ", line " in message
    assert "cannot be read" in refusal(write(f"b.jsonl{ending}", b"no such magic number here"))
    assert rows_of(write(f"c.jsonl{ending}", COMPRESS[ending](text[:900]) + COMPRESS[ending](text[900:])))[-1] == {
        "a": 29_999**2
    }, "a file may be several compressed ones, one after the other"


def test_a_file_is_called_cut_off_only_where_its_last_line_ends_too_early(write):
    good, cut = '{"a": 1}\n', '{"a": "b'
    for content in (good + cut, good + cut + "\n \n", good + '{"a": 1'):
        message = refusal(write("a.jsonl", content))
        assert "line 2: not JSON" in message and message.endswith("; it is the last line: is the file cut off?")
    for content in (good + cut + "\n" + good, good + '{"a": 1 2}', good.encode() + cut.encode() + b"\n\xff\n"):
        message = refusal(write("a.jsonl", content))
        assert "line 2: not JSON" in message and "cut off" not in message


def test_surrogate_pairs_are_characters(write):
    assert rows_of(write("a.jsonl", b'{"a": "\\ud83d\\ude00 \\\\ud83d"}\n')) == [{"a": "\U0001f600 \\ud83d"}]


def test_missing_files(tmp_path, write):
    for spec in ("none.jsonl", "./none", "a/b/none", "none", "none.gz", "x" * 5000 + ".jsonl", "a\0b.jsonl"):
        with pytest.raises(DataError, match=r"^task\.data: file .* does not exist"):
            read_sources(spec, "task.data")
    assert "no file matches" in refusal(str(tmp_path / "*.jsonl"))
    (tmp_path / "empty").mkdir()
    assert "is a folder without a data set" in refusal(str(tmp_path / "empty"))
    assert "a file name is empty" in refusal("")
    assert "a file name is empty" in refusal([write("a.jsonl", LINES), ""])


def test_an_unreadable_file(write):
    path = write("a.jsonl", LINES)
    os.chmod(path, 0)
    if os.access(path, os.R_OK):
        pytest.skip("this user may read everything")
    assert "cannot be read (Permission denied)" in refusal(path)


def test_what_is_no_file_of_rows(tmp_path, write):
    (tmp_path / "link.jsonl").symlink_to(tmp_path / "gone.jsonl")
    assert "link.jsonl' is a link to a file that does not exist" in refusal(str(tmp_path / "link.jsonl"))
    (tmp_path / "round.jsonl").symlink_to(tmp_path / "round.jsonl")
    assert "does not exist" in refusal(str(tmp_path / "round.jsonl"))
    (tmp_path / "folder.jsonl").mkdir()
    assert "folder.jsonl' is a folder" in refusal(str(tmp_path / "folder.jsonl"))
    assert "does not exist; no file name holds a NUL" in refusal("a\0*.jsonl")
    (tmp_path / "good.jsonl").symlink_to(write("a.jsonl", LINES))
    assert rows_of(str(tmp_path / "good.jsonl")) == ROWS


@pytest.mark.skipif(not hasattr(os, "mkfifo"), reason="no named pipes here")
@pytest.mark.timeout(60)
def test_a_pipe_that_nobody_writes_to_is_refused_and_not_waited_for(tmp_path):
    for name in ("pipe.jsonl", "pipe.parquet", "pipe.de"):
        os.mkfifo(tmp_path / name)
        assert f"{name}' is not a regular file" in refusal(str(tmp_path / name))
    os.mkfifo(tmp_path / "pipe.en")
    assert "is not a regular file" in refusal([str(tmp_path / "pipe.de"), str(tmp_path / "pipe.en")])


def test_a_file_name_cannot_drive_a_terminal(write):
    message = refusal(write("a\x1b[31m\n\u202eb.jsonl", "{\n"))
    assert "a\\x1b[31m\\n\\u202eb.jsonl, line 1: the JSON goes on" in message


def test_one_line_cannot_fill_the_memory(write, monkeypatch):
    monkeypatch.setattr(files, "LONGEST_LINE", 1 << 20)
    row = '{"a": "' + "x" * (1 << 19) + '"}\n'
    assert len(rows_of(write("a.jsonl", row * 3))) == 3
    for name, compress in (("b.jsonl", bytes), ("b.jsonl.gz", gzip.compress), ("b.jsonl.zst", COMPRESS[".zst"])):
        message = refusal(write(name, compress(row.encode() + b'{"a": "' + b"x" * (1 << 21) + b'"}\n')))
        assert f"{name}, line 2: longer than 1 MB" in message


@pytest.mark.timeout(60)
def test_a_hundred_thousand_keys_with_one_twice(write):
    keys = ", ".join(f'"k{i}": 1' for i in range(100_000))
    assert len(rows_of(write("a.jsonl", f"{{{keys}}}"))[0]) == 100_000
    assert "the key 'k99999' appears twice" in refusal(write("b.jsonl", f'{{{keys}, "k99999": 2}}'))


def test_the_tally_gets_every_file_with_its_hash_and_its_rows(write, tmp_path, monkeypatch):
    import datasets

    pq.write_table(pa.Table.from_pylist([{"a": 1}] * 5), tmp_path / "a.parquet")
    paths = [
        write("a.jsonl", LINES),
        write("a.jsonl.gz", gzip.compress(LINES, mtime=0)),
        write("b.de", "eins\nzwei\ndrei\n"),
        write("b.en", "one\ntwo\nthree\n"),
        str(tmp_path / "a.parquet"),
    ]
    hashes = [hashlib.sha256(Path(path).read_bytes()).hexdigest() for path in paths]
    assert len({*hashes}) == 5
    hub = datasets.Dataset.from_list([{"a": 1}])
    monkeypatch.setattr(datasets, "load_dataset", monkeypatched(datasets.load_dataset, hub))
    tally = Tally()
    read_sources([*paths, "some/thing"], "task.data", tally)
    read_sources(paths[0], "task.eval_data", tally)
    found = tally.as_dict()["files"]
    assert found["task.data"][:5] == [
        {"name": path, "sha256": sha256, "rows": rows}
        for path, sha256, rows in zip(paths, hashes, (2, 2, 3, 3, 5), strict=True)
    ]
    assert found["task.data"][5] == {"name": "some/thing", "sha256": f"fingerprint {hub._fingerprint}", "rows": 1}
    assert found["task.eval_data"] == found["task.data"][:1]


def monkeypatched(load: Callable, hub: object) -> Callable:
    """`load_dataset` that knows one name on the hub."""
    return lambda name, **options: hub if name == "some/thing" else load(name, **options)


def test_a_name_that_could_be_on_a_hub(monkeypatch):
    import datasets

    asked: list[str] = []

    def load_dataset(name, split):
        asked.append(f"{name} {split}")
        if name == "some/broken":
            raise ConnectionError("first line\nsecond line")
        return datasets.Dataset.from_list([{"a": 1}])

    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    [source] = read_sources("some/thing", "k")
    assert source.rows == [{"a": 1}] and source.where(0) == "some/thing, row 1"
    assert "'some/broken' is not a file here, and HF_HUB_OFFLINE forbids to ask the hub" in refusal("some/broken")
    assert asked == ["some/thing train", "some/broken train"]


def test_globs_lists_and_strange_names(write, tmp_path, monkeypatch):
    for name in ("b.jsonl", "a.jsonl", "we[i]rd *{x} ü#%20.jsonl", "we[i]rd?.jsonl.gz"):
        compress = gzip.compress if name.endswith("gz") else bytes
        write(name, compress(json.dumps({"name": name}).encode()))
    names = [row["name"] for row in rows_of([str(tmp_path / "[ab].jsonl"), str(tmp_path / "a.jsonl")])]
    assert names == ["a.jsonl", "b.jsonl", "a.jsonl"], "a glob in the order of names, a list in its own"
    for name in ("we[i]rd *{x} ü#%20.jsonl", "we[i]rd?.jsonl.gz"):
        assert rows_of(str(tmp_path / name)) == [{"name": name}]
    monkeypatch.setenv("HOME", str(tmp_path))
    assert rows_of("~/a.jsonl") == [{"name": "a.jsonl"}]
    assert [source.where(0)[-15:] for source in read_sources(str(tmp_path / "[ab].jsonl"), "k")] == [
        "a.jsonl, line 1",
        "b.jsonl, line 1",
    ]


def test_aligned_text(write):
    de, en = write("c.zh-Hant", "一\n\n三\n"), write("c.en", "one\ntwo\n\n")
    more = write("a.jsonl", '{"de": "x", "en": "y"}\n')
    sources = read_sources([more, de, en, more], "k")
    assert [source.name for source in sources] == [more, f"{de} + {en}", more]
    assert sources[1].rows == [
        {"zh-Hant": "一", "en": "one"},
        {"zh-Hant": "", "en": "two"},
        {"zh-Hant": "三", "en": ""},
    ]
    assert sources[1].where(2) == f"{de}, line 3"
    short = write("d.en", "one\n")
    assert "has 3 lines and" in refusal([write("d.de", "1\n2\n3\n"), short])
    assert "cannot tell what" in refusal([write("e.de", "1\n"), write("f.en", "1\n")])
    assert "cannot tell what" in refusal(short)
    assert "cannot tell what" in refusal([write("g.de", "1\n"), write("g.de.gz", gzip.compress(b"1\n", mtime=0))])
    assert "cannot tell what" in refusal([write("g", "1\n"), write("g.de", "1\n")])


def test_plain_suffix():
    assert [plain_suffix(name) for name in ("a.jsonl", "a.b.JSONL.GZ", "a.gz", "a", "a.de.xz")] == [
        ".jsonl",
        ".jsonl",
        "",
        "",
        ".de",
    ]


def test_a_hundred_thousand_rows_in_seconds(write):
    path = write("a.jsonl", "".join(json.dumps({"de": f"Satz {i}", "en": f"line {i}"}) + "\n" for i in range(100_000)))
    started = time.perf_counter()
    assert len(rows_of(path)) == 100_000
    assert time.perf_counter() - started < 5  # measured: 0.4 s
