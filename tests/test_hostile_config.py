"""Configurations that would hang, leak a secret, or fail in the midst of a run: refused at once, in one line."""

from __future__ import annotations

from pathlib import Path

import pytest

from fastalign.config import Config, config_from_dict, load_config
from fastalign.errors import ConfigError


def load(tmp_path: Path, text: str, *overrides: str) -> Config:
    path = tmp_path / "config.yaml"
    path.write_text(text, encoding="utf-8")
    return load_config(path, overrides)


def refusal(tmp_path: Path, text: str, *overrides: str) -> str:
    with pytest.raises(ConfigError) as caught:
        load(tmp_path, text, *overrides)
    assert "\n" not in str(caught.value)
    return str(caught.value)


BOMB = "a0: &a0 [x, x]\n" + "".join(f"a{i}: &a{i} [{', '.join([f'*a{i - 1}'] * 9)}]\n" for i in range(1, 12))
MERGES = "a0: &a0 {x: 1}\n" + "".join(f"a{i}: &a{i} {{<<: [{', '.join([f'*a{i - 1}'] * 9)}]}}\n" for i in range(1, 12))


@pytest.mark.timeout(10)
@pytest.mark.parametrize(
    "text",
    [
        BOMB,
        MERGES,
        "a: &a [*a]",
        "training: &a {b: *a}",
        "a: &a {<<: *a}",
        "[" * 100_000,
        "a: " * 50_000,
        "adapter: {r: " + "9" * 5000 + "}",
        "adapter: {r: " + "9" * 4000 + "}",
        "model: " + "!!set {" * 500,
        "adapter: {r: !!binary x}",
        "task: {system: !!timestamp 2020-99-99}",
        "task: {system: !!int x}",
        "? {a: b}\n: c",
        "adapter: {? [a]: b}",
        "task: {system: '" + "x" * 10**6,
    ],
)
def test_hostile_yaml_ends_soon_with_one_line(tmp_path, text):
    assert len(refusal(tmp_path, text)) < 1100


def test_anchors_and_merge_keys_work(tmp_path):
    config = load(tmp_path, "adapter: &a {r: 4, alpha: 8}\nschedule: {ratio: 2.0}\ntraining: {x: &b [1], y: *b, z: *b}")
    assert (config.adapter.r, config.training["y"], config.training["z"]) == (4, [1], [1])
    assert load(tmp_path, "adapter: {<<: {r: 4, alpha: 2.0}, alpha: 3.0}").adapter.alpha == 3.0


TOKEN = "hf_" + "aBcDeFgHiJ" * 3


@pytest.mark.parametrize(
    ("text", "overrides"),
    [
        (f"model: {{name_or_path: 'https://{TOKEN}@host/m'}}", []),
        ("model: {name_or_path: 'https://me:secretword@host/m'}", []),
        (f"task: {{data: [a.jsonl, {TOKEN}]}}", []),
        (f"training: {{hub_model_id: {TOKEN}}}", []),
        (f"training: {{logging: {{deep: [{TOKEN}]}}}}", []),
        (f"adapter: {{r: {TOKEN}}}", []),
        (f"model: {TOKEN}", []),
        (f"{TOKEN}: {{}}", []),
        (f"adapter: {{{TOKEN}: 1}}", []),
        (f"a: [{TOKEN}", []),
        ("", [TOKEN]),
        ("", [f"{TOKEN}.r=1"]),
        ("", [f"model.name_or_path=[{TOKEN}"]),
        ("", ["model.name_or_path=from-the-environment"]),
    ],
)
def test_no_message_holds_a_secret_and_no_secret_gets_into_a_configuration(tmp_path, monkeypatch, text, overrides):
    monkeypatch.setenv("HF_TOKEN", "from-the-environment")
    words = refusal(tmp_path, text, *overrides)
    assert TOKEN not in words and "secretword" not in words and "from-the-environment" not in words


def test_a_long_message_keeps_what_is_wrong_and_how_to_mend_it():
    message = str(ConfigError("adapter.r is wrong: " + "x" * 10**6 + "; give a number"))
    assert message.startswith("adapter.r is wrong") and message.endswith("give a number") and len(message) < 1100


ODD_VALUES = ["x", "", 3, -3, 2.5, True, [1], [], {"a": []}, {}, None, float("nan"), float("inf"), 1e30, 10**400]


def test_every_training_key_takes_a_good_value_or_refuses_it_in_one_line():
    """TrainingArguments itself takes anything, and fails in the midst of a run."""
    import dataclasses

    from transformers import TrainingArguments

    from fastalign.training.arguments import effective_training, training_arguments

    refused = set()
    # These start something: a compiler's settings, DeepSpeed; and this one is not passed on.
    left_alone = {"torch_compile", "deepspeed", "resume_from_checkpoint"}
    for field in dataclasses.fields(TrainingArguments):
        if not field.init or field.name in left_alone:
            continue
        for value in ODD_VALUES:
            try:
                config = config_from_dict({"training": {"use_cpu": True, field.name: value}})
                training_arguments(effective_training(config, True))
            except ConfigError as error:
                refused.add((field.name, repr(value)))
                assert str(error).startswith("training") and "\n" not in str(error) and len(str(error)) < 1100
    for key in ("learning_rate", "seed", "max_steps", "bf16", "optim", "per_device_train_batch_size", "logging_steps"):
        assert {(key, "[1]"), (key, "nan"), (key, "{'a': []}")} <= refused
    assert {("bf16", "3"), ("max_steps", "2.5"), ("optim", "'x'"), ("log_level", "'x'"), ("seed", "-3")} <= refused
    assert not {("bf16", "True"), ("seed", "3"), ("run_name", "'x'"), ("weight_decay", "2.5")} & refused


@pytest.mark.parametrize(
    ("training", "words"),
    [
        ({"hub_token": "anything"}, ["training.hub_token", "HF_TOKEN", "hf auth login"]),
        ({"eval_strategy": "sometimes"}, ["training.eval_strategy", "epoch"]),
        ({"log_level": "loud"}, ["training.log_level", "warning"]),
        ({"gradient_accumulation_steps": 10**9}, ["training.gradient_accumulation_steps", "at most"]),
        ({"learning_rate": float("nan")}, ["training.learning_rate"]),
    ],
)
def test_training_values_that_are_refused(training, words):
    from fastalign.training.arguments import effective_training, training_arguments

    with pytest.raises(ConfigError) as caught:
        training_arguments(effective_training(config_from_dict({"training": training}), True))
    assert all(word in str(caught.value) for word in words) and "anything" not in str(caught.value)
