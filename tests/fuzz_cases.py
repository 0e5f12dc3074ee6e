"""The random cases of `fuzz`: a configuration, or a data file, broken in ways that people and machines break them."""

from __future__ import annotations

import dataclasses
import gzip
import json
import random
import types
import typing
from collections.abc import Callable
from pathlib import Path
from typing import Any, Literal

import yaml

from fastalign.config import SECTIONS

OUTPUT_FOLDERS = {"out", "fastalign-output"}
HUGE = [10**9, 2**31, 2**63, 10**30, -(10**9), 1e30, 1e308, -1e30, float("inf"), float("-inf"), float("nan")]
SMALL = [0, 1, 2, 3, 4, 8, -1, 0.0, 0.5, 1.0, 1.5, -0.5, 1e-9]
TEXTS = [
    "", " ", "x", "no", "null", "5e-4", "מימין לשמאל", "e\u0301\u0323", "👩‍👩‍👧", "a\tb", "line\nbreak", "../up",
    "/no/such/file.jsonl", "no-such/name", "{text}", "{", "%s", "x" * 5000, "\u202e", "a: b", "auto", "middle", "\x7f",
    "https://user:secretword@example.invalid/x",
]  # fmt: skip
JUNK: list[Any] = [
    *HUGE, *SMALL, *TEXTS, None, True, False, [], {}, [[]], [1, "a"], {"a": 1}, [None], ["x", "x"], {"a": {"b": []}},
]  # fmt: skip

# Keys of TrainingArguments that are left alone, because a case would act on more than itself: compiling takes minutes,
# launchers and determinism change the process for all later cases, the output folder has values of its own.
LEFT_ALONE = {
    "torch_compile", "torch_compile_backend", "torch_compile_mode", "deepspeed", "full_determinism", "output_dir",
    "max_steps", "num_train_epochs", "gradient_accumulation_steps", "logging_dir", "use_cpu", "ddp_backend",
}  # fmt: skip
GOOD: list[tuple[str, str, Any]] = [
    ("adapter", "r", 1), ("adapter", "dropout", 0.5), ("adapter", "target_modules", ["q_proj", "v_proj"]),
    ("task", "max_length", 64), ("task", "language_temperature", "uniform"), ("task", "eval_share", 0.0),
    ("alignment", "layer", [1, 0.5]), ("alignment", "micro_batch_size", 3), ("alignment", "weight", 0),
    ("alignment", "preset", "paper"), ("alignment", "batch_size", 2), ("schedule", "ratio", 0.5),
    ("schedule", "mode", "joint"), ("schedule", "mode", "task_only"), ("training", "learning_rate", 0),
    ("training", "gradient_accumulation_steps", 2), ("training", "data_seed", 3), ("training", "report_to", None),
    ("training", "save_total_limit", 0), ("training", "lr_scheduler_type", "cosine"), ("training", "seed", 2**32 - 1),
]  # fmt: skip
OUTPUT_DIRS: list[Any] = [3, None, [], True, "", " ", "a\0b", "y" * 5000, "/proc/none/here", "/dev/null/x", {"a": 1}]


def base_config(work: Path, model: Path, data: Path) -> dict[str, Any]:
    """A configuration that trains two steps."""
    return {
        "model": {"name_or_path": str(model)},
        "adapter": {"r": 4, "alpha": 8.0},
        "task": {"data": str(data / "task.jsonl"), "eval_share": 0.2},
        "alignment": {"data": str(data / "pairs.jsonl"), "batch_size": 8, "eval_share": 0.2},
        "training": {
            "output_dir": str(work / "out"),
            "max_steps": 2,
            "per_device_train_batch_size": 4,
            "warmup_steps": 0,
            "save_strategy": "no",
            "use_cpu": True,
        },
    }


def config_case(rng: random.Random, work: Path, model: Path, data: Path) -> list[str]:
    """Writes a configuration with one to four mutations; gives the arguments of the command line."""
    raw: Any = base_config(work, model, data)
    overrides: list[str] = []
    mutations = [_own_key] * 6 + [_training_key] * 5 + [_structure, _override, _output_dir]
    if rng.random() < 0.3:
        mutations = [_good_value]
    for _ in range(rng.choice([1, 1, 1, 2, 2, 3])):
        raw = rng.choice(mutations)(rng, raw, overrides)
    text = yaml.safe_dump(raw, allow_unicode=True)
    if rng.random() < 0.12:
        text = _spoil(rng, text)
    path = work / "config.yaml"
    path.write_bytes(text.encode("utf-8", "surrogatepass"))
    return ["train", str(path), *overrides]


def _good_value(rng: random.Random, raw: Any, overrides: list[str]) -> Any:
    section, key, value = rng.choice(GOOD)
    return _with(raw, section, key, value)


def _own_key(rng: random.Random, raw: Any, overrides: list[str]) -> Any:
    section = rng.choice(list(SECTIONS))
    hints = typing.get_type_hints(SECTIONS[section])
    key = rng.choice(list(hints))
    value = _of(rng, hints[key]) if rng.random() < 0.75 else rng.choice(JUNK)
    return _with(raw, section, key, value)


def _of(rng: random.Random, hint: Any) -> Any:
    """A value of the annotated type, often an extreme one."""
    origin, arguments = typing.get_origin(hint), typing.get_args(hint)
    if origin in (typing.Union, types.UnionType):
        return _of(rng, rng.choice(arguments))
    if origin is Literal:
        return rng.choice(arguments)
    if origin is list:
        return [_of(rng, arguments[0]) for _ in range(rng.randint(0, 3))]
    if hint is bool:
        return rng.random() < 0.5
    if hint in (int, float):
        numbers = HUGE if rng.random() < 0.15 else SMALL
        return rng.choice([value for value in numbers if isinstance(value, hint)] + [hint(4), hint(16)])
    if hint is str:
        return rng.choice([*TEXTS, "en", "de", "q_proj", "to_english", "all-linear", "sdpa", "eager", "none"])
    return None


def _training_key(rng: random.Random, raw: Any, overrides: list[str]) -> Any:
    from transformers import TrainingArguments

    fields = [item for item in dataclasses.fields(TrainingArguments) if item.init and item.name not in LEFT_ALONE]
    item = rng.choice(fields)
    numbers = ["learning_rate", "per_device_train_batch_size", "eval_steps", "save_steps", "logging_steps", "seed"]
    key = item.name if rng.random() < 0.7 else rng.choice([*numbers, "gradient_accumulation_steps", "lerning_rate"])
    default = item.default if item.name == key else 1
    if rng.random() < 0.6 and isinstance(default, (bool, int, float)):
        value: Any = rng.choice([True, False]) if isinstance(default, bool) else rng.choice(SMALL)
    else:
        value = rng.choice(JUNK)
    if key == "gradient_accumulation_steps" and isinstance(value, int) and 8 < value < 10**8:
        value = 2
    return _with(raw, "training", key, value)


def _output_dir(rng: random.Random, raw: Any, overrides: list[str]) -> Any:
    return _with(raw, "training", "output_dir", rng.choice(OUTPUT_DIRS))


def _structure(rng: random.Random, raw: Any, overrides: list[str]) -> Any:
    """Sections that are missing, empty, of another kind, or unknown; the output folder stays where it is."""
    if not isinstance(raw, dict):
        return raw
    raw = dict(raw)
    section = rng.choice([name for name in raw if name != "training"] or ["model"])
    choice = rng.randrange(5)
    if choice == 0:
        raw.pop(section, None)
    elif choice == 1:
        raw[section] = rng.choice(JUNK)
    elif choice == 2:
        raw[rng.choice(["modle", "x", "", "streams", "Training", "data"])] = rng.choice(JUNK)
    elif choice == 3:
        raw = _with(raw, section, rng.choice(["x", "Data", "r ", "", "データ", "layer_"]), rng.choice(JUNK))
    else:
        raw["streams"] = {"extra": rng.choice(JUNK)}
    return raw


def _override(rng: random.Random, raw: Any, overrides: list[str]) -> Any:
    value = rng.choice(["1", "", "[", "{a: 1}", "*.jsonl", "&a", "!!python/name:os.system", "a: b", "'", "é", "1e400"])
    keys = ["adapter.r", "alignment.layer", "task.data", "x", "training", ".r", "model.", "training.seed", "a.b.c", "="]
    overrides.append(rng.choice(keys) + rng.choice(["=", "=", "=", "", "=="]) + value)
    return raw


def _with(raw: Any, section: str, key: str, value: Any) -> Any:
    if not isinstance(raw, dict) or not isinstance(raw.get(section, {}), dict):
        return raw
    return {**raw, section: {**raw.get(section, {}), key: value}}


def _spoil(rng: random.Random, text: str) -> str:
    """A configuration that was damaged as text, but not where the folders are named."""
    lines = text.splitlines(keepends=True)
    at = rng.choice([i for i, line in enumerate(lines) if "/" not in line and "max_steps" not in line])
    junk = ["\t", "}", "[", "&a *a", "!!python/object:os.system x", "? ", "- ", ": :", "\x00", "<<: *a", "'", "%YAML 9"]
    lines[at] = rng.choice([lines[at] * 2, lines[at].rstrip("\n"), rng.choice(junk) + lines[at], lines[at].upper()])
    return "".join(lines)


TASKS: dict[str, tuple[str, list[dict[str, Any]]]] = {
    "chat": ("chat", [{"prompt": f"set alarm {i}", "response": f"yes {i}", "lang": "en"} for i in range(16)]),
    "messages": (
        "chat",
        [
            {"messages": [{"role": "user", "content": f"play {i}"}, {"role": "assistant", "content": f"ok {i}"}]}
            for i in range(16)
        ],
    ),
    "slots": (
        "slots",
        [
            {"lang": "en", "tokens": ["set", "at", str(i)], "slots": ["O", "O", "B-time"], "intent": "alarm"}
            for i in range(16)
        ],
    ),
    "ner": (
        "ner",
        [{"lang": "en", "tokens": ["Ann", "in", f"X{i}"], "tags": ["B-PER", "O", "B-LOC"]} for i in range(16)],
    ),
    "prefix": ("chat", [{"prefix": f"q {i} ", "text": f"q {i} a {i}"} for i in range(16)]),
}
PAIRS: dict[str, list[dict[str, Any]]] = {
    "ways": [{"_id": f"{i}", "de": f"licht {i}", "en": f"light {i}", "fr": f"lampe {i}"} for i in range(24)],
    "english": [{"id": f"{i}", "lang": "de", "en": f"light {i}", "text": f"licht {i}"} for i in range(24)],
    "directed": [
        {"source": f"licht {i}", "target": f"light {i}", "source_lang": "de", "target_lang": "en"} for i in range(24)
    ],
    "reference": [{"text_parallel_0": f"licht {i}", "text_parallel_1": f"light {i}"} for i in range(24)],
}


def more_data(folder: Path) -> None:
    """A parquet file to break."""
    import pyarrow
    import pyarrow.parquet

    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(PAIRS["ways"]), folder / "pairs.parquet")


def file_case(rng: random.Random, work: Path, model: Path, data: Path) -> list[str]:
    """Writes a data file with one to three mutations, of a random kind; gives the arguments of the command line."""
    raw = base_config(work, model, data)
    if rng.random() < 0.5:
        section, kind = "task", rng.choice(list(TASKS))
        raw["task"]["template"], rows = TASKS[kind]
    else:
        section, rows = "alignment", rng.choice(list(PAIRS.values()))
    rows = [dict(row) for row in rows]
    for _ in range(rng.choice([0, 0, 0, 0, 0, 1, 2])):
        rng.choice(ROWS)(rng, rows)
    path = work / f"rows{rng.choice(['.jsonl'] * 9 + ['.jsonl.gz', '.tsv', '.parquet', '.txt'])}"
    content = _content(rng, path.name, rows, data)
    for _ in range(rng.choice([0, 0, 0, 0, 0, 1, 2])):
        content = rng.choice(BYTES)(rng, content)
    if path.suffix == ".gz":
        content = gzip.compress(content)
        content = content[: rng.choice([len(content), len(content), len(content) // 2, 5])]
    path.write_bytes(content)
    raw[section]["data"] = str(path)
    config = work / "config.yaml"
    config.write_text(yaml.safe_dump(raw, allow_unicode=True), encoding="utf-8")
    return ["train", str(config)]


def _content(rng: random.Random, name: str, rows: list[dict[str, Any]], data: Path) -> bytes:
    if name.endswith(".parquet"):
        return (data / "pairs.parquet").read_bytes()
    if name.endswith(".tsv"):
        head = list(rows[0]) if rows else []
        lines = ["\t".join(head), *("\t".join(str(row.get(key, "")) for key in head) for row in rows)]
        return "\n".join(lines).encode("utf-8", "replace")
    return "\n".join(json.dumps(row, ensure_ascii=rng.random() < 0.5) for row in rows).encode("utf-8", "surrogatepass")


ODD: list[Any] = [
    *TEXTS, "\0", "\u2028", "\ufeff", "\ufffe", "ا" * 50, "한" * 200, "\U0010ffff", "\u200b", "a" * 1_000_000,
    "🙂 " * 5000, "<s>", "</s><pad>", "{{ x }}", 0, -1, 1e308, None, True, [], {}, ["a"], {"role": "x"},
    "\ud800", 10**40,
]  # fmt: skip


def _odd_value(rng: random.Random, rows: list[dict[str, Any]]) -> None:
    for row in rng.sample(rows, min(len(rows), rng.choice([1, 1, 3, len(rows)]))):
        if row:
            row[rng.choice(list(row))] = rng.choice(ODD)


def _drop_column(rng: random.Random, rows: list[dict[str, Any]]) -> None:
    key = rng.choice(list(rows[0]) or ["x"]) if rows else ""
    for row in rows if rng.random() < 0.5 else rows[:1]:
        row.pop(key, None)


def _rename_column(rng: random.Random, rows: list[dict[str, Any]]) -> None:
    for row in rows:
        if row:
            row[rng.choice(["x", "", "Prompt", "_en", "zz", "言語"])] = row.pop(next(iter(row)))


def _fewer(rng: random.Random, rows: list[dict[str, Any]]) -> None:
    del rows[rng.choice([0, 1, 2, 5]) :]


def _same(rng: random.Random, rows: list[dict[str, Any]]) -> None:
    rows[:] = [rows[0]] * len(rows) if rows else []


ROWS: list[Callable[[random.Random, list[dict[str, Any]]], None]] = [
    _odd_value, _odd_value, _odd_value, _drop_column, _rename_column, _fewer, _same,
]  # fmt: skip


def _flip(rng: random.Random, content: bytes) -> bytes:
    changed = bytearray(content)
    for _ in range(rng.choice([1, 3, 30])):
        if changed:
            changed[rng.randrange(len(changed))] ^= 1 << rng.randrange(8)
    return bytes(changed)


def _cut(rng: random.Random, content: bytes) -> bytes:
    return content[: rng.randrange(len(content) + 1)]


def _insert(rng: random.Random, content: bytes) -> bytes:
    at = rng.randrange(len(content) + 1)
    junk = [b"\0", b"\xff\xfe", b"\xef\xbb\xbf", b"\n\n\n", b"\r\n", b"null\n", b"[]\n", b"{}\n", b"1\n", b"[" * 5000,
            b'{"a": 1, "a": 2}\n', b'"' + b"x" * 1_000_000 + b'"\n', b"NaN\n", b"\xed\xa0\x80",
            b"1" * 6000]  # fmt: skip
    return content[:at] + rng.choice(junk) + content[at:]


def _other_encoding(rng: random.Random, content: bytes) -> bytes:
    return content.decode("utf-8", "replace").encode(rng.choice(["utf-16", "utf-32", "utf-8-sig"]), "replace")


def _lines(rng: random.Random, content: bytes) -> bytes:
    lines = content.split(b"\n")
    rng.choice([rng.shuffle, lambda all: all.pop(rng.randrange(len(all))), lambda all: all.extend(all)])(lines)
    return rng.choice([b"\n", b"\n", b"\r\n", b"\r", b"\n\n"]).join(lines)


def _no_object(rng: random.Random, content: bytes) -> bytes:
    lines = content.split(b"\n")
    lines.insert(rng.randrange(len(lines) + 1), rng.choice([b"[1]", b"3", b'"x"', b"null", b"true", b'[["a", 1]]']))
    return b"\n".join(lines)


BYTES: list[Callable[[random.Random, bytes], bytes]] = [
    _flip, _flip, _cut, _insert, _other_encoding, _lines, _no_object,
]  # fmt: skip
