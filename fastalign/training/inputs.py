"""What a run reads: rows for training, rows held out, and the streams that serve them."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, TypeGuard

from fastalign.config import Config, DataSource, logits_bytes
from fastalign.data.parallel import Pair, PairBlocks, read_pairs
from fastalign.data.sampling import Sampler, held_out, stable_hash
from fastalign.data.streaming import Check, StreamedRows
from fastalign.data.tally import Tally
from fastalign.data.templates import TaskExample, TaskReader
from fastalign.data.tokenization import PromptTokenizer, SentenceTokenizer
from fastalign.errors import DataError
from fastalign.streams.alignment import AlignmentStream
from fastalign.streams.base import Stream
from fastalign.streams.task import TaskStream
from fastalign.training.checkpoint import PLACES
from fastalign.training.schedule import Schedule

MAX_HELD_OUT = {"task": 500, "alignment": 1_000}
REMEMBERED = 12  # steps whose streamed rows can still be named: a failure is seen up to SETTLE_EVERY steps later


@dataclass
class Inputs:
    """(training, held-out) rows of task and alignment, None where no data is named, and the count of what was read.

    Where the task's rows are streamed, `begin` reads the held-out ones, because the first block decides their prompts.
    """

    task: tuple[list[TaskExample] | StreamedRows, list[TaskExample]] | None
    pairs: tuple[list[Pair] | StreamedRows, list[Pair]] | None
    tally: Tally
    later: Callable[[], list[TaskExample]] | None = None

    @property
    def can_evaluate(self) -> bool:
        """Whether anything is held out."""
        return self.later is not None or any(part is not None and part[1] for part in (self.task, self.pairs))

    def begin(self, config: Config, args: Any, checkpoint: Path | None) -> None:
        """Read the first rows of what is streamed, at the place that a checkpoint has saved. Raises DataError.

        Args:
            args: `transformers.TrainingArguments`, of all ranks.
        """
        steps = {
            "task": args.per_device_train_batch_size * args.gradient_accumulation_steps,
            "alignment": config.alignment.batch_size,
        }
        for name, part in (("task", self.task), ("alignment", self.pairs)):
            if part is not None and isinstance(part[0], StreamedRows):
                trained = name in Schedule(config.schedule.mode, config.schedule.ratio).streams
                place = _saved_place(checkpoint, name, self.tally) if trained else None
                part[0].begin(args.seed, REMEMBERED * steps[name] * args.world_size, place)
        if self.task is not None and self.later is not None:
            self.task = (self.task[0], self.later())


def read_inputs(config: Config) -> Inputs:
    """Read all files that the configuration names; those that are streamed are only opened. Raises DataError."""
    tally = Tally()
    later = None
    if _is_streamed(config.task.data):
        task, later = _stream_task(config, tally)
    else:
        task = _read_task(config, tally) if config.task.data else None
    pairs = _read_alignment(config, tally) if config.alignment.data or config.alignment.eval_data else None
    return Inputs(task, pairs, tally, later)


def sentence_tokenizer(config: Config, inputs: Inputs, tokenizer: Any, text_config: Any) -> SentenceTokenizer:
    """The tokenizer of sentence pairs; counts what it will cut."""
    alignment = config.alignment
    room = _room(text_config, alignment.max_length)
    sentences = SentenceTokenizer(
        tokenizer, alignment.skip_first_token, alignment.pooling, room, _vocabulary(text_config)
    )
    for key, rows in _by_setting("alignment", alignment, inputs.pairs):
        _check(rows, inputs.tally, lambda part, tally, key=key: sentences.check(part, key, tally))
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
        context = _context(text_config)
        for key, rows in _by_setting("task", task, inputs.task):
            _check(rows, inputs.tally, lambda part, tally, key=key: prompts.check(part, key, tally, context))
        streams["task"] = TaskStream(
            *inputs.task,
            prompts,
            _sampler(inputs.task[0], TaskStream, task.language_temperature, args.seed),
            micro_batch_size=args.per_device_train_batch_size,
            accumulation=args.gradient_accumulation_steps,
            eval_batch_size=args.per_device_eval_batch_size,
            logits_memory=logits_bytes(task),
        )
    if inputs.pairs and config.alignment.data:
        train, kept = inputs.pairs
        streams["alignment"] = AlignmentStream(
            train,
            _some(kept, "alignment", _both_sides, inputs.tally),
            sentences,
            _sampler(train, AlignmentStream, config.alignment.language_temperature, args.seed),
            config.alignment,
            layers,
            accumulation=args.gradient_accumulation_steps,
        )
    return streams


def _sampler(
    rows: list | StreamedRows, stream: type[Stream], temperature: float | Literal["uniform"], seed: int
) -> Sampler | StreamedRows:
    if isinstance(rows, StreamedRows):
        return rows
    return Sampler([*map(stream.language, rows)], temperature, seed, stream.name)


def _check(rows: list | StreamedRows, tally: Tally, check: Check) -> None:
    """Have rows looked at: now, or as they come."""
    if isinstance(rows, StreamedRows):
        rows.add_check(check)
    else:
        check(rows, tally)


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


def _by_setting(
    name: str, section: Any, rows: tuple[list | StreamedRows, list] | None
) -> list[tuple[str, list | StreamedRows]]:
    """(setting, rows): the rows of each of the settings that name files."""
    if rows is None:
        return []
    if section.eval_data is None:
        return [(f"{name}.data", rows[0] if isinstance(rows[0], StreamedRows) else [*rows[0], *rows[1]])]
    return [(f"{name}.data", rows[0]), (f"{name}.eval_data", rows[1])]


def _is_streamed(data: Any) -> TypeGuard[DataSource]:
    return isinstance(data, DataSource) and data.streaming


def _saved_place(checkpoint: Path | None, name: str, tally: Tally) -> Mapping[str, Any] | None:
    if checkpoint is None:
        return None
    try:
        return json.loads((checkpoint / PLACES).read_text(encoding="utf-8"))[name]
    except (OSError, ValueError, LookupError, TypeError):
        tally.note(f"{name}.data", f"{checkpoint} has not saved the place in the stream: reading from the beginning")
        return None


def _stream_task(
    config: Config, tally: Tally
) -> tuple[tuple[StreamedRows, list[TaskExample]], Callable[[], list[TaskExample]] | None]:
    """Streamed examples, and what reads the held-out ones once the first block is there."""
    task = config.task
    assert _is_streamed(task.data)
    reader = TaskReader(task, tally)
    train = StreamedRows(task.data, reader, TaskStream.language, task.language_temperature, "task.data", "task", tally)
    held_out = task.eval_data

    def read() -> list[TaskExample]:
        return _some(reader.read(held_out, "task.eval_data"), "task", _text, tally)

    return (train, []), None if held_out is None else read


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


def _read_alignment(config: Config, tally: Tally) -> tuple[list[Pair] | StreamedRows, list[Pair]]:
    """(training, held-out) pairs; a meaning is on one side only."""
    alignment = config.alignment
    if alignment.data is None:
        assert alignment.eval_data is not None
        return [], read_pairs(alignment.eval_data, alignment.pairs, "alignment.eval_data", tally)
    if _is_streamed(alignment.data):
        reader = PairBlocks(alignment.pairs)
        heat, key = alignment.language_temperature, "alignment.data"
        train = StreamedRows(alignment.data, reader, AlignmentStream.language, heat, key, "alignment", tally)
        held_out = alignment.eval_data
        return train, [] if held_out is None else read_pairs(held_out, alignment.pairs, "alignment.eval_data", tally)
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
