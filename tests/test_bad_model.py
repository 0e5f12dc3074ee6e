"""Base models that cannot be trained on: one line that says what is wrong, exit code 2, nothing written."""

from __future__ import annotations

import copy
import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from safetensors.torch import load_file, save_file

from fastalign.cli import main


@pytest.fixture
def folder(model_dir: Path, tmp_path: Path) -> Path:
    """A copy of the model, for a test to break."""
    return Path(shutil.copytree(model_dir, tmp_path / "broken"))


@pytest.fixture
def run(
    raw_config: dict, folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture
) -> Callable[..., tuple[int, str]]:
    """Trains on the broken model from the command line; gives the exit code and the line it ends with."""

    def train(*overrides: str) -> tuple[int, str]:
        raw = copy.deepcopy(raw_config)
        raw["model"]["name_or_path"] = str(folder)
        raw["training"]["max_steps"] = 2
        path = tmp_path / "config.yaml"
        path.write_text(yaml.safe_dump(raw), encoding="utf-8")
        code = main(["train", str(path), *overrides])
        printed = capsys.readouterr()
        lines = [line for line in printed.err.splitlines() if line.startswith("fastalign:")]
        assert "Traceback" not in printed.err and len(lines) == (1 if code else 0), printed.err
        assert code == 0 or not (tmp_path / "out").exists()
        return code, "".join(lines)

    return train


def change_config(folder: Path, **changes: Any) -> None:
    path = folder / "config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))


def change_weights(folder: Path, change: Callable[[dict[str, torch.Tensor]], Any]) -> None:
    weights = load_file(folder / "model.safetensors")
    change(weights)
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})


def pickled(folder: Path) -> None:
    torch.save(load_file(folder / "model.safetensors"), folder / "pytorch_model.bin")
    (folder / "model.safetensors").unlink()


def truncate(path: Path) -> None:
    os.truncate(path, path.stat().st_size // 2)


def set_one(name: str, value: float) -> Callable[[dict[str, torch.Tensor]], Any]:
    return lambda weights: weights[name].view(-1).__setitem__(7, value)


def with_code(folder: Path) -> None:
    (folder / "theirs.py").write_text("raise SystemExit('their code was run')")
    change_config(folder, model_type="theirs", auto_map={"AutoConfig": "theirs.C", "AutoModelForCausalLM": "theirs.M"})


def extra_token(folder: Path) -> None:
    """A token of the vocabulary itself, not an added one."""
    path = folder / "tokenizer.json"
    raw = json.loads(path.read_text())
    raw["model"]["vocab"]["<extra>"] = 100_000
    path.write_text(json.dumps(raw))


def other_end(folder: Path) -> None:
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(folder)
    tokenizer.eos_token = "<end>"
    tokenizer.add_special_tokens({"eos_token": "<end>"})
    tokenizer.save_pretrained(folder)


QUERY = "model.layers.1.self_attn.q_proj.weight"
BREAKS: dict[str, tuple[Callable[[Path], Any], list[str]]] = {
    "a pickle": (pickled, ["pytorch_model.bin", "pickle", "save_pretrained"]),
    "no config.json": (lambda folder: (folder / "config.json").unlink(), ["no usable config"]),
    "a broken config.json": (lambda folder: (folder / "config.json").write_text('{"a": '), ["no usable config"]),
    "a config.json that is a list": (lambda folder: (folder / "config.json").write_text("[]"), ["no usable config"]),
    "a config.json of text for numbers": (
        lambda folder: change_config(folder, num_hidden_layers="four"), ["no usable config", "num_hidden_layers"]),
    "an unknown model type": (lambda folder: change_config(folder, model_type="martian"), ["martian"]),
    "truncated weights": (lambda folder: truncate(folder / "model.safetensors"), ["no usable model"]),
    "empty weights": (lambda folder: (folder / "model.safetensors").write_bytes(b""), ["no usable model"]),
    "no weights": (lambda folder: (folder / "model.safetensors").unlink(), ["no usable model"]),
    "missing tensors": (
        lambda folder: change_weights(folder, lambda weights: weights.pop(QUERY)), [QUERY, "random numbers"]),
    "other shapes": (
        lambda folder: change_weights(folder, lambda w: w.update({QUERY: torch.zeros(3, 64)})), ["shape", QUERY]),
    "fewer layers than config.json says": (
        lambda folder: change_config(folder, num_hidden_layers=5), ["model.layers.4.", "lacks"]),
    "a NaN": (lambda folder: change_weights(folder, set_one(QUERY, float("nan"))), ["NaN", QUERY]),
    "an infinite weight": (
        lambda folder: change_weights(folder, set_one("model.norm.weight", -float("inf"))), ["infinite", "model.norm"]),
    "code of its own": (with_code, ["Python code", "model.trust_remote_code"]),
    "a token that the embedding lacks": (extra_token, ["'<extra>'", "embedding"]),
    "an EOS that the embedding lacks": (other_end, ["'<end>'", "embedding"]),
    "no tokenizer": (
        lambda folder: [path.unlink() for path in folder.glob("tokenizer*")], ["no usable tokenizer"]),
    "a broken tokenizer": (lambda folder: (folder / "tokenizer.json").write_text("{"), ["no usable tokenizer"]),
    "an encoder": (lambda folder: change_config(folder, model_type="bert"), ["not a decoder"]),
    "an encoder-decoder": (lambda folder: change_config(folder, model_type="t5", is_encoder_decoder=True), ["decoder"]),
    "a vision-language model": (lambda folder: change_config(folder, model_type="llava"), ["not a decoder"]),
}  # fmt: skip


@pytest.mark.parametrize("name", BREAKS)
def test_a_model_with(name: str, folder: Path, run: Callable[..., tuple[int, str]]) -> None:
    breaks, said = BREAKS[name]
    breaks(folder)
    code, line = run()
    assert code == 2 and "model.name_or_path" in line and len(line) < 700, line
    for part in said:
        assert part in line


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_4_bit_bases_are_checked_too(value: float, folder: Path, run: Callable[..., tuple[int, str]]) -> None:
    change_weights(folder, set_one(QUERY, value))
    code, line = run("model.quantization=nf4")
    assert code == 2 and QUERY in line


@pytest.mark.parametrize(
    ("overrides", "said"),
    [
        (["model.attn_implementation=sparse_magic"], ["model.attn_implementation", "sparse_magic", "sdpa"]),
        (["model.attn_implementation=flash_attention_2"], ["model.attn_implementation", "flash_attention_2"]),
        (["model.attn_implementation=kernels-community/flash-attn2"], ["model.attn_implementation"]),
        (["model.revision=v9"], ["model.revision", "folder"]),
        (["model.name_or_path=some-where/no-model", "model.revision=v9"], ["model.name_or_path", "some-where"]),
        (["training.output_dir=/proc/none/here"], ["training.output_dir", "cannot write"]),
        (["model.dtype=int4"], ["model.dtype", "bfloat16"]),
        (["model.name_or_path=gpt 2?"], ["model.name_or_path"]),
        (["model.name_or_path=" + "x" * 5000], ["model.name_or_path", "xxx"]),
        (["model.name_or_path=https://user:secretword@host/model"], ["model.name_or_path", "***"]),
    ],
)
def test_model_settings_that_cannot_be(
    overrides: list[str], said: list[str], run: Callable[..., tuple[int, str]]
) -> None:
    code, line = run(*overrides)
    assert code == 2 and "secretword" not in line
    for part in said:
        assert part in line, line


def test_a_tied_head_is_not_missing(folder: Path, run: Callable[..., tuple[int, str]]) -> None:
    change_config(folder, tie_word_embeddings=True)
    change_weights(folder, lambda weights: weights.pop("lm_head.weight"))
    assert run()[0] == 0


def test_more_rows_than_tokens_are_fine(folder: Path, run: Callable[..., tuple[int, str]]) -> None:
    rows = json.loads((folder / "config.json").read_text())["vocab_size"] + 8
    change_config(folder, vocab_size=rows)
    change_weights(
        folder,
        lambda weights: weights.update(
            {name: torch.zeros(rows, 64) for name in ("model.embed_tokens.weight", "lm_head.weight")}
        ),
    )
    assert run()[0] == 0


def test_a_tokenizer_without_padding_trains(folder: Path, run: Callable[..., tuple[int, str]]) -> None:
    for name in ("tokenizer_config.json", "special_tokens_map.json"):
        if (folder / name).exists():
            settings = json.loads((folder / name).read_text())
            settings.pop("pad_token")
            (folder / name).write_text(json.dumps(settings))
    assert run()[0] == 0


def test_code_of_a_model_is_run_only_where_it_is_trusted(folder: Path, run: Callable[..., tuple[int, str]]) -> None:
    with_code(folder)
    with pytest.raises(SystemExit, match="their code was run"):
        run("model.trust_remote_code=true")
