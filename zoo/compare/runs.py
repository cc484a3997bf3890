"""Run folders as data: what their files say of a test of N sequences, and whether runs can be compared."""

from __future__ import annotations

import json
import math
import os
import re
import zipfile
import zlib
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from zoo.config import flat, one_line, show
from zoo.console import warn

BYTES = {".json": 4 << 20, ".jsonl": 256 << 20, ".npz": 64 << 20}  # the largest files that are read
NAME = re.compile(r"[\w./-]{1,80}")
TEXTS, GROUPS = ("task", "model", "main_metric"), ("test", "config")
COUNTS = ("seed", "steps", "tokens", "params_total", "params_active")
NUMBERS = ("seconds", "tokens_per_second", "flops_per_token")
OF_TEST = ("task", "data", "tokenizer", "evaluation", "main_metric", "test", "config")
"""What evaluations/NAME.json says in place of metrics.json."""
PLACES = {"data": ("task.files", "task.hub"), "tokenizer": ("task.tokenizer",)}
"""Digests, and the options that may differ where they are equal."""
DAMAGE = (ValueError, TypeError, KeyError, EOFError, MemoryError, RuntimeError, zipfile.BadZipFile, zlib.error)
"""What reading raises where a file is cut short, altered, or of another kind."""


@dataclass(frozen=True)
class Run:
    """One run. rows: of metrics.jsonl; errors, weight (N): of its test, None where the run did not keep them."""

    folder: Path
    metrics: dict[str, Any]
    rows: list[dict[str, float]]
    errors_N: np.ndarray | None
    weight_N: np.ndarray | None

    @property
    def seed(self) -> int:
        return self.metrics["seed"]

    @property
    def error(self) -> float:
        """The main metric of the test."""
        return self.metrics["test"][self.metrics["main_metric"]]

    def number(self, name: str) -> float:
        """A number of metrics.json, nan where it is not said; the FLOPs of training follow from others."""
        value = self.metrics.get(name)
        if value is None and name == "flops":
            value = 3 * self.metrics["flops_per_token"] * self.metrics["tokens"]
        return float(value) if _finite(value) else math.nan  # type: ignore[arg-type]

    def test(self) -> dict[str, Any]:
        """What the test is of, which runs that are compared must share."""
        config, said = flat(self.metrics["config"]), self.metrics.get("evaluation")
        tested = {"split": "test", "batches": config.get("test_batches"), "batch_size": config.get("optim.batch_size")}
        tested |= {"seed": self.seed} | (said if isinstance(said, dict) else {})  # older runs do not say it
        options = {name: value for name, value in config.items() if name.startswith("task.")}
        facts = {name: self.metrics.get(name) for name in ("task", "main_metric", *PLACES)}
        return facts | options | {f"evaluation.{name}": value for name, value in tested.items()}


def _finite(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and abs(value) < 1e300


def _numbers(values: dict[str, Any]) -> dict[str, float]:
    return {name: value for name, value in values.items() if _finite(value) and NAME.fullmatch(name)}


def find(paths: list[Path]) -> list[Path]:
    """Run folders: those given, and all in other folders that are given; warns of runs that have not ended."""
    found: dict[Path, Path] = {}
    for path in paths:
        if not path.is_dir():
            raise ValueError(f"{path} is no folder: give run folders, or folders that hold some")
        for place, inner, files in os.walk(path):
            inner.sort()
            if "metrics.json" in files:
                found.setdefault(Path(place).resolve(), Path(place))
                inner.clear()
            elif "metrics.jsonl" in files:
                warn(f"{place} is left out: the run has not ended")
    if not found:
        raise ValueError(f"{', '.join(map(str, paths))}: no metrics.json, which a run writes at its end")
    return list(found.values())


def read(folder: Path, evaluation: str | None = None) -> Run:
    """The run in a folder, with its own test or with evaluations/NAME; raises ValueError for files that are damaged,
    too large, or not what a run writes."""
    path, arrays = folder / "metrics.json", folder / "test.npz"
    metrics = _object(path)
    if evaluation:
        path, arrays = (folder / "evaluations" / f"{evaluation}{ending}" for ending in (".json", ".npz"))
        if not path.is_file():
            raise ValueError(f"{path} is missing: python -m zoo.evaluate writes it")
        metrics |= {name: value for name, value in _object(path).items() if name in OF_TEST}
    wrong = [name for name in TEXTS if not (isinstance(metrics.get(name), str) and NAME.fullmatch(metrics[name]))]
    wrong += [name for name in COUNTS if not (_finite(metrics.get(name)) and isinstance(metrics[name], int))]
    wrong += [name for name in NUMBERS if not _finite(metrics.get(name))]
    wrong += [name for name in GROUPS if not isinstance(metrics.get(name), dict)]
    if wrong:
        raise ValueError(f"{path}: {wrong[0]} is {show(metrics.get(wrong[0]))}, which no run writes")
    metrics["test"] = _numbers(metrics["test"])
    if metrics["main_metric"] not in metrics["test"]:
        raise ValueError(f"{path}: the test has no finite {metrics['main_metric']}")
    run = Run(folder, metrics, _rows(folder / "metrics.jsonl"), *_errors(arrays))
    if run.errors_N is not None:
        mean = np.average(run.errors_N, weights=run.weight_N)
        if abs(mean - run.error) > 1e-3 * abs(run.error) + 1e-9:
            raise ValueError(f"{arrays} is of another test: its mean is {mean:.6g}, {path} says {run.error:.6g}")
    return run


def _bounded(path: Path) -> Path:
    if path.stat().st_size > BYTES[path.suffix]:
        raise ValueError(f"{path} has more than {BYTES[path.suffix]:,} bytes, the most that is read")
    return path


def _object(path: Path) -> dict[str, Any]:
    try:
        value = json.loads(_bounded(path).read_text(encoding="utf-8"))
    except DAMAGE as error:  # too deep is a RuntimeError
        raise ValueError(f"{path} is damaged: {one_line(error, 200)}") from None
    if not isinstance(value, dict):
        raise ValueError(f"{path} is damaged: it holds {show(value)}, no object")
    return value


def _rows(path: Path) -> list[dict[str, float]]:
    """The numbers of the rows that are whole: a kill may have cut one short."""
    rows = []
    for line in _bounded(path).read_text(encoding="utf-8", errors="replace").splitlines() if path.is_file() else ():
        try:
            row = json.loads(line)
        except DAMAGE:
            continue
        if isinstance(row, dict) and _finite(row.get("step")):
            rows.append(_numbers(row))
    return rows


def _errors(path: Path) -> tuple[np.ndarray | None, np.ndarray | None]:
    """main and weight (N) of the test in float64; None for a run that has none."""
    if not path.is_file():
        return None, None
    try:
        with zipfile.ZipFile(_bounded(path)) as file:
            if sum(item.file_size for item in file.infolist()) > BYTES[".npz"]:
                raise ValueError(f"unpacked it has more than {BYTES['.npz']:,} bytes")
        with np.load(path, allow_pickle=False) as arrays:
            main, weight = (np.asarray(arrays[name], np.float64) for name in ("main", "weight"))
        if main.ndim != 1 or main.shape != weight.shape or not np.isfinite([main, weight]).all():
            raise ValueError("main and weight must be finite numbers, one for each sequence")
        if not main.size or weight.min() < 0 or weight.max() == 0:
            raise ValueError("weight must be numbers of predictions")
    except DAMAGE as error:
        raise ValueError(f"{path} is damaged: {one_line(error, 200)}") from None
    return main, weight


def require_one_test(runs: list[Run]) -> None:
    """Raises ValueError, with the differences named, unless all runs answered the same test."""
    tests = [run.test() for run in runs]
    if all(test["evaluation.seed"] == run.seed for test, run in zip(tests, runs, strict=True)):
        tests = [{**test, "evaluation.seed": "that of the run"} for test in tests]
    first = tests[0]
    for run, other in zip(runs, tests, strict=True):
        known = {digest for digest in PLACES if None not in (first[digest], other[digest])}  # older runs do not say it
        free = ({*PLACES} - known).union(*(PLACES[digest] for digest in known))
        differ = [name for name in first | other if name not in free and first.get(name) != other.get(name)]
        if differ:
            named = [f"{name} is {show(first.get(name), 60)} and {show(other.get(name), 60)}" for name in differ[:3]]
            more = f", and {len(differ) - 3} more differ" if len(differ) > 3 else ""
            both = f"{runs[0].folder} and {run.folder} had different tests"
            raise ValueError(f"{both}: {', '.join(named)}{more}; compare them in separate calls")
