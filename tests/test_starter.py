"""`fastalign init`: what it writes runs as written, fits into the memory, and what it cannot know it says."""

from __future__ import annotations

import json
import shutil
from collections.abc import Mapping, Sequence
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import torch

from fastalign.cli import main
from fastalign.config import Config, config_from_dict, load_config, parse_memory
from fastalign.config.dialect import load_yaml
from fastalign.errors import ConfigError, DataError, FastalignError, ModelError
from fastalign.starter import propose, starter
from fastalign.starter.fit import ENOUGH, RUNGS, Needs, fit
from fastalign.training.needs import CONTEXT, usable
from fastalign.training.run import train

SHORT = ["training.max_steps=2", "training.use_cpu=true", "training.save_strategy=no", "training.eval_strategy=no"]


def write(path: Path, rows: Sequence[Mapping[str, Any]]) -> str:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return str(path)


def load(text: str, folder: Path, *overrides: str) -> Config:
    """What `load_config` reads from the text."""
    path = folder / "starter.yaml"
    path.write_text(text, encoding="utf-8")
    return load_config(path, [f"training.output_dir={folder / 'out'}", *overrides])


@pytest.fixture(scope="module")
def roomy(model_dir: Path, tmp_path_factory: pytest.TempPathFactory) -> str:
    """The tiny model with a context that holds every template's system message."""
    return edited(model_dir, tmp_path_factory.mktemp("roomy"), max_position_embeddings=1024)


def edited(model_dir: Path, folder: Path, **values: Any) -> str:
    """A copy of the model with other values in its config."""
    shutil.copytree(model_dir, folder, dirs_exist_ok=True)
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, **values}))
    return str(folder)


TAGGED = {"lang": "de", "tokens": ["wecker", "um", "sieben"]}
TASKS: dict[str, tuple[dict, dict]] = {
    "messages": ({"messages": [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]}, {}),
    "raw": ({"prefix": "a", "text": "b"}, {}),
    "slots": ({**TAGGED, "slots": ["O", "O", "B-time"], "intent": "alarm"}, {"template": "slots"}),
    "ner": ({**TAGGED, "tags": ["O", "O", "B-TIME"]}, {"template": "ner"}),
    "ner_tags": ({**TAGGED, "ner_tags": ["O", "O", "B-TIME"]}, {"template": "ner", "tags": "ner_tags"}),
    "pairs": ({"source": "a", "target": "b", "source_lang": "de", "target_lang": "fr"}, {"template": "translation"}),
    "n-way": ({"de": "licht an", "en": "light on", "fr": "allume"}, {"template": "translation"}),
    "question": ({"id": 7, "Question": "set?", "answer": "on", "lang": "en"}, {"prompt": "Question", "lang": "lang"}),
    "conversations": (
        {"conversations": [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]},
        {"messages": "conversations"},
    ),
    "alpaca": ({"instruction": "a", "input": "b", "output": "c"}, {"prompt": "{instruction}\n\n{input}"}),
    "label": ({"text": "a", "label": 3}, {"template": "custom", "response": "{label}"}),
}


def some(kinds: Mapping[str, Any], *fast: str) -> list[Any]:
    """All kinds; those not named here are run with the slow tests."""
    return [pytest.param(kind, marks=() if kind in fast else pytest.mark.slow) for kind in kinds]


@pytest.mark.parametrize("kind", some(TASKS, "slots", "n-way", "question", "alpaca"))
def test_each_kind_of_task_rows_is_recognised_and_trains_as_written(kind: str, roomy: str, tmp_path: Path) -> None:
    row, expected = TASKS[kind]
    path = write(tmp_path / "rows.jsonl", [row] * 12)
    config = load(starter(model=roomy, task_data=[path]), tmp_path, *SHORT)
    task: Any = config.task
    columns = {} if isinstance(task.data, str) else task.data.columns
    for key, value in expected.items():
        assert columns.get(key, getattr(task, key, None)) == value
    assert config.schedule.mode == "task_only" and task.max_length % 64 == 0
    summary = train(config)
    assert summary["steps"] == 2 and not summary["data"].get("left_out")


PAIRS: dict[str, tuple[list[dict], Any, int]] = {
    "english": ([{"de": f"licht {i}", "en": f"light {i}", "fr": f"lampe {i}"} for i in range(12)], "to_english", 24),
    "no english": (
        [{"de": f"licht {i}", "it": f"luce {i}", "fr": f"lampe {i}"} for i in range(12)],
        [["it", "de"], ["fr", "de"]],
        24,
    ),
    "directed": (
        [{"source": f"a {i}", "target": f"b {i}", "source_lang": "de", "target_lang": "fr"} for i in range(12)],
        [["de", "fr"]],
        12,
    ),
    "nested": ([{"translation": {"de": f"licht {i}", "en": f"light {i}"}} for i in range(12)], "to_english", 12),
    "names": ([{"german": f"licht {i}", "english": f"light {i}"} for i in range(12)], "to_english", 12),
}


@pytest.mark.parametrize("kind", some(PAIRS, "no english", "names"))
def test_each_kind_of_pairs_is_recognised_and_trains_as_written(kind: str, model_dir: Path, tmp_path: Path) -> None:
    rows, wanted, count = PAIRS[kind]
    path = write(tmp_path / "pairs.jsonl", rows)
    config = load(starter(model=str(model_dir), parallel=[path]), tmp_path, *SHORT)
    assert config.alignment.pairs == wanted and config.schedule.mode == "align_only"
    summary = train(config)
    planned = summary["plan"]["alignment"]
    assert summary["steps"] == 2 and planned["rows"] + planned["held_out"] == count
    assert planned["rows_per_step"] <= planned["rows"]


def test_aligned_text_files_in_any_order_and_several_files(model_dir: Path, tmp_path: Path) -> None:
    for name, word in (("one.de", "licht"), ("one.en", "light"), ("two.fr", "lampe"), ("two.en", "light")):
        (tmp_path / name).write_text("".join(f"{word} {i}\n" for i in range(8)), encoding="utf-8")
    files = [str(tmp_path / name) for name in ("one.en", "two.en", "one.de", "two.fr")]
    proposal = propose(model=str(model_dir), task_data=[], parallel=files, gpu_memory=None, out="config.yaml")
    assert "16 pairs (de 8, fr 8)" in proposal.text
    assert train(load(proposal.text, tmp_path, *SHORT))["steps"] == 2


def test_command_writes_a_short_config_of_both_streams_that_trains(
    model_dir: Path, data_dir: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    monkeypatch.chdir(tmp_path)
    shutil.copytree(data_dir, tmp_path / "data")
    options = ["--model", str(model_dir), "--task-data", "data/task.jsonl", "--parallel", "data/pairs.jsonl"]
    assert main(["init", *options]) == 0
    said = capsys.readouterr().out.splitlines()
    assert 3 <= len(said) - 3 <= 8 and said[-2:] == [
        "  fastalign train config.yaml --dry-run",
        "  fastalign train config.yaml",
    ]
    assert any("24 rows (en 24)" in line for line in said) and any("120 pairs (de 60, fr 60)" in line for line in said)
    text = (tmp_path / "config.yaml").read_text()
    assert len(text.splitlines()) <= 45 and max(map(len, text.splitlines())) <= 120
    assert "fastalign train --help" in text.splitlines()[-1]
    sections = [line[:-1] for line in text.splitlines() if line[0] not in "# "]
    assert sections == ["model", "adapter", "task", "alignment", "schedule", "training"]
    assert main(["train", "config.yaml", "training.max_steps=2", "training.use_cpu=true"]) == 0
    assert (tmp_path / "fastalign-output" / "adapter_model.safetensors").exists()

    capsys.readouterr()
    assert main(["init", *options]) == 2  # it is there now
    assert "config.yaml' exists" in capsys.readouterr().err
    assert (tmp_path / "config.yaml").read_text() == text
    assert main(["init", "--overwrite", "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert found["out"] == "config.yaml" and "FILL IN" in (tmp_path / "config.yaml").read_text()


def test_the_config_may_lie_where_a_run_writes_by_default(model_dir: Path, data_dir: Path, tmp_path: Path) -> None:
    out = str(Path("fastalign-output") / "config.yaml")
    text = starter(model=str(model_dir), task_data=[str(data_dir / "task.jsonl")], out=out)
    assert load_yaml(text)["training"]["output_dir"] == "fastalign-output/run"


def test_train_names_all_that_is_still_to_be_filled_in(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    path = tmp_path / "config.yaml"
    assert main(["init", "--out", str(path)]) == 0
    assert "fill in before you train: model.name_or_path, task.data, alignment.data" in capsys.readouterr().out
    assert main(["train", str(path)]) == 2
    said = capsys.readouterr().err
    assert "model.name_or_path, task.data, alignment.data" in said and len(said.splitlines()) == 1
    with pytest.raises(ConfigError, match=r"alignment.data$"):
        load_config(path, ["model.name_or_path=m", "task.data=d.jsonl"])


def test_a_lengths_quantile_leaves_the_longest_rows_out(tmp_path: Path) -> None:
    rows = [{"prompt": "a" * 300, "response": "b"}] * 999 + [{"prompt": "a" * 30_000, "response": "b"}]
    few = load_yaml(starter(task_data=[write(tmp_path / "few.jsonl", rows[499:])]))
    many = load_yaml(starter(task_data=[write(tmp_path / "many.jsonl", rows[:4] + rows[-1:])]))
    assert few["task"]["max_length"] == 192 and many["task"]["max_length"] > 10_000


def test_prompts_that_the_model_cannot_see_are_refused(model_dir: Path, tmp_path: Path) -> None:
    path = write(tmp_path / "long.jsonl", [{"prompt": "set " * 300, "response": "on"}] * 4)
    with pytest.raises(DataError, match="no room for an answer in the model's context of 128"):
        starter(model=str(model_dir), task_data=[path])


@pytest.fixture(scope="module")
def larger(model_dir: Path, tmp_path_factory: pytest.TempPathFactory) -> str:
    """A model of 1.4 billion parameters, of which there is the config only."""
    shape = {"hidden_size": 4096, "intermediate_size": 11008, "num_hidden_layers": 8, "num_attention_heads": 32}
    shape |= {"head_dim": 128, "max_position_embeddings": 4096}
    folder = edited(model_dir, tmp_path_factory.mktemp("larger"), **shape)
    (Path(folder) / "model.safetensors").unlink()
    return folder


@pytest.fixture(scope="module")
def wide(tmp_path_factory: pytest.TempPathFactory) -> dict[str, list[str]]:
    folder = tmp_path_factory.mktemp("wide")
    rows = [{"prompt": "set alarm " * 200, "response": "on"}] * 4
    pairs = [{"de": f"licht {i} " * 20, "en": f"light {i} " * 20} for i in range(400)]
    return {
        "task_data": [write(folder / "task.jsonl", rows)],
        "parallel": [write(folder / "pairs.jsonl", pairs)],
    }


def test_more_memory_never_gives_a_smaller_forward_and_all_of_it_fits(larger: str, wide: dict) -> None:
    seen, settings = [], set()
    for size in ("1.7GB", "2.3GB", "6GB", "24GB", "80GB"):
        text = starter(model=larger, gpu_memory=size, **wide)
        raw: Any = load_yaml(text)
        rows, pairs = raw["training"]["per_device_train_batch_size"], raw["alignment"]["micro_batch_size"]
        config = config_from_dict(raw)
        seen.append((rows, pairs))
        settings.add((config.model.quantization, bool(config.training.get("gradient_checkpointing"))))
        assert rows * raw["training"]["gradient_accumulation_steps"] == 16
        assert raw["training"]["per_device_eval_batch_size"] == rows
        assert pairs <= raw["alignment"]["batch_size"] == 128
        assert _predicted(text) < usable(parse_memory(size, ""), on_gpu=True)
    assert all(before[i] <= after[i] for before, after in pairwise(seen) for i in (0, 1))
    assert seen[0] < ENOUGH < seen[-1] and len(settings) >= 3
    assert ("nf4", True) in settings and ("none", False) in settings


def a_model(vocab: int) -> Needs:
    """Of 2 wide layers."""
    from transformers import LlamaConfig

    shape: dict[str, Any] = {"hidden_size": 1024, "intermediate_size": 2816, "num_hidden_layers": 2}
    hf_config = LlamaConfig(**shape, num_attention_heads=16, num_key_value_heads=16, vocab_size=vocab)
    return Needs("a model", hf_config, torch.bfloat16, {"task": 64, "alignment": 32}, 1, 128)


@pytest.mark.parametrize("vocab", [1_000, 32_000])
def test_memory_in_small_steps_never_takes_anything_away(vocab: int) -> None:
    sizes = [CONTEXT + round(3e7 * 1.12**i) for i in range(36)]
    fits = []
    for size in sizes:
        try:
            found = fit(a_model(vocab), size, on_gpu=True)
        except ConfigError:
            assert not fits  # what fitted into less fits into this
            continue
        assert found.peak is not None and found.peak <= usable(size, on_gpu=True)
        fits.append(found)
    for before, after in pairwise(fits):
        assert before.rows <= after.rows and before.pairs <= after.pairs
        assert RUNGS.index((before.quantization, before.checkpointing)) >= RUNGS.index(
            (after.quantization, after.checkpointing)
        )
    assert len({(found.quantization, found.checkpointing) for found in fits}) >= 2 and fits[-1].rows == 16


def test_on_a_cpu_what_needs_4_bits_is_refused() -> None:
    least = next(size for size in range(10**7, 10**10, 10**7) if _fits(size, True))
    with pytest.raises(ConfigError, match=r"even with gradient checkpointing and one row .* take a machine of"):
        fit(a_model(1_000), round((least - CONTEXT) * 0.95 / 0.85), on_gpu=False)  # of which as much is usable


def _fits(size: int, on_gpu: bool) -> bool:
    try:
        return bool(fit(a_model(1_000), size, on_gpu))
    except ConfigError:
        return False


def _predicted(text: str) -> float:
    count, unit = text.splitlines()[0].rstrip(".").split()[-2:]
    return float(count) * {"GB": 1e9, "MB": 1e6}[unit]


def test_a_model_that_cannot_fit_is_refused_with_what_would(larger: str, wide: dict) -> None:
    with pytest.raises(
        ConfigError, match=r"does not fit into 1.00 GB: .*nf4.* it needs about .* a GPU of (.*) GB"
    ) as bad:
        starter(model=larger, gpu_memory="1GB", **wide)
    enough = str(bad.value).partition("a GPU of ")[2].split()[0]
    assert starter(model=larger, gpu_memory=f"{float(enough) + 0.01:.2f}GB", **wide)


def test_a_cpu_gets_small_batches_and_no_4_bits(model_dir: Path, data_dir: Path) -> None:
    if torch.cuda.is_available():
        pytest.skip("there is a GPU")
    for model in (str(model_dir), ""):
        raw: Any = load_yaml(starter(model=model, parallel=[str(data_dir / "pairs.jsonl")] * 2))
        assert "quantization" not in raw["model"] and raw["alignment"]["batch_size"] == 32
        assert raw["training"]["per_device_train_batch_size"] <= 4 and raw["alignment"]["micro_batch_size"] <= 16


def test_a_hub_that_is_away_gives_careful_settings_and_says_so(data_dir: Path) -> None:
    options: dict[str, Any] = {"task_data": [str(data_dir / "task.jsonl")], "parallel": [], "out": "config.yaml"}
    proposal = propose(model="nobody/nothing", gpu_memory="8GB", **options)
    raw: Any = load_yaml(proposal.text)
    assert "hub is away" in proposal.lines[0] and raw["model"]["name_or_path"] == "nobody/nothing"
    assert raw["model"]["quantization"] == "nf4" and raw["training"]["gradient_checkpointing"] is True
    assert raw["training"]["per_device_train_batch_size"] == 1


@pytest.mark.parametrize(
    ("text", "size"), [("8GB", 8e9), ("24G", 24e9), ("12GiB", 12 * 2**30), ("8000MB", 8e9), (" 1.5 tb", 1.5e12)]
)
def test_sizes(text: str, size: float) -> None:
    assert parse_memory(text, "--gpu-memory") == size


REFUSED: dict[str, tuple[dict, type[FastalignError], str]] = {
    "no unit": ({"gpu_memory": "8"}, ConfigError, "--gpu-memory must be a size .*not '8'"),
    "nothing": ({"gpu_memory": "0GB"}, ConfigError, "--gpu-memory must be a size"),
    "a word": ({"gpu_memory": "large"}, ConfigError, "--gpu-memory must be a size"),
    "no file": ({"task_data": ["nope.jsonl"]}, DataError, "--task-data: file 'nope.jsonl' does not exist"),
    "no pairs": ({"parallel": ["nope.jsonl"]}, DataError, "--parallel: file 'nope.jsonl' does not exist"),
    "no folder": ({"model": "./nope"}, ModelError, "the folder './nope' does not exist"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_bad_input_is_one_line(case: str) -> None:
    options, kind, words = REFUSED[case]
    with pytest.raises(kind, match=words):
        starter(**options)


@pytest.mark.parametrize(
    "row",
    [
        {"foo": "a", "bar": "b"},
        {"question": "a", "choices": ["b", "c"], "answer": 0},
        {"question": "a", "context": "b", "instruction": "c", "answer": "d"},
        {"text": "a", "label": "b", "intent": "c"},
    ],
)
def test_columns_that_could_mean_several_things_are_refused_with_their_samples(row: dict, tmp_path: Path) -> None:
    path = write(tmp_path / "rows.jsonl", [row] * 3)
    with pytest.raises(DataError, match=r"init cannot choose: .*columns: \{prompt") as bad:
        starter(task_data=[path])
    assert all(name in str(bad.value) for name in row)
    with pytest.raises(DataError, match=r"init cannot choose: .*columns: \{de"):
        starter(parallel=[path])


def test_a_model_that_is_no_decoder_is_refused(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    (tmp_path / "config.json").write_text('{"model_type": "t5", "is_encoder_decoder": true}')
    assert main(["init", "--model", str(tmp_path), "--out", str(tmp_path / "c.yaml")]) == 2
    assert "is an encoder-decoder; a decoder is needed" in capsys.readouterr().err
    assert not (tmp_path / "c.yaml").exists()
    assert main(["init", "--out", str(tmp_path)]) == 2
    assert "is a folder" in capsys.readouterr().err
