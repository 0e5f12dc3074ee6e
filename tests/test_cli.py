"""The command line: results, exit codes, and one clear line for every mistake of the first day."""

from __future__ import annotations

import copy
import json
import os
import signal
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import yaml

from fastalign.cli import main
from fastalign.config import SECTIONS, TRAINING_DEFAULTS, describe, load_config, save_config

ROOT = Path(__file__).resolve().parents[1]


@pytest.fixture
def config_file(raw_config: dict, tmp_path: Path) -> Path:
    raw = copy.deepcopy(raw_config)
    raw["training"]["max_steps"] = 2
    path = tmp_path / "config.yaml"
    path.write_text(yaml.safe_dump(raw), encoding="utf-8")
    return path


def complaint(capsys: pytest.CaptureFixture, *argv: str) -> str:
    """The only line on stderr of a command that exits with 2."""
    code = main(argv)
    printed = capsys.readouterr()
    lines = [line for line in printed.err.splitlines() if line.startswith("fastalign:") or "Traceback" in line]
    assert code == 2 and len(lines) == 1 and printed.out == "", (code, printed)
    return lines[0]


def process(*argv: str, **options: Any) -> subprocess.CompletedProcess:
    environment = {**os.environ, "PYTHONPATH": f"{ROOT}{os.pathsep}{ROOT / 'kernels'}", "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-m", "fastalign", *argv]
    return subprocess.run(command, capture_output=True, text=True, env=environment, timeout=200, **options)


def test_train_from_a_process_with_json_and_a_second_run_is_refused(config_file: Path, tmp_path: Path) -> None:
    done = process("train", str(config_file), "--json")
    assert done.returncode == 0, done.stderr
    summary = json.loads(done.stdout)
    saved = json.loads((tmp_path / "out" / "summary.json").read_text())
    assert saved == summary
    assert (
        summary["steps"] == 2 and summary["layer"] == 2 and summary["seconds"] > 0 and summary["peak_memory_bytes"] > 0
    )
    assert {"steps", "loss_first", "loss_last", "tokens", "seconds", "pairs"} == summary["streams"]["alignment"].keys()
    assert {"steps", "loss_first", "loss_last", "tokens", "seconds"} == summary["streams"]["task"].keys()
    for when in ("before", "after"):
        scores = summary["retrieval"][when]
        assert scores["languages"].keys() == {"de", "fr"}
        assert scores["mean"] == pytest.approx(sum(scores["languages"].values()) / 2)
    asked, effective = load_config(config_file), load_config(tmp_path / "out" / "config.yaml")
    assert effective.training.items() >= {**TRAINING_DEFAULTS, **asked.training}.items()
    assert replace(effective, training={}) == replace(asked, training={})

    before = {path: path.read_bytes() for path in (tmp_path / "out").iterdir() if path.is_file()}
    again = process("train", str(config_file))
    assert again.returncode == 2 and again.stdout == ""
    [line] = again.stderr.splitlines()
    assert "holds results" in line and "--overwrite" in line
    assert {path: path.read_bytes() for path in (tmp_path / "out").iterdir() if path.is_file()} == before


def test_the_adapter_loads_with_plain_peft_and_generates(config_file: Path, model_dir: Path, tmp_path: Path) -> None:
    import torch
    from peft import PeftModel
    from transformers import AutoModelForCausalLM, AutoTokenizer

    assert main(["train", str(config_file)]) == 0
    base = AutoModelForCausalLM.from_pretrained(model_dir)
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "out")
    batch = tokenizer("set alarm", return_tensors="pt")
    with torch.no_grad():
        plain = base(**batch).logits
        model = PeftModel.from_pretrained(base, str(tmp_path / "out"))
        assert not torch.equal(model(**batch).logits, plain)
    answer = model.generate(**batch, max_new_tokens=4, do_sample=False)
    assert answer.shape[1] > batch["input_ids"].shape[1]


MISTAKES: dict[str, tuple[list[str], list[str]]] = {
    # name: (overrides, what the line must say)
    "missing data file": (["task.data=/no/such/file.jsonl"], ["task.data", "/no/such/file.jsonl", "does not exist"]),
    "missing pairs file": (["alignment.data=/no/such.jsonl"], ["alignment.data", "does not exist"]),
    "unknown section": (["alignement.layer=2"], ["alignement", "alignment"]),
    "unknown key": (["alignment.temprature=0.1"], ["alignment.temprature", "did you mean 'temperature'"]),
    "unknown training key": (["training.lerning_rate=1"], ["training.lerning_rate", "did you mean 'learning_rate'"]),
    "bad training value": (["training.optim=adamm"], ["training", "adamm"]),
    "training value of the wrong type": (["training.learning_rate=[1]"], ["training.learning_rate"]),
    "not an override": (["alignment.layer"], ["section.key=value"]),
    "wrong type": (["alignment.batch_size=many"], ["alignment.batch_size", "an integer", "many"]),
    "unknown language": (["alignment.pairs=[[xx, en]]"], ["'xx'", "de, en, fr"]),
    "unknown task language": (["task.languages=[xx]"], ["'xx'", "en"]),
    "layer beyond the model": (["alignment.layer=5"], ["alignment.layer", "1..4"]),
    "layer 0": (["alignment.layer=0"], ["alignment.layer", "at least 1"]),
    "negative layer": (["alignment.layer=-1"], ["alignment.layer", "at least 1"]),
    "fraction above 1": (["alignment.layer=1.5"], ["alignment.layer", "(0, 1)"]),
    "layer twice": (["alignment.layer=[2, middle]"], ["alignment.layer", "twice"]),
    "temperature 0": (["alignment.temperature=0"], ["alignment.temperature", "above 0"]),
    "temperature that is no number": (["alignment.temperature=.nan"], ["alignment.temperature"]),
    "a batch of one pair": (["alignment.batch_size=1"], ["alignment.batch_size", "at least 2"]),
    "no model": (["model.name_or_path=''"], ["model.name_or_path"]),
    "a model that cannot be reached": (["model.name_or_path=no-such/model"], ["model.name_or_path", "no-such/model"]),
    "a reporter that is not installed": (["training.report_to=wandb"], ["training", "wandb"]),
    "an optimizer that is not installed": (["training.optim=galore_adamw"], ["training", "galore"]),
    "a batch of no rows": (["training.per_device_train_batch_size=0"], ["per_device_train_batch_size", "at least 1"]),
    "half a step": (["training.max_steps=2.5"], ["training.max_steps", "an integer"]),
    "no epochs": (["training.max_steps=-1", "training.num_train_epochs=0"], ["training.num_train_epochs"]),
    "a key that would do nothing": (["training.label_smoothing_factor=0.1"], ["label_smoothing_factor", "no effect"]),
    "an output folder that is no text": (["training.output_dir=3"], ["training.output_dir"]),
    "a metric of a stream with nothing held out": (
        ["task.eval_share=0", "training.metric_for_best_model=eval_task_loss"],
        ["metric_for_best_model", "eval_alignment_loss"],
    ),
    "no task data": (["task.data=null"], ["task.data is missing", "align_only"]),
    "no alignment data": (["alignment.data=null"], ["alignment.data is missing", "task_only"]),
    "wrong template": (["task.template=slots"], ["line 1", "tokens", "keys prompt ('set"]),
    "target modules that match nothing": (["adapter.target_modules=[nothing]"], ["adapter.target_modules", "q_proj"]),
    "nothing to evaluate on": (
        ["task.eval_share=0", "alignment.eval_share=0", "training.eval_strategy=steps"],
        ["training.eval_strategy", "held out"],
    ),
    "evaluation at the end of nothing": (["training.max_steps=0"], ["training.max_steps"]),
    "a metric that is not there": (
        ["training.eval_strategy=steps", "training.eval_steps=1", "training.metric_for_best_model=bleu"],
        ["metric_for_best_model", "bleu", "eval_task_loss"],
    ),
    "a checkpoint that is none": (["training.resume_from_checkpoint=/tmp"], ["training.resume_from_checkpoint"]),
    "a batch size that finds itself": (["training.auto_find_batch_size=true"], ["auto_find_batch_size", "negatives"]),
    "further streams": (["streams.extra={type: task}"], ["streams", "extra"]),
    "a file as output folder": (["training.output_dir={config}"], ["training.output_dir", "is a file"]),
    "a chat template that is not there": (["task.chat_template=/no/such.jinja"], ["task.chat_template"]),
}  # fmt: skip


@pytest.mark.parametrize("name", MISTAKES)
def test_mistakes(name: str, config_file: Path, tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    overrides, said = MISTAKES[name]
    overrides = [override.replace("{config}", str(config_file)) for override in overrides]
    line = complaint(capsys, "train", str(config_file), *overrides)
    for part in said:
        assert part in line
    assert not (tmp_path / "out").exists() or not any((tmp_path / "out").iterdir())


@pytest.mark.parametrize(
    ("content", "said"),
    [
        (b'{"prompt": "a", "response": "b"}\n{"prompt": \n', ["line 2", "JSON"]),
        (b'{"question": "a", "reply": "b"}\n', ["line 1", "question ('a'), reply ('b')", "prompt"]),
        (b"", ["no rows"]),
        (b"\xff\xfe\x00\x01\n", ["UTF-8"]),
        (b'{"prompt": "a", "response": ""}\n', ["line 1", "response", "is empty"]),
    ],
)
def test_broken_task_files(
    content: bytes, said: list[str], config_file: Path, tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    path = tmp_path / "broken.jsonl"
    path.write_bytes(content)
    line = complaint(capsys, "train", str(config_file), f"task.data={path}")
    assert all(part in line for part in ["broken.jsonl", *said])


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("model: [", "not YAML"),
        ("just text", "sections"),
        ("model: 3", "keys and values"),
        ("!!python/object:os.x {}", "not YAML"),
    ],
)
def test_broken_config_files(text: str, said: str, tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    path = tmp_path / "c.yaml"
    path.write_text(text, encoding="utf-8")
    assert said in complaint(capsys, "train", str(path))


def test_a_missing_config_file(capsys: pytest.CaptureFixture) -> None:
    assert "does not exist" in complaint(capsys, "train", "no-such.yaml")


@pytest.mark.parametrize(
    "argv", [[], ["trian"], ["train"], ["train", "a.yaml", "--no-such-option"], ["demo", "--seed", "x"]]
)
def test_usage_mistakes_are_one_line(argv: list[str], capsys: pytest.CaptureFixture) -> None:
    with pytest.raises(SystemExit) as stop:
        main(argv)
    assert stop.value.code == 2
    [line] = capsys.readouterr().err.splitlines()
    assert line.startswith("fastalign: ") and "--help" in line


def test_help_teaches_every_key(capsys: pytest.CaptureFixture) -> None:
    with pytest.raises(SystemExit):
        main(["train", "--help"])
    text = capsys.readouterr().out
    for section in SECTIONS:
        for name, _, _, meaning in describe(section):
            assert f"  {name}  (" in text and " ".join(meaning.split()) in " ".join(text.split())
    assert all(name in text for name in TRAINING_DEFAULTS)


def test_resuming_a_run_that_has_no_checkpoint_yet_starts_over_and_says_so(
    config_file: Path, tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    (tmp_path / "out").mkdir()
    save_config(load_config(config_file), tmp_path / "out" / "config.yaml")  # what a run leaves that was killed early
    assert main(["train", str(config_file), "training.resume_from_checkpoint=true"]) == 0
    assert "starting from the beginning" in capsys.readouterr().err


def test_overrides_may_stand_behind_options(config_file: Path, tmp_path: Path) -> None:
    assert main(["train", str(config_file), "training.max_steps=5", "--overwrite", "training.max_steps=2"]) == 0
    assert json.loads((tmp_path / "out" / "summary.json").read_text())["steps"] == 2


def test_another_runs_checkpoint_is_no_leave_to_overwrite(
    config_file: Path, tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    saving = ["training.save_strategy=steps", "training.save_steps=1", f"training.output_dir={tmp_path / 'first'}"]
    assert main(["train", str(config_file), *saving]) == 0
    assert main(["train", str(config_file)]) == 0
    capsys.readouterr()
    resume = f"training.resume_from_checkpoint={tmp_path / 'first' / 'checkpoint-1'}"
    assert "holds results" in complaint(capsys, "train", str(config_file), resume)


def test_overwrite_replaces_results_and_nothing_else(config_file: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    saving = ["training.save_strategy=steps", "training.save_steps=1"]
    assert main(["train", str(config_file), *saving]) == 0
    assert (out / "checkpoint-2").is_dir()
    (out / "my-notes.txt").write_text("keep me")
    assert main(["train", str(config_file), "--overwrite"]) == 0
    assert not (out / "checkpoint-2").exists() and (out / "my-notes.txt").read_text() == "keep me"


@pytest.mark.skipif(os.name == "nt", reason="SIGINT as on POSIX")
def test_ctrl_c_saves_and_the_run_goes_on_to_the_same_end(config_file: Path, tmp_path: Path) -> None:
    import queue
    import threading

    steps = ["training.max_steps=60", "training.disable_tqdm=true"]
    whole = [*steps, f"training.output_dir={tmp_path / 'whole'}"]
    assert main(["train", str(config_file), *whole]) == 0

    environment = {**os.environ, "PYTHONPATH": f"{ROOT}{os.pathsep}{ROOT / 'kernels'}", "PYTHONUNBUFFERED": "1"}
    command = [sys.executable, "-m", "fastalign", "train", str(config_file), *steps]
    running = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True, env=environment)
    lines: queue.Queue[str] = queue.Queue()
    threading.Thread(target=lambda: [lines.put(line) for line in running.stderr or []], daemon=True).start()
    deadline = time.monotonic() + 120
    while "task_loss" not in lines.get(timeout=max(1, deadline - time.monotonic())):
        pass
    running.send_signal(signal.SIGINT)
    assert running.wait(timeout=120) == 1
    [checkpoint] = (tmp_path / "out").glob("checkpoint-*")
    assert 0 < int(checkpoint.name.split("-")[1]) < 60
    assert main(["train", str(config_file), *steps, "training.resume_from_checkpoint=true"]) == 0
    ends = [(tmp_path / name / "adapter_model.safetensors").read_bytes() for name in ("whole", "out")]
    assert ends[0] == ends[1]


def test_the_demo_refuses_to_replace_what_is_there(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    (tmp_path / "aligned").mkdir()
    (tmp_path / "aligned" / "summary.json").write_text("{}")
    assert main(["demo", "--out", str(tmp_path)]) == 2
    (tmp_path / "file").write_text("")
    assert main(["demo", "--out", str(tmp_path / "file")]) == 2
    lines = capsys.readouterr().err.splitlines()
    assert len(lines) == 2 and "holds results" in lines[0] and "is a file" in lines[1]
