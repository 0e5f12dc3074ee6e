"""Token ids and labels: exact at the boundary of prompt and answer, for every manner of tokenizer and chat template.

The tokenizers are trained here on a few lines, so that they do merge across that boundary.
"""

from __future__ import annotations

import itertools
import random
from collections.abc import Sequence
from typing import Any

import pytest
import torch
from tokenizers import AddedToken, Tokenizer, decoders, models, normalizers, pre_tokenizers, processors, trainers
from transformers import PreTrainedTokenizerFast

from fastalign.data.parallel import Pair
from fastalign.data.tally import Tally
from fastalign.data.templates import Message, TaskExample
from fastalign.data.tokenization import IGNORE_INDEX, PromptTokenizer, SentenceTokenizer, adds_bos, pad
from fastalign.errors import ConfigError, DataError

SPECIALS = [
    *("<s>", "</s>", "<pad>", "<|im_start|>", "<|im_end|>", "<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>"),
    *("<start_of_turn>", "<end_of_turn>"),
]
LINES = [
    "user\nwhat is the weather?<|im_end|>\nassistant\nthe answer is yes: the sun shines.",
    "assistant\n\nyes\n\nno [INST] hello [/INST] good morning, how are you?",
    "Assistant: yes it is\nUser: no it is not\n\nthe weather in größe 日本語 \U0001f600",
    "Question: where?\nhere and there\n",
]

CHATML = (
    "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
LLAMA3 = (
    "{{ bos_token }}{% for m in messages %}<|start_header_id|>{{ m.role }}<|end_header_id|>\n\n"
    "{{ m.content | trim }}<|eot_id|>{% endfor %}"
    "{% if add_generation_prompt %}<|start_header_id|>assistant<|end_header_id|>\n\n{% endif %}"
)
MISTRAL = (
    "{{ bos_token }}{% for m in messages %}{% if m.role == 'user' %}[INST] {{ m.content }} [/INST]"
    "{% elif m.role == 'assistant' %} {{ m.content }}{{ eos_token }}"
    "{% else %}{{ raise_exception('only user and assistant') }}{% endif %}{% endfor %}"
)
GEMMA = (
    "{{ bos_token }}{% for m in messages %}{% if m.role == 'system' %}{{ raise_exception('no system') }}{% endif %}"
    "{% if (m.role == 'user') != (loop.index0 % 2 == 0) %}{{ raise_exception('roles must alternate') }}{% endif %}"
    "<start_of_turn>{{ 'model' if m.role == 'assistant' else m.role }}\n{{ m.content | trim }}<end_of_turn>\n"
    "{% endfor %}{% if add_generation_prompt %}<start_of_turn>model\n{% endif %}"
)
QWEN3 = (  # writes a thought, if only an empty one, into the last turn, and leaves it out of the earlier ones
    "{% for m in messages %}{% set content = m.content %}{% if m.role == 'assistant' %}"
    "{% set content = content.split('</think>')[-1].lstrip('\n') %}"
    "{% set thought = m.content.split('</think>')[0].split('<think>')[-1].strip() if '</think>' in m.content else '' %}"
    "{% if loop.last %}{% set content = '<think>\n' + thought + '\n</think>\n\n' + content %}{% endif %}{% endif %}"
    "<|im_start|>{{ m.role }}\n{{ content }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
THINKING = (  # the prompt opens a thought that the history does not have
    "{{ bos_token }}{% for m in messages %}{% if m.role == 'assistant' %}Assistant: {{ m.content }}{{ eos_token }}"
    "{% else %}{{ m.role }}: {{ m.content }}\n{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}Assistant: <think>\n{% endif %}"
)
NO_END = (
    "{% for m in messages %}{% if m.role == 'assistant' %}Assistant: {{ m.content }}\n"
    "{% elif m.role == 'user' %}User: {{ m.content }}\n{% else %}{{ m.content }}\n\n{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}Assistant: {% endif %}"
)
SILENT = (  # leaves a system message out without a word
    "{% for m in messages %}{% if m.role == 'user' %}<|im_start|>{{ m.content }}<|im_end|>"
    "{% elif m.role == 'assistant' %}{{ m.content }}<|im_end|>{% endif %}{% endfor %}"
)
TWO_ENDS = CHATML.replace("{% endif %}", "{% else %}{{ eos_token }}{% endif %}")  # of the turn, and of the whole
TEMPLATES = {  # template, end token, what it writes before an answer
    "chatml": (CHATML, "<|im_end|>", ""),
    "llama3": (LLAMA3, "<|eot_id|>", ""),
    "mistral": (MISTRAL, "</s>", " "),
    "gemma": (GEMMA, "<end_of_turn>", ""),
    "qwen3": (QWEN3, "<|im_end|>", "<think>\n\n</think>\n\n"),
    "thinking": (THINKING, "</s>", ""),
    "no end": (NO_END, "</s>", ""),
    "silent": (SILENT, "<|im_end|>", ""),
    "two ends": (TWO_ENDS, "<|im_end|>", ""),
}


def byte_level(regex: bool = False, prefix_space: bool = False) -> Tokenizer:
    """Byte-level BPE. Without the regex it merges whatever stands together, newlines with words included."""
    bpe = Tokenizer(models.BPE())
    bpe.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=prefix_space, use_regex=regex)  # type: ignore
    bpe.decoder = decoders.ByteLevel()  # type: ignore
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    bpe.train_from_iterator(
        LINES * 5, trainers.BpeTrainer(vocab_size=460, special_tokens=SPECIALS, initial_alphabet=alphabet)
    )
    return bpe


def sentencepiece(legacy: bool) -> Tokenizer:
    """BPE in which a space is a letter and every text gets one in front; `legacy`: by a normalizer, as Llama 2."""
    bpe = Tokenizer(models.BPE(unk_token="<unk>", byte_fallback=True))
    letters = sorted({letter for line in LINES for letter in line if letter != " "} | {"▁"})
    fallback = [f"<0x{i:02X}>" for i in range(256)]
    trainer = trainers.BpeTrainer(
        vocab_size=560, special_tokens=[*SPECIALS, "<unk>", *fallback], initial_alphabet=letters
    )
    if legacy:
        bpe.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])  # type: ignore
        strip = decoders.Strip(content=" ", left=1)
        parts = [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), strip]
        bpe.decoder = decoders.Sequence(parts)  # type: ignore
    else:
        bpe.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="always", split=False)  # type: ignore
        bpe.decoder = decoders.Sequence([decoders.ByteFallback(), decoders.Metaspace(prepend_scheme="always")])  # type: ignore
    bpe.train_from_iterator([line.replace("\n", "") for line in LINES * 5], trainer)
    return bpe


def wrap(backend: Tokenizer, template: str | None = None, *, bos: bool = True, eos: bool = False) -> Any:
    """`bos`, `eos`: whether they are put around every text."""
    if bos or eos:
        around = "<s> $A" if bos else "$A"
        ids = [(token, backend.token_to_id(token)) for token in ("<s>", "</s>")]
        backend.post_processor = processors.TemplateProcessing(  # type: ignore
            single=around + (" </s>" if eos else ""), special_tokens=ids
        )
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=backend, bos_token="<s>", eos_token="</s>", pad_token="<pad>")
    tokenizer.chat_template = template
    return tokenizer


BACKENDS = {
    "byte level, merging all": byte_level(),
    "byte level with regex": byte_level(regex=True),
    "byte level, prefix space": byte_level(regex=True, prefix_space=True),
    "metaspace": sentencepiece(legacy=False),
    "llama 2": sentencepiece(legacy=True),
}
CASES = [
    (f"{backend}, {'BOS' if bos else 'no BOS'}, {name}", backend, bos, name)
    for backend in BACKENDS
    for name in TEMPLATES
    for bos in (True, False)
]
ENDS_WITH_SPECIAL = ("chatml", "llama3", "gemma")  # a prompt's last token is special, or a newline after one
ANSWERS = [
    "yes",
    "the sun shines.",
    " yes",
    "\nyes",
    "\n\nno",
    "größe 日本語 \U0001f600!",
    ": a",
    "zq\tx\n\nyes",
    "1",
    ")",
]


def make(backend: str, bos: bool, name: str | None) -> Any:
    copy = Tokenizer.from_str(BACKENDS[backend].to_str())
    return wrap(copy, TEMPLATES[name][0] if name else None, bos=bos)


def chat(*contents: str, system: str | None = None) -> list[Message]:
    roles = itertools.cycle(["user", "assistant"])
    messages = [{"role": role, "content": content} for role, content in zip(roles, contents, strict=False)]
    return [{"role": "system", "content": system}, *messages] if system is not None else messages


def encode(prompts: PromptTokenizer, messages: Sequence[Message], **options: Any) -> tuple[list[int], list[int]]:
    ids, labels = prompts(TaskExample(list(messages), "en", **options))
    assert len(ids) == len(labels)
    assert all(label in (i, IGNORE_INDEX) for i, label in zip(ids, labels, strict=True))
    return ids, labels


def spans(labels: list[int]) -> list[list[int]]:
    """The learnt ids, turn by turn."""
    groups = itertools.groupby(labels, key=lambda label: label != IGNORE_INDEX)
    return [list(group) for learnt, group in groups if learnt]


def text(tokenizer: Any, ids: list[int], after: str = "\n") -> str:
    """`ids` as text in the middle of a text, where no decoder takes a space off."""
    head = tokenizer(after, add_special_tokens=False)["input_ids"]
    decode = {
        "skip_special_tokens": False,
        "clean_up_tokenization_spaces": False,
        "spaces_between_special_tokens": False,
    }
    return tokenizer.decode(head + ids, **decode)[len(tokenizer.decode(head, **decode)) :]


def written(tokenizer: Any, messages: Sequence[Message]) -> list[int]:
    """What a user's program generates from."""
    prompt = tokenizer.apply_chat_template(list(messages), tokenize=False, add_generation_prompt=True)
    return tokenizer(prompt, add_special_tokens=False)["input_ids"]


@pytest.mark.parametrize(("backend", "bos", "name"), [case[1:] for case in CASES], ids=[case[0] for case in CASES])
def test_labels_are_the_answer_and_its_end_and_nothing_else(backend, bos, name):
    tokenizer = make(backend, bos, name)
    _, end, before = TEMPLATES[name]
    prompts = PromptTokenizer(tokenizer)
    trims = name in ("llama3", "gemma")
    for answer in ANSWERS:
        messages = chat("what is the weather?", answer)
        ids, labels = encode(prompts, messages)
        [learnt] = spans(labels)
        given = answer.strip() if trims else answer.lstrip("\n") if name == "qwen3" else answer
        assert text(tokenizer, learnt) == before + given + end
        assert learnt[-1] == tokenizer.convert_tokens_to_ids(end)
        prompt = ids[: -len(learnt)]
        assert labels[len(prompt) :] == learnt
        assert prompt == written(tokenizer, messages[:-1]) == prompts.prompt_ids(messages[:-1])


def test_the_tokenizers_do_merge_across_the_boundary():
    """Or the test above would show nothing."""
    merged = 0
    for _, backend, bos, name in CASES:
        tokenizer = make(backend, bos, name)
        for answer in ANSWERS:
            messages = chat("what is the weather?", answer)
            prompt = written(tokenizer, messages[:-1])
            whole = tokenizer.apply_chat_template(messages, tokenize=False)
            merged += tokenizer(whole, add_special_tokens=False)["input_ids"][: len(prompt)] != prompt
    assert merged > 100


@pytest.mark.parametrize(("backend", "bos", "name"), [case[1:] for case in CASES], ids=[case[0] for case in CASES])
def test_every_turn_is_learnt(backend, bos, name):
    tokenizer = make(backend, bos, name)
    _, end, before = TEMPLATES[name]
    messages = chat("where?", "yes", "hello", "no it is not", "here?", "good morning")
    prompts = PromptTokenizer(tokenizer)
    ids, labels = encode(prompts, messages)
    answers = ["yes", "no it is not", "good morning"]
    if name in ("qwen3", "thinking"):  # an earlier turn does not stand in the history as it was written
        answers = answers[-1:]
        assert ids[: -len(spans(labels)[0])] == written(tokenizer, messages[:-1])
    assert [text(tokenizer, span) for span in spans(labels)] == [before + answer + end for answer in answers]
    assert prompts.prompt_ids(messages[:-1]) == written(tokenizer, messages[:-1])
    if name != "no end" and len(answers) == 3:  # nothing is lost or doubled between the turns but prepended spaces
        told = tokenizer.apply_chat_template(messages, tokenize=False)
        assert told.replace(" ", "").startswith(text(tokenizer, ids).replace(" ", ""))


@pytest.mark.parametrize(
    ("backend", "name"),
    [("byte level with regex", "mistral")]
    + [(backend, name) for backend in ("byte level with regex", "metaspace", "llama 2") for name in ENDS_WITH_SPECIAL],
)
def test_later_turns_see_the_history_that_generation_sees(backend, name):
    """Token for token, where no token reaches from one turn into the next."""
    tokenizer = make(backend, True, name)
    messages = chat("where?", "yes", "hello", "no it is not", "here?", "good")
    ids, labels = encode(PromptTokenizer(tokenizer), messages)
    assert ids[: -len(spans(labels)[-1])] == written(tokenizer, messages[:-1])


def test_an_added_token_that_swallows_the_white_space_around_it():
    template = CHATML.replace("<|im_end|>", "<|end|>").replace("<|im_start|>", "<|user|>")
    tokenizer = make("llama 2", True, "chatml")
    tokenizer.add_tokens(
        [AddedToken(t, rstrip=True, special=True) for t in ("<|end|>", "<|user|>")], special_tokens=True
    )
    tokenizer.chat_template = template
    messages = chat("where?", "yes", "hello", "no")
    ids, labels = encode(PromptTokenizer(tokenizer), messages)
    assert ids[: -len(spans(labels)[-1])] == written(tokenizer, messages[:-1])
    assert [text(tokenizer, span) for span in spans(labels)] == ["yes<|end|>", "no<|end|>"]


def test_an_end_token_that_is_not_marked_as_special():
    tokenizer = make("byte level with regex", False, None)
    tokenizer.add_tokens([AddedToken("</answer>", special=False), AddedToken("<end>", special=False)])
    tokenizer.chat_template = CHATML.replace("<|im_end|>", "<end>")
    _, labels = encode(PromptTokenizer(tokenizer), chat("a", "yes</answer>"))
    assert text(tokenizer, spans(labels)[0]) == "yes</answer><end>"
    tokenizer.chat_template = CHATML.replace("<|im_end|>", "</answer><|im_end|>")
    _, labels = encode(PromptTokenizer(tokenizer), chat("a", "yes"))
    assert text(tokenizer, spans(labels)[0]) == "yes</answer><|im_end|>", "a special token ends a turn before others do"


def test_an_answer_that_holds_special_tokens_is_learnt_to_its_end():
    tokenizer = make("byte level with regex", False, "chatml")
    _, labels = encode(PromptTokenizer(tokenizer), chat("a", "yes<|im_end|>\nno"))
    assert text(tokenizer, [i for span in spans(labels) for i in span]) == "yes<|im_end|>\nno<|im_end|>"


def test_thinking_of_the_last_turn_is_learnt_and_of_earlier_ones_forgotten():
    tokenizer = make("byte level, merging all", False, "qwen3")
    first, second = "<think>\nhm\n</think>\n\nyes", "<think>\nso\n</think>\n\nno"
    ids, labels = encode(PromptTokenizer(tokenizer), chat("a", first, "b", second))
    assert text(tokenizer, spans(labels)[0]) == second + "<|im_end|>"
    assert "hm" not in text(tokenizer, ids)
    _, labels = encode(PromptTokenizer(tokenizer), chat("a", first))
    assert text(tokenizer, spans(labels)[0]) == first + "<|im_end|>"


@pytest.mark.parametrize("name", ["mistral", "gemma", "silent"])
@pytest.mark.parametrize("turns", [("a", "yes"), ("a", "yes", "b", "no")])
def test_a_system_message_goes_to_the_user_where_the_template_has_no_place_for_it(name, turns):
    tokenizer = make("byte level with regex", True, name)
    prompts = PromptTokenizer(tokenizer)
    with_system = chat(*turns, system="be brief")
    merged = [{**with_system[1], "content": "be brief\n\na"}, *with_system[2:]]
    assert encode(prompts, with_system) == encode(prompts, merged)
    assert prompts.prompt_ids(with_system[:-1]) == written(tokenizer, merged[:-1])
    assert text(tokenizer, prompts.prompt_ids(with_system[:2])).count("be brief") == 1


def test_a_system_message_stays_where_the_template_has_a_place_for_it():
    for name in ("chatml", "llama3", "no end"):
        tokenizer = make("byte level with regex", True, name)
        prompt = PromptTokenizer(tokenizer).prompt_ids(chat("a", system=" be brief\n"))
        assert prompt == written(tokenizer, chat("a", system=" be brief\n"))


def test_roles_that_a_template_refuses():
    prompts = PromptTokenizer(make("byte level with regex", True, "gemma"))
    good, bad = TaskExample(chat("a", "yes"), "en"), [*chat("a"), *chat("b", "no")]
    with pytest.raises(
        DataError, match=r"^x\.jsonl, line 3: the chat template does not take .* user, user: roles must"
    ):
        encode(prompts, bad, where="x.jsonl, line 3")
    with pytest.raises(DataError, match=r"x\.jsonl, line 4: "):
        prompts.check([good, good, TaskExample(bad, "en", where="x.jsonl, line 4")])


def test_chat_templates_from_a_file(tmp_path):
    path = tmp_path / "chat.jinja"
    path.write_text(GEMMA, encoding="utf-8")
    tokenizer = make("byte level with regex", True, "chatml")
    ids, _ = encode(PromptTokenizer(tokenizer, str(path)), chat("a", "yes"))
    assert text(tokenizer, ids) == "<s><start_of_turn>user\na<end_of_turn>\n<start_of_turn>model\nyes<end_of_turn>"
    with pytest.raises(ConfigError, match=r"task\.chat_template: .*none.jinja' cannot be read"):
        PromptTokenizer(tokenizer, str(tmp_path / "none.jinja"))
    path.write_text("a\n{% for m in messages %}", encoding="utf-8")
    with pytest.raises(ConfigError, match=r"task\.chat_template: not a jinja template .*line 2"):
        encode(PromptTokenizer(tokenizer, str(path)), chat("a", "yes"))


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize(("bos", "eos"), [(True, False), (False, False), (True, True)])
@pytest.mark.parametrize("template", ["auto", "none"])
def test_plain_text_without_a_chat_template(backend, bos, eos, template):
    tokenizer = wrap(
        Tokenizer.from_str(BACKENDS[backend].to_str()), CHATML if template == "none" else None, bos=bos, eos=eos
    )
    prompts = PromptTokenizer(tokenizer, template)
    messages = chat("where?", "yes", system="be brief")
    ids, labels = encode(prompts, messages)
    prompt = tokenizer("be brief\n\nwhere?\n")["input_ids"]
    prompt = prompt[:-1] if eos else prompt
    [learnt] = spans(labels)
    assert ids == prompt + learnt
    assert (ids[0] == tokenizer.bos_token_id) is bos and ids.count(tokenizer.eos_token_id) == 1
    assert text(tokenizer, learnt) == "yes</s>"
    assert prompts.prompt_ids(messages[:-1]) == prompt

    ids, labels = encode(prompts, chat("a", "yes", "b", "no", "c", "good", system="x"))
    assert [text(tokenizer, span) for span in spans(labels)] == ["yes</s>", "no</s>", "good</s>"]
    whole = ("<s>" if bos else "") + "x\n\na\nyes</s>\n\nb\nno</s>\n\nc\ngood</s>"
    assert text(tokenizer, ids).replace(" ", "") == whole
    assert prompts.prompt_ids(chat("a", "yes", "b", "no", "c", system="x")) == ids[: -len(spans(labels)[-1])]


@pytest.mark.parametrize("template", [None, CHATML])
def test_rows_of_the_reference_are_taken_as_they_are(template):
    """Their markup is written already: a BOS before it, no chat template around it, no second end."""
    tokenizer = make("byte level, merging all", True, None)
    tokenizer.chat_template = template
    prefix = (
        "<|start_header_id|>user<|end_header_id|>\n\nhi<|eot_id|>\n<|start_header_id|>assistant<|end_header_id|>\n\n"
    )
    prompts = PromptTokenizer(tokenizer)
    for start in ("", "<s>"):
        for answer, end in (("yes<|eot_id|>", ""), ("yes", "</s>"), ("yes</s>\n", "")):
            ids, labels = encode(prompts, chat(start + prefix, answer), raw=True)
            [learnt] = spans(labels)
            assert ids[: -len(learnt)] == tokenizer(prefix)["input_ids"]
            assert text(tokenizer, learnt) == answer.strip() + end


def test_no_end_token_at_all():
    backend = byte_level(regex=True)
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=backend, pad_token="<pad>")
    ids, labels = encode(PromptTokenizer(tokenizer), chat("a", "yes"))
    assert text(tokenizer, spans(labels)[0]) == "yes"
    assert text(tokenizer, ids) == "a\nyes"


def cut(
    max_length: int, *turns: str, bos: bool = True, name: str | None = "llama3"
) -> tuple[Any, list[int], list[int]]:
    tokenizer = make("byte level with regex", bos, name)
    prompts = PromptTokenizer(tokenizer, max_length=max_length)
    ids, labels = encode(prompts, chat(*turns))
    assert len(ids) <= max_length
    return tokenizer, ids, labels


def test_truncation_keeps_the_answer():
    whole_ids, whole = cut(1024, "where? " * 20, "yes it is")[1:]
    learnt = spans(whole)[0]
    for bos, name in ((True, "llama3"), (False, "chatml"), (True, None), (False, None)):
        for room in (len(whole_ids), 60, 30, 16):
            tokenizer, ids, labels = cut(room, "where? " * 20, "yes it is", bos=bos, name=name)
            assert text(tokenizer, spans(labels)[0])[:9] == "yes it is"
            assert labels[-1] in (tokenizer.convert_tokens_to_ids(t) for t in ("<|eot_id|>", "<|im_end|>", "</s>"))
            assert labels[0] == IGNORE_INDEX
            if bos:
                assert ids[0] == tokenizer.bos_token_id and ids.count(ids[0]) == 1
            full = PromptTokenizer(make("byte level with regex", bos, name))(
                TaskExample(chat("where? " * 20, "yes it is"), "")
            )[0]
            assert ids == full if len(full) <= room else ids[bos:] == full[-(room - bos) :]
    assert len(learnt) > 3


def test_truncation_of_an_answer_that_is_too_long():
    for bos in (True, False):
        name = "llama3" if bos else "chatml"
        tokenizer, ids, labels = cut(8, "where? " * 20, "yes it is " * 20, bos=bos, name=name)
        assert len(ids) == 8 and labels[0] == IGNORE_INDEX and len(spans(labels)[0]) == 7
        assert text(tokenizer, spans(labels)[0]).startswith("yes it is")


def test_truncation_of_several_turns_keeps_the_last():
    turns = ("where? " * 5, "yes it is not " * 5, "here?", "no no")
    tokenizer, whole_ids, whole = cut(1024, *turns)
    first, last = spans(whole)
    for room in range(len(last) + 2, len(whole_ids)):
        _, ids, labels = cut(room, *turns)
        assert len(ids) == room and ids[0] == tokenizer.bos_token_id
        assert ids[1:] == whole_ids[-(room - 1) :]
        assert spans(labels)[-1] == last
        anything_before = room - 1 > len(whole_ids) - whole.index(first[0])
        assert spans(labels)[:-1] == ([first] if anything_before else [])


def test_a_prompt_that_is_too_long_to_generate_from():
    for bos in (True, False):
        tokenizer = make("byte level with regex", bos, "llama3" if bos else "chatml")
        whole = PromptTokenizer(tokenizer).prompt_ids(chat("where? " * 20))
        prompts = PromptTokenizer(tokenizer, max_length=10)
        kept = prompts.prompt_ids(chat("where? " * 20))
        assert len(kept) == 10 and kept[bos:] == whole[-(10 - bos) :] and kept[:bos] == whole[:bos]


def test_any_answer_comes_back_from_its_labels():
    generator = random.Random(0)
    letters = "aeyns .,:!?)(\n\t▁é日\U0001f600\u200b0'\""
    for backend, name in itertools.product(BACKENDS, ("chatml", "mistral", None)):
        tokenizer = make(backend, True, name)
        prompts = PromptTokenizer(tokenizer)
        end, before = TEMPLATES[name][1:] if name else ("</s>", "")
        for _ in range(40):
            answer = "".join(generator.choices(letters, k=generator.randint(1, 8)))
            if not answer.strip() or ("▁" in answer and backend in ("metaspace", "llama 2")):
                continue  # an empty answer is refused by the reader; to SentencePiece the character is a space
            ids, labels = encode(prompts, chat("what?", answer))
            assert text(tokenizer, spans(labels)[0]) == before + answer + end
            assert ids[: -len(spans(labels)[0])] == prompts.prompt_ids(chat("what?"))


# Sentences


SENTENCES = ["the weather", "yes", "good morning, how are you? " * 3]


def test_sentences_with_a_bos():
    tokenizer = make("byte level with regex", True, None)
    assert adds_bos(tokenizer)
    batch = SentenceTokenizer(tokenizer)(SENTENCES)
    rows = [tokenizer(sentence)["input_ids"] for sentence in SENTENCES]
    width = max(map(len, rows))
    for i, ids in enumerate(rows):
        padding = width - len(ids)
        assert batch["input_ids"][i].tolist() == ids + [tokenizer.pad_token_id] * padding
        assert batch["attention_mask"][i].tolist() == [1] * len(ids) + [0] * padding
        assert batch["pool_mask"][i].tolist() == [0] + [1] * (len(ids) - 1) + [0] * padding
    assert all(part.dtype == torch.int64 for part in batch.values())


def test_sentences_without_a_bos_get_a_token_to_sacrifice():
    tokenizer = make("byte level with regex", False, None)
    assert not adds_bos(tokenizer)
    batch = SentenceTokenizer(tokenizer)(SENTENCES)
    for i, sentence in enumerate(SENTENCES):
        ids = [tokenizer.bos_token_id, *tokenizer(sentence)["input_ids"]]
        assert batch["input_ids"][i, : len(ids)].tolist() == ids
        assert batch["pool_mask"][i].sum() == len(ids) - 1 and batch["pool_mask"][i, 0] == 0
    bare = PreTrainedTokenizerFast(tokenizer_object=byte_level(regex=True), eos_token="</s>", pad_token="<pad>")
    assert not adds_bos(bare)
    assert SentenceTokenizer(bare)(["yes"])["input_ids"][0, 0] == bare.eos_token_id


@pytest.mark.parametrize("bos", [True, False])
def test_sentences_as_in_the_paper_and_with_whatever_is_first_left_out(bos):
    tokenizer = make("byte level with regex", bos, None)
    rows = [tokenizer(sentence)["input_ids"] for sentence in SENTENCES]
    every = SentenceTokenizer(tokenizer, skip_first_token=False)(SENTENCES)
    assert (every["pool_mask"] == every["attention_mask"]).all()
    assert every["attention_mask"].sum(1).tolist() == [len(ids) for ids in rows]
    later = SentenceTokenizer(tokenizer, skip_first_token=True)(SENTENCES)
    assert (later["input_ids"] == every["input_ids"]).all()
    assert later["pool_mask"].sum(1).tolist() == [max(len(ids) - 1, 1) for ids in rows]


def test_last_token_pooling():
    for bos, skip in itertools.product((True, False), ("auto", True, False)):
        batch = SentenceTokenizer(make("byte level with regex", bos, None), skip, "last")(SENTENCES)  # type: ignore[arg-type]
        lengths = batch["attention_mask"].sum(1)
        assert batch["pool_mask"].sum(1).tolist() == [1, 1, 1]
        assert batch["pool_mask"].argmax(1).tolist() == (lengths - 1).tolist()


def test_sentences_are_cut_at_their_end():
    for bos in (True, False):
        tokenizer = make("byte level with regex", bos, None)
        batch = SentenceTokenizer(tokenizer, max_length=5)(SENTENCES)
        ids = [tokenizer.bos_token_id, *tokenizer(SENTENCES[2], add_special_tokens=False)["input_ids"][:4]]
        assert batch["input_ids"].shape == (3, 5)
        assert batch["input_ids"][2].tolist() == ids
        assert len(tokenizer("a" * 99, add_special_tokens=False)["input_ids"]) > 5, "the tokenizer itself cuts nothing"


def test_sentences_of_one_token_or_none_are_pooled():
    tokenizer = make("byte level with regex", False, None)
    for skip in (True, False, "auto"):
        batch = SentenceTokenizer(tokenizer, skip)(["", "a"])  # type: ignore[arg-type]
        assert batch["pool_mask"].sum(1).tolist() == [1, 1]
        assert batch["attention_mask"].sum(1).min() >= 1


def test_pad():
    assert pad([[1, 2], [], [3]], -7).tolist() == [[1, 2], [-7, -7], [3, -7]]
    assert pad([], 0).shape[0] == 0


def test_tokens_that_the_embedding_lacks_are_refused():
    tokenizer = wrap(byte_level())
    rows = len(tokenizer)
    tokenizer.add_tokens(["<image>"])
    known, beyond = chat("where?", "here"), chat("where <image>?", "here")
    prompts = PromptTokenizer(tokenizer, embedding_rows=rows)
    sentences = SentenceTokenizer(tokenizer, embedding_rows=rows)
    prompts(TaskExample(known, "en"))
    prompts.check([TaskExample(known, "en")])
    sentences(["where?"])
    said = f"'<image>', number {rows}, but the model's embedding only has {rows} rows"
    row = TaskExample(beyond, "en", where="x.jsonl, line 3")
    for refused in (lambda: prompts(row), lambda: prompts.check([TaskExample(known, "en"), row])):
        with pytest.raises(DataError, match=f"^x.jsonl, line 3: .*{said}"):
            refused()
    with pytest.raises(DataError, match=said):
        sentences(["a", "an <image>"])
    with pytest.raises(DataError, match=f"^p.jsonl, line 2: .*{said}"):
        sentences.check([Pair("an <image>", "b", "de", "en", 0, "p.jsonl, line 2")], "alignment.data", Tally())
    PromptTokenizer(tokenizer, embedding_rows=rows + 1)(row)


def test_a_chat_template_that_writes_a_token_that_the_embedding_lacks():
    tokenizer = wrap(byte_level(), "<image>" + CHATML)
    tokenizer.add_tokens(["<image>"])
    prompts = PromptTokenizer(tokenizer, embedding_rows=len(tokenizer) - 1)
    with pytest.raises(DataError, match="'<image>'"):
        prompts.check([TaskExample(chat("where?", "here"), "en")])
