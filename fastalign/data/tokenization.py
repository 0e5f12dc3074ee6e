"""From text to token ids: prompts with answers, exact at their boundary, and sentences with their pooling mask."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Literal, cast

import torch

from fastalign.data.lengths import may_exceed, most_tokens
from fastalign.data.parallel import Pair
from fastalign.data.tally import Tally, listed_places
from fastalign.data.templates import Message, TaskExample
from fastalign.data.text import listed, shown
from fastalign.data.vocabulary import refuse_unknown, unknown_tokens
from fastalign.errors import ConfigError, DataError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

IGNORE_INDEX = -100  # label of a token that is not learnt
SPECIALS = 2  # tokens that a tokenizer puts around a text, at most
SENTINEL = "TheAnswerOfTheAssistant"  # shows what a chat template writes after an answer


def adds_bos(tokenizer: PreTrainedTokenizerBase) -> bool:
    """Whether the tokenizer puts its beginning-of-sequence token before every text."""
    return tokenizer.bos_token_id is not None and tokenizer("a")["input_ids"][:1] == [tokenizer.bos_token_id]


@dataclass
class _Segment:
    """A piece of a conversation, given to the assistant or `learnt`: its answer and the token that ends it."""

    text: str
    learnt: bool = False
    end: str | None = None  # appended to the text; None: the text ends by itself


@dataclass
class PromptTokenizer:
    """Turns messages into token ids and labels.

    Prompt and answer are tokenized apart and their ids joined. The prompt's ids are therefore those that a user's
    program has when it asks for the answer, whatever a tokenizer would merge across the boundary, and exactly the
    answer's tokens carry labels. The answer ends with the token that ends a turn in the chat template, or with EOS
    where that writes none. All turns of the assistant are learnt. The exception are chat templates that write a
    turn differently once it is history (Qwen3's drops the thinking): there it is the last turn only.

    Args:
        tokenizer: of the base model.
        chat_template: ``auto`` (the tokenizer's own, plain text where it has none), ``none``, or a jinja file.
        max_length: longer rows lose what comes first, up to the last answer, then the end of that.
        embedding_rows: of the model, if known; tokens from this number on are refused.
    """

    tokenizer: PreTrainedTokenizerBase
    chat_template: str = "auto"
    max_length: int = 1024
    embedding_rows: int | None = None

    def __post_init__(self) -> None:
        added = self.tokenizer.added_tokens_decoder
        self._added = {token.content: i for i, token in added.items()}
        self._specials = {*self.tokenizer.all_special_tokens, *(t.content for t in added.values() if t.special)}
        self._prepends_space = self._encode(":a") != self._encode(":") + self._encode("a")
        self._template: str | None = None
        if self.chat_template not in ("auto", "none"):
            try:
                self._template = Path(self.chat_template).read_text(encoding="utf-8")
            except (OSError, UnicodeDecodeError) as error:
                raise ConfigError(f"task.chat_template: {self.chat_template!r} cannot be read ({error})") from None
        self._chat = self._template is not None or (self.chat_template == "auto" and bool(self.tokenizer.chat_template))

    def __call__(self, example: TaskExample) -> tuple[list[int], list[int]]:
        """(input_ids, labels) of one example, equally long; labels are `IGNORE_INDEX` outside the answers.

        Raises:
            DataError: the chat template does not take these messages, or a token is one that the model does not have.
        """
        return self._cut(*self._whole(example))

    def prompt_ids(self, messages: Sequence[Message]) -> list[int]:
        """Token ids from which to generate the next answer: those of the prompt's text, as in `__call__`.

        A prompt of more than `max_length` loses its beginning.
        """
        if self._chat:
            segments = [_Segment(self._apply(list(messages), generate=True))]
        else:
            segments = self._plain_segments(messages)
        ids, _ = self._join(segments, special=not self._chat)
        keep = 1 if ids[:1] == [self.tokenizer.bos_token_id] else 0
        return ids[:keep] + ids[max(keep, keep + len(ids) - self.max_length) :]

    def check(
        self,
        examples: Sequence[TaskExample],
        key: str = "task.data",
        tally: Tally | None = None,
        context: int | None = None,
    ) -> None:
        """Refuse now what the training could not use, and count the rows that it will cut.

        Args:
            examples: one of every sequence of roles is tokenized, and all that may be too long.
            key: the setting that names their files.
            tally: gets the count.
            context: tokens the model can see at once, if that is known.

        Raises:
            DataError: the chat template does not take these messages; a token that the model does not have; prompts
                that fill the context alone. The prompt is what follows the answer before the last one: a history
                can be cut.
        """
        added: dict[tuple[object, ...], int] = {}  # tokens that come to the texts, by the roles of a conversation
        unknown = unknown_tokens(self.tokenizer, self.embedding_rows)
        for example in examples:
            if unknown and any(token in message["content"] for message in example.messages for token in unknown):
                self._whole(example)
            if (kind := _kind(example)) not in added:
                self._whole(example)
                added[kind] = self._added_tokens(example)
        rooms = [self.max_length - added[_kind(example)] for example in examples]
        texts = [[message["content"] for message in example.messages] for example in examples]
        reason = f"rows cut: longer than {self.max_length:,} tokens"
        too_long: list[tuple[int, str]] = []
        for example in (examples[i] for i in may_exceed(self.tokenizer, texts, rooms)):
            ids, labels = self._whole(example)
            if tally is not None and len(ids) > self.max_length:
                tally.add(key, reason, example.where)
            if context is not None and (length := self._last_prompt(example, labels)) > context - 1:
                too_long.append((length, example.where))
        if tally is not None:
            tally.out_of(key, reason, len(examples))
        if too_long:
            places = listed_places(where for _, where in too_long)
            raise DataError(
                f"{key}: {len(too_long):,} of {len(examples):,} rows have a prompt that leaves no room for an answer "
                f"in the model's context of {context:,} tokens ({places}); the longest has {max(too_long)[0]:,}; "
                "shorten or remove these rows"
            )

    def _whole(self, example: TaskExample) -> tuple[list[int], list[int]]:
        """As `__call__`, of any length."""
        ids, labels = self._join(self._segments(example), special=example.raw or not self._chat)
        refuse_unknown(self.tokenizer, ids, self.embedding_rows, example.where)
        return ids, labels

    def _last_prompt(self, example: TaskExample, labels: Sequence[int]) -> int:
        """Tokens between the answer before the last one and the last one."""
        first = last = _last_answer(labels)
        while first and labels[first - 1] == IGNORE_INDEX:
            first -= 1
        roles = [message["role"] for message in example.messages[:-1]]
        if first == 0 and "assistant" in roles:  # a chat template that rewrites its history, which is not learnt
            texts = [message["content"] for message in example.messages[:-1]]
            return sum(len(self._encode(text)) for text in texts[len(roles) - roles[::-1].index("assistant") :])
        return last - first

    def _segments(self, example: TaskExample) -> list[_Segment]:
        if example.raw:
            prompt, answer = (message["content"] for message in example.messages)
            if answer.rstrip().endswith((*self._specials,)):  # it brings its end
                return [_Segment(prompt), _Segment(answer.rstrip(), True)]
            return [_Segment(prompt), _Segment(answer, True, self._eos)]
        if not self._chat:
            return self._plain_segments(example.messages)
        try:
            return self._chat_segments(example.messages)
        except DataError as error:
            raise DataError(f"{example.where}: {error}" if example.where else str(error)) from None

    def _added_tokens(self, example: TaskExample) -> int:
        """Upper bound of the tokens that come to the texts of a conversation like this one."""
        short = [{**message, "content": "a"} for message in example.messages]
        try:
            segments = self._segments(replace(example, messages=short))
        except DataError:  # a template that takes some texts and not others
            segments = self._segments(example)
        return sum(most_tokens(segment.text) + most_tokens(segment.end or "") for segment in segments)

    @property
    def _eos(self) -> str | None:
        return cast("str | None", self.tokenizer.eos_token)

    def _plain_segments(self, messages: Sequence[Message]) -> list[_Segment]:
        """Without a chat template: texts with an empty line between them, and an answer on a line of its own."""
        segments: list[_Segment] = []
        texts: list[str] = []
        for message in messages:
            if message["role"] == "assistant":
                segments += [_Segment(_paragraphs(texts, segments)), _Segment(message["content"], True, self._eos)]
                texts = []
            else:
                texts.append(message["content"])
        return [*segments, _Segment(_paragraphs(texts, segments))] if texts else segments

    def _chat_segments(self, messages: list[Message]) -> list[_Segment]:
        """The conversation as the chat template writes it, cut where the assistant begins and ends."""
        segments: list[_Segment] = []
        done = ""
        for i, message in enumerate(messages):
            if message["role"] == "assistant":
                prompt = self._apply(messages[:i], generate=True)
                answer, end = self._answer(messages[: i + 1], prompt)
                if not prompt.startswith(done):  # it rewrites the history: learn this turn only
                    segments, done = [], ""
                segments += [_Segment(prompt[len(done) :]), _Segment(answer, True, end or self._eos)]
                done = prompt + answer + (end or "")
        return segments

    def _answer(self, messages: list[Message], prompt: str) -> tuple[str, str | None]:
        """What the assistant has to write after `prompt`, and the token in the chat template that ends it."""
        content = messages[-1]["content"]
        full = self._apply(messages, generate=False)
        marked = self._apply([*messages[:-1], {**messages[-1], "content": SENTINEL}], generate=False)
        after = marked.rpartition(SENTINEL)[2] if SENTINEL in marked else ""
        if full.startswith(prompt) and full.endswith(after):
            answer = full[len(prompt) : len(full) - len(after)]
        else:  # an answer that is not the continuation of the prompt, e.g. because the prompt opens a thought
            answer = content
        places = [(token not in self._specials, after.find(token), -len(token), token) for token in self._added]
        places = [place for place in places if place[1] >= 0]
        if not places:
            return answer, None
        _, place, _, token = min(places)
        return answer + after[:place], token

    def _apply(self, messages: list[Message], generate: bool) -> str:
        from jinja2 import TemplateSyntaxError

        system = messages[0]["content"].strip() if len(messages) > 1 and messages[0]["role"] == "system" else None
        try:
            text = self.tokenizer.apply_chat_template(
                messages, tokenize=False, add_generation_prompt=generate, chat_template=self._template
            )
            if system is None or system in cast(str, text):
                return cast(str, text)
        except TemplateSyntaxError as error:
            raise ConfigError(f"task.chat_template: not a jinja template ({error}, line {error.lineno})") from None
        except Exception as error:  # whatever a template raises
            if system is None:
                roles = listed(message["role"] for message in messages)
                why = shown(str(error), 160)
                raise DataError(f"the chat template does not take messages with the roles {roles}: {why}") from None
        # Many chat templates know no system message: they raise, or leave it out without a word.
        first = {**messages[1], "content": f"{messages[0]['content']}\n\n{messages[1]['content']}"}
        return self._apply([first, *messages[2:]], generate)

    def _join(self, segments: list[_Segment], special: bool) -> tuple[list[int], list[int]]:
        """Token ids and labels; `special`: the tokenizer's own special tokens begin the text."""
        input_ids: list[int] = []
        labels: list[int] = []
        for i, segment in enumerate(segments):
            if segment.learnt:
                ids = self._answer_ids(segment.text, segment.end)
            elif i > 0:
                ids = self._ids_after(segments[i - 1].end, segment.text)
            else:
                ids = self._first_ids(segment.text) if special else self._encode(segment.text)
            input_ids += ids
            labels += ids if segment.learnt else [IGNORE_INDEX] * len(ids)
        return input_ids, labels

    def _encode(self, text: str, special: bool = False) -> list[int]:
        return cast("list[int]", self.tokenizer(text, add_special_tokens=special, verbose=False)["input_ids"])

    def _first_ids(self, text: str) -> list[int]:
        ids = self._encode(text, special=True)
        if len(ids) > 1 and ids[-1] == self.tokenizer.eos_token_id and not text.endswith(str(self._eos)):
            ids = ids[:-1]  # some tokenizers end every text
        if len(ids) > 1 and ids[0] == ids[1] == self.tokenizer.bos_token_id:
            ids = ids[1:]  # the text brings its own
        return ids

    def _ids_after(self, token: str | None, text: str) -> list[int]:
        """The ids of a text that follows a special token, in whose company a tokenizer may treat it differently."""
        if token is not None:
            ids = self._encode(token + text)
            if ids[:1] == [self.tokenizer.convert_tokens_to_ids(token)]:
                return ids[1:]
        return self._encode(text)

    def _answer_ids(self, text: str, end: str | None) -> list[int]:
        """The ids of an answer, which is no beginning: a tokenizer that puts a space before every text may not."""
        text += end or ""
        ids = self._encode(text)
        if self._prepends_space:
            for before in (":", "\n", "a", ")"):  # one that merges with nothing in the answer
                head, both = self._encode(before), self._encode(before + text)
                if head and both[: len(head)] == head and len(both) > len(head):
                    ids = both[len(head) :]
                    break
        return ids

    def _cut(self, input_ids: list[int], labels: list[int]) -> tuple[list[int], list[int]]:
        excess = len(input_ids) - self.max_length
        if excess <= 0:
            return input_ids, labels
        last = _last_answer(labels)
        keep = 1 if input_ids[0] == self.tokenizer.bos_token_id else 0
        cut = max(0, min(excess, last - max(keep, 1)))  # something has to come before the first token to be learnt
        first = keep + cut
        while cut and first < last and labels[first] != IGNORE_INDEX:  # an earlier answer without its prompt
            labels[first] = IGNORE_INDEX
            first += 1
        input_ids, labels = input_ids[:keep] + input_ids[keep + cut :], labels[:keep] + labels[keep + cut :]
        return input_ids[: self.max_length], labels[: self.max_length]


def _kind(example: TaskExample) -> tuple[object, ...]:
    """What a chat template goes by."""
    return (example.raw, *(message["role"] for message in example.messages))


def _last_answer(labels: Sequence[int]) -> int:
    """Where the last answer begins: the number of tokens of the prompt."""
    first = len(labels)
    while first and labels[first - 1] != IGNORE_INDEX:
        first -= 1
    return first


def _paragraphs(texts: list[str], before: list[_Segment]) -> str:
    return "\n\n".join([*([""] if before else []), *texts]) + "\n"


@dataclass
class SentenceTokenizer:
    """Turns sentences into a padded batch with the mask of the tokens that are pooled.

    The first token of a causal model is an attention sink whose state has a norm of hundreds; averaged in, it makes
    all cosines 1. ``auto`` leaves the BOS out of the mean; where a tokenizer adds none, a sacrificial token takes the
    sink's role and is left out instead. A sentence of a single token keeps it; one of none gets a filler.

    Args:
        tokenizer: of the base model, with a padding token.
        skip_first_token: ``auto``, True (skip whatever is first) or False (pool every token, as in the paper).
        pooling: ``mean`` over the tokens, or ``last`` token only.
        max_length: tokens kept of a sentence.
        embedding_rows: of the model, if known; tokens from this number on are refused with a DataError.
    """

    tokenizer: PreTrainedTokenizerBase
    skip_first_token: bool | Literal["auto"] = "auto"
    pooling: Literal["mean", "last"] = "mean"
    max_length: int = 256
    embedding_rows: int | None = None

    def __post_init__(self) -> None:
        tokenizer = self.tokenizer
        known = cast("list[int | None]", [tokenizer.bos_token_id, tokenizer.eos_token_id, tokenizer.pad_token_id])
        self._filler = next((token for token in known if token is not None), 0)
        sacrifice = self.skip_first_token == "auto" and not adds_bos(tokenizer)
        self._first = [self._filler] if sacrifice else []

    def __call__(self, texts: Sequence[str]) -> dict[str, torch.Tensor]:
        """input_ids, attention_mask, pool_mask: (N, T) int64, padded on the right."""
        first = self._first
        encoded = self.tokenizer(list(texts), truncation=True, max_length=self.max_length - len(first))["input_ids"]
        rows = [first + ids or [self._filler] for ids in cast("list[list[int]]", encoded)]
        for ids in rows:
            refuse_unknown(self.tokenizer, ids, self.embedding_rows, "")
        batch = pad(rows, cast("int | None", self.tokenizer.pad_token_id) or 0)
        mask = torch.zeros_like(batch)
        pool = torch.zeros_like(batch)
        for i, ids in enumerate(rows):
            mask[i, : len(ids)] = 1
            start = 1 if self.skip_first_token and len(ids) > 1 else 0
            pool[i, len(ids) - 1 if self.pooling == "last" else start : len(ids)] = 1
        return {"input_ids": batch, "attention_mask": mask, "pool_mask": pool}

    def check(self, pairs: Iterable[Pair], key: str, tally: Tally) -> None:
        """Count the different sentences that will be cut at `max_length`; `key` names their files' setting."""
        places: dict[str, str] = {}
        for pair in pairs:
            places.setdefault(pair.source, pair.where)
            places.setdefault(pair.target, pair.where)
        texts = [*places]
        unknown = unknown_tokens(self.tokenizer, self.embedding_rows)
        for text in (text for text in texts if any(token in text for token in unknown)):
            ids = cast("list[int]", self.tokenizer(text, verbose=False)["input_ids"])
            refuse_unknown(self.tokenizer, ids, self.embedding_rows, places[text])
        reason = f"different sentences cut: longer than {self.max_length:,} tokens"
        room = self.max_length - len(self._first)
        for i in may_exceed(self.tokenizer, [[text] for text in texts], [room - SPECIALS] * len(texts)):
            if len(cast("list[int]", self.tokenizer(texts[i], verbose=False)["input_ids"])) > room:
                tally.add(key, reason, places[texts[i]])
        tally.out_of(key, reason, len(texts))


def pad(rows: Sequence[Sequence[int]], value: int) -> torch.Tensor:
    """(N, T) int64 with `value` to the right of the shorter rows."""
    width = max((len(row) for row in rows), default=0)
    return torch.tensor([[*row, *[value] * (width - len(row))] for row in rows], dtype=torch.int64)
