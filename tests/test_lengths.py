"""The check of lengths: it counts what will be cut, refuses what cannot be used, and tokenizes little."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest

from fastalign.data import lengths
from fastalign.data.lengths import SLACK, may_exceed, most_tokens
from fastalign.data.parallel import Pair
from fastalign.data.tally import Tally
from fastalign.data.templates import TaskExample
from fastalign.data.tokenization import PromptTokenizer, SentenceTokenizer
from fastalign.errors import DataError

CHATML = (
    "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
TEXTS = ["a", "rain " * 40, "日本語" * 9, "größe", "\ufdfa\u0301\0" * 5, "\U0001f469\u200d\U0001f467" * 4, ""]


class Counting:
    """A tokenizer that notes how many texts it is given."""

    def __init__(self, tokenizer: Any):
        self.tokenizer, self.texts = tokenizer, 0

    def __call__(self, text: str | list[str], **options: Any) -> Any:
        self.texts += 1 if isinstance(text, str) else len(text)
        return self.tokenizer(text, **options)

    def __getattr__(self, name: str) -> Any:
        return getattr(self.tokenizer, name)


@pytest.fixture(params=[None, CHATML], ids=["plain", "chat"])
def tokenizer(request: pytest.FixtureRequest, model_dir: Path) -> Any:
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(model_dir)
    tokenizer.chat_template = request.param
    return tokenizer


def example(prompt: str, answer: str, where: str = "") -> TaskExample:
    return TaskExample(
        [{"role": "user", "content": prompt}, {"role": "assistant", "content": answer}], "en", where=where
    )


def test_no_text_has_more_tokens_than_the_bound(tokenizer):
    for text in TEXTS:
        assert len(tokenizer(text)["input_ids"]) <= most_tokens(text)


@pytest.mark.parametrize("room", [0, 5, 12, 30, 60, 200, 1000])
def test_no_row_that_is_too_long_goes_unseen(tokenizer, room, monkeypatch):
    """Whether they are tokenized at once or in many batches; some tokens of slack a text, as beside others."""
    rows: list[Sequence[str]] = [[a, b] for a in TEXTS for b in TEXTS]
    tokens = [sum(len(tokenizer(text, add_special_tokens=False)["input_ids"]) for text in row) for row in rows]
    for characters in (lengths.CHARACTERS, 100):
        monkeypatch.setattr(lengths, "CHARACTERS", characters)
        found = may_exceed(tokenizer, rows, [room] * len(rows))
        assert found == [i for i, count in enumerate(tokens) if count + 2 * SLACK > room]


def test_rows_that_will_be_cut_are_counted_with_their_places(tokenizer):
    examples = [example("set alarm " * (i % 30), "yes", f"a.jsonl, line {i}") for i in range(300)]
    for max_length in (20, 47, 64, 1000):
        prompts = PromptTokenizer(tokenizer, max_length=max_length)
        whole = PromptTokenizer(tokenizer, max_length=10_000)
        cut = [one.where for one in examples if len(whole(one)[0]) > max_length]
        tally = Tally()
        prompts.check(examples, "task.data", tally, 10_000)
        counts = tally.as_dict()["rows"]
        assert counts == ({"task.data": {f"rows cut: longer than {max_length:,} tokens": len(cut)}} if cut else {})
        if cut:
            assert f"{len(cut)} of 300 rows cut" in tally.lines()[0] and f"({cut[0]}; " in tally.lines()[0]


def test_prompts_that_fill_the_context_alone_are_refused(tokenizer):
    whole = PromptTokenizer(tokenizer, max_length=10_000)
    examples = [example("set alarm " * n, "yes", f"a.jsonl, line {n}") for n in (1, 30, 31, 32)]
    lengths = [len(whole.prompt_ids(one.messages[:1])) for one in examples]
    prompts = PromptTokenizer(tokenizer, max_length=16)
    prompts.check(examples, "task.data", Tally(), lengths[3] + 1)  # the longest leaves one token for the answer
    prompts.check(examples, "task.data", Tally(), None)
    with pytest.raises(DataError) as caught:
        prompts.check(examples, "task.data", Tally(), lengths[1])
    message = str(caught.value)
    assert message.startswith("task.data: 3 of 4 rows have a prompt that leaves no room for an answer")
    assert f"context of {lengths[1]} tokens (a.jsonl, line 30; line 31; line 32)" in message
    assert f"the longest has {lengths[3]};" in message and "shorten or remove" in message


@pytest.mark.parametrize("rewrites", [False, True])
def test_a_long_history_is_cut_and_not_refused(tokenizer, rewrites):
    if rewrites:
        if tokenizer.chat_template is None:
            pytest.skip("plain text is not rewritten")
        shorter = "{{ m.content if loop.last or m.role == 'user' else m.content[1:] }}"
        tokenizer.chat_template = CHATML.replace("{{ m.content }}", shorter)
    prompts = PromptTokenizer(tokenizer, max_length=64)

    def conversation(prompt: str) -> TaskExample:
        turns = [("rain " * 200, "yes"), (prompt, "no")]
        texts = [example(*turn).messages for turn in turns]
        return TaskExample([*texts[0], *texts[1]], "en", where="x")

    tally = Tally()
    prompts.check([conversation("set")], "task.data", tally, 64)
    assert tally.as_dict()["rows"] == {"task.data": {"rows cut: longer than 64 tokens": 1}}
    with pytest.raises(DataError, match="1 of 1 rows have a prompt that leaves no room"):
        prompts.check([conversation("sun " * 200)], "task.data", Tally(), 64)


def test_a_long_answer_is_cut_and_not_refused(tokenizer):
    tally = Tally()
    PromptTokenizer(tokenizer, max_length=64).check([example("set", "yes " * 200, "x")], "task.data", tally, 64)
    assert tally.as_dict()["rows"] == {"task.data": {"rows cut: longer than 64 tokens": 1}}


def test_short_rows_are_not_tokenized(tokenizer):
    def tokenized(count: int, prompt: str) -> int:
        counting: Any = Counting(tokenizer)
        PromptTokenizer(counting, max_length=400).check([example(prompt, "yes")] * count)
        return counting.texts

    assert tokenized(1, "größe 日本") == tokenized(1000, "größe 日本") > 0
    assert tokenized(1000, "größe 日本" * 40) >= 2000, "or this counts nothing"


def test_sentences_that_will_be_cut_are_counted_once_each(tokenizer):
    pairs = [Pair("set " * n, "rain " * 99, "de", "en", n, f"p.jsonl, line {n}") for n in (1, 8, 9, 10, 11, 50)]
    sentences = SentenceTokenizer(tokenizer, max_length=10)
    uncut = SentenceTokenizer(tokenizer, max_length=1000)
    texts = [*dict.fromkeys(text for pair in pairs for text in (pair.source, pair.target))]
    cut = [text for text in texts if uncut([text])["input_ids"].shape[1] > 10]
    assert 2 < len(cut) < 7
    tally = Tally()
    sentences.check(pairs, "alignment.data", tally)
    assert tally.as_dict()["rows"] == {"alignment.data": {"different sentences cut: longer than 10 tokens": len(cut)}}
    assert f"{len(cut)} of 7 different sentences" in tally.lines()[0] and "(p.jsonl, line 1; line " in tally.lines()[0]


def test_a_sacrificial_token_takes_room(tokenizer):
    room = len(tokenizer("set alarm")["input_ids"])
    tokenizer.bos_token = None
    for skip, cut in ((False, {}), ("auto", {"alignment.data": 1})):
        tally = Tally()
        sentences = SentenceTokenizer(tokenizer, skip, max_length=room)  # type: ignore[arg-type]
        sentences.check([Pair("set alarm", "", "de", "en", 0)], "alignment.data", tally)
        assert {key: sum(counts.values()) for key, counts in tally.as_dict()["rows"].items()} == cut
