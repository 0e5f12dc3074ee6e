"""Other people's text, made fit to stand in a page or in a plot."""

from __future__ import annotations

import html
import re
import textwrap

# What neither HTML nor XML may hold: control characters, lone surrogates, code points that are no characters.
NO_TEXT = re.compile(
    "[\x00-\x08\x0b\x0c\x0e-\x1f\x7f-\x9f\ud800-\udfff\ufdd0-\ufdef"
    + "".join(chr(plane << 16 | 0xFFFE) + chr(plane << 16 | 0xFFFF) for plane in range(17))
    + "]"
)

MISSING = "–"


def clean(text: object) -> str:
    """Text with a replacement character for whatever a page may not hold."""
    return NO_TEXT.sub("\ufffd", str(text).replace("\r\n", "\n").replace("\r", "\n"))


def escape(text: object) -> str:
    """Text as it stands in HTML, between tags or in a quoted attribute."""
    return html.escape(clean(text), quote=True)


def isolated(text: object) -> str:
    """`escape` in an element of its own, so that a text from right to left leaves what stands beside it in place."""
    return f"<bdi>{escape(text)}</bdi>"


def one_line(text: object, longest: int) -> str:
    """Text for a plot, where there is little room: white space joined, cut to a number of characters."""
    joined = " ".join(clean(text).split())
    return joined if len(joined) <= longest else joined[: longest - 1].rstrip() + "…"


def wrapped(text: object, width: int) -> str:
    """Text for a plot in lines of at most so many characters."""
    return textwrap.fill(" ".join(clean(text).split()), width)


def in_words(value: object) -> str:
    """A value that is not a measurement: None as a dash, True as yes."""
    if value is None:
        return MISSING
    return {True: "yes", False: "no"}[value] if isinstance(value, bool) else str(value)
