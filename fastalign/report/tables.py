"""Tables that are sorted by a click on a header."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from numbers import Integral, Real
from typing import Any

from fastalign.report.text import MISSING, clean, escape, in_words, isolated


@dataclass(frozen=True)
class Column:
    """A column.

    Attributes:
        name: its header.
        help: what the numbers are; stands below the table.
        digits: decimals of its numbers; None: as many as tell them apart, for what spans orders of magnitude.
        unit: stands beside the name, as in "%".
    """

    name: str
    help: str = ""
    digits: int | None = 1
    unit: str = ""


@dataclass(frozen=True)
class Cell:
    """A value with something to say about it. Only the value counts when the table is sorted.

    Attributes:
        value: None, and a number that is none, stand as a dash and come last in either direction.
        note: small print beside it, as in "± 3".
        best: of its group of rows; stands out.
    """

    value: str | float | None
    note: str = ""
    best: bool = False


@dataclass(frozen=True)
class Table:
    """A table. A column is one of numbers where all of its values are numbers or missing; others are sorted as words.

    Attributes:
        rows: of as many cells as there are columns; a bare value is a cell without a note. The first cell of a row
            says what the row is about.
        caption: stands above it.
    """

    columns: Sequence[Column]
    rows: Sequence[Sequence[Cell | str | float | None]]
    caption: str

    def __post_init__(self) -> None:
        for place, row in enumerate(self.rows):
            if len(row) != len(self.columns):
                raise ValueError(f"row {place} has {len(row)} cells for {len(self.columns)} columns")

    def html(self, key: str) -> str:
        rows = [[cell if isinstance(cell, Cell) else Cell(cell) for cell in row] for row in self.rows]
        made = [_column(column, [row[place] for row in rows]) for place, column in enumerate(self.columns)]
        heads = "".join(head for head, _ in made)
        body = "".join(
            "<tr>" + "".join(_element(cells[place], is_head=not at) for at, (_, cells) in enumerate(made)) + "</tr>\n"
            for place in range(len(rows))
        )
        if not rows:
            body = f'<tr><td colspan="{max(1, len(made))}">There are no rows.</td></tr>\n'
        helps = "".join(
            f"<div><dt>{isolated(column.name)}</dt><dd>{isolated(column.help)}</dd></div>\n"
            for column in self.columns
            if column.help
        )
        return (
            f'<p class="caption" id="{key}-caption" dir="auto">{escape(self.caption)}</p>\n'
            f'<div class="scroll" role="region" aria-labelledby="{key}-caption" tabindex="0">\n'
            f'<table aria-labelledby="{key}-caption">\n'
            f"<thead><tr>{heads}</tr></thead>\n<tbody>\n{body}</tbody>\n</table>\n</div>\n"
            + (f'<dl class="legend">\n{helps}</dl>\n' if helps else "")
        )


def _element(attributes_and_content: tuple[str, str], *, is_head: bool) -> str:
    attributes, content = attributes_and_content
    return f'<th scope="row"{attributes}>{content}</th>' if is_head else f"<td{attributes}>{content}</td>"


def _column(column: Column, cells: Sequence[Cell]) -> tuple[str, list[tuple[str, str]]]:
    """The header of a column as HTML; attributes and content of each of its cells."""
    there = [cell.value for cell in cells if not _is_missing(cell.value)]
    numeric = bool(there) and all(map(_is_number, there))
    digits = 0 if all(isinstance(value, Integral) for value in there) else column.digits
    room = max((len(clean(cell.note)) for cell in cells), default=0)
    number_class = ' class="number"' if numeric else ""
    unit = f' <span class="unit">{isolated(column.unit)}</span>' if column.unit else ""
    head = (
        f'<th scope="col" aria-sort="none"{number_class}><button type="button"><span>{isolated(column.name)}{unit}'
        "</span></button></th>"
    )
    made = []
    for cell in cells:
        shown, sort = (MISSING, None) if _is_missing(cell.value) else _forms(cell.value, numeric, digits)
        content = f"<strong>{isolated(shown)}</strong>" if cell.best and sort is not None else isolated(shown)
        if room:  # of equal width beside each number, so that the numbers keep their place
            width = f' style="min-width:{room}ch"' if numeric else ""
            content += f' <span class="note"{width}>{isolated(cell.note) if cell.note else ""}</span>'
        made.append((number_class + ("" if sort is None else f' data-sort="{escape(sort)}"'), content))
    return head, made


def _is_number(value: object) -> bool:
    return isinstance(value, Real) and not isinstance(value, bool)


def _is_missing(value: object) -> bool:
    return value is None or (isinstance(value, Real) and math.isnan(value))


def _forms(value: Any, numeric: bool, digits: int | None) -> tuple[str, str]:
    """A value as a reader sees it, and as page.js compares it."""
    if not numeric:
        return in_words(value), in_words(value)
    value = float(value)
    return number(value, digits), repr(value).replace("inf", "Infinity")


def number(value: float, digits: int | None) -> str:
    """A number for a reader: digits in threes, a minus as wide as a figure, and no minus before a zero."""
    if math.isinf(value):
        return "∞" if value > 0 else "−∞"
    text = f"{value:.4g}" if digits is None or abs(value) >= 1e15 else f"{value:,.{digits}f}"
    if not any(char in "123456789" for char in text):
        text = text.removeprefix("-")
    return text.replace("-", "−")
