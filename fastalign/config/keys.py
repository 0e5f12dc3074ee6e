"""Every key of the configuration with its type, default and meaning. This is the only home of the three."""

# ruff: noqa: RUF009 - `_help` makes a dataclasses.field

from __future__ import annotations

import dataclasses
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

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
        "nf4: the base in 4 bits through bitsandbytes (QLoRA), with double quantisation. A checkpoint that "
        "bitsandbytes has quantised, to 4 or 8 bits, is taken as it is, whatever stands here.",
        "none",
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
    dtype: Literal["auto", "float32", "bfloat16", "float16"] = _help(
        "Number format of the adapter, its gradient and what the optimizer keeps. auto: float32. In 16 bits they take "
        "half the memory, but an update is lost where it is below about 1/500 of a number (bfloat16; 1/4000 in "
        "float16, whose range is small), so that a small learning rate learns less.",
        "auto",
    )
    target_modules: str | list[str] = _help(
        "all-linear: every linear layer but the head; or a list of module names, e.g. [q_proj, v_proj].", "all-linear"
    )


@dataclass(kw_only=True)
class DataSource:
    """Rows that a path alone does not name: another split, other columns. Stands where a path may stand."""

    path: str | list[str] = _help(
        "File(s), a pattern, a hub id, or a folder that `datasets` can load. Required; the other keys are optional.", ""
    )
    name: str | None = _help("Configuration of the data set, where it has several, e.g. de-en.", None)
    split: str | None = _help(
        "Split of the data set, also train[:1000] or train+test. Not given: train, or the only one there is.", None
    )
    revision: str | None = _help("Branch, tag or commit on the hub.", None)
    columns: dict[str, Any] | None = _help(
        "Our key: their column, e.g. {prompt: question, response: answer}, or for pairs {de: german, en: english}. "
        "Dots lead into nested columns ({de: translation.de}); {lang: {value: de}} is the same in every row. What is "
        "not named is left out.",
        None,
    )
    streaming: bool = _help(
        "Read the rows while training, for data that do not fit into memory. Of one source alone; needs "
        "training.max_steps, and eval_data to evaluate on, because nothing is held out of a stream.",
        False,
    )


Data = str | DataSource | list[str | DataSource] | None
"""What ``data`` and ``eval_data`` may hold."""


@dataclass(kw_only=True)
class TaskConfig:
    """The task: prompts and answers in the languages that have labels."""

    data: Data = _help(
        "JSONL (plain or compressed), parquet or TSV file(s), a folder of a data set, or a hub id. Rows: "
        "{prompt, response}, {messages}, "
        "{lang, tokens, slots, intent}, {lang, tokens, tags}, {prefix, text}; for translation the rows of "
        "alignment.data: {source, target} in the direction they are written, all others to English.",
        None,
    )
    eval_data: Data = _help("Held-out rows of the same kind. Not given: eval_share of `data`, chosen by hash.", None)
    eval_share: float = _help("Share of `data` held out where eval_data is not given (at most 500 rows).", 0.05)
    languages: list[str] | None = _help("Use only rows of these languages.", None)
    template: Literal["chat", "slots", "ner", "translation", "custom"] = _help(
        "How a row becomes a prompt and an answer. chat: prompt/response and messages through the chat template, "
        "prefix/text rows as they are, because they hold its markup already; slots, ner, translation: built in; "
        "custom: your `prompt` and `response` below.",
        "chat",
    )
    system: str | None = _help(
        "System message; replaces that of the built-in template, '' for none. chat: for rows without one.", None
    )
    prompt: str | None = _help(
        "User message with {fields}; replaces that of the template. Fields: the row's columns; for slots and ner also "
        "{text}, {types}, {answer}, for translation {text}, {source_language}, {target_language}, {answer}.",
        None,
    )
    response: str | None = _help("Answer with {fields}; replaces that of the template.", None)
    chat_template: str = _help(
        "auto: the tokenizer's own chat template where it has one; none: plain text; or the path of a jinja file.",
        "auto",
    )
    max_length: int = _help("Tokens a row may have; longer prompts lose their beginning.", 1024)
    logits_memory: str = _help(
        "Memory that the logits of a forward may take, with their copies and gradients, e.g. 64MB or 1GiB: only answer "
        "tokens have logits, as many at a time as fit, and the loss and its gradient are exact. whole: the logits of "
        "all tokens at once, as transformers makes them, for a model whose head is refused.",
        "256MB",
    )
    language_temperature: float | Literal["uniform"] = _help(
        "Languages are drawn with probability proportional to rows ** (1 / T). 1: as in the data; uniform: T = inf.",
        1.0,
    )


@dataclass(kw_only=True)
class AlignmentConfig:
    """Sentence pairs that are pulled together at a middle layer."""

    data: Data = _help(
        "File(s), a folder of a data set, or a hub id: N-way rows (a key a language; keys that begin with _ are "
        "metadata), {translation: {de, en}}, {lang, en, text}, "
        "{source, target, source_lang, target_lang}, {text_parallel_0, text_parallel_1}, TSV whose header names "
        "two languages, or two aligned text files name.xx and name.yy.",
        None,
    )
    eval_data: Data = _help(
        "Held-out pairs. Not given: eval_share of `data`, chosen by hash so that no sentence is on both sides.", None
    )
    eval_share: float = _help("Share of the pairs held out where eval_data is not given (at most 1,000 pairs).", 0.05)
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
    pooling: Literal["mean", "last"] = _help(
        "Sentence vector: mean over its tokens in fp32, or its last token.", "mean"
    )
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
        "Pairs per forward; batch_size / gradient_accumulation_steps if not given. Changes memory and time, not the "
        "gradient: all pairs of the step are each other's negatives. Below batch_size costs one more forward.",
        None,
    )
    negatives: Literal["rank", "world"] = _help(
        "Other pairs of the step to contrast with: those of this rank, or of all ranks, so that several ranks train "
        "exactly what one with all of their pairs would.",
        "rank",
    )
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
        "paper: the reference's choices (BOS in the mean, one direction, no masking), unless you set them yourself.",
        None,
    )


@dataclass(kw_only=True)
class ScheduleConfig:
    """Which stream runs at an optimizer step."""

    mode: Literal["alternate", "joint", "task_only", "align_only"] = _help(
        "alternate: one kind of batch per optimizer step, task first; joint: both in every step; or only one. Under "
        "align_only the model is loaded up to the deepest aligned block only, unless the task is evaluated too.",
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


SECTIONS: dict[str, type] = {
    "model": ModelConfig,
    "adapter": AdapterConfig,
    "task": TaskConfig,
    "alignment": AlignmentConfig,
    "schedule": ScheduleConfig,
}
NESTED: dict[str, type] = {"data source": DataSource}
"""What a key of a section may hold instead of a simple value, by the name that its type has in messages and help."""

FREE_SECTIONS = ("streams", "training")
