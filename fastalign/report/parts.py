"""The plain parts of a page: headings, paragraphs, lists of facts."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass

from fastalign.report.text import clean, escape, in_words, isolated


@dataclass(frozen=True)
class Heading:
    """A heading.

    Attributes:
        level: 2 for a chapter of the page, 3 for what is within one.
    """

    text: str
    level: int = 2

    def __post_init__(self) -> None:
        if self.level not in (2, 3):
            raise ValueError(f"a heading has level 2 or 3, not {self.level}; 1 is the title of the page")

    def html(self, key: str) -> str:
        return f'<h{self.level} id="{key}" dir="auto">{escape(self.text)}</h{self.level}>\n'


@dataclass(frozen=True)
class Text:
    """Paragraphs, with an empty line between one and the next. Plain text: no markup is read in it."""

    text: str

    def html(self, key: str) -> str:
        paragraphs = [p.strip() for p in re.split(r"\n\s*\n", clean(self.text))]
        return "".join(f'<p dir="auto">{escape(p)}</p>\n' for p in paragraphs if p)


@dataclass(frozen=True)
class Facts:
    """A list of names and values: versions, the seed, settings. None is shown as a dash, True as yes.

    Attributes:
        title: stands above the list.
    """

    facts: Mapping[str, str | float | bool | None]
    title: str = ""

    def html(self, key: str) -> str:
        title = f'<p class="caption" dir="auto">{escape(self.title)}</p>\n' if self.title else ""
        rows = "".join(
            f"<div><dt>{isolated(name)}</dt><dd>{isolated(in_words(value))}</dd></div>\n"
            for name, value in self.facts.items()
        )
        return f'{title}<dl class="facts">\n{rows}</dl>\n' if rows else ""
