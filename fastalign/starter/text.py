"""The starter config as text: a few sections, and a word on everything that is not a default."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from typing import Any

from fastalign.config import SECTIONS
from fastalign.config.dialect import dump_yaml, plain

Entries = dict[str, tuple[Any, str]]
"""Key to (value, the reason for it)."""

LONGEST = 118


def config_text(head: Sequence[str], sections: Mapping[str, Entries]) -> str:
    """YAML of the sections in their order, under the lines of `head`."""
    lines = [f"# {line}" for line in head]
    for name in (*SECTIONS, "training"):
        if sections.get(name):
            lines += [f"{name}:", *(_line(key, *entry) for key, entry in sections[name].items())]
    return "\n".join([*lines, "# Every key, its default and its meaning: fastalign train --help"]) + "\n"


def _line(key: str, value: Any, why: str) -> str:
    if hasattr(value, "__dataclass_fields__"):  # a data source: what it does not say is left out
        value = {name: item for name, item in plain(value).items() if item}
    # A text of several lines in double quotes, as YAML and JSON both write it.
    several = isinstance(value, str) and "\n" in value
    text = json.dumps(value, ensure_ascii=False) if several else dump_yaml(value, one_line=True).splitlines()[0]
    line = f"  {key}: {text}"
    if not why:
        return line
    comment = f"{line}  # {why}"
    return comment if len(comment) <= LONGEST else f"  # {why}\n{line}"
