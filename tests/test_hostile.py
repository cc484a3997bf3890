"""Hostile files end in one line: none is executed, hangs, fills the memory, touches another folder or ends in a trace."""

from __future__ import annotations

import os
import time
import warnings
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import hostile
import pytest
import torch
from test_checkpoint import OPTIONS, QUIET, one_line
from test_patch_files import model_and_patch

import zoo
from zoo import plain
from zoo.checkpoint import Files
from zoo.lens.files import load_patch, save_patch

SIZES = {"dim": 4, "layers": 1, "heads": 1, "hidden": 4}


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A finished run of the smallest model."""
    torch.set_num_threads(1)
    folder = tmp_path_factory.mktemp("genuine") / "run"
    zoo.train(model={"name": "transformer", **SIZES}, trainer=QUIET, out=str(folder), **OPTIONS)
    return folder


@pytest.fixture
def last(run: Path, tmp_path: Path) -> Path:
    """Where hostile files are written: a run folder without a best checkpoint."""
    (tmp_path / "run/checkpoints").mkdir(parents=True)
    return tmp_path / "run/checkpoints/last.ckpt"


def content_of(run: Path) -> Any:
    return torch.load(run / "checkpoints/last.ckpt", weights_only=True)


def memory(name: str) -> int:
    """Bytes of this process: VmRSS now, VmHWM at most since clear_refs; 0 where there is no /proc."""
    status = Path("/proc/self/status")
    lines = status.read_text().splitlines() if status.exists() else []
    return next((int(line.split()[1]) << 10 for line in lines if line.startswith(name)), 0)


def refused(files: Iterable[hostile.File], read: Callable[[Path], Any]) -> tuple[list[str], list[str]]:
    """What was refused, and what was read; every other end, and every file that costs too much, fails."""
    ends: tuple[list[str], list[str]] = [], []
    for what, path in files:
        if os.access("/proc/self/clear_refs", os.W_OK):
            Path("/proc/self/clear_refs").write_text("5")
        before, start = memory("VmRSS"), time.perf_counter()
        try:
            read(path)
            ends[1].append(what)
        except ValueError as error:
            assert type(error) is ValueError, what
            assert len(str(error).splitlines()) == 1, what
            assert len(str(error)) < 1000, what
            ends[0].append(what)
        except Exception as error:
            raise AssertionError(f"{what}: {error!r:.200}") from error
        seconds, grown = time.perf_counter() - start, memory("VmHWM") - before
        if os.environ.get("T") and seconds > float(os.environ["T"]): print(what, seconds, grown>>20)
        assert seconds < 5, f"{what} takes {seconds} s"
        assert grown < 1 << 30, f"{what} takes {grown} bytes"
    return ends
