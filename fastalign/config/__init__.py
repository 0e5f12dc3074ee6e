"""The configuration: dataclasses that read from and write to YAML, with overrides and validation.

This package is the only home of defaults and of help text: the command line's ``--help``, the commented example
and the error messages are all drawn from the fields in `keys`. It imports neither torch nor transformers, so that
``fastalign train --help`` and every configuration error are instant.

``training:`` is not described here: it goes unchanged to ``transformers.TrainingArguments``. Where the user is
silent, `TRAINING_DEFAULTS` speaks.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from fastalign.config.checks import (
    installed_version,
    make_section,
    nearest,
    refuse_newer,
    refuse_secrets,
    streams,
    validate,
)
from fastalign.config.dialect import dump_yaml, load_yaml, plain, read_yaml
from fastalign.config.keys import (
    FREE_SECTIONS,
    NESTED,
    PAPER_PRESET,
    SECTIONS,
    TRAINING_DEFAULTS,
    AdapterConfig,
    AlignmentConfig,
    Config,
    Data,
    DataSource,
    ModelConfig,
    ScheduleConfig,
    TaskConfig,
)
from fastalign.config.reference import commented_yaml, describe
from fastalign.config.sizes import logits_bytes, parse_memory
from fastalign.errors import ConfigError

__all__ = [
    "FREE_SECTIONS",
    "NESTED",
    "PAPER_PRESET",
    "SAVED",
    "SECTIONS",
    "TRAINING_DEFAULTS",
    "AdapterConfig",
    "AlignmentConfig",
    "Config",
    "Data",
    "DataSource",
    "ModelConfig",
    "ScheduleConfig",
    "TaskConfig",
    "commented_yaml",
    "config_from_dict",
    "config_text",
    "config_to_dict",
    "describe",
    "load_config",
    "logits_bytes",
    "nearest",
    "parse_memory",
    "save_config",
]


SAVED = "# Written by fastalign: the settings of a run, every key spelled out.\n"
"""The first line of a ``config.yaml`` that a run has left, and no user has written."""


def load_config(path: str | Path | None = None, overrides: Sequence[str] = ()) -> Config:
    """Read a YAML file, apply ``section.key=value`` overrides (values are YAML) and validate.

    Raises:
        ConfigError: the file is missing or not YAML, was written by a newer fastalign, a key is unknown or there twice,
            a value has the wrong type or range.
    """
    raw: dict[str, Any] = read_yaml(Path(path)) if path is not None else {}
    refuse_newer(raw.pop("version", None), str(path))
    for override in overrides:
        _apply_override(raw, override)
    return config_from_dict(raw)


def config_from_dict(raw: Mapping[str, Any]) -> Config:
    """Build and validate a `Config` from nested dictionaries. Raises ConfigError."""
    known = (*SECTIONS, *FREE_SECTIONS)
    values: dict[str, Any] = {}
    for name, section in raw.items():
        if name not in known:
            raise ConfigError(f"unknown section {name!r}{nearest(name, known)}; known: {', '.join(known)}")
        section = {} if section is None else plain(section)
        if not isinstance(section, dict):
            raise ConfigError(f"section {name!r} must hold keys and values, not {section!r}")
        for key in section:
            if not isinstance(key, str):
                raise ConfigError(f"{name}: key {key!r} is not text")
        refuse_secrets(section, name)
        if name == "alignment" and section.get("preset") == "paper":
            section = {**PAPER_PRESET, **section}
        if streams(section.get("data")):
            section = {"eval_share": 0.0, **section}
        values[name] = make_section(SECTIONS[name], name, section) if name in SECTIONS else section
    config = Config(**values)
    validate(config)
    return config


def config_to_dict(config: Config) -> dict[str, Any]:
    """The inverse of `config_from_dict`: nested plain dictionaries, every key spelled out."""
    return plain(dataclasses.asdict(config))


def config_text(config: Config) -> str:
    """The effective configuration as YAML, with the version that writes it, under a line that says what it is."""
    version = installed_version()
    return SAVED + dump_yaml({**({"version": version} if version else {}), **config_to_dict(config)})


def save_config(config: Config, path: str | Path) -> None:
    """Write the effective configuration as YAML; `load_config` reads it back to an equal object."""
    Path(path).write_text(config_text(config), encoding="utf-8")


def _apply_override(raw: dict[str, Any], override: str) -> None:
    dotted, equals, text = override.partition("=")
    section, dot, key = dotted.partition(".")
    if not (equals and dot and section and key):
        raise ConfigError(f"override {override!r} must read section.key=value, e.g. training.max_steps=100")
    try:
        value = load_yaml(text)
    except ValueError:
        raise ConfigError(f"override {override!r}: the value is not YAML; quote it: {dotted}='\"...\"'") from None
    known = (*SECTIONS, *FREE_SECTIONS)
    if section not in known:
        raise ConfigError(f"override {override!r}: unknown section {section!r}{nearest(section, known)}")
    if raw.get(section) is None:
        raw[section] = {}
    if not isinstance(raw[section], dict):
        raise ConfigError(f"section {section!r} must hold keys and values, not {raw[section]!r}")
    raw[section][key] = value
