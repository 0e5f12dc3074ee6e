"""A configuration from its text, and what is said where it is refused; shared by the tests of the configuration."""

from __future__ import annotations

from pathlib import Path

import pytest

from fastalign.config import Config, load_config
from fastalign.errors import ConfigError


def load(tmp_path: Path, text: str, *overrides: str) -> Config:
    """What `text` is as a file, under these overrides."""
    path = tmp_path / "config.yaml"
    path.write_text(text, encoding="utf-8")
    return load_config(path, overrides)


def refusal(tmp_path: Path, text: str, *overrides: str) -> str:
    """The one line that refuses it."""
    with pytest.raises(ConfigError) as caught:
        load(tmp_path, text, *overrides)
    assert "\n" not in str(caught.value)
    return str(caught.value)
