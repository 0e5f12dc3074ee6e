"""Texts of other people: whether there is anything to see in one, and how to quote one in a message."""

from __future__ import annotations

import unicodedata
from collections.abc import Iterable

from fastalign.errors import printable

INVISIBLE = ("Cc", "Cf", "Cs", "Zs", "Zl", "Zp")  # controls, formats, half characters, every kind of space
BLANK = "\u115f\u1160\u2800\u3164\uffa0"  # letters and symbols that draw nothing


def has_text(text: str) -> bool:
    """Whether any character of `text` can be seen."""
    return any(unicodedata.category(char) not in INVISIBLE and char not in BLANK for char in text)


def is_language(value: object) -> bool:
    """Whether `value` can be the name of a language: a short text without control characters, such as ``de``."""
    return isinstance(value, str) and len(value) <= 60 and value.isprintable() and bool(value.strip())


def shown(value: object, limit: int = 80) -> str:
    """`value` for a message: on one line, without control characters, cut in the middle to about `limit` characters.

    A text is shown as it is, anything else as Python writes it.
    """
    try:
        text = value if isinstance(value, str) else repr(value)
    except (RecursionError, ValueError):  # nested too deeply; an integer of too many digits
        text = f"a {type(value).__name__}"
    if len(text) > limit:
        text = f"{text[: limit * 2 // 3]}...{text[len(text) - limit // 3 :]}"
    return printable(text)


def quoted(value: object, limit: int = 60) -> str:
    """As `shown`, a text in quotes."""
    return f"'{shown(value, limit)}'" if isinstance(value, str) else shown(value, limit)


def listed(names: Iterable[object], most: int = 12) -> str:
    """``a, b, c``; of more than `most` names the first ones and how many there are."""
    names = list(names)
    words = [shown(name, 40) for name in names[:most]]
    return ", ".join(words) + (f", ... ({len(names):,} in all)" if len(names) > most else "")
