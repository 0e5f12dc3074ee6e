"""Sentence pairs: from rows of every kind to pairs, and which of them mean the same."""

from __future__ import annotations

import json
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from fastalign.config import Data
from fastalign.data.parallel import Pair, is_english, meaning_ids, read_pairs
from fastalign.data.tally import Tally
from fastalign.errors import DataError

Written = Callable[..., str]


@pytest.fixture
def write(tmp_path: Path) -> Written:
    def write(*rows: dict, name: str = "pairs.jsonl") -> str:
        path = tmp_path / name
        path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
        return str(path)

    return write


def quads(pairs: list[Pair]) -> list[tuple[str, str, str, str]]:
    return [(pair.source_lang, pair.target_lang, pair.source, pair.target) for pair in pairs]


def read(path: Data, pairs: str | list[list[str]] = "to_english") -> list[tuple[str, str, str, str]]:
    return quads(read_pairs(path, pairs, "alignment.data"))


def refusal(path: Data, pairs: str | list[list[str]] = "to_english") -> str:
    with pytest.raises(DataError) as caught:
        read_pairs(path, pairs, "alignment.data")
    assert str(caught.value).isprintable() and len(str(caught.value)) < 600
    return str(caught.value)


def test_n_way_rows_become_pairs_with_english(write):
    path = write(
        {"_id": "row 1", "_doc": 7, "en": "one", "de": "eins", "id": "satu", "no": "en"},
        {"_id": "row 2", "fr": "deux", "en": "two"},
        {"en": "only", "_id": "row 3"},
        {"de": "drei", "fr": "trois"},
        {"en": "four", "de": None, "fr": "  "},
    )
    assert read(path) == [
        ("de", "en", "eins", "one"),
        ("id", "en", "satu", "one"),
        ("no", "en", "en", "one"),
        ("fr", "en", "deux", "two"),
    ]


def test_any_list_of_pairs_on_request(write):
    path = write({"en": "one", "de": "eins", "fr": "un"}, {"fr": "deux", "de": "zwei"}, {"en": "three", "fr": "trois"})
    assert read(path, [["de", "fr"], ["en", "de"], ["de", "en"]]) == [
        ("de", "fr", "eins", "un"),
        ("en", "de", "one", "eins"),
        ("de", "en", "eins", "one"),
        ("de", "fr", "zwei", "deux"),
    ]


def test_english_centred_rows_whose_source_and_id_are_metadata(write):
    path = write(
        {"id": "tatoeba-1", "source": "tatoeba", "lang": "de", "en": " one ", "text": "eins\n"},
        {"id": 2, "lang": "id", "en": "two", "text": "dua"},
        {"lang": "en", "en": "three", "text": "three"},
        {"lang": "fr", "en": "four", "text": None},
    )
    assert read(path) == [("de", "en", "eins", "one"), ("id", "en", "dua", "two")]
    assert read(path, [["en", "de"]]) == [("en", "de", "one", "eins")]


def test_directed_rows_in_both_orientations(write):
    rows = [
        {"id": 1, "source": "eins", "target": "one", "source_lang": "de", "target_lang": "en"},
        {"id": 2, "source": "two", "target": "zwei", "source_lang": "en", "target_lang": "de"},
        {"source": "trois", "target": "drei", "source_lang": "fr", "target_lang": "de"},
    ]
    path = write(*rows)
    assert read(path) == [("de", "en", "eins", "one"), ("de", "en", "zwei", "two")]
    assert read(path, [["en", "de"]]) == [("en", "de", "one", "eins"), ("en", "de", "two", "zwei")]
    assert read(path, [["de", "fr"]]) == [("de", "fr", "drei", "trois")]
    assert read(path, "as_written") == [
        ("de", "en", "eins", "one"),
        ("en", "de", "two", "zwei"),
        ("fr", "de", "trois", "drei"),
    ]


def test_as_written_takes_undirected_rows_to_english(write):
    path = write(
        {"lang": "de", "en": "one", "text": "eins"},
        {"en": "two", "de": "zwei"},
        {"text_parallel_0": "drei", "text_parallel_1": "three", "lang": "de"},
        {"source": "", "target": "x", "source_lang": "de", "target_lang": "en"},
    )
    assert read(path, "as_written") == [
        ("de", "en", "eins", "one"),
        ("de", "en", "zwei", "two"),
        ("de", "en", "drei", "three"),
    ]


def test_rows_of_the_reference(write):
    path = write({"text_parallel_0": "eins", "text_parallel_1": "one", "prefix": "x", "text": "y"})
    assert read(path) == [("und", "en", "eins", "one")]


def test_every_english_is_english(write):
    assert [
        code for code in ("en", "en-US", "en_GB", "eng", "eng_Latn", "EN", "enm", "ang", "de") if is_english(code)
    ] == [*("en", "en-US", "en_GB", "eng", "eng_Latn", "EN")]
    path = write({"en-US": "one", "de": "eins", "en-GB": "ONE"}, {"deu_Latn": "zwei", "eng_Latn": "two"})
    assert read(path) == [("de", "en-US", "eins", "one"), ("deu_Latn", "eng_Latn", "zwei", "two")]
    assert [pair.direction for pair in read_pairs(path, "to_english", "k")] == ["de", "deu_Latn"]
    assert "language 'en' is not in alignment.data; there: de, deu_Latn, en-GB, en-US" in refusal(path, [["de", "en"]])


def test_direction_names_results():
    names = [Pair("a", "b", *langs, 0).direction for langs in (("de", "en"), ("en", "de"), ("de", "fr"))]
    assert names == ["de", "en-de", "de-fr"]


def test_files_of_different_kinds_together(write, tmp_path):
    (tmp_path / "a.tsv").write_text("en\tde\none\teins\n", encoding="utf-8")
    (tmp_path / "b.fr").write_text("deux\n", encoding="utf-8")
    (tmp_path / "b.en").write_text("two\n", encoding="utf-8")
    paths = [str(tmp_path / name) for name in ("a.tsv", "b.fr", "b.en")]
    assert read([*paths, write({"lang": "sw", "en": "three", "text": "tatu"})]) == [
        ("de", "en", "eins", "one"),
        ("fr", "en", "deux", "two"),
        ("sw", "en", "tatu", "three"),
    ]


def test_a_language_that_first_appears_late_in_a_large_file(write):
    rows = [{"en": f"line {i}" + "x" * 1000, "de": f"Zeile {i}"} for i in range(12_000)]
    assert read(write(*rows, {"en": "late", "kk": "кеш"}))[-1] == ("kk", "en", "кеш", "late")


@pytest.mark.parametrize(
    ("row", "words"),
    [
        (
            {"prompt": "a", "response": "b"},
            "line 2: found keys prompt ('a'), response ('b'); known kinds: {lang, en, text}",
        ),
        (
            {"source": "tatoeba", "de": "a", "en": "b"},
            "line 2: found keys source ('tatoeba'), de ('a'), en ('b'); known kinds",
        ),
        ({}, "line 2: found keys none"),
        ({"_id": 1}, "line 2: found keys _id"),
        ({"DE": "a", "EN": "b"}, "line 2: found keys DE ('a'), EN ('b')"),
        ({"source": "a", "target": "b"}, "line 2: a row with source and target needs source_lang and target_lang"),
        ({"source": "a", "target": "b", "source_lang": "de", "target_lang": ""}, "needs source_lang and target_lang"),
        ({"source": "a", "target": "b", "source_lang": "de", "target_lang": 3}, "line 2: a language must be text"),
        ({"lang": None, "en": "a", "text": "b"}, "line 2: a language must be text such as de, not None"),
        ({"lang": "", "en": "a", "text": "b"}, "line 2: a language must be text such as de, not ''"),
        ({"lang": "d\0e\n", "en": "a", "text": "b"}, "must be text such as de, not 'd\\x00e\\n'"),
        ({"lang": "x" * 10_000, "en": "a", "text": "b"}, "must be text such as de, not 'xxx"),
        ({"aa" + "-b" * 5_000: "a", "en": "b"}, "must be text such as de, not 'aa-b-b"),
        ({"k" * 10_000: "a", "en": "b"}, "line 2: found keys kkk"),
        ({f"K{i}": "a" for i in range(100_000)}, "line 2: found keys K0 ('a'), K1 ('a'), "),
        ({"en": "a", "de": [[["b"] * 99] * 99] * 99}, "line 2: the 'de' sentence must be text, not [[['b', 'b'"),
        ({"id": 17, "en": "a", "de": "b"}, "line 2: the 'id' sentence must be text, not 17 (keys of metadata begin"),
        ({"en": "a", "de": ["b"]}, "line 2: the 'de' sentence must be text, not ['b']"),
        ({"lang": "de", "en": float("nan"), "text": "b"}, "line 2: the 'en' sentence must be text, not nan"),
    ],
)
def test_bad_rows_are_named_with_their_line(write, row, words):
    assert words in refusal(write({"en": "one", "de": "eins"}, row))


def test_what_is_not_there(write):
    path = write({"en": "one", "de": "eins"}, {"fr": "un", "en": "one", "it": ""})
    assert "alignment.pairs: language 'sw' is not in alignment.data; there: de, en, fr" in refusal(path, [["sw", "en"]])
    assert "language 'it' has only empty sentences in alignment.data" in refusal(path, [["it", "en"]])
    assert "no row of alignment.data has both 'de' and 'fr'" in refusal(path, [["de", "en"], ["de", "fr"]])
    french = write({"de": "eins", "fr": "un"})
    assert (
        "there is no English, so name the languages, e.g. alignment.pairs: [[de, fr]] (languages: de, fr)"
        in refusal(french)
    )
    assert "no pair of sentences (languages: none)" in refusal(write({"en": "", "de": None}))
    assert "no pair of sentences (languages: en)" in refusal(write({"en": "one"}))


BLANKS = ["", "  ", "\0", "\ufeff", "\u200b\u200f \t", "\x1b"]


def told(path: str, pairs: str | list[list[str]] = "to_english") -> list[str]:
    tally = Tally()
    read_pairs(path, pairs, "alignment.data", tally)
    return [line.replace(path, "FILE") for line in tally.lines()]


@pytest.mark.parametrize("blank", [*BLANKS, None])
def test_a_pair_with_an_empty_side_is_left_out_and_counted(write, blank):
    good = {"lang": "de", "en": "one", "text": "eins"}
    path = write(good, {**good, "text": blank}, good, {**good, "en": blank}, good)
    assert read(path) == [("de", "en", "eins", "one")] * 3
    assert told(path) == ["alignment.data: 2 of 5 pairs skipped: a side is empty (FILE, line 2; line 4)"]
    good = {"source": "eins", "target": "one", "source_lang": "de", "target_lang": "en"}
    path = write(good, {**good, "source": blank}, good)
    for pairs in ("to_english", "as_written", [["en", "de"]]):
        assert told(path, pairs) == ["alignment.data: 1 of 3 pairs skipped: a side is empty (FILE, line 2)"]


@pytest.mark.parametrize("blank", BLANKS)
def test_an_empty_sentence_of_several_languages_counts_and_a_missing_one_does_not(write, blank):
    path = write({"en": "one", "de": blank, "fr": "un"}, {"en": "two", "de": "zwei"}, {"en": "three", "fr": None})
    assert read(path) == [("fr", "en", "un", "one"), ("de", "en", "zwei", "two")]
    assert told(path) == [
        "alignment.data: 1 of 3 rows skipped: no English beside another language (FILE, line 3)",
        "alignment.data: 1 of 3 pairs skipped: a side is empty (FILE, line 1)",
    ]
    assert told(path, [["fr", "en"]])[0] == (
        "alignment.data: 2 of 3 rows skipped: no pair of alignment.pairs (FILE, line 2; line 3)"
    )


def test_an_empty_english_gives_way_to_another(write):
    path = write({"en": "", "en-GB": "one", "de": "eins"})
    assert read(path) == [("de", "en-GB", "eins", "one")]
    assert told(path) == ["alignment.data: no pair for en: all its sentences are empty"]


def test_mostly_empty_pairs_are_refused(write):
    good, bad = {"en": "one", "de": "eins"}, {"en": "one", "de": "\u200b"}
    assert len(read(write(good, bad))) == 1, "half of them is not most"
    message = refusal(write(good, *[bad] * 4))
    assert "alignment.data: 4 of 5 rows give no pair, because a side is empty (" in message
    assert "pairs.jsonl, line 2; line 3; line 4; ...); fill them in, remove them, or leave out the key" in message
    assert "2 of 2 rows give no pair" in refusal(write({"en": "", "de": "eins"}, {"en": "two", "de": " "}))


def test_empty_cells_of_a_tsv_with_many_languages_are_not_there(tmp_path):
    path = tmp_path / "many.tsv"
    path.write_text("en\tde\tfr\tes\tit\none\teins\t\t\t\ntwo\t\t \tdos\t\n\tvier\t\t\t\n")
    assert read(str(path)) == [("de", "en", "eins", "one"), ("es", "en", "dos", "two")]
    assert told(str(path)) == [
        "alignment.data: 1 of 3 rows skipped: no English beside another language (FILE, line 4)",
        "alignment.data: no pair for fr, it: all its sentences are empty",
    ]


def test_an_empty_cell_of_a_tsv_with_two_languages_is_an_empty_side(tmp_path):
    path = tmp_path / "two.tsv"
    path.write_text("en\tde\none\teins\ntwo\t\n")
    assert told(str(path)) == ["alignment.data: 1 of 2 pairs skipped: a side is empty (FILE, line 3)"]


def test_rows_with_a_pair_may_have_mostly_empty_sentences(write):
    path = write(*[{"en": "one", "de": "eins", "fr": "", "es": "", "it": ""}] * 2)
    assert len(read(path)) == 2
    assert told(path)[0] == "alignment.data: 6 of 8 pairs skipped: a side is empty (FILE, line 1; line 2)"


def test_a_language_whose_english_is_elsewhere_has_none_beside_it(write):
    path = write({"en": "one", "de": "eins", "fr": ""}, {"de": "zwei", "fr": "deux"})
    assert told(path)[-1] == "alignment.data: no pair for fr: no sentence in it has English beside it"


def test_equal_sides_are_a_pair(write):
    path = write({"en": "Berlin", "de": "Berlin"})
    assert read(path) == [("de", "en", "Berlin", "Berlin")] and told(path) == []


def test_languages_that_end_up_without_a_pair_are_named(write):
    path = write(
        {"en": "one", "de": "eins", "xx": "", "fr": "un"},
        {"en": "two", "de": "zwei", "en-GB": "2"},
        {"it": "tre", "pt": "três"},
    )
    assert told(path) == [
        "alignment.data: 1 of 3 rows skipped: no English beside another language (FILE, line 3)",
        "alignment.data: 1 of 4 pairs skipped: a side is empty (FILE, line 1)",
        "alignment.data: no pair for xx: all its sentences are empty",
        "alignment.data: no pair for en-GB: its rows have another English",
        "alignment.data: no pair for it, pt: no sentence in it has English beside it",
    ]
    assert told(path, [["it", "pt"]])[1:] == [], "what was not asked for is not missed"


def test_a_pair_knows_its_line(write):
    path = write({"en": "one", "de": "eins", "fr": "un"}, {"en": "two"}, {"en": "three", "de": "drei"})
    assert [pair.where for pair in read_pairs(path, "to_english", "k")] == [
        f"{path}, line {number}" for number in (1, 1, 3)
    ]


def test_one_english_sentence_with_its_german_and_french_is_one_meaning(write):
    path = write(
        {"lang": "de", "en": "Good morning.", "text": "Guten Morgen."},
        {"lang": "de", "en": "Thanks.", "text": "Danke."},
        {"lang": "fr", "en": "Good morning.", "text": "Bonjour."},
    )
    german, thanks, french = (pair.meaning for pair in read_pairs(path, "to_english", "k"))
    assert german == french != thanks


def test_meaning_by_row_by_source_and_by_target(write):
    path = write(
        {"en": "one", "de": "eins", "fr": "un"},  # one row: 0, 0
        {"en": "two", "de": "zwei"},  # 1
        {"en": "two!", "de": "zwei"},  # equal source: 1
        {"en": "two!", "fr": "deux"},  # equal target of the one before: 1
        {"en": "three", "de": "drei"},  # 2
        {"en": " one ", "de": "eines"},  # equal target after trimming: 0
    )
    assert [pair.meaning for pair in read_pairs(path, "to_english", "k")] == [0, 0, 1, 1, 1, 2, 0]


def test_meaning_does_not_mix_up_rows_and_sentences():
    assert meaning_ids([0, 1, 2], [("1", "a"), ("2", "b"), ("0", "c")]) == [0, 1, 2]


def test_meanings_against_a_search_of_the_graph():
    import random

    generator = random.Random(0)
    rows = [generator.randrange(40) for _ in range(60)]
    sentences = [(f"s{generator.randrange(50)}", f"t{generator.randrange(50)}") for _ in rows]
    found = meaning_ids(rows, sentences)
    shares = [
        [
            rows[i] == rows[j] or sentences[i][0] == sentences[j][0] or sentences[i][1] == sentences[j][1]
            for j in range(60)
        ]
        for i in range(60)
    ]
    for i in range(60):
        reached, todo = {i}, [i]
        while todo:
            k = todo.pop()
            new = {j for j in range(60) if shares[k][j]} - reached
            reached |= new
            todo += new
        assert {j for j in range(60) if found[j] == found[i]} == reached
    assert 1 < len(set(found)) < 60


def test_a_hundred_thousand_rows_in_seconds(write):
    path = write(*({"lang": "de", "en": f"line {i % 50_000}", "text": f"Zeile {i}"} for i in range(100_000)))
    started = time.perf_counter()
    pairs = read_pairs(path, "to_english", "k")
    assert time.perf_counter() - started < 10  # measured: 1.2 s
    assert len(pairs) == 100_000 and len({pair.meaning for pair in pairs}) == 50_000


def test_a_column_of_row_numbers_is_not_taken_for_indonesian(tmp_path: Path):
    def write(ids: list[str]) -> str:
        rows = [{"id": number, "de": f"satz {number}", "en": f"sentence {number}"} for number in ids]
        (tmp_path / "a.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
        return str(tmp_path / "a.jsonl")

    assert "call it _id" in refusal(write(["a1", "a2", "tidak"]))
    assert {pair[0] for pair in read(write(["selamat pagi", "terima kasih", "a3"]))} == {"id", "de"}
