"""Texts of other people: what can be seen in one, and how a message quotes one without harm."""

from __future__ import annotations

import pytest

from fastalign.data.text import has_text, is_language, listed, quoted, shown


@pytest.mark.parametrize(
    "text", ["", "  \t\n", "\0", "\ufeff", "\u200b\u200f", "\u2028\u00a0", "\x1b\x07", "\u3164", "\u2800", "\ud83d"]
)
def test_a_text_without_anything_to_see(text):
    assert not has_text(text)


@pytest.mark.parametrize(
    "text", ["a", "0", "。", "\u0301", "שלום", "\0a", "\ufeffb", "\U0001f469\u200d\U0001f467", "\U000f0000", "ㄱ"]
)
def test_a_text_with_something_to_see(text):
    assert has_text(text)


def test_what_can_name_a_language():
    assert all(map(is_language, ["de", "zh_Hans", "Deutsch", "nicht bestimmt"]))
    assert not any(map(is_language, ["", " ", "d\0e", "de\n", "\u200b", "x" * 61, None, 3, ["de"], "\ud83d"]))


def test_a_quotation_is_short_and_cannot_drive_a_terminal():
    assert shown("größe 日本") == "größe 日本"
    assert shown("a\x1b[31mb\n\u202e\0\ud83d") == "a\\x1b[31mb\\n\\u202e\\x00\\ud83d"
    assert shown("x" * 100 + "end", 30) == "x" * 20 + "..." + "x" * 7 + "end"
    assert shown(["a", 1]) == "['a', 1]" and shown(None) == "None"
    assert quoted("it's") == "'it's'" and quoted(17) == "17"
    assert len(quoted("y" * 10_000)) < 70


def test_values_that_python_cannot_write():
    deep: list = []
    for _ in range(100_000):
        deep = [deep]
    assert shown(deep) == "a list"
    assert shown(10**5000) == "a int"


def test_a_list_is_cut():
    assert listed(["a", "b"]) == "a, b" and listed([]) == ""
    assert listed(range(100_000), 3) == "0, 1, 2, ... (100,000 in all)"
    assert len(listed(["k" * 10_000] * 50)) < 700
