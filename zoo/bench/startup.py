"""Benchmarks of what users wait for around training, by commands in processes of their own: seconds, not CPU time."""

from __future__ import annotations

import json
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

from zoo.bench.timing import Case, Row, Setting, measure

ALLOWED = {"--help": 1.5, "to first step": 5.0, "without training": 8.0}
"""Seconds; the last: of all before the first step and after the last, test and figure included."""


def startup(setting: Setting) -> Iterator[Row]:
    """Commands in seconds against those allowed: help, the first step, a default run without its training."""
    few = setting._replace(rounds=min(setting.rounds, 1 if setting.quick else 3))
    for name in list(ALLOWED)[: 2 if setting.quick else 3]:
        variants: dict[str, Callable[[], Any]] = {
            "allowed": partial(ALLOWED.get, name),
            name: partial(seconds_of, name),
        }
        yield from measure(Case("train.py", "allowed", variants, {(name, "allowed"): 1.0}), few)


def seconds_of(what: str) -> float:
    """Of `python train.py`, by the clock; raises CalledProcessError where it fails."""
    with tempfile.TemporaryDirectory() as folder:
        run, began = Path(folder, "run"), time.time()
        few = ("optim.steps=1", "log_every=1", "validation_batches=1", "test_batches=1", f"out={run}")
        arguments = {"--help": ("--help",), "to first step": few}.get(what, (f"out={run}",))
        command = [sys.executable, "train.py", *arguments]
        subprocess.run(command, capture_output=True, check=True, cwd=Path(__file__).parents[2])
        seconds = time.time() - began
        if what == "to first step":
            return (run / "metrics.jsonl").stat().st_mtime - began
        training = what == "without training" and json.loads((run / "metrics.json").read_text())["seconds"]
        return seconds - training
