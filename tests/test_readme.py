"""The README: its two command lines are the ones that CI runs, and its Python runs as it stands."""

from __future__ import annotations

import os
import re
from pathlib import Path
from typing import Any

import pytest
import torch

import zoo
from runs import QUIET

ROOT = Path(__file__).parent.parent
README = (ROOT / "README.md").read_text()
LINES = [
    "python -m pip install -c constraints.txt -e .          && python train.py model=hypernet",
    "python -m pip install -c constraints.txt -e '.[test]'  && python -m pytest -n auto",
]


def blocks(text: str, language: str) -> list[str]:
    """The fenced blocks of a page in one language, "" for those without."""
    fences = re.findall(r"^```(\w*)\n(.*?)^```$", text, re.M | re.S)
    return [block for name, block in fences if name == language]


def tiny_run(folder: Path) -> dict[str, Any]:
    """A trained hypernetwork at folder/runs/hypernet-regression/ID, the path that the pages use; its metrics."""
    model = {"name": "hypernet", "dim": 16, "layers": 2, "heads": 2, "hidden": 24, "code_dim": 8}
    optim, out = {"steps": 20, "warmup": 2, "batch_size": 8}, str(folder / "runs" / "hypernet-regression" / "ID")
    return zoo.train(model, optim=optim, trainer=QUIET, out=out, validation_batches=1, test_batches=1)


def test_the_two_command_lines_stand_there_once_each() -> None:
    assert [line for line in README.splitlines() if "pip install -c constraints.txt" in line] == LINES
    assert set(LINES) <= {line for block in blocks(README, "") for line in block.splitlines()}


def test_the_numeric_tests_run_as_another_machine_would() -> None:
    ci = (ROOT / ".ci" / "run").read_text()
    for name in ("ATEN_CPU_CAPABILITY=default", "MKL_ENABLE_INSTRUCTIONS=SSE4_2", "MKL_CBWR=COMPATIBLE"):
        assert name in ci
    assert "ZOO_TEST_THREADS=2" in ci
    assert "-m 'numeric and not slow'" in ci
    assert torch.get_num_threads() == int(os.environ.get("ZOO_TEST_THREADS", "1"))


def test_versions_are_those_of_the_package() -> None:
    python = re.search(r'requires-python = "(.+)"', (ROOT / "pyproject.toml").read_text())
    torch_line = re.search(r"^torch==\S+$", (ROOT / "constraints.txt").read_text(), re.M)
    assert python
    assert torch_line
    assert f"Python {python[1]}" in README
    assert torch_line[0] in README


def test_snippet_runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    tiny_run(tmp_path)
    monkeypatch.chdir(tmp_path)
    (snippet,) = blocks(README, "python")
    names: dict[str, Any] = {}
    exec(snippet, names)
    assert (names["patched"] - names["contextual"]).abs().max() < 1e-12
    with torch.no_grad():
        unpatched = names["model"](names["tokens"][:, names["n"] :])
    assert (unpatched - names["contextual"]).abs().max() > 1e-3
