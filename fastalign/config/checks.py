"""Checks of a configuration that need no model and no data: types, ranges, combinations. All raise ConfigError."""

from __future__ import annotations

import dataclasses
import difflib
import errno
import importlib.metadata
import os
import re
import types
import typing
from collections.abc import Iterable, Mapping
from typing import Any, Literal

from fastalign.config.keys import NESTED, AlignmentConfig, Config, Data, DataSource, TaskConfig
from fastalign.config.sizes import logits_bytes
from fastalign.errors import ConfigError, mask_secrets, mask_tokens

# No machine has the memory for more; a typo is told at once instead of in the midst of an allocation.
MOST = {"rank": 2**16, "pairs": 2**20, "tokens": 2**24}
# Written for the model to read; a URL with a password in them is an example.
TEXTS = ("task.prompt", "task.system", "task.response")
BLANK = "FILL IN"  # what `fastalign init` writes where it does not know


def nearest(name: str, known: Iterable[str]) -> str:
    """`` (did you mean 'x'?)`` for the closest of the known names, or an empty string."""
    close = difflib.get_close_matches(str(name), list(known), n=1, cutoff=0.5)
    return f" (did you mean {close[0]!r}?)" if close else ""


def installed_version(package: str = "fastalign") -> str | None:
    """Of a package; None where it is not installed."""
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None


def refuse_newer(version: object, path: str) -> None:
    """ConfigError where a configuration says that it was written by a newer fastalign than this one."""
    if version is None:
        return
    theirs = re.fullmatch(r"(\d+)\.(\d+)\.(\d+).*", str(version))
    if theirs is None:
        raise ConfigError(f"{path}: version must be one of fastalign such as 0.1.0, not {version!r}; leave it out")
    ours = re.match(r"(\d+)\.(\d+)\.(\d+)", installed_version() or "")
    if ours and [*map(int, theirs.groups())] > [*map(int, ours.groups())]:
        raise ConfigError(
            f"{path} was written by fastalign {version}, and this is {installed_version()}: install the newer one, or "
            "take the line with the version out and see which keys are unknown"
        )


def make_section(cls: type, name: str, raw: Mapping[str, Any]) -> Any:
    """An instance of a section's dataclass from what the user wrote."""
    hints = typing.get_type_hints(cls)
    values = {}
    for key, value in raw.items():
        if key not in hints:
            raise ConfigError(f"unknown key {name}.{key}{nearest(key, hints)}; known: {', '.join(hints)}")
        try:
            values[key] = _coerce(hints[key], value, f"{name}.{key}")
        except TypeError:
            raise ConfigError(f"{name}.{key} must be {type_name(hints[key])}, not {value!r}") from None
    return cls(**values)


def _coerce(hint: Any, value: Any, where: str) -> Any:
    """`value` as the annotated type (an integer is also a number), or TypeError. `where` it stands is for messages."""
    origin, arguments = typing.get_origin(hint), typing.get_args(hint)
    if origin in (typing.Union, types.UnionType):
        for option in arguments:
            try:
                return _coerce(option, value, where)
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
        return [_coerce(arguments[0], item, f"{where}[{i}]") for i, item in enumerate(value)]
    if origin is dict:
        if not isinstance(value, Mapping):
            raise TypeError
        names = {key: _coerce(arguments[0], key, where) for key in value}
        return {names[key]: _coerce(arguments[1], item, f"{where}.{key}") for key, item in value.items()}
    if dataclasses.is_dataclass(hint) and isinstance(value, Mapping):
        return make_section(typing.cast("type", hint), where, value)
    if hint is Any:
        return value
    if hint is type(None) and value is None:
        return None
    if hint is float and type(value) is int and abs(value) < 2**53:
        return float(value)
    if isinstance(hint, type) and type(value) is hint:
        return value
    raise TypeError


def type_name(hint: Any) -> str:
    """An annotation in words."""
    origin, arguments = typing.get_origin(hint), typing.get_args(hint)
    if origin in (typing.Union, types.UnionType):
        return " or ".join(type_name(option) for option in arguments)
    if origin is Literal:
        return " or ".join(str(option) for option in arguments)
    if origin is list:
        return f"a list of {type_name(arguments[0])}"
    if origin is dict:
        return "keys and values"
    nested = next((name for name, cls in NESTED.items() if cls is hint), None)
    if nested is not None:
        return f"a {nested}"
    names = {str: "text", int: "an integer", float: "a number", bool: "true or false", type(None): "null"}
    return names.get(hint, str(hint))


def validate(config: Config) -> None:
    """Ranges and combinations."""
    blanks = _blanks(dataclasses.asdict(config))
    if blanks:
        raise ConfigError(f"still to be filled in, see {BLANK!r} in the config: {', '.join(blanks)}")
    adapter = config.adapter
    _need(adapter.r >= 1, "adapter.r", "at least 1", adapter.r)
    _need(adapter.r <= MOST["rank"], "adapter.r", f"at most {MOST['rank']:,}", adapter.r)
    _need(0 < adapter.alpha < float("inf"), "adapter.alpha", "above 0", adapter.alpha)
    _need(0 <= adapter.dropout < 1, "adapter.dropout", "in [0, 1)", adapter.dropout)
    if adapter.dtype == "float16":
        _validate_float16(config.training)
    folder = config.training.get("output_dir", "")
    _need(isinstance(folder, str), "training.output_dir", "text", folder)
    _need("output_dir" not in config.training or bool(folder.strip()), "training.output_dir", "a folder's name", folder)
    for key in ("output_dir", "resume_from_checkpoint"):
        path = config.training.get(key)
        _need(not isinstance(path, str) or _can_be_path(path), f"training.{key}", "a path that can exist", path)
    ratio = config.schedule.ratio
    _need(0 < ratio < float("inf"), "schedule.ratio", "above 0 (mode: task_only for none)", ratio)
    _need(1e-6 <= ratio <= 1e6, "schedule.ratio", "from 0.000001 to 1,000,000", ratio)
    for name, section in (("task", config.task), ("alignment", config.alignment)):
        _need(section.max_length >= 4, f"{name}.max_length", "at least 4", section.max_length)
        most = MOST["tokens"]
        _need(section.max_length <= most, f"{name}.max_length", f"at most {most:,}", section.max_length)
        _need(0 <= section.eval_share < 1, f"{name}.eval_share", "in [0, 1)", section.eval_share)
        heat = section.language_temperature
        _need(heat == "uniform" or float(heat) > 0, f"{name}.language_temperature", "above 0 or 'uniform'", heat)
        for key in ("data", "eval_data"):
            _validate_data(getattr(section, key), f"{name}.{key}", config)
    _validate_task(config.task)
    _validate_alignment(config.alignment)
    if config.streams:
        raise ConfigError(
            f"streams: {', '.join(config.streams)}: this version has the two built-in streams only; "
            "configure them under task: and alignment:"
        )


def _validate_float16(training: Mapping[str, Any]) -> None:
    """What an adapter in fp16 cannot be trained with."""
    if training.get("fp16"):
        raise ConfigError(
            "adapter.dtype: float16 cannot be trained under training.fp16, whose scaled gradients need fp32; set "
            "adapter.dtype: auto"
        )
    epsilon = training.get("adam_epsilon", 1e-8)
    plain_adam = str(training.get("optim", "adamw_torch")).startswith("adamw_torch")
    if plain_adam and isinstance(epsilon, (int, float)) and epsilon < 1e-7:
        raise ConfigError(
            f"adapter.dtype: float16 needs training.adam_epsilon: 1.0e-4 or so with AdamW, because {epsilon:g} is 0 in "
            "that format and the update would be 0 / 0; or set adapter.dtype: bfloat16"
        )


def _blanks(value: Any, where: str = "") -> list[str]:
    """Keys that `fastalign init` has left to the user."""
    if isinstance(value, Mapping):
        return [key for name, item in value.items() for key in _blanks(item, f"{where}.{name}" if where else name)]
    if isinstance(value, list):
        return [*dict.fromkeys(key for item in value for key in _blanks(item, where))]
    return [where] if value == BLANK else []


def _can_be_path(text: str) -> bool:
    """Whether the file system takes such a name at all."""
    try:
        os.stat(text)
    except FileNotFoundError:
        return True
    except (ValueError, OSError) as error:  # a NUL; a name too long
        return getattr(error, "errno", None) not in (None, errno.ENAMETOOLONG)
    return True


def streams(data: Any) -> bool:
    """Whether a value of `data`, as the user or a dataclass has it, asks for streaming."""
    return (data.get("streaming") if isinstance(data, Mapping) else getattr(data, "streaming", False)) is True


def refuse_secrets(value: Any, where: str) -> None:
    """ConfigError where a text of the configuration, which is written to files, holds an access token or a password."""
    if isinstance(value, Mapping):
        for key, item in value.items():
            refuse_secrets(str(key), f"a key of {where}")
            refuse_secrets(item, f"{where}.{key}" if where else str(key))
    elif isinstance(value, (list, tuple)):
        for item in value:
            refuse_secrets(item, where)
    elif isinstance(value, str) and (mask_tokens if where in TEXTS else mask_secrets)(value) != value:
        raise ConfigError(
            f"{where}: {value!r} holds an access token or a password, and the configuration is written to the results; "
            "give it through the environment variable HF_TOKEN, or run: hf auth login"
        )


def _need(condition: bool, key: str, rule: str, value: Any) -> None:
    if not condition:
        raise ConfigError(f"{key} must be {rule}, not {value!r}")


def _validate_data(data: Data, key: str, config: Config) -> None:
    for source in data if isinstance(data, list) else [data]:
        if not isinstance(source, DataSource):
            continue
        paths = source.path if isinstance(source.path, list) else [source.path]
        good = bool(paths) and all(path.strip() for path in paths)
        _need(good, f"{key}.path", "a file, a pattern, a folder or a hub id", source.path)
        for name in ("name", "split", "revision"):
            value = getattr(source, name)
            _need(value is None or bool(value.strip()), f"{key}.{name}", "null or a text that is not empty", value)
        _validate_columns(source.columns, f"{key}.columns")
        if source.streaming:
            _validate_stream(data, source, key, config)


def _validate_stream(data: Data, source: DataSource, key: str, config: Config) -> None:
    steps = config.training.get("max_steps", -1)
    if key.endswith("eval_data"):
        raise ConfigError(f"{key}.streaming: held-out rows are all read before the first step; leave streaming out")
    if isinstance(data, list):
        raise ConfigError(
            f"{key}.streaming: a stream is one source alone, not an item of a list; name files by a pattern"
        )
    if steps is None or (isinstance(steps, (int, float)) and steps <= 0):
        raise ConfigError(f"{key}.streaming: nobody knows how long a stream is; set training.max_steps")
    if source.split is not None and re.search(r"[\[+]", source.split):
        raise ConfigError(f"{key}.split: {source.split!r} is a part or a sum of splits, which cannot be streamed")
    section = getattr(config, key.partition(".")[0])
    if section.eval_share and section.eval_data is None:
        raise ConfigError(
            f"{key.partition('.')[0]}.eval_share: nothing can be held out of a stream; leave it out, and give "
            "eval_data to evaluate"
        )


def _validate_columns(columns: Mapping[str, Any] | None, key: str) -> None:
    if columns is None:
        return
    named = False
    for ours, theirs in columns.items():
        _need(bool(ours.strip()), key, "our keys with their columns, without an empty name", ours)
        if isinstance(theirs, str):
            named = True
            _need(bool(theirs.strip()), f"{key}.{ours}", "the name of a column", theirs)
        else:
            good = isinstance(theirs, Mapping) and theirs.keys() == {"value"}
            good = good and isinstance(theirs["value"], (str, int, float))
            _need(good, f"{key}.{ours}", "the name of a column, or {value: ...} with a text or a number", theirs)
    _need(named, key, "a mapping of our keys to their columns, of one column at least", dict(columns))


def _validate_task(task: TaskConfig) -> None:
    logits_bytes(task)
    _need(task.languages != [], "task.languages", "a list of one or more languages, or null for all", task.languages)
    if task.template == "custom" and not (task.prompt and task.response):
        raise ConfigError("task.template: custom needs task.prompt and task.response, e.g. prompt: 'Classify: {text}'")
    for name, text in (("prompt", task.prompt), ("response", task.response)):
        if task.template == "chat" and text is not None:
            raise ConfigError(f"task.{name}: template chat takes rows as they are; set task.template: custom")
        _need(text is None or bool(text.strip()), f"task.{name}", "null or a text that is not empty", text)


def _validate_alignment(alignment: AlignmentConfig) -> None:
    heat, size, micro = alignment.temperature, alignment.batch_size, alignment.micro_batch_size
    _need(0 < heat < float("inf"), "alignment.temperature", "above 0 (0.1 is usual)", heat)
    rule = "at least 2, because the other pairs of the batch are the negatives"
    _need(size >= 2, "alignment.batch_size", rule, size)
    _need(size <= MOST["pairs"], "alignment.batch_size", f"at most {MOST['pairs']:,}", size)
    rule = "from 1 to alignment.batch_size, or null"
    _need(micro is None or 1 <= micro <= size, "alignment.micro_batch_size", rule, micro)
    _need(0 <= alignment.weight < float("inf"), "alignment.weight", "0 or more", alignment.weight)
    _need(alignment.eval_pairs >= 2, "alignment.eval_pairs", "at least 2", alignment.eval_pairs)

    layers = alignment.layer if isinstance(alignment.layer, list) else [alignment.layer]
    _need(len(layers) > 0, "alignment.layer", "an integer, a fraction, 'middle' or a list of these", alignment.layer)
    for layer in layers:
        if isinstance(layer, str):
            _need(layer == "middle", "alignment.layer", "an integer, a fraction or 'middle'", layer)
        elif isinstance(layer, float):
            _need(0 < layer < 1, "alignment.layer", "a fraction in (0, 1) or an integer index", layer)
        else:
            _need(layer >= 1, "alignment.layer", "at least 1 (0 would be the embeddings)", layer)
    weights = alignment.layer_weights
    if weights is not None:
        rule = f"one number for each of {len(layers)} layers"
        _need(len(weights) == len(layers), "alignment.layer_weights", rule, weights)
        good = all(0 <= weight < float("inf") for weight in weights) and sum(weights) > 0
        _need(good, "alignment.layer_weights", "0 or more, not all 0", weights)

    pairs, rule = alignment.pairs, "'to_english' or a list such as [[de, en]]"
    if isinstance(pairs, str):
        _need(pairs == "to_english", "alignment.pairs", rule, pairs)
    else:
        _need(len(pairs) > 0, "alignment.pairs", rule, pairs)
        seen: set[tuple[str, ...]] = set()
        for pair in pairs:
            good = len(pair) == 2 and pair[0] != pair[1]
            _need(good, "alignment.pairs", "a list of two different languages each", pair)
            _need(tuple(pair) not in seen, "alignment.pairs", "without a pair that comes twice", pair)
            seen.add(tuple(pair))
