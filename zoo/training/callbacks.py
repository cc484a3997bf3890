"""What happens around training steps: the metrics file, the clock, clean stops, and the end of a run that diverged."""

from __future__ import annotations

import json
import math
import signal
import threading
from pathlib import Path
from time import monotonic
from types import FrameType
from typing import Any

import lightning as L
import torch
from lightning.pytorch.callbacks import Callback, Checkpoint

from zoo.config import VERSION
from zoo.files import to_json, write
from zoo.training.checkpoint import SCHEMA


class Interrupted(BaseException):
    """A signal stopped the run; its last checkpoint is complete. code: the exit code that shells expect.

    As KeyboardInterrupt it is no Exception: it may come at any line, also where every Exception is a broken file."""

    def __init__(self, message: str, code: int):
        super().__init__(message)
        self.code = code


def _step_done(trainer: L.Trainer, batch_idx: int) -> bool:
    """True after the last accumulated part of an optimiser step."""
    return (batch_idx + 1) % trainer.accumulate_grad_batches == 0


def _logged(trainer: L.Trainer, batch_idx: int, log_every: int) -> bool:
    """True where a row of metrics is written."""
    return _step_done(trainer, batch_idx) and trainer.global_step % log_every == 0


class RunState(Callback):
    """Seconds of training over all parts of a resumed run; marks checkpoints with schema, versions and options.

    started_with: what else checkpoints say of the start: trainer, logger, placement."""

    def __init__(self, config: dict[str, Any], command: str):
        self.config, self.command = config, command
        self.started_with: dict[str, Any] = {}
        self.seconds, self._since = 0.0, 0.0

    def on_train_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        self._since = monotonic()

    def _read(self) -> None:
        now = monotonic()
        self.seconds, self._since = self.seconds + now - self._since, now

    def on_train_batch_end(self, trainer: L.Trainer, pl_module: L.LightningModule, *args: Any) -> None:
        self._read()
        if trainer.global_step >= trainer.max_steps:
            trainer.should_stop = True  # the last step is validated even if validate_every does not divide the steps

    def on_save_checkpoint(self, trainer: L.Trainer, pl_module: L.LightningModule, checkpoint: dict[str, Any]) -> None:
        checkpoint["zoo"] = {
            "schema": SCHEMA,
            "zoo": VERSION,
            "torch": str(torch.__version__),
            "config": {**self.config, **dict(pl_module.hparams)},
            "command": self.command,
            "seconds": self.seconds,
            **self.started_with,
        }

    def on_load_checkpoint(self, trainer: L.Trainer, pl_module: L.LightningModule, checkpoint: dict[str, Any]) -> None:
        self.seconds, self.command = checkpoint["zoo"]["seconds"], checkpoint["zoo"]["command"]


def step_losses(trainer: L.Trainer, pl_module: Any) -> dict[str, float]:
    """The losses of the last step, means over its parts and all processes, each of which must call this; raises
    ValueError if one is no number."""
    share = 1 / trainer.accumulate_grad_batches
    losses = {
        name: float(trainer.strategy.reduce(value * share, reduce_op="mean"))
        for name, value in pl_module.losses.items()
    }
    for name, value in losses.items():
        _refuse_infinite("the training loss" if name == "loss" else f"the {name}", value, trainer)
    return losses


def _refuse_infinite(name: str, value: float, trainer: L.Trainer) -> None:
    if math.isfinite(value):
        return
    last = Path(trainer.default_root_dir, "checkpoints", "last.ckpt")
    good = f"the last good checkpoint is {last}" if last.exists() else "no checkpoint was written yet"
    raise ValueError(
        f"{name} is {value} at step {trainer.global_step}; {good}. A lower optim.lr, a longer optim.warmup or a "
        f"smaller optim.clip may help"
    )


class FiniteLoss(Callback):
    """Stops a run that diverged before a checkpoint of it could be written; rows of metrics do so when they are
    logged. Not at every step: reading a loss makes a GPU wait."""

    def on_validation_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        if "validation_loss" in trainer.callback_metrics:
            _refuse_infinite("the validation loss", float(trainer.callback_metrics["validation_loss"]), trainer)

    def on_save_checkpoint(self, trainer: L.Trainer, pl_module: L.LightningModule, checkpoint: dict[str, Any]) -> None:
        step_losses(trainer, pl_module)
        for name, weight in checkpoint["state_dict"].items():
            if not weight.isfinite().all():  # of a finite loss whose gradient was not
                _refuse_infinite(f"an entry of {name}", math.nan, trainer)


class MetricsFile(Callback):
    """Logs the losses and appends a row to metrics.jsonl every log_every optimiser steps, a row at each validation."""

    def __init__(self, path: Path, log_every: int):
        self.path, self.log_every, self.lr = path, log_every, 0.0

    def on_train_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Drops rows that a killed run wrote after its last checkpoint."""
        if trainer.is_global_zero:
            text = self.path.read_text(encoding="utf-8", errors="replace") if self.path.is_file() else ""
            lines = [line for line in text.splitlines() if _row_step(line) <= trainer.global_step]
            write(self.path, "".join(line + "\n" for line in lines))  # a file of its own, never one of a link

    def _append(self, trainer: L.Trainer, row: dict[str, Any]) -> None:
        if trainer.is_global_zero:
            # where the folder was removed, the rest of the run is not lost
            self.path.parent.mkdir(parents=True, exist_ok=True)
            with self.path.open("a", encoding="utf-8") as file:
                file.write(to_json({"step": trainer.global_step, **row}) + "\n")

    def on_before_optimizer_step(self, trainer: L.Trainer, pl_module: L.LightningModule, optimizer: Any) -> None:
        self.lr = optimizer.param_groups[0]["lr"]  # after the step it is that of the next one

    def on_train_batch_end(
        self, trainer: L.Trainer, pl_module: L.LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        if _logged(trainer, batch_idx, self.log_every):
            losses = step_losses(trainer, pl_module)
            for name, value in losses.items():  # here, not at every step: Lightning's log takes half a millisecond
                pl_module.log(name, value, prog_bar=name == "loss")
            self._append(trainer, {**losses, "lr": self.lr})

    def on_validation_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        names = [name for name in trainer.callback_metrics if name == "validation_loss" or name.startswith("layer")]
        self._append(trainer, {name: float(trainer.callback_metrics[name]) for name in names})


def _row_step(line: str) -> float:
    try:
        return float(json.loads(line)["step"])
    except (ValueError, KeyError, TypeError, RecursionError):  # a row cut short by a kill
        return math.inf


class LastCheckpoint(Checkpoint):
    """Writes last.ckpt after each validation (Lightning's save_last: after new bests alone), and when a signal comes.

    Ctrl-C and SIGTERM stop it after the current step; a second Ctrl-C stops it at once. It is a Checkpoint because
    Lightning calls those last, in order: the best checkpoint is saved by then, and last.ckpt knows of it.
    """

    def __init__(self, folder: Path):
        self.folder, self.path = folder, folder / "checkpoints" / "last.ckpt"
        self.signal = 0

    def on_train_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        if threading.current_thread() is threading.main_thread():  # no other may do this
            for number in (signal.SIGINT, signal.SIGTERM):
                signal.signal(number, self._note)  # Lightning puts all handlers back when the fit ends, however it ends

    def _note(self, number: int, frame: FrameType | None) -> None:
        if self.signal and number == signal.SIGINT:
            raise KeyboardInterrupt
        self.signal = number

    def on_train_batch_end(
        self, trainer: L.Trainer, pl_module: L.LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        assert trainer.val_check_batch is not None
        due = (batch_idx + 1) % trainer.val_check_batch == 0 or trainer.should_stop
        # a step that is validated next is complete after that: a resumed run would not make up for it
        if due and trainer.enable_validation:
            return
        if _step_done(trainer, batch_idx) and (due or self._signalled(trainer)):
            self._save(trainer)

    def on_validation_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        self._save(trainer)

    def _signalled(self, trainer: L.Trainer) -> bool:
        """True in every process if any has got a signal: all must stop at the same step."""
        return trainer.strategy.reduce_boolean_decision(bool(self.signal), all=False)

    def _save(self, trainer: L.Trainer) -> None:
        trainer.save_checkpoint(self.path)
        if self._signalled(trainer):
            name = signal.Signals(self.signal or signal.SIGTERM).name
            raise Interrupted(
                f"stopped by {name} at step {trainer.global_step}; continue with: python train.py resume={self.folder}",
                128 + (self.signal or signal.SIGTERM),
            )
