"""The demo's task as a conversation that a small model can learn.

A command is said and its intent answered; then its words are read out one by one, and the slot of each is answered:

    wake me at seven today -> alarm,  wake -> no,  me -> no,  at -> no,  seven -> hour,  today -> date

So nothing has to be copied, which is beyond a model of this size, and only answers are learnt. Answers are common
English words that the model knows from plain text. A span is a run of words with the same answer: no two slots of one
kind meet in this corpus.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

INTENTS = {
    "set_alarm": "alarm",
    "get_weather": "weather",
    "play_music": "music",
    "turn_on_device": "switch",
    "send_message": "tell",
    "add_to_list": "add",
}
SLOTS = {
    "O": "please",
    "time": "seven",
    "day": "monday",
    "city": "tokyo",
    "artist": "madonna",
    "occasion": "dinner",
    "device": "lamp",
    "room": "kitchen",
    "person": "anna",
    "message": "late",
    "item": "milk",
    "list": "list",
}
CHAT_TEMPLATE = (
    "{{ bos_token }}{% for message in messages %}{% if message.role == 'assistant' %} {{ message.content }}"
    "{{ eos_token }}{% else %} {{ message.content }}{% endif %}{% endfor %}"
)
"""Of the tokenizer: a space before every word, as in running text, and the end token after an answer."""


def kinds(row: Mapping[str, Any]) -> list[str]:
    """The slot of each word, without the B and I of its tag."""
    return [tag.partition("-")[2] or tag for tag in row["slots"]]


def spans(kinds: Sequence[str]) -> set[tuple[str, int, int]]:
    """(slot, first, end) of every run of words with the same slot."""
    found, first = set(), 0
    for i in range(1, len(kinds) + 1):
        if i == len(kinds) or kinds[i] != kinds[first]:
            if kinds[first] != "O":
                found.add((kinds[first], first, i))
            first = i
    return found


def conversation(row: Mapping[str, Any]) -> dict[str, Any]:
    """A labelled row of the corpus as ``{"lang", "messages"}``."""
    messages = [*_turn(" ".join(row["tokens"]), INTENTS[row["intent"]])]
    for word, kind in zip(row["tokens"], kinds(row), strict=True):
        messages += _turn(word, SLOTS[kind])
    return {"lang": row["lang"], "messages": messages}


def write_conversations(rows: Path, path: Path) -> Path:
    """The labelled rows of a file as conversations in `path`, which is returned."""
    lines = [json.dumps(conversation(json.loads(line))) + "\n" for line in rows.read_text(encoding="utf-8").splitlines()]
    path.write_text("".join(lines), encoding="utf-8")
    return path


def _turn(said: str, answer: str) -> list[dict[str, str]]:
    return [{"role": "user", "content": said}, {"role": "assistant", "content": answer}]
