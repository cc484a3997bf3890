"""A sweep that is started again."""

from __future__ import annotations

import shutil
import signal
from pathlib import Path
from typing import Any

import pytest

from runs import signalled
from test_cli import SHORT, TINY, assert_same, command  # noqa: F401


def test_a_sweep_that_is_started_again_makes_up_for_what_is_missing(
    command: Any,  # noqa: F811
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    few = ["experiment=incontext", *TINY, *SHORT, "debug=fast", "trainer.enable_progress_bar=false"]
    asked = ["-m", *few, "model=transformer,moe", "seed=0,1"]
    folder = tmp_path / "multirun/incontext"
    assert command(*few, "model=transformer", "seed=1", "out=whole").code == 0
    signalled(monkeypatch, 2)  # in the first job
    answer = command(*asked)
    assert answer.code == 128 + signal.SIGTERM
    assert [path.name for path in folder.iterdir() if path.is_dir()] == ["model=transformer,seed=0"]
    assert command(*asked).code == 0
    begun = sorted(path.name for path in folder.iterdir() if path.is_dir())
    assert begun == [f"model={model},seed={seed}" for model in ("moe", "transformer") for seed in (0, 1)]
    assert_same(folder / "model=transformer,seed=1", tmp_path / "whole")
    shutil.rmtree(folder / "model=moe,seed=1")
    before = {path: path.stat().st_mtime_ns for path in folder.rglob("*.json*")}
    answer = command(*asked)
    assert answer.code == 0
    assert answer.out.count(" is complete\n") == 3
    assert {path: path.stat().st_mtime_ns for path in before} == before
    assert (folder / "model=moe,seed=1/metrics.json").exists()
    answer = command(*asked, "validate_every=3")  # what is complete is another run
    assert answer.code == 1
    assert answer.err.count("validate_every is 2 in the checkpoint, 3 asked") == 4
