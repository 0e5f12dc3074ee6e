"""The rules about who may import whom, checked on the source text, and that our names hide no one else's."""

from __future__ import annotations

import ast
import importlib
import importlib.metadata
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]

# The order in which data flows. A room may import itself and the rooms before it.
ROOMS = [
    "errors",
    "config",
    "report",
    "data",
    "model",
    "objectives",
    "streams",
    "probing",
    "training",
    "evaluation",
    "merging",
    "starter",
    "demo",
    "doctor",
    "cli",
]


def imports(file: Path, source_root: Path) -> Iterator[tuple[int, str]]:
    """Line and full dotted name of everything ``file`` imports, inside functions too.

    ``from a.b import c`` is ``a.b.c``; relative imports are resolved; ``import_module`` counts where its
    argument is a literal.
    """
    package = file.relative_to(source_root).parent.parts
    for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            for alias in node.names:
                yield node.lineno, alias.name
        elif isinstance(node, ast.ImportFrom):
            above = package[: len(package) + 1 - node.level] if node.level else ()
            for alias in node.names:
                yield node.lineno, ".".join((*above, *filter(None, [node.module]), alias.name))
        elif isinstance(node, ast.Call) and node.args and isinstance(node.args[0], ast.Constant):
            called = node.func.attr if isinstance(node.func, ast.Attribute) else getattr(node.func, "id", "")
            name = node.args[0].value
            if called in ("import_module", "__import__") and isinstance(name, str):
                dots = len(name) - len(name.lstrip("."))
                above = package[: len(package) + 1 - dots] if dots else ()
                yield node.lineno, ".".join((*above, name.lstrip(".")))


def wrong_way_imports(root: Path) -> list[str]:
    """Imports in ``fastalign/`` that point at a later room, at ``cli``, or at the lazy ``__init__``."""
    found = []
    for file in sorted((root / "fastalign").rglob("*.py")):
        path = file.relative_to(root)
        room = path.parts[1].removesuffix(".py")
        for line, name in imports(file, root):
            top, _, rest = name.partition(".")
            target = rest.split(".")[0]
            if top != "fastalign" or room == "__main__":
                continue
            if room == "__init__":
                wrong = target == "cli"
            elif target in ROOMS and room in ROOMS:
                wrong = ROOMS.index(target) > ROOMS.index(room)
            else:  # an unlisted room, or a public name by way of __init__; fastalign.__version__ is fine
                wrong = not target.startswith("__")
            if wrong:
                found.append(f"{path}:{line} imports {name}")
    return found


def foreign_imports_of_kernels(root: Path) -> list[str]:
    """Imports in ``fastalign_kernels`` of anything but the standard library, torch, triton and itself."""
    allowed = {*sys.stdlib_module_names, "torch", "triton", "fastalign_kernels"}
    source_root = root / "kernels"
    return [
        f"{file.relative_to(root)}:{line} imports {name}"
        for file in sorted((source_root / "fastalign_kernels").rglob("*.py"))
        for line, name in imports(file, source_root)
        if name.split(".")[0] not in allowed
    ]


def files_that_hide_kernels(root: Path) -> list[str]:
    """Files and folders that would be ``import kernels`` for whoever runs something beside them."""
    bad = [root / "kernels.py", root / "kernels" / "__init__.py"]
    for folder in ("fastalign", "kernels", "tests", "benchmarks", "examples"):
        bad += [*(root / folder).rglob("kernels.py"), *(root / folder).rglob("kernels")]
    return [str(path.relative_to(root)) for path in bad if path.exists()]


def missing_of_the_four(root: Path) -> list[str]:
    """One name, four files: what a kernel or a reference twin still lacks."""
    package = root / "kernels" / "fastalign_kernels"

    def names(folder: Path) -> set[str]:
        return {p.stem for p in folder.glob("*.py") if p.stem[0] != "_" and p.stem != "compile"}

    kernels, twins = names(package), names(package / "reference")
    wanted = [package / "reference" / f"{k}.py" for k in kernels]
    wanted += [root / "benchmarks" / f"bench_{k}.py" for k in kernels]
    wanted += [root / "tests" / f"test_{k}.py" for k in kernels | twins]
    return sorted(str(path.relative_to(root)) for path in wanted if not path.exists())


def run_python(code: str) -> str:
    """What ``code`` prints in a new interpreter that has our two source roots at the head of its path."""
    path = os.pathsep.join([str(ROOT), str(ROOT / "kernels"), *filter(None, [os.environ.get("PYTHONPATH")])])
    result = subprocess.run(
        [sys.executable, "-c", code],
        cwd=ROOT,
        env={**os.environ, "PYTHONPATH": path},
        capture_output=True,
        text=True,
    )
    assert result.returncode == 0, result.stderr
    return result.stdout.strip().splitlines()[-1]  # libraries may print before


def test_every_room_has_a_place_in_the_order():
    modules = {p.stem for p in (ROOT / "fastalign").glob("*.py") if not p.stem.startswith("__")}
    packages = {p.parent.name for p in (ROOT / "fastalign").glob("*/*.py")}
    assert modules | packages <= set(ROOMS), "say in ROOMS, and in the layout, where the new room stands"


@pytest.mark.parametrize(
    "check", [wrong_way_imports, foreign_imports_of_kernels, files_that_hide_kernels, missing_of_the_four]
)
def test_our_tree_keeps_the_rule(check):
    found = check(ROOT)
    assert not found, "\n".join([check.__doc__, *found])


def test_the_light_modules_load_no_heavy_library():
    """The package itself, its configuration and its command line: ``--help`` may not wait for torch."""
    light = ["fastalign", "fastalign.errors", "fastalign.config", "fastalign.cli", "fastalign.doctor"]
    heavy = [
        "torch",
        "triton",
        "transformers",
        "datasets",
        "peft",
        "accelerate",
        "deepspeed",
        "bitsandbytes",
        "matplotlib",
    ]
    loaded = run_python(
        f"import sys, {', '.join(light)}; print([m for m in {heavy} if m in sys.modules])",
    )
    assert loaded == "[]"


def test_third_party_kernels_is_found_from_our_root():
    """A regular package ``kernels`` of ours would come first, and transformers would import from that."""
    try:
        importlib.metadata.distribution("kernels")
    except importlib.metadata.PackageNotFoundError:
        pytest.skip("the third-party package kernels is not installed, so there is nothing to hide")
    where = run_python(
        f"import sys; sys.path.insert(0, {str(ROOT)!r})\n"
        "import kernels\n"
        "from transformers import Trainer\n"
        "print(kernels.__file__)"
    )
    assert Path(where).name == "__init__.py"
    assert not Path(where).is_relative_to(ROOT / "kernels")


def test_public_names_resolve():
    if not (ROOT / "fastalign/__init__.py").exists():
        pytest.skip("fastalign has no __init__.py yet")
    package = importlib.import_module("fastalign")
    for name in package.__all__:
        assert getattr(package, name) is not None
        beside = ROOT / "fastalign" / name
        assert not beside.is_dir() and not beside.with_suffix(".py").exists(), (
            f"importing the submodule {name} would replace the public name fastalign.{name}"
        )


# Each check above is a function of a tree, so each can be shown a tree that it has to refuse.
OFFENDERS = [
    (wrong_way_imports, "fastalign/config/keys.py", "from fastalign.data.readers import read"),
    (wrong_way_imports, "fastalign/data/readers.py", "def f():\n    from ..model import loading"),
    (wrong_way_imports, "fastalign/model/sub/x.py", "from ... import training"),
    (wrong_way_imports, "fastalign/data/__init__.py", "from ..streams.task import TaskStream"),
    (wrong_way_imports, "fastalign/training/x.py", "import importlib\nimportlib.import_module('..cli', 'x')"),
    (wrong_way_imports, "fastalign/streams/task.py", "import fastalign.training.trainer as t"),
    (wrong_way_imports, "fastalign/streams/x.py", "from fastalign import AlignTrainer"),
    (wrong_way_imports, "fastalign/config/keys.py", "from fastalign.attic import helper"),
    (wrong_way_imports, "fastalign/__init__.py", "from .cli import main"),
    (foreign_imports_of_kernels, "kernels/fastalign_kernels/a.py", "def f():\n    import numpy as np"),
    (foreign_imports_of_kernels, "kernels/fastalign_kernels/a.py", "from fastalign.errors import ModelError"),
    (files_that_hide_kernels, "kernels/__init__.py", ""),
    (files_that_hide_kernels, "kernels.py", ""),
    (files_that_hide_kernels, "fastalign/kernels.py", ""),
    (files_that_hide_kernels, "tests/kernels/test_x.py", ""),
    (missing_of_the_four, "kernels/fastalign_kernels/reference/new.py", ""),
    (missing_of_the_four, "kernels/fastalign_kernels/new.py", ""),
]


@pytest.mark.parametrize(("check", "file", "source"), OFFENDERS)
def test_the_checks_refuse_offenders(check, file, source, tmp_path):
    assert check(tmp_path) == []
    offender = tmp_path / file
    offender.parent.mkdir(parents=True, exist_ok=True)
    offender.write_text(source, encoding="utf-8")
    assert len(check(tmp_path)) >= 1


def test_the_checks_let_good_imports_pass(tmp_path):
    good = {
        "fastalign/__main__.py": "from fastalign.cli import main",
        "fastalign/cli.py": "def main():\n    from fastalign.training.trainer import AlignTrainer",
        "fastalign/data/readers.py": "import torch\nfrom . import templates\nfrom ..errors import DataError",
        "fastalign/data/templates.py": "from fastalign import __version__, config",
        "fastalign/objectives/info_nce.py": "from fastalign_kernels import info_nce",
        "kernels/fastalign_kernels/_dispatch.py": "import os\nfrom .reference import x\nimport triton, torch",
    }
    for file, source in good.items():
        (tmp_path / file).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / file).write_text(source, encoding="utf-8")
    assert wrong_way_imports(tmp_path) + foreign_imports_of_kernels(tmp_path) == []
