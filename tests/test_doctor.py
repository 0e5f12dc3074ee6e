"""`fastalign doctor` tells what is used, and does not trust it."""

from __future__ import annotations

import importlib.metadata
import json

import pytest
import torch

from fastalign import doctor as module
from fastalign.cli import main


def test_it_says_which_kernels_and_why(capsys: pytest.CaptureFixture) -> None:
    assert main(["doctor"]) == 0
    text = capsys.readouterr().out
    for part in (torch.__version__, "triton", "deepspeed", "PyTorch twins", "no CUDA device", "agree with fp64"):
        assert part in text
    assert main(["doctor", "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert found["kernels"]["backend"] == "torch" and found["kernels"]["problem"] is None
    assert found["versions"]["torch"] == torch.__version__


def test_it_finds_kernels_that_are_wrong_or_broken(monkeypatch, capsys: pytest.CaptureFixture) -> None:
    right = module.pooled_info_nce

    def wrong(hidden, mask, **options):
        return right(hidden, mask, **options) * (1 if hidden.dtype == torch.float64 else 1.001)

    def broken(hidden, mask, **options):
        raise OSError("no ptxas\nsecond line")

    for kernel, said in ((wrong, "wrong results: off by 1.0e-03"), (broken, "OSError: no ptxas")):
        monkeypatch.setattr(module, "pooled_info_nce", kernel)
        assert main(["doctor"]) == 1
        text = capsys.readouterr().out
        assert said in text and "second line" not in text


def test_a_package_that_is_missing(monkeypatch, capsys: pytest.CaptureFixture) -> None:
    def version(package: str) -> str:
        if package == "triton":
            raise importlib.metadata.PackageNotFoundError(package)
        return installed(package)

    installed = importlib.metadata.version
    monkeypatch.setattr(importlib.metadata, "version", version)
    assert main(["doctor"]) == 0
    said = capsys.readouterr().out.split("\n")
    assert ["triton", "not", "installed"] in [line.split() for line in said]
    assert ["torch", torch.__version__] in [line.split() for line in said]
