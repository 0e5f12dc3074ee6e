"""The configuration: what is read, what is refused and in which words, and that what is saved is read back."""

from __future__ import annotations

import importlib.metadata
import os
import random
import re
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import yaml

from fastalign.config import (
    PAPER_PRESET,
    SECTIONS,
    TRAINING_DEFAULTS,
    AlignmentConfig,
    Config,
    commented_yaml,
    config_from_dict,
    config_to_dict,
    describe,
    load_config,
    nearest,
    save_config,
)
from fastalign.config.dialect import dump_yaml, load_yaml
from fastalign.errors import ConfigError
from tests.configs import load, refusal


def test_nothing_given_is_the_defaults():
    assert load_config() == Config()
    assert Config().alignment.layer == "middle"
    assert str(Config().output_dir) == "fastalign-output"


def test_values_reach_their_fields(tmp_path):
    config = load(
        tmp_path,
        """
model: {name_or_path: some/model, quantization: nf4}
adapter:
  r: 4
  alpha: 32
task:
alignment: {layer: [4, 0.5, middle], pairs: [[de, en], [no, en]], skip_first_token: false}
training: {learning_rate: 5e-4, fsdp_config: {a: [1, 2]}}
""",
    )
    assert (config.model.name_or_path, config.model.quantization) == ("some/model", "nf4")
    assert (config.adapter.r, config.adapter.alpha) == (4, 32.0)
    assert config.alignment.layer == [4, 0.5, "middle"]
    assert config.alignment.pairs == [["de", "en"], ["no", "en"]]
    assert config.alignment.skip_first_token is False
    assert config.training == {"learning_rate": 5e-4, "fsdp_config": {"a": [1, 2]}}


@pytest.mark.parametrize("word", ["no", "on", "off", "yes", "y", "n", "No", "NO"])
def test_languages_are_no_booleans(tmp_path, word):
    assert load(tmp_path, f"task: {{languages: [de, {word}]}}").task.languages == ["de", word]
    assert load_config(None, [f"task.languages=[{word}]"]).task.languages == [word]
    assert load(tmp_path, "model: {trust_remote_code: true}").model.trust_remote_code is True


@pytest.mark.parametrize(
    ("text", "value"), [("5e-4", 5e-4), ("1E5", 1e5), ("1.5e+3", 1500.0), (".5e1", 5.0), ("0.5", 0.5), ("3", 3)]
)
def test_numbers_are_numbers(text, value):
    assert load_yaml(text) == value
    assert type(load_yaml(text)) is type(value)


def test_overrides_win_and_are_yaml(tmp_path):
    text = "adapter: {r: 4}\nalignment:\n"
    config = load(
        tmp_path, text, "adapter.r=16", "alignment.pairs=[[de, fr]]", "training.max_steps=7", "training.a=b=c"
    )
    assert config.adapter.r == 16
    assert config.alignment.pairs == [["de", "fr"]]
    assert config.training == {"max_steps": 7, "a": "b=c"}
    assert load(tmp_path, "task: {system: x}", "task.system=").task.system is None
    assert load(tmp_path, "task: {system: x}", "task.system=''").task.system == ""


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("adaptor: {r: 4}", "unknown section 'adaptor' (did you mean 'adapter'?)"),
        ("trainig: {}", "did you mean 'training'?"),
        ("adapter: {rank: 4}", "unknown key adapter.rank"),
        ("alignment: {temprature: 1}", "unknown key alignment.temprature (did you mean 'temperature'?)"),
        ("task: {langauges: [de]}", "(did you mean 'languages'?)"),
        ("adapter: {r: four}", "adapter.r must be an integer, not 'four'"),
        ("adapter: {r: 4.0}", "adapter.r must be an integer, not 4.0"),
        ("adapter: {r: true}", "adapter.r must be an integer, not True"),
        ("adapter: {r: null}", "adapter.r must be an integer, not None"),
        ("model: {quantization: int8}", "must be none or nf4, not 'int8'"),
        ("model: {trust_remote_code: no}", "must be true or false, not 'no'"),
        ("model: {revision: 1234567}", "must be text or null, not 1234567"),
        ("task: {languages: de}", "must be a list of text or null, not 'de'"),
        ("alignment: {pairs: [de, en]}", "must be text or a list of a list of text"),
        ("adapter: [1]", "section 'adapter' must hold keys and values"),
        ("adapter: {1: 2}", "key 1 is not text"),
        ("[1, 2]", "must hold sections"),
        ("just text", "must hold sections"),
        ("a: [1", "is not YAML: line 1:"),
        ("model:\n\tname: x", "is not YAML: line 2:"),
        ("? [a]\n: b", "is not YAML: line 1:"),
        ("model: {}\nadapter: {r: 1}\nmodel: {}", "line 3: the key 'model' appears twice"),
        ("adapter: {r: 1, alpha: 2, r: 3}", "line 1: the key 'r' appears twice"),
        ("a: !!python/object/apply:os.getcwd []", "is not YAML: line 1: could not determine a constructor"),
        ("a: b\n---\nc: d", "is not YAML: line 2"),
        ("[" * 3000, "is not YAML"),
        ("a: \x07", "is not YAML"),
        ("streams: {mine: {type: x}}", "streams: mine: this version"),
    ],
)
def test_mistakes_in_the_file_get_one_line(tmp_path, text, words):
    assert words in refusal(tmp_path, text)


@pytest.mark.parametrize(
    ("override", "words"),
    [
        ("adapter.r", "must read section.key=value"),
        ("r=4", "must read section.key=value"),
        (".r=4", "must read section.key=value"),
        ("adapter.=4", "must read section.key=value"),
        ("adaptor.r=4", "unknown section 'adaptor' (did you mean 'adapter'?)"),
        ("trainin.max_steps=4", "(did you mean 'training'?)"),
        ("adapter.x.y=4", "unknown key adapter.x.y"),
        ("task.data=*.jsonl", "quote it: task.data='\"...\"'"),
        ("task.prompt={text}", "task.prompt must be text or null"),
        ("adapter.r=", "adapter.r must be an integer, not None"),
    ],
)
def test_mistakes_in_overrides_get_one_line(tmp_path, override, words):
    assert words in refusal(tmp_path, "", override)


def test_override_of_a_section_that_is_no_section(tmp_path):
    assert "must hold keys and values" in refusal(tmp_path, "adapter: 3", "adapter.r=4")


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("adapter.r", 0),
        ("adapter.r", 10**9),
        ("alignment.batch_size", 10**9),
        ("task.max_length", 10**9),
        ("schedule.ratio", 1e30),
        ("training.output_dir", ""),
        ("training.output_dir", "a\0b"),
        ("training.output_dir", "y" * 5000),
        ("training.resume_from_checkpoint", "y" * 5000),
        ("adapter.alpha", 0.0),
        ("adapter.alpha", float("nan")),
        ("adapter.alpha", float("inf")),
        ("adapter.dropout", 1.0),
        ("adapter.dropout", -0.1),
        ("task.max_length", 3),
        ("task.eval_share", 1.0),
        ("task.eval_share", float("nan")),
        ("task.languages", []),
        ("task.language_temperature", 0),
        ("task.prompt", " "),
        ("alignment.temperature", 0),
        ("alignment.temperature", -1.0),
        ("alignment.temperature", float("nan")),
        ("alignment.batch_size", 1),
        ("alignment.micro_batch_size", 0),
        ("alignment.micro_batch_size", 129),
        ("alignment.weight", -1),
        ("alignment.eval_pairs", 1),
        ("alignment.language_temperature", float("nan")),
        ("alignment.layer", 0),
        ("alignment.layer", -1),
        ("alignment.layer", 1.0),
        ("alignment.layer", 1.5),
        ("alignment.layer", "top"),
        ("alignment.layer", []),
        ("alignment.layer", [4, 0]),
        ("alignment.layer_weights", [1.0, 2.0]),
        ("alignment.layer_weights", [0.0]),
        ("alignment.layer_weights", [-1.0]),
        ("alignment.layer_weights", [float("nan")]),
        ("alignment.pairs", "to_german"),
        ("alignment.pairs", []),
        ("alignment.pairs", [["de"]]),
        ("alignment.pairs", [["de", "de"]]),
        ("alignment.pairs", [["de", "en"], ["fr", "en"], ["de", "en"]]),
        ("schedule.ratio", 0),
        ("schedule.ratio", float("inf")),
    ],
)
def test_values_out_of_range(key, value):
    section, name = key.split(".")
    raw = {section: {name: value}}
    if key == "task.prompt":
        raw["task"]["template"] = "slots"
    with pytest.raises(ConfigError, match=re.escape(key)):
        config_from_dict(raw)


@pytest.mark.parametrize(
    "raw",
    [
        {"adapter": {"r": 1, "dropout": 0.0, "alpha": 1e-3}},
        {"task": {"eval_share": 0.0, "language_temperature": float("inf"), "max_length": 4}},
        {"alignment": {"batch_size": 2, "micro_batch_size": 2, "weight": 0.0, "layer": 1}},
        {"alignment": {"layer": [1, 0.999], "layer_weights": [0.0, 1.0], "pairs": [["de", "en"], ["en", "de"]]}},
        {"schedule": {"ratio": 0.5, "mode": "joint"}},
    ],
)
def test_values_at_the_edge_of_their_range(raw):
    config_from_dict(raw)


def test_custom_template_needs_its_texts_and_chat_takes_none():
    with pytest.raises(ConfigError, match=r"custom needs task\.prompt and task\.response"):
        config_from_dict({"task": {"template": "custom", "prompt": "{a}"}})
    with pytest.raises(ConfigError, match=r"custom needs"):
        config_from_dict({"task": {"template": "custom", "prompt": "", "response": "{a}"}})
    config_from_dict({"task": {"template": "custom", "prompt": "{a}", "response": "{b}"}})
    for key in ("prompt", "response"):
        with pytest.raises(ConfigError, match=rf"task\.{key}: template chat takes rows as they are"):
            config_from_dict({"task": {key: "{a}"}})
    config_from_dict({"task": {"system": "Be brief."}})


def test_missing_and_unreadable_files(tmp_path):
    with pytest.raises(ConfigError, match="does not exist"):
        load_config(tmp_path / "none.yaml")
    with pytest.raises(ConfigError, match="cannot be read"):
        load_config(tmp_path)
    (tmp_path / "latin.yaml").write_bytes("task: {system: caf\xe9}".encode("latin-1"))
    with pytest.raises(ConfigError, match="cannot be read"):
        load_config(tmp_path / "latin.yaml")


def test_byte_order_mark_and_windows_line_ends(tmp_path):
    (tmp_path / "bom.yaml").write_bytes(b"\xef\xbb\xbfadapter:\r\n  r: 3\r\n")
    assert load_config(tmp_path / "bom.yaml").adapter.r == 3


def test_paper_preset_yields_to_what_the_user_sets():
    config = config_from_dict({"alignment": {"preset": "paper", "temperature": 0.5}})
    ours = AlignmentConfig()
    for key, value in PAPER_PRESET.items():
        assert getattr(config.alignment, key) == (0.5 if key == "temperature" else value)
    assert (ours.skip_first_token, ours.mask_equal_meaning, ours.direction) == ("auto", True, "symmetric")
    assert load_config(None, ["alignment.preset=paper"]).alignment.direction == "source_to_target"


def test_what_is_saved_is_read_back(tmp_path):
    config = config_from_dict(
        {
            "model": {"name_or_path": Path("some/model")},  # of the Python API
            "adapter": {"target_modules": ["q_proj", "v_proj"], "alpha": 3e-7},
            "task": {
                "languages": ["no", "null", "1e5", "on", "nan", "~", "2020-01-01", "0x1f", "1_000"],
                "system": "a: b # c\n\u2028  'd' {text} \ud83d\ude00".encode("utf-16", "surrogatepass").decode(
                    "utf-16"
                ),
                "language_temperature": float("inf"),
            },
            "alignment": {"preset": "paper", "pairs": [["no", "en"]], "layer": [1, 0.5, "middle"]},
            "training": {"output_dir": tmp_path / "out", "run_name": "5e-4", "nested": {"a": ("x", None)}},
        }
    )
    save_config(config, tmp_path / "saved.yaml")
    assert load_config(tmp_path / "saved.yaml") == config
    assert config.output_dir == tmp_path / "out"
    assert config.model.name_or_path == "some/model"
    saved = yaml.safe_load((tmp_path / "saved.yaml").read_text(encoding="utf-8"))  # other YAML readers see the same
    assert saved.pop("version") == importlib.metadata.version("fastalign")
    assert saved == config_to_dict(config)
    assert set(saved["alignment"]) == {row[0] for row in describe("alignment")}, "every key is spelled out"
    assert config_from_dict(config_to_dict(config)) == config


def test_any_text_survives_a_round_trip():
    generator = random.Random(0)
    letters = "nNoOyYeEsS~0123456789.:+-_#'\"{}[]&*!|>%@`, \nxta\\é日\u2028\ufeff"
    for _ in range(3000):
        text = "".join(generator.choices(letters, k=generator.randint(0, 6)))
        assert load_yaml(dump_yaml({"a": text})) == {"a": text}


@pytest.mark.parametrize("section", SECTIONS)
def test_every_key_is_described(section):
    rows = describe(section)
    defaults = config_to_dict(Config())[section]
    assert [row[0] for row in rows] == list(defaults)
    for name, kind, default, text in rows:
        assert load_yaml(default) == defaults[name]
        assert kind and len(text) > 3 and "  " not in text
    assert ("r", "an integer", "8", "Rank.") in describe("adapter")


def test_nearest():
    assert nearest("tempratur", ["temperature", "pairs"]) == " (did you mean 'temperature'?)"
    assert nearest("xyz", ["temperature", "pairs"]) == ""


def test_the_configuration_is_light():
    """No heavy library, so that help and refusals are instant."""
    code = "import sys, fastalign.config; print(*{m.split('.')[0] for m in sys.modules})"
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)}
    run = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True, check=True)
    names = run.stdout.split()
    assert not {"torch", "transformers", "datasets", "numpy"} & set(names)
    assert "yaml" in names


def test_the_commented_example_teaches_every_key(tmp_path: Path) -> None:
    loaded = load(tmp_path, commented_yaml())
    assert replace(loaded, training={}) == Config() and loaded.training == TRAINING_DEFAULTS


@pytest.mark.parametrize("version", ["99.0.0", "0.99.0", "0.1.99", "99.0.0.dev1"])
def test_a_config_from_a_newer_version_says_so(version: str, tmp_path: Path):
    said = refusal(tmp_path, f"version: {version}\ntask: {{a_key_to_come: 1}}")
    assert re.search(rf"config.yaml was written by fastalign {re.escape(version)}, and this is \d", said)


def test_a_config_of_this_version_or_an_older_one_is_read(tmp_path: Path):
    save_config(Config(), tmp_path / "saved.yaml")
    assert f"version: {importlib.metadata.version('fastalign')}" in (tmp_path / "saved.yaml").read_text()
    assert load_config(tmp_path / "saved.yaml") == Config()
    assert load(tmp_path, "version: 0.0.1\nadapter: {r: 4}").adapter.r == 4
    assert "must be one of fastalign such as 0.1.0" in refusal(tmp_path, "version: new")


def test_what_is_to_be_filled_in_is_found_in_lists_too(tmp_path: Path):
    assert "task.data" in refusal(tmp_path, "task: {data: [FILL IN]}")


def test_a_token_as_a_key_is_refused(tmp_path: Path):
    token = "hf_" + "a" * 34
    said = refusal(tmp_path, f"task: {{data: {{path: x.jsonl, columns: {{{token}: a}}}}}}")
    assert "access token" in said and token not in said
