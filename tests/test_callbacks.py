"""Callbacks: a diverged run stops with its last checkpoint intact, rows are repaired, signals are handed back."""

import math
import signal
import threading
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from lightning.pytorch.loggers.logger import DummyLogger

import zoo
from runs import QUIET, rows, saved, small
from zoo.console import Interrupted
from zoo.tasks.regression import Regression
from zoo.training.callbacks import Keeper


def poisoned(monkeypatch: pytest.MonkeyPatch, split: str, k: int, value: float = math.nan) -> None:
    """Makes one target of batch k of a split `value`."""
    original = Regression.batch

    def batch(self: Regression, of: str, index: int, size: int) -> Any:
        made = original(self, of, index, size)
        if (of, index) == (split, k):
            made.targets[-1, -1] = value
        return made

    monkeypatch.setattr(Regression, "batch", batch)


@pytest.mark.parametrize(("value", "accumulate"), [(math.nan, 2), (math.inf, 1)])
def test_a_loss_that_is_no_number_stops_the_run(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, value: float, accumulate: int
) -> None:
    poisoned(monkeypatch, "train", 4, value)
    with pytest.raises(
        ValueError, match=r"training loss is (nan|inf) at step 5; .*last good checkpoint is .*last\.ckpt"
    ):
        small(tmp_path / "run", optim={"accumulate": accumulate})
    last = saved(tmp_path / "run")
    assert last["global_step"] == 4
    assert all(weight.isfinite().all() for weight in last["state_dict"].values())
    assert "NaN" not in (tmp_path / "run/metrics.jsonl").read_text()
    assert not (tmp_path / "run/metrics.json").exists()
    # the data repaired, the run goes on from there
    monkeypatch.undo()
    assert zoo.train(resume=tmp_path / "run", trainer=QUIET)["steps"] == 6


def test_between_rows_of_metrics_a_loss_is_read_before_a_checkpoint_is_written(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    poisoned(monkeypatch, "train", 4)
    with pytest.raises(ValueError, match="nan at step 6"):
        small(tmp_path / "run", log_every=100)
    assert saved(tmp_path / "run")["global_step"] == 4
    # a signal saves at once: the loss may be a number where the step after it was none
    trainer: Any = SimpleNamespace(
        accumulate_grad_batches=1,
        default_root_dir=tmp_path,
        global_step=3,
        strategy=SimpleNamespace(reduce=lambda value, reduce_op: value, broadcast=lambda value: value),
    )
    model: Any = SimpleNamespace(losses={"loss": torch.tensor(1.0)}, hparams={})
    Keeper(tmp_path, {}, "").on_save_checkpoint(trainer, model, {"state_dict": {"norm.weight": torch.ones(3)}})
    with pytest.raises(ValueError, match=r"an entry of norm\.weight is nan at step 3; no checkpoint was written yet"):
        Keeper(tmp_path, {}, "").on_save_checkpoint(
            trainer, model, {"state_dict": {"norm.weight": torch.tensor([1.0, math.nan])}}
        )


def test_a_validation_loss_that_is_no_number_stops_the_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    poisoned(monkeypatch, "validation", 0)
    with pytest.raises(ValueError, match="the validation loss is nan at step 2; no checkpoint"):
        small(tmp_path / "run")
    assert not list(tmp_path.rglob("*.ckpt"))


def test_signals_are_handed_back(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    numbers = (signal.SIGINT, signal.SIGTERM)
    before = [signal.getsignal(number) for number in numbers]
    small(tmp_path / "whole")
    assert [signal.getsignal(number) for number in numbers] == before
    assert before[1] == signal.SIG_DFL
    # after an error too: else Ctrl-C would do nothing in the session that called zoo.train
    poisoned(monkeypatch, "train", 4)
    with pytest.raises(ValueError, match="nan"):
        small(tmp_path / "failed")
    assert [signal.getsignal(number) for number in numbers] == before


def test_a_second_ctrl_c_does_not_wait(tmp_path: Path) -> None:
    callback = Keeper(tmp_path, {}, "")
    callback._note(signal.SIGINT, None)
    callback._note(signal.SIGTERM, None)
    with pytest.raises(Interrupted, match=r"^stopped by SIGINT at once; no checkpoint was written yet$"):
        callback._note(signal.SIGINT, None)


def test_training_in_a_thread(tmp_path: Path) -> None:
    results = []
    thread = threading.Thread(target=lambda: results.append(small(tmp_path / "run")))
    thread.start()
    thread.join(60)
    assert results[0]["steps"] == 6


def test_seconds_add_up_over_parts(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    poisoned(monkeypatch, "train", 4)
    with pytest.raises(ValueError, match="nan"):
        small(tmp_path / "run")
    monkeypatch.undo()
    path = tmp_path / "run/checkpoints/last.ckpt"
    content = torch.load(path, weights_only=True)
    assert 0 < content["zoo"]["seconds"] < 60
    content["zoo"].update(seconds=1000.0, command="what was typed first")
    torch.save(content, path)
    metrics = zoo.train(resume=tmp_path / "run", trainer=QUIET)
    assert 1000 < metrics["seconds"] < 1060
    assert metrics["tokens_per_second"] == pytest.approx(metrics["tokens"] / metrics["seconds"], rel=0.1)
    assert metrics["command"] == "what was typed first"


class Kept(DummyLogger):
    """A logger that keeps what it is told."""

    def __init__(self) -> None:
        super().__init__()
        self.rows: list[tuple[int, dict[str, float]]] = []

    def log_metrics(self, metrics: dict[str, float], step: int) -> None:  # type: ignore[override]
        self.rows.append((step, dict(metrics)))


@pytest.mark.parametrize("accumulate", [1, 2])
def test_loggers_are_told_what_the_metrics_file_holds(tmp_path: Path, accumulate: int) -> None:
    logger = Kept()
    often = {"optim": {"accumulate": accumulate}, "validate_every": 6, "log_every": 2}
    small(tmp_path / "run", "moe", model_options={"balance_weight": 0.1}, logger=[logger], **often)
    written = [(row["step"], row["loss"], row["aux_loss"]) for row in rows(tmp_path / "run") if "loss" in row]
    assert [step for step, *_ in written] == [2, 4, 6]
    assert all(aux > 0 for *_, aux in written)
    told = [(step, row["loss"], row["aux_loss"]) for step, row in logger.rows if "loss" in row]
    assert told == written
    assert [step for step, row in logger.rows if "validation_loss" in row] == [6]
