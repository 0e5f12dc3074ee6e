"""What a run reads: rows for training, rows held out, and the streams that serve them."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from fastalign.config import Config
from fastalign.data.parallel import Pair, read_pairs
from fastalign.data.sampling import Sampler, held_out, stable_hash
from fastalign.data.tally import Tally
from fastalign.data.templates import TaskExample, TaskReader
from fastalign.data.tokenization import PromptTokenizer, SentenceTokenizer
from fastalign.errors import DataError
from fastalign.streams.alignment import AlignmentStream
from fastalign.streams.base import Stream
from fastalign.streams.task import TaskStream

MAX_HELD_OUT = {"task": 500, "alignment": 1_000}


@dataclass
class Inputs:
    """(training, held-out) rows of task and alignment, None where no data is named, and the count of what was read."""

    task: tuple[list[TaskExample], list[TaskExample]] | None
    pairs: tuple[list[Pair], list[Pair]] | None
    tally: Tally

    @property
    def can_evaluate(self) -> bool:
        """Whether anything is held out."""
        return any(part is not None and part[1] for part in (self.task, self.pairs))


def read_inputs(config: Config) -> Inputs:
    """Read all files that the configuration names. Raises DataError."""
    tally = Tally()
    task = _read_task(config, tally) if config.task.data else None
    pairs = _read_alignment(config, tally) if config.alignment.data or config.alignment.eval_data else None
    return Inputs(task, pairs, tally)


def sentence_tokenizer(config: Config, inputs: Inputs, tokenizer: Any, text_config: Any) -> SentenceTokenizer:
    """The tokenizer of sentence pairs; counts what it will cut."""
    alignment = config.alignment
    room = _room(text_config, alignment.max_length)
    sentences = SentenceTokenizer(
        tokenizer, alignment.skip_first_token, alignment.pooling, room, _vocabulary(text_config)
    )
    for key, rows in _by_setting("alignment", alignment, inputs.pairs):
        sentences.check(rows, key, inputs.tally)
    return sentences


def build_streams(
    config: Config,
    inputs: Inputs,
    tokenizer: Any,
    sentences: SentenceTokenizer,
    text_config: Any,
    layers: list[int],
    args: Any,
) -> dict[str, Stream]:
    """The streams of all data that is there, also those that the schedule only evaluates.

    Args:
        tokenizer: of the model. text_config: of its decoder. layers: resolved indices to align.
        args: `transformers.TrainingArguments`.

    Raises:
        DataError: a chat template does not take the messages, or prompts do not fit into the model's context.
    """
    streams: dict[str, Stream] = {}
    if inputs.task:
        task = config.task
        room = _room(text_config, task.max_length)
        prompts = PromptTokenizer(tokenizer, task.chat_template, room, _vocabulary(text_config))
        for key, rows in _by_setting("task", task, inputs.task):
            prompts.check(rows, key, inputs.tally, _context(text_config))
        languages = [example.language for example in inputs.task[0]]
        streams["task"] = TaskStream(
            *inputs.task,
            prompts,
            Sampler(languages, task.language_temperature, args.seed, "task"),
            micro_batch_size=args.per_device_train_batch_size,
            accumulation=args.gradient_accumulation_steps,
            eval_batch_size=args.per_device_eval_batch_size,
        )
    if inputs.pairs and config.alignment.data:
        train, kept = inputs.pairs
        directions = [pair.direction for pair in train]
        streams["alignment"] = AlignmentStream(
            train,
            _some(kept, "alignment", _both_sides, inputs.tally),
            sentences,
            Sampler(directions, config.alignment.language_temperature, args.seed, "alignment"),
            config.alignment,
            layers,
            accumulation=args.gradient_accumulation_steps,
        )
    return streams


def _room(text_config: Any, wanted: int) -> int:
    """Tokens a row may have: as configured, but not beyond the model's context."""
    context = _context(text_config)
    return wanted if context is None else min(wanted, context)


def _context(text_config: Any) -> int | None:
    context = getattr(text_config, "max_position_embeddings", None)
    return context if isinstance(context, int) and context > 0 else None


def _vocabulary(text_config: Any) -> int | None:
    """Rows of the embedding, if the configuration tells."""
    rows = getattr(text_config, "vocab_size", None)
    return rows if isinstance(rows, int) else None


def _by_setting(name: str, section: Any, rows: tuple[list, list] | None) -> list[tuple[str, list]]:
    """(setting, rows): the rows of each of the settings that name files."""
    if rows is None:
        return []
    if section.eval_data is None:
        return [(f"{name}.data", [*rows[0], *rows[1]])]
    return [(f"{name}.data", rows[0]), (f"{name}.eval_data", rows[1])]


def _read_task(config: Config, tally: Tally) -> tuple[list[TaskExample], list[TaskExample]]:
    """(training, held-out) examples."""
    task = config.task
    reader = TaskReader(task, tally)
    assert task.data is not None
    examples = reader.read(task.data, "task.data")
    if task.eval_data is not None:
        kept = reader.read(task.eval_data, "task.eval_data")
        _note_overlap(examples, kept, _text, "task.eval_data", tally)
        return examples, _some(kept, "task", _text, tally)
    return _split(examples, _text, task.eval_share, "task")


def _read_alignment(config: Config, tally: Tally) -> tuple[list[Pair], list[Pair]]:
    """(training, held-out) pairs; a meaning is on one side only."""
    alignment = config.alignment
    if alignment.data is None:
        assert alignment.eval_data is not None
        return [], read_pairs(alignment.eval_data, alignment.pairs, "alignment.eval_data", tally)
    pairs = read_pairs(alignment.data, alignment.pairs, "alignment.data", tally)
    if alignment.eval_data is not None:
        kept = read_pairs(alignment.eval_data, alignment.pairs, "alignment.eval_data", tally)
        _note_overlap(pairs, kept, _both_sides, "alignment.eval_data", tally)
        return pairs, kept
    names: dict[int, str] = {}
    for pair in pairs:
        names[pair.meaning] = min(names.get(pair.meaning, pair.target), pair.target)
    return _split(pairs, lambda pair: names[pair.meaning], alignment.eval_share, "alignment")


def _split(rows: list, key: Callable[[Any], str], share: float, name: str) -> tuple[list, list]:
    share = min(share, MAX_HELD_OUT[name] / max(len(rows), 1))
    train, kept = [], []
    for row in rows:
        (kept if held_out(key(row), share) else train).append(row)
    if not train:
        raise DataError(f"{name}.data: only {len(rows)} rows, and all are held out; give eval_data or eval_share: 0")
    return train, kept


def _some(rows: list, name: str, key: Callable[[Any], str], tally: Tally) -> list:
    """At most as many rows as are evaluated, drawn and mixed by the hash of their content."""
    limit = MAX_HELD_OUT[name]
    if len(rows) > limit:
        tally.note(f"{name}.eval_data", f"the loss is measured on {limit:,} of {len(rows):,} rows, drawn by their hash")
    return sorted(rows, key=lambda row: stable_hash(key(row)))[:limit]


def _note_overlap(train: list, kept: list, key: Callable[[Any], str], name: str, tally: Tally) -> None:
    known = set(map(key, train))
    count = sum(key(row) in known for row in kept)
    if count:
        tally.note(name, f"{count:,} of {len(kept):,} held-out rows are also trained on: their scores say little")


def _both_sides(pair: Pair) -> str:
    return f"{pair.source}\x1f{pair.target}"


def _text(example: TaskExample) -> str:
    return "\x1f".join(message["content"] for message in example.messages)
