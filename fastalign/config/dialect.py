"""Our YAML: safe, without the surprises of YAML 1.1. What we write, we read back to the same values."""

from __future__ import annotations

import dataclasses
import os
import re
from collections.abc import Hashable, Mapping
from pathlib import Path
from typing import Any, ClassVar

import yaml

from fastalign.errors import ConfigError

MOST_VALUES = 400_000
_FLOAT = re.compile(r"^[-+]?(?:[0-9]+|[0-9]*\.[0-9]+|[0-9]+\.)[eE][-+]?[0-9]+$")


class _Loader(yaml.SafeLoader):
    """Safe YAML in which only true and false are booleans, so that `no` is Norwegian, and 5e-4 is a number."""

    yaml_implicit_resolvers: ClassVar = {
        first: [(tag, pattern) for tag, pattern in resolvers if not tag.endswith((":bool", ":timestamp"))]
        for first, resolvers in yaml.SafeLoader.yaml_implicit_resolvers.items()
    }

    def construct_mapping(self, node: Any, deep: bool = False) -> dict[Hashable, Any]:
        seen = set()
        for key_node, _ in node.value if isinstance(node, yaml.MappingNode) else ():
            key = key_node.value if isinstance(key_node, yaml.ScalarNode) else id(key_node)
            if key in seen and key != "<<":
                raise yaml.MarkedYAMLError(problem=f"the key {key!r} appears twice", problem_mark=key_node.start_mark)
            seen.add(key)
        return super().construct_mapping(node, deep=deep)


class _Dumper(yaml.SafeDumper):
    """Quotes what any YAML reader, ours or another, would take for something else than text."""


_Loader.add_implicit_resolver(
    "tag:yaml.org,2002:bool", re.compile(r"^(?:true|True|TRUE|false|False|FALSE)$"), list("tTfF")
)
for _class in (_Loader, _Dumper):
    _class.add_implicit_resolver("tag:yaml.org,2002:float", _FLOAT, list("-+.0123456789"))


def load_yaml(text: str) -> Any:
    """The value of a YAML text. Raises ValueError with a reason that says the line."""
    try:
        loader = _Loader(text)  # a SafeLoader: builds nothing but plain values
        node = loader.get_single_node()
        if node is None:
            return None
        _refuse_bomb(node)
        return loader.construct_document(node)
    except yaml.MarkedYAMLError as error:
        mark = error.problem_mark or error.context_mark
        raise ValueError(f"line {mark.line + 1}: {error.problem}" if mark else str(error)) from None
    except (yaml.YAMLError, RecursionError) as error:
        raise ValueError(str(error)) from None


def _refuse_bomb(root: yaml.Node) -> None:
    """YAMLError for more values, anchors included, than any configuration has, or an anchor that holds itself."""
    sizes: dict[int, int] = {}

    def size(node: yaml.Node) -> int:
        if id(node) not in sizes:
            sizes[id(node)] = MOST_VALUES  # met again while it is counted, it holds itself
            parts = node.value if isinstance(node, yaml.CollectionNode) else []
            parts = [part for pair in parts for part in pair] if isinstance(node, yaml.MappingNode) else parts
            sizes[id(node)] = min(MOST_VALUES, 1 + sum(map(size, parts)))
        return sizes[id(node)]

    if size(root) >= MOST_VALUES:
        raise yaml.YAMLError(f"it holds more than {MOST_VALUES:,} values, anchors included, or an anchor holds itself")


def dump_yaml(value: Any, *, one_line: bool = False) -> str:
    """`value` as YAML, keys in their order."""
    layout: dict[str, Any] = {"default_flow_style": True, "width": 1_000_000} if one_line else {}
    return yaml.dump(value, Dumper=_Dumper, sort_keys=False, allow_unicode=True, **layout)


def read_yaml(path: Path) -> dict[str, Any]:
    """The sections of a YAML file. Raises ConfigError."""
    try:
        raw = load_yaml(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise ConfigError(f"config file {str(path)!r} does not exist") from None
    except (OSError, UnicodeDecodeError) as error:
        reason = getattr(error, "strerror", None) or error
        raise ConfigError(f"config file {str(path)!r} cannot be read: {reason}") from None
    except ValueError as error:
        raise ConfigError(f"config file {str(path)!r} is not YAML: {error}") from None
    if raw is None:
        return {}
    if not isinstance(raw, dict):
        raise ConfigError(f"config file {str(path)!r} must hold sections such as 'model:', not {type(raw).__name__}")
    return raw


def plain(value: Any) -> Any:
    """`value` as YAML can hold it: paths as text, tuples as lists, any mapping or dataclass as a dictionary."""
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        return plain(dataclasses.asdict(value))
    if isinstance(value, os.PathLike):
        return os.fspath(value)
    if isinstance(value, Mapping):
        return {key: plain(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [plain(item) for item in value]
    return value
