"""Benchmarks of what users wait for around training, by commands in processes of their own: seconds, not CPU time."""

from __future__ import annotations

import json
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path

from zoo.bench.timing import Case, Row, Setting, measure

ALLOWED = {"--help": 1.5, "command to first step": 5.0, "command without training": 8.0}
"""Seconds; the last: of all before the first step and after the last, test and figures included."""


def startup(setting: Setting) -> Iterator[Row]:
    """Commands in seconds against those allowed: help, the first step, all of a default run but its training."""
    few = setting._replace(rounds=min(setting.rounds, 1 if setting.quick else 3))
    works = {"--help": help_of_train, "command to first step": first_step, "command without training": around_training}
    for name, work in works.items():
        if not (setting.quick and work is around_training):
            allowed: dict[str, Callable[[], float]] = {"allowed": lambda name=name: ALLOWED[name], name: work}  # type: ignore[misc]
            yield from measure(Case(f"python train.py: {name}", "allowed", allowed, {(name, "allowed"): 1.0}), few)


def help_of_train() -> float:
    return seconds_of(["--help"])[0]


def first_step() -> float:
    """From the command to the first row of metrics.jsonl."""
    with tempfile.TemporaryDirectory() as folder:
        began = time.time()
        seconds_of(["optim.steps=1", "log_every=1", "validation_batches=1", "test_batches=1", f"out={folder}/run"])
        return (Path(folder) / "run/metrics.jsonl").stat().st_ctime - began


def around_training() -> float:
    """A default run less the seconds that it says it trained."""
    with tempfile.TemporaryDirectory() as folder:
        seconds, _ = seconds_of([f"out={folder}/run"])
        return seconds - json.loads((Path(folder) / "run/metrics.json").read_text())["seconds"]


def seconds_of(arguments: list[str]) -> tuple[float, str]:
    """Wall-clock seconds of `python train.py`, and what it printed; raises CalledProcessError where it failed."""
    began = time.perf_counter()
    command = [sys.executable, "train.py", *arguments]
    done = subprocess.run(command, capture_output=True, text=True, check=True, cwd=Path(__file__).parents[2])
    return time.perf_counter() - began, done.stdout
