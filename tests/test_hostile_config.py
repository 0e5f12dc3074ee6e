"""Configurations that would hang, leak a secret, or fail in the midst of a run: refused at once, in one line."""

from __future__ import annotations

import json
import time

import pytest

from fastalign.config import config_from_dict, load_config
from fastalign.errors import ConfigError
from tests.configs import load, refusal

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


@pytest.mark.parametrize(
    ("text", "token"),
    [
        ("training: {run_name: wolfhf_" + "a" * 40 + ", output_dir: xhf_" + "b" * 40 + "}", ""),
        ("training: {run_name: hf_llama_3_for_german_and_dutch_2026, output_dir: out-hf_" + "a" * 29 + "}", ""),
        (
            "task: {template: custom, system: 'ftp://me:pass@host', prompt: 'url://a:b@c {x}', response: 'u://a:b@c'}",
            "",
        ),
        ("training: {run_name: 'me:secret@host'}", ""),
        ("model: {name_or_path: some/password-model}", "password"),
        ("task: {system: You are a helpful assistant}", "You are a helpful assistant"),
    ],
)
def test_innocent_text_is_no_secret(tmp_path, monkeypatch, text, token):
    monkeypatch.setenv("HF_TOKEN", token)
    load(tmp_path, text)


def test_a_token_in_a_prompt_is_refused(tmp_path):
    assert "task.system" in refusal(tmp_path, f"task: {{system: 'use {TOKEN}'}}")


@pytest.mark.timeout(20)
def test_all_pairs_of_two_hundred_languages_are_read_quickly(tmp_path):
    pairs = [[f"a{i}", f"a{j}"] for i in range(200) for j in range(200) if i != j]
    path = tmp_path / "config.yaml"
    path.write_text(f"alignment: {{pairs: {json.dumps(pairs)}}}", encoding="utf-8")
    assert len(load_config(path).alignment.pairs) == 39_800
    begun = time.process_time()  # not what others do at the same time
    config_from_dict({"alignment": {"pairs": pairs}})
    assert time.process_time() - begun < 4


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
        ({"learning_rate": 1e39}, ["training.learning_rate", "at most"]),
        ({"weight_decay": 1e39}, ["training.weight_decay", "at most"]),
        ({"adam_epsilon": 1e39}, ["training.adam_epsilon", "at most"]),
        ({"debug": 3}, ["training.debug", "must be text, not 3"]),
        ({"label_smoothing_factor": 0.1}, ["training.label_smoothing_factor has no effect here"]),
        ({"train_sampling_strategy": "group_by_length"}, ["training.train_sampling_strategy has no effect here"]),
        ({"save_on_each_node": True}, ["training.save_on_each_node has no effect here", "all hosts share"]),
        ({"fsdp": "full_shard"}, ["training.fsdp has no effect here"]),
    ],
)
def test_training_values_that_are_refused(training, words):
    from fastalign.training.arguments import effective_training, training_arguments

    with pytest.raises(ConfigError) as caught:
        training_arguments(effective_training(config_from_dict({"training": training}), True))
    assert all(word in str(caught.value) for word in words) and "anything" not in str(caught.value)


@pytest.mark.parametrize(
    "training",
    [
        {"train_sampling_strategy": "random", "label_smoothing_factor": 0.0, "dataloader_num_workers": 0, "fsdp": None},
        {"save_total_limit": 0},
        {"report_to": None},
        {"restore_callback_states_from_checkpoint": True},
    ],
)
def test_training_values_that_copied_configurations_hold_are_taken_silently(training, capsys):
    from fastalign.training.arguments import effective_training, training_arguments

    arguments = training_arguments(effective_training(config_from_dict({"training": training}), True))
    assert arguments.report_to == []
    assert "no effect" not in capsys.readouterr().err


def test_settings_that_change_no_result_are_said_in_one_line_each(capsys, monkeypatch):
    from fastalign.training.arguments import effective_training

    config = config_from_dict({"training": {"data_seed": 3, "dataloader_num_workers": 4, "torch_empty_cache_steps": 5}})
    effective_training(config, True)
    lines = capsys.readouterr().err.splitlines()
    assert [line.partition(":")[0] for line in lines] == [
        f"training.{key} has no effect here"
        for key in ("torch_empty_cache_steps", "dataloader_num_workers", "data_seed")
    ]
    monkeypatch.setenv("RANK", "1")
    effective_training(config, True)
    assert not capsys.readouterr().err
