"""`fastalign memory`: from a config alone, what it shows adds up, and the batches it names fit and no larger ones."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch

from fastalign.cli import main
from fastalign.config import config_from_dict
from fastalign.config.dialect import dump_yaml
from fastalign.errors import ConfigError, ModelError
from fastalign.training.capacity import memory_report
from fastalign.training.needs import CONTEXT, usable


@pytest.fixture(scope="module")
def bare(model_dir: Path, tmp_path_factory: pytest.TempPathFactory) -> str:
    """A folder with config and tokenizer of a model of 0.4 billion parameters: no weights."""
    folder = tmp_path_factory.mktemp("bare")
    shutil.copytree(model_dir, folder, dirs_exist_ok=True)
    (folder / "model.safetensors").unlink()
    shape = {"hidden_size": 2048, "intermediate_size": 8192, "num_attention_heads": 16, "head_dim": 128}
    shape |= {"num_hidden_layers": 6, "max_position_embeddings": 4096, "num_key_value_heads": 8}
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, **shape}))
    return str(folder)


@pytest.fixture
def raw(bare: str, raw_config: dict) -> dict[str, Any]:
    return {**raw_config, "model": {"name_or_path": bare}}


def test_command_shows_each_item_and_json_adds_up(raw: dict, tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    path = tmp_path / "config.yaml"
    path.write_text(dump_yaml(raw), encoding="utf-8")
    options = ["--gpu-memory", "3GB", "model.quantization=nf4"]
    assert main(["memory", str(path), *options]) == 0
    said = capsys.readouterr().out
    for words in (
        "base",
        "embedding",
        "head",
        "adapter",
        "gradients",
        "optimizer",
        "activations, task",
        "logits, task",
    ):
        assert words in said
    for words in ("activations, alignment", "workspace, task", "driver and libraries", "widths of the rows: data"):
        assert words in said
    assert main(["memory", str(path), *options, "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert found["peak_bytes"] == sum(found["items"].values()) and found["context_bytes"] == CONTEXT
    assert found["gpu_memory_bytes"] == 3 * 10**9 and found["fits"] is True and found["gpus"] == 1
    rows = {row["micro_batch"]: row for row in found["table"]}
    assert rows[4]["task"] < rows[8]["task"] and max(rows[4]["task"], rows[8]["alignment"]) == found["peak_bytes"]


def test_the_largest_micro_batches_fit_and_no_larger_ones(raw: dict) -> None:
    raw["task"] |= {"data": "nowhere.jsonl", "max_length": 128}  # so that the widths do not depend on the batch
    largest = memory_report(config_from_dict(raw), gpu_memory="3GB")["largest_micro_batch"]
    assert largest["task"] > 1 and largest["alignment"] > 1
    for more, fits in ((0, True), (1, False)):
        for name in ("task", "alignment"):
            count = largest[name] + more
            raw["training"]["per_device_train_batch_size"] = count if name == "task" else 1
            raw["alignment"] |= {"batch_size": count if name == "alignment" else 2}
            found = memory_report(config_from_dict(raw), gpu_memory="3GB")
            assert found["streams"][name]["micro_batch"] == count
            assert found["fits"] == (found["peak_bytes"] <= usable(3 * 10**9, on_gpu=True)) == fits


def test_widths_are_those_of_the_data_or_the_longest_allowed(raw: dict) -> None:
    raw["task"]["max_length"], raw["alignment"]["max_length"] = 300, 77
    config = config_from_dict(raw)
    read = memory_report(config)
    raw["task"]["data"] = "nowhere.jsonl"
    blind = memory_report(config_from_dict(raw))
    assert {part["width_from"] for part in read["streams"].values()} == {"data"}
    assert all(
        "max_length, because task.data: file 'nowhere.jsonl'" in s["width_from"] for s in blind["streams"].values()
    )
    assert read["streams"]["task"]["width"] < 40 and read["streams"]["alignment"]["width"] < 40
    assert (blind["streams"]["task"]["width"], blind["streams"]["alignment"]["width"]) == (300, 77)
    assert [blind["streams"][name]["micro_batch"] for name in ("task", "alignment")] == [4, 8]
    assert blind["peak_bytes"] > read["peak_bytes"] and blind["largest_micro_batch"] == {}


def test_ranks_part_what_zero_parts(raw: dict) -> None:
    raw["training"]["deepspeed"] = {"zero_optimization": {"stage": 2}, "train_micro_batch_size_per_gpu": "auto"}
    raw["task"]["data"] = "nowhere.jsonl"
    alone, four = (memory_report(config_from_dict(raw), gpu_memory="8GB", gpus=count) for count in (1, 4))
    assert four["items"]["optimizer"] == -(-alone["items"]["optimizer"] // 4) and alone["zero"] is None
    assert any("ZeRO-2 over 4 GPUs" in line for line in four["lines"])


def test_a_gpu_that_is_too_small_is_refused_with_what_would_fit(
    raw: dict, tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    path = tmp_path / "config.yaml"
    path.write_text(dump_yaml(raw), encoding="utf-8")
    assert main(["memory", str(path), "--gpu-memory", "1.2GB"]) == 2
    said = capsys.readouterr().err
    assert "1.20 GB is too small" in said and "with model.quantization: nf4 it would fit" in said
    assert len(said.splitlines()) == 1
    assert main(["memory", str(path), "--gpu-memory", "1.2GB", "model.quantization=nf4"]) == 0
    capsys.readouterr()
    assert main(["memory", str(path), "--gpu-memory", "600MB"]) == 2
    said = capsys.readouterr().err
    assert "take a GPU of" in said and len(said.splitlines()) == 1
    for wrong in ("8", "-1GB"):
        with pytest.raises(ConfigError, match="--gpu-memory must be a size"):
            memory_report(config_from_dict(raw), gpu_memory=wrong)


def test_without_a_gpu_nothing_is_compared(raw: dict) -> None:
    if torch.cuda.is_available():
        pytest.skip("there is a GPU")
    found = memory_report(config_from_dict(raw))
    assert (found["largest_micro_batch"], found["fits"], found["context_bytes"]) == ({}, None, 0)
    assert "on the CPU" in found["lines"][0]


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"training": {"deepspeed": {"zero_optimization": {"stage": 4}}}}, "stage must be 0, 1, 2 or 3"),
        ({"alignment": {"layer": [4, 4]}}, "names a layer twice"),
        ({"training": {"deepspeed": "zero4"}}, "neither a preset"),
    ],
)
def test_what_train_refuses_is_refused_also_without_data(changes: dict, words: str, raw: dict) -> None:
    raw["task"]["data"] = "nowhere.jsonl"
    for section, keys in changes.items():
        raw[section] |= keys
    with pytest.raises(ConfigError, match=words):
        memory_report(config_from_dict(raw), gpus=2)


def test_checkpoints_that_cannot_be_used_are_refused_and_what_is_on_is_not_proposed(
    raw: dict, bare: str, tmp_path: Path
) -> None:
    raw["task"]["data"] = "nowhere.jsonl"
    raw["model"]["name_or_path"] = shutil.copytree(bare, tmp_path / "stored")
    path = Path(raw["model"]["name_or_path"]) / "config.json"
    model = json.loads(path.read_text())
    path.write_text(json.dumps({**model, "quantization_config": {"quant_method": "gptq", "bits": 4}}))
    raw["model"]["name_or_path"] = str(path.parent)
    with pytest.raises(ModelError, match="quantised with gptq"):
        memory_report(config_from_dict(raw))
    packed = {"quant_method": "bitsandbytes", "load_in_4bit": True, "bnb_4bit_quant_type": "nf4"}
    path.write_text(json.dumps({**model, "quantization_config": packed}))
    raw["training"]["activation_checkpointing"] = True
    with pytest.raises(ConfigError, match="too small") as caught:
        memory_report(config_from_dict(raw), gpu_memory="520MB")
    assert "nf4" not in str(caught.value) and "checkpointing" not in str(caught.value)


def test_checkpointing_has_two_names(raw: dict) -> None:
    peaks = []
    for training in ({}, {"gradient_checkpointing": True}, {"activation_checkpointing": True}):
        peaks.append(
            memory_report(config_from_dict({**raw, "training": {**raw["training"], **training}}))["peak_bytes"]
        )
    assert peaks[0] > peaks[1] == peaks[2]


def test_joint_keeps_a_second_copy_of_the_gradients_in_the_table_too(raw: dict) -> None:
    raw["schedule"] = {"mode": "joint"}
    found = memory_report(config_from_dict(raw))
    assert found["items"]["gradients"] == 2 * found["items"]["adapter"]
    rows = {row["micro_batch"]: row for row in found["table"]}
    assert max(rows[4]["task"], rows[8]["alignment"]) == found["peak_bytes"]


def test_align_only_says_what_is_loaded(raw: dict) -> None:
    raw["schedule"] = {"mode": "align_only"}
    found = memory_report(config_from_dict(raw))
    assert any("blocks 1 to 3 of 6 are loaded" in line for line in found["lines"])
    assert found["items"]["head"] == 0 and [*found["streams"]] == ["alignment"]
