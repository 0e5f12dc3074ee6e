"""The readers: every format and compression, and every bad file refused on one line with its place."""

from __future__ import annotations

import bz2
import gzip
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

from fastalign.data.files import Row, plain_suffix, read_sources
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


def rows_of(spec: str | list[str]) -> list[Row]:
    return [row for source in read_sources(spec, "task.data") for row in source.rows]


def refusal(spec: str | list[str]) -> str:
    with pytest.raises(DataError) as caught:
        read_sources(spec, "task.data")
    message = str(caught.value)
    assert "\n" not in message and len(message) < 500
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
    code = "import sys; from fastalign.data.files import read_sources\n"
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
        ("a.jsonl", b"null\n", "line 1: must be an object"),
        ("a.jsonl", b"12\n", "line 1: must be an object"),
        ("a.jsonl", b'{"de": "a", "en": "b", "de": "c"}\n', "line 1: the key 'de' appears twice"),
        ("a.jsonl", b'{"a": [{"b": 1, "b": 1}]}\n', "line 1: the key 'b' appears twice"),
        ("a.jsonl", b'{"a": "ok"}\n{"a": "\\ud83d"}\n', "line 2: a text holds half of a surrogate pair"),
        ("a.jsonl", b'{"\\uDE00": "a"}\n', "line 1: a text holds half of a surrogate pair"),
        ("a.jsonl", b'{"a": ' + b"9" * 5000 + b"}\n", "line 1: not JSON that can be parsed"),
        ("a.jsonl", b'{"a": ' * 100_000 + b"\n", "line 1: not JSON that can be parsed"),
        ("a.jsonl", b'{"a": 1}\n' * 5000 + b'{"a": "\xe9"}\n', "line 5001: not UTF-8 (invalid continuation byte)"),
        ("a.jsonl", '{"a": 1}\n'.encode("utf-16"), "line 1: not UTF-8 (invalid start byte); it looks like UTF-16"),
        ("a.jsonl", gzip.compress(b'{"a": 1}\n'), "line 1: not UTF-8 (invalid start byte); it looks compressed"),
        ("a.jsonl", lzma.compress(b'{"a": 1}\n'), "it looks compressed"),
        ("a.jsonl", b"", "task.data: "),
        ("a.jsonl", b"\n\n", "a.jsonl holds no rows"),
        ("a.jsonl.gz", gzip.compress(b""), "a.jsonl.gz holds no rows"),
        ("a.jsonl.gz", b'{"a": 1}\n', "line 1: cannot be read, perhaps damaged or cut off (Not a gzipped file"),
        ("a.tsv", b"de\n", "a.tsv, line 1: a TSV needs a header"),
        ("a.tsv", b"de\tde\n", "a.tsv, line 1: a TSV needs a header"),
        ("a.tsv", b"de\t\n", "a.tsv, line 1: a TSV needs a header"),
        ("a.tsv", b"", "a.tsv, line 1: a TSV needs a header"),
        ("a.tsv", b"de\ten\n", "a.tsv holds no rows"),
        ("a.tsv", b"de\ten\nja\tyes\nnein\n", "a.tsv, line 3: 1 columns where the header has 2"),
        ("a.tsv", b"de\ten\nja\tyes\t\n", "a.tsv, line 2: 3 columns where the header has 2"),
        ("a.tsv", b"de\ten\nja\t\xff\n", "a.tsv, line 2: not UTF-8"),
        ("a.parquet", b"PAR1", "a.parquet cannot be read as parquet"),
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


def test_surrogate_pairs_are_characters(write):
    assert rows_of(write("a.jsonl", b'{"a": "\\ud83d\\ude00 \\\\ud83d"}\n')) == [{"a": "\U0001f600 \\ud83d"}]


def test_missing_files(tmp_path, write):
    for spec in ("none.jsonl", "./none", "a/b/none", "none", "none.gz", "x" * 5000 + ".jsonl", "a\0b.jsonl"):
        with pytest.raises(DataError, match=r"^task\.data: file .* does not exist"):
            read_sources(spec, "task.data")
    assert "no file matches" in refusal(str(tmp_path / "*.jsonl"))
    assert "is a folder; name its files" in refusal(str(tmp_path))
    assert "a file name is empty" in refusal("")
    assert "a file name is empty" in refusal([write("a.jsonl", LINES), ""])


def test_an_unreadable_file(write):
    path = write("a.jsonl", LINES)
    os.chmod(path, 0)
    if os.access(path, os.R_OK):
        pytest.skip("this user may read everything")
    assert "Permission denied" in refusal(path)


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
    assert "'some/broken' is not a file here, and the hub gave no data set" in refusal("some/broken")
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
    assert "cannot tell what" in refusal([write("g.de", "1\n"), write("g.de.gz", gzip.compress(b"1\n"))])
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
