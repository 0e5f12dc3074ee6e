"""What is written down about the keys, drawn from their dataclasses: help, a commented YAML, a page of the docs."""

from __future__ import annotations

import dataclasses
import textwrap
import typing
from collections.abc import Callable
from pathlib import Path

from fastalign.config.checks import type_name
from fastalign.config.dialect import dump_yaml
from fastalign.config.keys import NESTED, PAPER_PRESET, SECTIONS, TRAINING_DEFAULTS


def describe(section: str) -> list[tuple[str, str, str, str]]:
    """(key, type, default, help) of every key of a section or of `NESTED`: the source of ``--help`` and of the docs."""
    cls = {**SECTIONS, **NESTED}[section]
    hints = typing.get_type_hints(cls)
    rows = []
    for item in dataclasses.fields(cls):
        rows.append((item.name, type_name(hints[item.name]), _yaml(item.default), item.metadata["help"]))
    return rows


def commented_yaml() -> str:
    """A configuration that spells out every key with its default and its help: ``examples/all_keys.yaml``."""
    lines = [
        "# Every key with its default, made from the help texts in fastalign/config/keys.py. Keep what you change."
    ]
    for section, cls in SECTIONS.items():
        lines += ["", f"# {_words(cls)}", f"{section}:"]
        for name, kind, default, text in describe(section):
            lines += textwrap.wrap(f"{text} ({kind})", width=110, initial_indent="  # ", subsequent_indent="  # ")
            lines.append(f"  {name}: {default}")
    for nested, cls in NESTED.items():
        lines += ["", *textwrap.wrap(f"{nested}: {cls.__doc__}", 110, initial_indent="# ", subsequent_indent="# ")]
        for name, kind, default, text in describe(nested):
            wrapped = textwrap.wrap(f"{text} ({kind})", 110, initial_indent="#   # ", subsequent_indent="#   # ")
            lines += [*wrapped, f"#   {name}: {default}"]
    lines += [
        "",
        "# Any key of transformers.TrainingArguments. These are the defaults where they differ from its own.",
        "training:",
    ]
    lines += [f"  {name}: {_yaml(value)}" for name, value in TRAINING_DEFAULTS.items()]
    return "\n".join(lines) + "\n"


def page() -> str:
    """The keys as a page of Markdown: ``docs/configuration.md``."""
    lines = [_HEAD]
    for section, cls in SECTIONS.items():
        lines += ["", f"## {section}", "", _words(cls), "", *_table(section)]
    for nested, cls in NESTED.items():
        lines += ["", f"## A {nested}", "", _words(cls), "[data.md](data.md) has examples.", "", *_table(nested)]
    lines += ["", "## alignment.preset: paper", "", _PRESET, "", "| key | value |", "|---|---|"]
    lines += [f"| `alignment.{name}` | `{_yaml(value)}` |" for name, value in PAPER_PRESET.items()]
    lines += ["", "## training", "", _TRAINING, "", "| key | default here |", "|---|---|"]
    lines += [f"| `{name}` | `{_yaml(value)}` |" for name, value in TRAINING_DEFAULTS.items()]
    return "\n".join(lines) + "\n"


WRITTEN: dict[str, Callable[[], str]] = {"docs/configuration.md": page, "examples/all_keys.yaml": commented_yaml}
"""The files of the repository that are made here."""


def write(root: Path) -> None:
    """Make `WRITTEN` anew: what ``make docs`` does."""
    for name, made in WRITTEN.items():
        (root / name).write_text(made(), encoding="utf-8")


_HEAD = """\
# Every key

<!-- Made by `make docs` from fastalign/config/keys.py. Do not edit. -->

A configuration is a YAML file of sections. What is left out has the default below; only `model.name_or_path` and the
data of the streams that are trained on have none. On the command line `section.key=value` wins over the file, and the
value is YAML, too: `alignment.layer=12`, `task.languages='[en, de]'`. `fastalign train --help` prints what is on this
page, [all_keys.yaml](../examples/all_keys.yaml) is a file with all of it, and [guide.md](guide.md) says which keys
matter.

An unknown section or key is refused, and so is a key that is there twice. Only `true` and `false` are read as true and
false, so that `no` is Norwegian, and `5e-4` is a number."""

_PRESET = "The choices of the paper's own code. A key that you set yourself keeps your value."

_TRAINING = """\
Any key of
[transformers.TrainingArguments](https://huggingface.co/docs/transformers/main_classes/trainer#transformers.TrainingArguments),
with its type and its default, but for those below. Beyond the table: `bf16` is true on a GPU that has it, unless `fp16`
is set; `disable_tqdm` is true where stderr is no terminal; `eval_strategy` is `no` where nothing is held out.
`resume_from_checkpoint` is true (the last checkpoint in `output_dir`) or the folder of one. `warmup_steps`,
`eval_steps` and `save_steps` below 1 are shares of all steps. A key that cannot act as it says is refused where that
would change what is learnt, and otherwise told."""


def _table(section: str) -> list[str]:
    rows = [f"| `{name}` | {kind} | `{default}` | {_cell(text)} |" for name, kind, default, text in describe(section)]
    return ["| key | type | default | |", "|---|---|---|---|", *rows]


def _cell(text: str) -> str:
    """Help as Markdown shows it: nothing in it is meant as markup."""
    for sign in ("|", "*", "<"):
        text = text.replace(sign, f"\\{sign}")
    return text


def _words(cls: type) -> str:
    return " ".join((cls.__doc__ or "").split())


def _yaml(value: object) -> str:
    return dump_yaml(value).splitlines()[0]
