"""What README and docs/ show works as it is written: links, names, configurations, commands, examples, messages."""

from __future__ import annotations

import ast
import re
import shlex
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import pytest

from fastalign.cli import _parse
from fastalign.config import ModelConfig, load_config
from fastalign.config.reference import WRITTEN
from fastalign.data import demo_corpus

ROOT = Path(__file__).resolve().parents[1]
FOLDERS = ("docs", "examples", "benchmarks", "kernels", "tests", "fastalign")
PAGES = sorted([*ROOT.glob("*.md"), *(page for folder in FOLDERS for page in (ROOT / folder).rglob("*.md"))])
HISTORY = ROOT / "CHANGELOG.md"  # names what was there at the time
FENCED = re.compile(r"(<!-- not run: [^\n]+ -->\n)?^( *)```(\w*)\n(.*?)^\2```", flags=re.M | re.S)
FORBIDDEN = {"kernels/__init__.py"}  # named because it must not be there
CODE = re.compile(r"(?<!`)`([^`\n]+)`(?!`)")


class Block(NamedTuple):
    """A fenced piece of a page. `runs`: no comment `<!-- not run: why -->` stands before it."""

    page: Path
    line: int
    language: str
    text: str
    runs: bool

    @property
    def where(self) -> str:
        return f"{self.page.name}:{self.line}"


def read(page: Path) -> str:
    return page.read_text(encoding="utf-8")


def blocks(*languages: str) -> list[Block]:
    found = []
    for page in PAGES:
        text = read(page)
        for match in FENCED.finditer(text):
            line = text.count("\n", 0, match.start(3)) + 1
            found.append(Block(page, line, match[3], match[4], match[1] is None))
    return [block for block in found if block.language in languages]


def prose(page: Path) -> str:
    return FENCED.sub("", read(page))


def name_of(block: Block) -> str:
    return block.where


# Links


def anchors(page: Path) -> set[str]:
    """As GitHub names the headings of a page, and ids that are given by hand."""
    headings = re.findall(r"^#+ +(.+?) *$", prose(page), flags=re.M)
    plain = (re.sub(r"\[([^]]*)\]\([^)]*\)", r"\1", heading) for heading in headings)
    slugs = {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in plain}
    return slugs | set(re.findall(r'\bid="([^"]+)"', prose(page)))


def broken_links(page: Path) -> Iterator[str]:
    text = CODE.sub("", prose(page))
    links = re.findall(r"\]\(([^)\s]+)[^)]*\)", text) + re.findall(r'\b(?:src|srcset|href)="([^"]+)"', text)
    for link in links:
        if re.match(r"[a-z]+:", link):  # of the web
            continue
        path, _, anchor = link.partition("#")
        target = page if not path else page.parent / path
        if not target.exists() or (anchor and anchor not in anchors(target)):
            yield f"{page.name}: {link}"


def test_links_lead_to_files_and_headings_that_exist() -> None:
    assert [link for page in PAGES for link in broken_links(page)] == []


def test_a_broken_link_is_found(tmp_path: Path) -> None:
    page = tmp_path / "page.md"
    page.write_text("# Some `code`, here\n[a](#some-code-here) [b](#gone) [c](none.md) [d](page.md#some-code-here)\n")
    assert [*broken_links(page)] == ["page.md: #gone", "page.md: none.md"]


def test_every_page_of_docs_is_in_its_index() -> None:
    index = read(ROOT / "docs" / "README.md")
    pages = {page.name for page in (ROOT / "docs").glob("*.md")} - {"README.md"}
    assert pages == set(re.findall(r"\]\(([\w.-]+)\)", index))


# Names


def test_files_that_are_named_exist() -> None:
    named = re.compile(rf"(?:{'|'.join(FOLDERS)})/[\w./-]*")
    gone = [
        f"{page.name}: {name}"
        for page in PAGES
        if page != HISTORY
        for name in CODE.findall(prose(page))
        if named.fullmatch(name) and name not in FORBIDDEN and not (ROOT / name).exists()
    ]
    assert gone == []


def test_the_map_of_the_readme() -> None:
    rows = re.findall(r"^\| (`.*?) \| (.*) \|$", read(ROOT / "README.md").split("## Map")[1], flags=re.M)
    assert len(rows) > 5
    for names, text in rows:
        folders = [ROOT / name for name in CODE.findall(names)]
        assert all(folder.exists() for folder in folders), names
        for name in CODE.findall(text):
            if re.fullmatch(r"\w+\.\w+", name):
                assert any(found for folder in folders for found in folder.rglob(name)), f"{names}: {name}"


def test_targets_of_make_exist() -> None:
    targets = set(re.findall(r"^([a-z-]+):", read(ROOT / "Makefile"), flags=re.M))
    named = {name for page in PAGES for name in re.findall(r"`make ([a-z-]+)", prose(page))}
    named |= {name for block in blocks("", "sh") for name in re.findall(r"^make ([a-z-]+)", block.text, flags=re.M)}
    assert len(named) > 5 and named <= targets, named - targets


# Configurations and commands


@pytest.mark.parametrize("block", blocks("yaml"), ids=name_of)
def test_configurations_load(block: Block, tmp_path: Path) -> None:
    from fastalign.training.arguments import effective_training

    (tmp_path / "config.yaml").write_text(block.text, encoding="utf-8")
    effective_training(load_config(tmp_path / "config.yaml"), can_evaluate=True)


@pytest.mark.parametrize("path", sorted((ROOT / "examples").glob("*.yaml")), ids=lambda path: path.name)
def test_examples_load(path: Path) -> None:
    load_config(path)


def commands(text: str) -> list[list[str]]:
    """The arguments of fastalign in every line that calls it, directly or through a launcher."""
    found = []
    for line in text.replace("\\\n", " ").splitlines():
        if not re.search(r"(^|\s)fastalign ", line.removeprefix("$ ")):
            continue
        words = shlex.split(line.removeprefix("$ "), comments=True)
        if "fastalign" in words:
            found.append(words[words.index("fastalign") + 1 :])
    return found


def test_commands_parse() -> None:
    shown = [(block.where, words) for block in blocks("", "sh", "bash", "console") for words in commands(block.text)]
    inline = [code for page in PAGES if page != HISTORY for code in CODE.findall(prose(page))]
    shown += [(code, commands(code)[0]) for code in inline if code.startswith("fastalign ")]
    assert len(shown) > 10
    for where, words in shown:
        try:
            arguments = _parse(words)
        except SystemExit as end:
            assert end.code == 0, f"{where}: fastalign {shlex.join(words)}"  # --help
        else:
            load_config(overrides=getattr(arguments, "overrides", []))


# Python


@pytest.fixture
def workspace(model_dir: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """What the examples find where they run: what `make demo` leaves, but smaller, and an adapter."""
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM

    from fastalign.config import AdapterConfig
    from fastalign.model.loading import add_adapter, load_model, load_tokenizer

    monkeypatch.chdir(tmp_path)
    demo_corpus.write("demo-output/data", train=60, test=10, parallel=120, text=10)
    shutil.copytree(model_dir, "demo-output/model")
    # Its tokenizer makes many tokens of a word.
    small = {"max_position_embeddings": 256, "hidden_size": 16, "intermediate_size": 16, "head_dim": 8}
    small |= {"num_attention_heads": 2, "num_key_value_heads": 1}
    settings = AutoConfig.from_pretrained(model_dir, **small)
    AutoModelForCausalLM.from_config(settings).save_pretrained("demo-output/model")
    base = ModelConfig(name_or_path="demo-output/model")
    add_adapter(load_model(base, torch.device("cpu")), AdapterConfig()).save_pretrained("fastalign-output")
    load_tokenizer(base).save_pretrained("fastalign-output")
    return tmp_path


@pytest.mark.parametrize("block", [block for block in blocks("python") if block.runs], ids=name_of)
def test_python_runs(block: Block, workspace: Path) -> None:
    exec(compile(block.text, block.where, "exec"), {})


def test_the_python_of_the_readme_is_short() -> None:
    [block] = [block for block in blocks("python") if block.page == ROOT / "README.md"]
    assert block.runs and len(block.text.strip().splitlines()) <= 15


# What is made from the source, or quotes it


@pytest.mark.parametrize("name", WRITTEN)
def test_what_is_made_from_the_keys_is_up_to_date(name: str) -> None:
    assert read(ROOT / name) == WRITTEN[name](), f"{name} is not what fastalign/config says; write it anew: make docs"


def literals() -> Iterator[str]:
    """Every text in the source of fastalign, with ``...`` for what is filled in."""
    for file in (ROOT / "fastalign").rglob("*.py"):
        for node in ast.walk(ast.parse(read(file))):
            if isinstance(node, ast.Constant) and isinstance(node.value, str):
                yield node.value
            elif isinstance(node, ast.JoinedStr):
                yield "".join(str(part.value) if isinstance(part, ast.Constant) else "..." for part in node.values)


def is_quoted_from(message: str, text: str) -> bool:
    """Whether the fixed words of a message, between its ``...``, stand in a text one after the other."""
    pattern = ".*?".join(re.escape(words) for words in message.split("..."))
    return re.search(pattern, text, flags=re.S) is not None


def quoted_messages() -> list[str]:
    rows = re.findall(r"^\| `([^`]+)` \|", read(ROOT / "docs" / "troubleshooting.md"), flags=re.M)
    assert len(rows) >= 20
    return rows


def test_messages_of_the_troubleshooting_are_those_of_the_program() -> None:
    texts = [*literals()]
    stale = [message for message in quoted_messages() if not any(is_quoted_from(message, text) for text in texts)]
    assert stale == [], "no text in fastalign/ has the words of these"
    assert not is_quoted_from("no ... such words", "no such word") and is_quoted_from("a ... c", "a b c")
