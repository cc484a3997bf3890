"""After training: nothing that fails there takes a run away, and no output, full disk or missing folder ends in lines
of Python."""

import io
import json
import math
import os
import signal
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.pytorch.loggers.logger import DummyLogger

import zoo
from runs import QUIET, small
from zoo import console, files, generate
from zoo.console import Interrupted, Untested
from zoo.models import Model
from zoo.records import results
from zoo.records import summary as report


def raising(error: BaseException | Callable[[], Any]) -> Callable[..., Any]:
    def fail(*args: Any, **options: Any) -> None:
        raise error if isinstance(error, BaseException) else error()

    return fail


def test_a_test_that_fails_says_what_is_safe_and_is_made_up_for(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(Model, "test_step", raising(TypeError("a symbol")))
    with pytest.raises(Untested, match=rf"TypeError: a symbol; training is complete .*resume={tmp_path}/run$"):
        small(tmp_path / "run")
    assert not (tmp_path / "run/metrics.json").exists()
    monkeypatch.undo()
    assert zoo.train(resume=tmp_path / "run", trainer=QUIET)["steps"] == 6
    assert (tmp_path / "run/metrics.json").exists()


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_after_training(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, number: signal.Signals) -> None:
    before = [signal.getsignal(one) for one in (signal.SIGINT, signal.SIGTERM)]
    monkeypatch.setattr(Model, "test_step", lambda *args: signal.raise_signal(number))
    with pytest.raises(Interrupted, match=f"stopped by {number.name}; training is complete .*resume=") as stop:
        small(tmp_path / "run")
    assert stop.value.code == 128 + number
    assert [signal.getsignal(one) for one in (signal.SIGINT, signal.SIGTERM)] == before


def test_a_run_that_validates_nothing_is_tested_at_its_end(tmp_path: Path) -> None:
    metrics = small(tmp_path / "run", trainer={"limit_val_batches": 0})
    assert metrics["checkpoint"] == str(tmp_path / "run/checkpoints/last.ckpt")
    assert torch.load(metrics["checkpoint"], weights_only=True)["global_step"] == 6
    zoo.load(tmp_path / "run")
    again = zoo.train(resume=tmp_path / "run", trainer={**QUIET, "limit_val_batches": 0})
    assert again["test"] == metrics["test"]


@pytest.mark.parametrize("option", ["fast_dev_run", "limit_train_batches", "limit_test_batches", "overfit_batches"])
def test_options_that_others_decide_are_refused(tmp_path: Path, option: str) -> None:
    with pytest.raises(ValueError, match=f"trainer.{option} is decided by the option"):
        small(tmp_path / "run", trainer={option: 2})
    assert not (tmp_path / "run").exists()


def test_a_figure_that_fails_is_a_warning(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(report, "curve", raising(RuntimeError("no font")))
    small(tmp_path / "run")
    assert (tmp_path / "run/metrics.json").exists()
    assert capsys.readouterr().err == "warning: curve.png failed: RuntimeError: no font\n"


def test_damaged_rows(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    small(tmp_path / "run")
    rows = tmp_path / "run/metrics.jsonl"
    gone = f"warning: curve.png failed: {rows} is gone or damaged\n"
    for content, warned in (
        (None, gone),
        (b'\xff\xfe{"step', gone),
        (b'[1]\n{"step": 2, "loss": null}\n7\n', ""),
    ):
        rows.unlink() if content is None else rows.write_bytes(content)
        zoo.train(resume=tmp_path / "run", trainer=QUIET)
        assert capsys.readouterr().err == warned


class Broken(DummyLogger):
    """A logger whose service went away."""

    log_metrics = finalize = save = raising(ConnectionError("gone"))  # type: ignore[assignment]


def test_a_logger_that_fails_is_a_warning(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    small(tmp_path / "run", logger=[Broken()])
    assert (tmp_path / "run/metrics.json").exists()
    warned = capsys.readouterr().err.splitlines()
    assert {line.split()[1] for line in warned} == {"Broken.log_metrics", "Broken.save", "Broken.finalize"}
    assert len(warned) == 3  # once each
    with pytest.raises(ValueError, match=r"logger must be a name, .*, got 'wandb'"):
        small(tmp_path / "other", logger=["wandb"])


def test_numbers_that_json_does_not_have_are_null(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    original = results.numbers
    monkeypatch.setattr(results, "numbers", lambda *args, **said: original(*args, **said) | {"flops": math.nan})
    small(tmp_path / "run")
    assert json.loads((tmp_path / "run/metrics.json").read_text())["flops"] is None
    assert files.to_json({"a": (math.inf, [float("nan"), "nan"]), "b": 1.5}) == '{"a": [null, [null, "nan"]], "b": 1.5}'


class Stream(io.TextIOWrapper):
    """Standard output with an encoding of its own; `broken`: nobody reads it."""

    def __init__(self, encoding: str, broken: bool = False):
        super().__init__(io.BytesIO(), encoding=encoding, errors="strict")
        self.broken = broken

    def write(self, text: str) -> int:
        if self.broken:
            raise BrokenPipeError
        return super().write(text)

    def text(self) -> str:
        self.flush()
        return self.buffer.getvalue().decode(self.encoding)  # type: ignore[attr-defined]


@pytest.mark.parametrize("encoding", ["ascii", "cp1252"])
def test_no_character_stops_a_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, encoding: str) -> None:
    monkeypatch.setattr(sys, "stdout", Stream(encoding))
    small(tmp_path / "ü ΔW", trainer={"enable_progress_bar": True})
    printed = sys.stdout.text()  # type: ignore[attr-defined]
    assert "load it with" in printed
    assert "?" in printed


def test_a_closed_output_stops_no_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "stdout", Stream("utf-8", broken=True))
    small(tmp_path / "run", trainer={"enable_progress_bar": True})
    assert (tmp_path / "run/metrics.json").exists()


@pytest.mark.parametrize(
    ("error", "code", "said"),
    [
        (ValueError("no such\nthing"), 2, "error: no such thing\n"),
        (OSError(28, "No space left on device", "a"), 2, "error: [Errno 28] No space left on device: 'a'\n"),
        (BrokenPipeError(), 141, ""),
        (UnicodeEncodeError("ascii", "é", 0, 1, "not in range"), None, ""),
        (ZeroDivisionError(), None, ""),
    ],
)
def test_commands_end_in_one_line(
    capsys: pytest.CaptureFixture[str], error: Exception, code: int | None, said: str
) -> None:
    command = console.command(raising(error))
    if code is None:
        with pytest.raises(type(error)):
            command()
    else:
        assert command() == code
    assert capsys.readouterr().err == said


def test_generate_writes_what_a_terminal_cannot_show(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(zoo, "load", lambda path, base: None)
    monkeypatch.setattr(generate, "of_one", lambda *args: print("é → ΔW") or 1)
    monkeypatch.setattr(sys, "stdout", Stream("ascii"))
    assert generate.main(["a", "b"]) == 0
    assert sys.stdout.text() == "? ? ?W\n"  # type: ignore[attr-defined]


def test_files_hold_names_that_are_no_text(tmp_path: Path) -> None:
    files.write(tmp_path / "report.md", os.fsdecode(b"runs/\xfc"))
    assert (tmp_path / "report.md").read_bytes() == b"runs/\xfc"


def test_elsewhere_than_in_a_terminal_progress_is_a_line_per_validation(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    small(tmp_path / "run", trainer={"enable_progress_bar": True})
    lines = capsys.readouterr()
    steps = [line for line in lines.out.splitlines() if line.startswith("step ")]
    assert [line.split(",")[0] for line in steps] == ["step 2/6", "step 4/6", "step 6/6"]
    assert all(", val " in line and ", loss " in line and line.endswith(" s") for line in steps)
    assert "Epoch" not in lines.out + lines.err
    small(tmp_path / "quiet")
    assert "step 2/6" not in capsys.readouterr().out


def test_in_a_terminal_progress_is_a_bar_of_steps(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    screen = Stream("utf-8")
    monkeypatch.setattr(screen, "isatty", lambda: True)
    monkeypatch.setattr(sys, "stdout", screen)
    small(tmp_path / "run", trainer={"enable_progress_bar": True})
    last = [line for line in screen.text().split("\r") if "6/6" in line][-1]
    assert "loss=" in last
    assert "validation_loss=" in last
    assert "\nstep" not in screen.text()
