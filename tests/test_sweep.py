"""A sweep that is started again."""

from __future__ import annotations

import gc
import math
import multiprocessing
import re
import runpy
import shutil
import signal
import weakref
from pathlib import Path
from typing import Any

import pytest
from hydra.core.plugins import Plugins
from hydra.core.utils import JobReturn, JobStatus

from runs import signalled, small
from test_cli import SHORT, TINY, TRAIN, assert_same, command  # noqa: F401
from zoo.compare.sweep import finished
from zoo.training.trainer import make


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
    (folder / "model=moe,seed=0").rename(folder / "seed=0,model=moe")  # as older sweeps called it
    answer = command(*asked[:-2], *asked[:-3:-1])  # in another order
    assert answer.code == 0
    assert answer.out.count(" is complete\n") == 3
    (folder / "seed=0,model=moe").rename(folder / "model=moe,seed=0")
    assert {path: path.stat().st_mtime_ns for path in before} == before
    assert (folder / "model=moe,seed=1/metrics.json").exists()
    answer = command(*asked, "validate_every=3")  # what is complete is another run
    assert answer.code == 1
    assert answer.err.count("validate_every is 2 in the checkpoint") == answer.err.count("this was model=") == 4
    assert answer.out.count("failed; holds an earlier run") == 4


def test_a_job_is_gone_before_the_next_one_is_made(command: Any, monkeypatch: pytest.MonkeyPatch) -> None:  # noqa: F811
    engines: list[weakref.ref] = []
    alive: list[int] = []

    def noted(*arguments: Any) -> Any:
        alive.append(sum(engine() is not None for engine in engines))
        engines.append(weakref.ref(engine := make(*arguments)))
        return engine

    monkeypatch.setattr("zoo.training.run.make", noted)
    gc.disable()  # by chance it would come in between
    try:
        assert command("-m", *TINY, *SHORT, "debug=fast", "seed=0,1,2").code == 0
        monkeypatch.setattr(gc, "collect", lambda: 0)
        assert command("-m", *TINY, *SHORT, "debug=fast", "seed=3,4").code == 0
    finally:
        gc.enable()
    assert alive == [0, 0, 0, 1, 2]


def test_failures_in_processes_of_their_own_count(command: Any, monkeypatch: pytest.MonkeyPatch) -> None:  # noqa: F811
    """Launchers of Hydra give back what their processes returned, and nothing else."""
    launcher = Plugins.instance().class_name_to_class["hydra._internal.core_plugins.basic_launcher.BasicLauncher"]
    launch, returns = launcher.launch, []

    def elsewhere(*arguments: Any, **options: Any) -> Any:
        context = multiprocessing.get_context("fork")
        ours, theirs = context.Pipe()
        process = context.Process(target=lambda: theirs.send(launch(*arguments, **options)))
        process.start()
        returns.append(ours.recv())
        process.join()
        return returns[-1]

    monkeypatch.setattr(launcher, "launch", elsewhere)
    answer = command("-m", "optim.lr=-1,-2", "hydra.sweep.dir=sweep")
    assert (answer.code, len(*returns)) == (1, 2)
    assert re.findall(r"^(\S+) +failed$", answer.out, re.M) == ["optim.lr=-1", "optim.lr=-2"]
    failed = runpy.run_path(str(TRAIN))["failed"]
    # no number, but no mistake
    assert [*failed([[JobReturn(status=JobStatus.COMPLETED, _return_value=math.nan)]])] == [*failed(None)] == []


def test_the_folder_of_a_finished_run_may_be_at_home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    assert runpy.run_path(str(TRAIN))["added"]("hydra.sweep.dir=~/a") == f"hydra.sweep.dir={tmp_path}/a"
    metrics = small(tmp_path / "run")
    assert (finished({"out": "~/run"}) or {})["test"] == metrics["test"]
