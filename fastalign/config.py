"""The configuration: dataclasses that read from and write to YAML, with overrides and validation.

This module is the only home of defaults and of help text: the command line's ``--help``, the commented example
and the error messages are all drawn from the fields below. It imports neither torch nor transformers, so that
``fastalign train --help`` and every configuration error are instant.

``training:`` is not described here: it goes unchanged to ``transformers.TrainingArguments``. Where the user is
silent, `TRAINING_DEFAULTS` speaks.
"""

from __future__ import annotations

import dataclasses
import difflib
import re
import types
import typing
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import yaml

from fastalign.errors import ConfigError

TRAINING_DEFAULTS: dict[str, Any] = {
    "output_dir": "fastalign-output",
    "learning_rate": 5e-4,
    "lr_scheduler_type": "cosine",
    "warmup_steps": 0.03,  # a number below 1 is a share of all steps
    "logging_steps": 10,
    "logging_nan_inf_filter": False,
    "eval_strategy": "steps",
    "eval_steps": 0.1,
    "save_strategy": "steps",
    "save_steps": 0.1,
    "save_total_limit": 2,
    "report_to": "none",
}
"""What ``training:`` starts from where the user says nothing. bf16 is switched on where a GPU has it."""

PAPER_PRESET: dict[str, Any] = {
    "pooling": "mean",
    "skip_first_token": False,
    "direction": "source_to_target",
    "detach": None,
    "temperature": 0.1,
    "mask_equal_meaning": False,
}
"""`alignment.preset: paper`: the choices of Liu & Niehues (2025) and of their reference code."""


def _help(text: str, default: Any = dataclasses.MISSING, factory: Any = dataclasses.MISSING) -> Any:
    return field(default=default, default_factory=factory, metadata={"help": " ".join(text.split())})  # type: ignore[call-overload]


@dataclass(kw_only=True)
class ModelConfig:
    """The base model, frozen."""

    name_or_path: str = _help("Folder or hub id of a decoder (causal) language model. Required.", "")
    revision: str | None = _help("Branch, tag or commit on the hub.", None)
    quantization: Literal["none", "nf4"] = _help(
        "nf4: the base in 4 bits through bitsandbytes (QLoRA), with double quantisation.", "none"
    )
    dtype: Literal["auto", "bfloat16", "float16", "float32"] = _help(
        "Number format of the base. auto: bfloat16 on a GPU that has it, else float32.", "auto"
    )
    attn_implementation: str = _help("auto: what transformers picks; or sdpa, eager, flash_attention_2, ...", "auto")
    trust_remote_code: bool = _help("Run Python code that comes with the model. Off unless you trust it.", False)


@dataclass(kw_only=True)
class AdapterConfig:
    """The low-rank adapter, the only thing that is trained."""

    type: Literal["lora"] = _help("Kind of adapter.", "lora")
    r: int = _help("Rank.", 8)
    alpha: float = _help("Scale: the update is alpha / r times B A.", 16)
    dropout: float = _help("Dropout before A, in [0, 1).", 0.0)
    target_modules: str | list[str] = _help(
        "all-linear: every linear layer but the head; or a list of module names, e.g. [q_proj, v_proj].", "all-linear"
    )


@dataclass(kw_only=True)
class TaskConfig:
    """The task: prompts and answers in the languages that have labels."""

    data: str | list[str] | None = _help(
        "JSONL (plain or compressed), parquet or TSV file(s), or a hub id. Rows: {prompt, response}, {messages}, "
        "{lang, tokens, slots, intent}, {lang, tokens, tags}, {prefix, text}; sentence pairs for translation.",
        None,
    )
    eval_data: str | list[str] | None = _help(
        "Held-out rows of the same kind. Not given: eval_share of `data`, chosen by hash.", None
    )
    eval_share: float = _help("Share of `data` held out where eval_data is not given (at most 1,000 rows).", 0.05)
    languages: list[str] | None = _help("Use only rows of these languages.", None)
    template: Literal["chat", "slots", "ner", "translation", "custom"] = _help(
        "How a row becomes a prompt and an answer. chat: prompt/response, messages and prefix/text rows as they are; "
        "slots, ner, translation: built in; custom: your `prompt` and `response` below.",
        "chat",
    )
    system: str | None = _help("System message; replaces that of the built-in template. '' for none.", None)
    prompt: str | None = _help(
        "User message with {fields}; replaces that of the template. Fields: the row's columns, and for slots and ner "
        "{text}, {types}, {answer}, for translation {text}, {source_language}, {target_language}, {answer}.",
        None,
    )
    response: str | None = _help("Answer with {fields}; replaces that of the template.", None)
    chat_template: str = _help(
        "auto: the tokenizer's own chat template where it has one; none: plain text; or the path of a jinja file.",
        "auto",
    )
    max_length: int = _help("Tokens a row may have; longer prompts lose their beginning.", 1024)
    language_temperature: float | Literal["uniform"] = _help(
        "Languages are drawn with probability proportional to rows ** (1 / T). 1: as in the data; uniform: T = inf.",
        1.0,
    )


@dataclass(kw_only=True)
class AlignmentConfig:
    """Sentence pairs that are pulled together at a middle layer."""

    data: str | list[str] | None = _help(
        "File(s) or a hub id: N-way rows (a key a language; keys that begin with _ are metadata), {lang, en, text}, "
        "{source, target, source_lang, target_lang}, {text_parallel_0, text_parallel_1}, TSV whose header names "
        "two languages, or two aligned text files name.xx and name.yy.",
        None,
    )
    eval_data: str | list[str] | None = _help(
        "Held-out pairs. Not given: eval_share of `data`, chosen by hash so that no sentence is on both sides.", None
    )
    eval_share: float = _help("Share of the pairs held out where eval_data is not given (at most 2,000 pairs).", 0.05)
    eval_pairs: int = _help("Held-out pairs per language that retrieval is measured on, at most.", 256)
    pairs: str | list[list[str]] = _help(
        "to_english: every language with English; or a list such as [[de, en], [fr, en]], source first.", "to_english"
    )
    layer: int | float | str | list[int | float | str] = _help(
        "Where to align: l is the output of block l before the final norm (1 <= l <= L). An integer, a fraction of "
        "the depth in (0, 1), `middle` (half), or a list of these.",
        "middle",
    )
    layer_weights: list[float] | None = _help("Weights of several layers; equal if not given.", None)
    pooling: Literal["mean", "last"] = _help("Sentence vector: mean over its tokens in fp32, or its last token.", "mean")
    skip_first_token: bool | Literal["auto"] = _help(
        "Leave the first token, the attention sink, out of the mean. auto: skip the BOS; a tokenizer without one gets "
        "a sacrificial first token, which is skipped. true: skip whatever is first. false: as in the paper.",
        "auto",
    )
    temperature: float = _help("Temperature of the softmax over cosines.", 0.1)
    direction: Literal["source_to_target", "target_to_source", "symmetric"] = _help(
        "From the anchor to its candidates. The reference: source_to_target, i.e. non-English to English.", "symmetric"
    )
    detach: Literal["source", "target"] | None = _help("Stop the gradient on this side.", None)
    mask_equal_meaning: bool = _help(
        "Pairs of equal meaning (same row, same source or same target sentence) are not each other's negatives.", True
    )
    batch_size: int = _help("Pairs per optimizer step and rank.", 128)
    micro_batch_size: int | None = _help(
        "Pairs per forward; batch_size / gradient_accumulation_steps if not given. Negatives come from the same "
        "micro-batch.",
        None,
    )
    negatives: Literal["rank", "world"] = _help("Negatives from this rank, or from all ranks.", "rank")
    weight: float = _help(
        "Factor of the alignment loss. Under `alternate` with Adam it hardly acts, because Adam divides it out again: "
        "use schedule.ratio there.",
        1.0,
    )
    max_length: int = _help("Tokens a sentence may have; longer ones are cut.", 256)
    language_temperature: float | Literal["uniform"] = _help(
        "As in task: probability proportional to pairs ** (1 / T).", "uniform"
    )
    preset: Literal["paper"] | None = _help(
        "paper: the reference's choices (BOS in the mean, one direction, no masking), unless you set them yourself.", None
    )


@dataclass(kw_only=True)
class ScheduleConfig:
    """Which stream runs at an optimizer step."""

    mode: Literal["alternate", "joint", "task_only", "align_only"] = _help(
        "alternate: one kind of batch per optimizer step, task first; joint: both in every step; or only one.",
        "alternate",
    )
    ratio: float = _help("Alignment steps per task step under `alternate`; 0.5 is one to two.", 1.0)


@dataclass(kw_only=True)
class Config:
    """A whole run. ``training`` holds any key of ``transformers.TrainingArguments``."""

    model: ModelConfig = field(default_factory=ModelConfig)
    adapter: AdapterConfig = field(default_factory=AdapterConfig)
    task: TaskConfig = field(default_factory=TaskConfig)
    alignment: AlignmentConfig = field(default_factory=AlignmentConfig)
    schedule: ScheduleConfig = field(default_factory=ScheduleConfig)
    streams: dict[str, Any] = field(default_factory=dict)
    training: dict[str, Any] = field(default_factory=dict)

    @property
    def output_dir(self) -> Path:
        """Folder that the run writes to."""
        return Path(self.training.get("output_dir", TRAINING_DEFAULTS["output_dir"]))

    def uses(self, stream: str) -> bool:
        """Whether the schedule trains on this stream (``task`` or ``alignment``)."""
        return self.schedule.mode != {"task": "align_only", "alignment": "task_only"}[stream]


SECTIONS: dict[str, type] = {
    "model": ModelConfig,
    "adapter": AdapterConfig,
    "task": TaskConfig,
    "alignment": AlignmentConfig,
    "schedule": ScheduleConfig,
}
FREE_SECTIONS = ("streams", "training")


def nearest(name: str, known: Iterable[str]) -> str:
    """`` (did you mean 'x'?)`` for the closest of the known names, or an empty string."""
    close = difflib.get_close_matches(str(name), list(known), n=1, cutoff=0.5)
    return f" (did you mean {close[0]!r}?)" if close else ""


def load_config(path: str | Path | None = None, overrides: Sequence[str] = ()) -> Config:
    """Read a YAML file, apply ``section.key=value`` overrides (values are YAML) and validate.

    Raises:
        ConfigError: the file is missing or not YAML, a key is unknown, a value has the wrong type or range.
    """
    raw: dict[str, Any] = _read_yaml(Path(path)) if path is not None else {}
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
        section = {} if section is None else section
        if not isinstance(section, Mapping):
            raise ConfigError(f"section {name!r} must hold keys and values, not {section!r}")
        for key in section:
            if not isinstance(key, str):
                raise ConfigError(f"{name}: key {key!r} is not text")
        if name == "alignment" and section.get("preset") == "paper":
            section = {**PAPER_PRESET, **section}
        values[name] = _section(SECTIONS[name], name, section) if name in SECTIONS else dict(section)
    config = Config(**values)
    _validate(config)
    return config


def config_to_dict(config: Config) -> dict[str, Any]:
    """The inverse of `config_from_dict`: nested plain dictionaries, every key spelled out."""
    return dataclasses.asdict(config)


def save_config(config: Config, path: str | Path) -> None:
    """Write the effective configuration as YAML; `load_config` reads it back to an equal object."""
    text = yaml.safe_dump(config_to_dict(config), sort_keys=False, allow_unicode=True)  # quotes 'no'
    Path(path).write_text(text, encoding="utf-8")


def describe(section: str) -> list[tuple[str, str, str, str]]:
    """(key, type, default, help) of every key of a section: the source of ``--help`` and of the docs."""
    hints = typing.get_type_hints(SECTIONS[section])
    rows = []
    for item in dataclasses.fields(SECTIONS[section]):
        default = yaml.safe_dump(item.default, default_flow_style=True).splitlines()[0]
        rows.append((item.name, _type_name(hints[item.name]), default, item.metadata["help"]))
    return rows


class _Loader(yaml.SafeLoader):
    """Safe YAML in which only true and false are booleans, so that `no` is Norwegian, and 5e-4 is a number."""

    yaml_implicit_resolvers = {
        first: [(tag, pattern) for tag, pattern in resolvers if not tag.endswith((":bool", ":timestamp"))]
        for first, resolvers in yaml.SafeLoader.yaml_implicit_resolvers.items()
    }


_Loader.add_implicit_resolver("tag:yaml.org,2002:bool", re.compile(r"^(?:true|True|TRUE|false|False|FALSE)$"), list("tTfF"))
_Loader.add_implicit_resolver(
    "tag:yaml.org,2002:float", re.compile(r"^[-+]?(?:[0-9]+|[0-9]*\.[0-9]+|[0-9]+\.)[eE][-+]?[0-9]+$"), list("-+.0123456789")
)


def _load_yaml(text: str) -> Any:
    return yaml.load(text, Loader=_Loader)  # a SafeLoader: builds nothing but plain values


def _read_yaml(path: Path) -> dict[str, Any]:
    try:
        raw = _load_yaml(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise ConfigError(f"config file {str(path)!r} does not exist") from None
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"config file {str(path)!r} cannot be read: {error}") from None
    except (yaml.YAMLError, ValueError, RecursionError) as error:
        raise ConfigError(f"config file {str(path)!r} is not YAML: {error}") from None
    if raw is None:
        return {}
    if not isinstance(raw, dict):
        raise ConfigError(f"config file {str(path)!r} must hold sections such as 'model:', not {type(raw).__name__}")
    return raw


def _apply_override(raw: dict[str, Any], override: str) -> None:
    dotted, equals, text = override.partition("=")
    section, dot, key = dotted.partition(".")
    if not (equals and dot and section and key):
        raise ConfigError(f"override {override!r} must read section.key=value, e.g. training.max_steps=100")
    try:
        value = _load_yaml(text)
    except (yaml.YAMLError, ValueError, RecursionError):
        raise ConfigError(f"override {override!r}: the value is not YAML; quote it: {dotted}='\"...\"'") from None
    if section not in (*SECTIONS, *FREE_SECTIONS):
        raise ConfigError(f"override {override!r}: unknown section {section!r}{nearest(section, SECTIONS)}")
    if raw.get(section) is None:
        raw[section] = {}
    if not isinstance(raw[section], dict):
        raise ConfigError(f"section {section!r} must hold keys and values, not {raw[section]!r}")
    raw[section][key] = value


def _section(cls: type, name: str, raw: Mapping[str, Any]) -> Any:
    hints = typing.get_type_hints(cls)
    values = {}
    for key, value in raw.items():
        if key not in hints:
            raise ConfigError(f"unknown key {name}.{key}{nearest(key, hints)}; known: {', '.join(hints)}")
        try:
            values[key] = _coerce(hints[key], value)
        except TypeError:
            raise ConfigError(f"{name}.{key} must be {_type_name(hints[key])}, not {value!r}") from None
    return cls(**values)


def _coerce(hint: Any, value: Any) -> Any:
    """`value` as the annotated type (an integer is also a number), or TypeError."""
    origin, arguments = typing.get_origin(hint), typing.get_args(hint)
    if origin in (typing.Union, types.UnionType):
        for option in arguments:
            try:
                return _coerce(option, value)
            except TypeError:
                continue
        raise TypeError
    if origin is Literal:
        for option in arguments:
            if value == option and type(value) is type(option):
                return value
        raise TypeError
    if origin is list:
        if not isinstance(value, list):
            raise TypeError
        return [_coerce(arguments[0], item) for item in value]
    if hint is type(None) and value is None:
        return None
    if hint is float and type(value) is int and abs(value) < 2**53:
        return float(value)
    if isinstance(hint, type) and type(value) is hint:
        return value
    raise TypeError


def _type_name(hint: Any) -> str:
    origin, arguments = typing.get_origin(hint), typing.get_args(hint)
    if origin in (typing.Union, types.UnionType):
        return " or ".join(_type_name(option) for option in arguments)
    if origin is Literal:
        return " or ".join(str(option) for option in arguments)
    if origin is list:
        return f"a list of {_type_name(arguments[0])}"
    names = {str: "text", int: "an integer", float: "a number", bool: "true or false", type(None): "null"}
    return names.get(hint, str(hint))


def _validate(config: Config) -> None:
    """Ranges and combinations that no model or data file is needed for. Raises ConfigError."""

    def need(condition: bool, key: str, rule: str, value: Any) -> None:
        if not condition:
            raise ConfigError(f"{key} must be {rule}, not {value!r}")

    adapter, task, alignment = config.adapter, config.task, config.alignment
    need(adapter.r >= 1, "adapter.r", "at least 1", adapter.r)
    need(0 < adapter.alpha < float("inf"), "adapter.alpha", "above 0", adapter.alpha)
    need(0 <= adapter.dropout < 1, "adapter.dropout", "in [0, 1)", adapter.dropout)
    need(0 < alignment.temperature < float("inf"), "alignment.temperature", "above 0 (0.1 is usual)", alignment.temperature)
    need(
        alignment.batch_size >= 2,
        "alignment.batch_size",
        "at least 2, because the other pairs of the batch are the negatives",
        alignment.batch_size,
    )
    micro = alignment.micro_batch_size
    need(
        micro is None or 2 <= micro <= alignment.batch_size,
        "alignment.micro_batch_size",
        "from 2 to alignment.batch_size, or null",
        micro,
    )
    need(0 <= alignment.weight < float("inf"), "alignment.weight", "0 or more", alignment.weight)
    need(alignment.eval_pairs >= 2, "alignment.eval_pairs", "at least 2", alignment.eval_pairs)
    need(0 < config.schedule.ratio < float("inf"), "schedule.ratio", "above 0 (mode: task_only for none)", config.schedule.ratio)
    for name, section in (("task", task), ("alignment", alignment)):
        need(section.max_length >= 4, f"{name}.max_length", "at least 4", section.max_length)
        need(0 <= section.eval_share < 1, f"{name}.eval_share", "in [0, 1)", section.eval_share)
        heat = section.language_temperature
        need(heat == "uniform" or float(heat) > 0, f"{name}.language_temperature", "above 0 or 'uniform'", heat)
    layers = alignment.layer if isinstance(alignment.layer, list) else [alignment.layer]
    need(len(layers) > 0, "alignment.layer", "an integer, a fraction, 'middle' or a list of these", alignment.layer)
    for layer in layers:
        if isinstance(layer, str):
            need(layer == "middle", "alignment.layer", "an integer, a fraction or 'middle'", layer)
        elif isinstance(layer, float):
            need(0 < layer < 1, "alignment.layer", "a fraction in (0, 1) or an integer index", layer)
        else:
            need(layer >= 1, "alignment.layer", "at least 1 (0 would be the embeddings)", layer)
    weights = alignment.layer_weights
    if weights is not None:
        need(len(weights) == len(layers), "alignment.layer_weights", f"one number for each of {len(layers)} layers", weights)
        need(all(0 <= w < float("inf") for w in weights) and sum(weights) > 0, "alignment.layer_weights", "0 or more, not all 0", weights)
    pairs = alignment.pairs
    if isinstance(pairs, str):
        need(pairs == "to_english", "alignment.pairs", "'to_english' or a list such as [[de, en]]", pairs)
    else:
        need(len(pairs) > 0, "alignment.pairs", "'to_english' or a list such as [[de, en]]", pairs)
        for pair in pairs:
            need(len(pair) == 2 and pair[0] != pair[1], "alignment.pairs", "a list of two different languages each", pair)
    if task.template == "custom" and (task.prompt is None or task.response is None):
        raise ConfigError("task.template: custom needs task.prompt and task.response, e.g. prompt: 'Classify: {text}'")
    if config.streams:
        raise ConfigError(
            f"streams: {', '.join(config.streams)}: this version has the two built-in streams only; "
            "configure them under task: and alignment:"
        )
