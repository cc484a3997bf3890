"""The logger is part of a run, and what a resumed one logged before stays."""

from __future__ import annotations

import csv
from dataclasses import asdict
from pathlib import Path
from typing import Any

import pytest

import zoo
from runs import QUIET, rows, saved, signalled, small
from zoo.console import Interrupted
from zoo.records.loggers import LoggerConfig, of_logger


def test_a_logger_keeps_its_id() -> None:
    first = of_logger({"name": "wandb", "project": "mine"}, {})
    kept = {"name": "wandb", "project": "mine", "offline": True, "id": first.id}
    assert first.id
    assert of_logger({}, kept) == of_logger({"name": "wandb"}, kept) == first
    assert of_logger({"name": "files"}, kept).name == "files"
    assert of_logger({"name": "wandb"}, {"name": "files"}).id != first.id


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"name": "wandbb"}, r"logger\.name 'wandbb' does not exist; did you mean wandb\?"),
        ({"name": "wandb", "projct": "a"}, r"logger\.projct is not an option of LoggerConfig; did you mean project\?"),
        ({"name": "wandb", "id": "../../a"}, r"logger\.id='\.\./\.\./a' must be letters"),
        ("wandb", "logger must be a group of options, got 'wandb'"),
    ],
)
def test_wrong_options_of_a_logger(given: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        of_logger(given, {})


def test_a_resumed_run_goes_on_in_its_own_run_of_wandb(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    made: list[LoggerConfig] = []
    monkeypatch.setattr(LoggerConfig, "begun", lambda self, folder, stack: made.append(self) or [])
    small(tmp_path / "run", logger={"name": "wandb", "project": "mine"})
    zoo.train(resume=tmp_path / "run")
    assert made[0] == made[1]
    assert made[0].id
    assert saved(tmp_path / "run")["zoo"]["logger"] == asdict(made[0])
    assert saved(tmp_path / "run")["zoo"]["trainer"] == {**QUIET, "precision": "32-true"}  # what auto was


@pytest.mark.slow
def test_one_id_of_wandb_on_disk(tmp_path: Path) -> None:
    small(tmp_path / "run", logger="wandb")
    zoo.train(resume=tmp_path / "run")
    ids = {path.stem for path in tmp_path.rglob("run-*.wandb")}
    assert ids == {f"run-{saved(tmp_path / 'run')['zoo']['logger']['id']}"}


def test_a_table_of_losses_goes_on_with_the_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Its rows are those of metrics.jsonl, and the test."""
    signalled(monkeypatch, 3)
    with pytest.raises(Interrupted):
        small(tmp_path / "run", logger="csv")
    for _ in range(2):
        zoo.train(resume=tmp_path / "run")
        table = [*csv.DictReader((tmp_path / "run/csv/metrics.csv").open())]
        told = [{name: float(x) for name, x in row.items() if x and name in ("step", "loss", "lr")} for row in table]
        written = [{name: row[name] for name in row.keys() & {"step", "loss", "lr"}} for row in rows(tmp_path / "run")]
        assert told == [*written, {"step": 6}]
        assert len(table[0]) > 4


def test_a_run_for_tensorboard_is_one_file(tmp_path: Path) -> None:
    pytest.importorskip("tensorboard")
    small(tmp_path / "run", logger="tensorboard")
    assert len([*(tmp_path / "run/tensorboard").glob("events.*")]) == 1


def test_a_run_that_is_shorter_than_log_every_has_a_row(tmp_path: Path) -> None:
    small(tmp_path / "run", log_every=100)
    assert [row["step"] for row in rows(tmp_path / "run") if "loss" in row] == [6]
