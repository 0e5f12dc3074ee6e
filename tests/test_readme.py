"""What the README shows works as it is written."""

from __future__ import annotations

import json
import re
import shutil
from pathlib import Path

import pytest

from fastalign.config import load_config
from fastalign.data import demo_corpus

ROOT = Path(__file__).resolve().parents[1]
README = (ROOT / "README.md").read_text(encoding="utf-8")


def blocks(language: str) -> list[str]:
    return re.findall(rf"^```{language}\n(.*?)^```", README, flags=re.M | re.S)


def test_the_python_example(
    model_dir: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    [code] = blocks("python")
    assert len(code.strip().splitlines()) <= 15
    monkeypatch.chdir(tmp_path)
    demo_corpus.write(tmp_path / "demo-output" / "data")
    model = shutil.copytree(model_dir, tmp_path / "demo-output" / "model")
    settings = json.loads((model / "config.json").read_text())
    settings["max_position_embeddings"] = 256  # the tokenizer of the tests makes many tokens of a word
    (model / "config.json").write_text(json.dumps(settings))
    exec(compile(code, "README.md", "exec"), {})
    printed = capsys.readouterr().out.strip().splitlines()
    before, after = map(float, printed[-2].split(" -> "))
    assert 0 <= before <= 1 and 0 <= after <= 1
    assert re.fullmatch(r"tensor\(-?[\d.]+\)", printed[-1])


def test_the_configurations(tmp_path: Path) -> None:
    [text] = blocks("yaml")
    (tmp_path / "config.yaml").write_text(text, encoding="utf-8")
    assert load_config(tmp_path / "config.yaml").training["num_train_epochs"] == 3
    for path in (ROOT / "examples").glob("*.yaml"):
        load_config(path)


def test_files_and_links_exist() -> None:
    for link in re.findall(r"\]\((?!http)([^)#]+)\)", README):
        assert (ROOT / link).exists(), link
    for row in re.findall(r"^\| (`.*?) \|", README.split("## Map")[1], flags=re.M):
        for name in re.findall(r"`([^`]+/)`", row):
            assert (ROOT / name).is_dir(), name
