"""Callbacks around training steps: checkpoints, clean stops, rows of metrics, and what a person sees meanwhile."""

from __future__ import annotations

import json
import math
import signal
import sys
import threading
from contextlib import suppress
from pathlib import Path
from time import monotonic
from types import FrameType
from typing import Any

import lightning as L
import torch
from lightning.pytorch.callbacks import Callback, Checkpoint
from tqdm import tqdm

from zoo.config import VERSION
from zoo.console import Interrupted, say
from zoo.files import to_json, write
from zoo.training.checkpoint import SCHEMA


class Checkpoints(Checkpoint):
    """Writes best.ckpt and last.ckpt after each validation, and last.ckpt when a signal comes.

    Ctrl-C and SIGTERM stop a run after the current step; a second Ctrl-C stops it at once. It is a Checkpoint because
    Lightning calls those last. config, command, begun_with: what checkpoints say of their run besides the seconds of
    training, over all its parts, and the score of the best.
    """

    def __init__(self, folder: Path, config: dict[str, Any], command: str):
        self.folder, self.config, self.command = folder, config, command
        self.begun_with: dict[str, Any] = {}
        self.best: float | None = None
        self.seconds, self.since, self.signal = 0.0, 0.0, 0

    def setup(self, trainer: L.Trainer, pl_module: L.LightningModule, stage: str) -> None:
        self.folder = Path(trainer.strategy.broadcast(str(self.folder)))  # others may have started a second later

    def on_train_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        self.since = monotonic()
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
        now = monotonic()
        self.seconds, self.since = self.seconds + now - self.since, now
        if trainer.global_step >= trainer.max_steps:
            trainer.should_stop = True  # the last step is validated even if validate_every does not divide the steps
        assert trainer.val_check_batch is not None
        due = (batch_idx + 1) % trainer.val_check_batch == 0 or trainer.should_stop
        # a step that is validated next is complete after that: a resumed run would not make up for it
        if due and trainer.enable_validation:
            return
        if _step_done(trainer, batch_idx) and (due or self._signalled(trainer)):
            self._save(trainer)

    def on_validation_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        loss = float(trainer.callback_metrics["validation_loss"])
        if self.best is None or loss < self.best:
            self.best = loss
            trainer.save_checkpoint(self.folder / "checkpoints" / "best.ckpt")
        self._save(trainer)

    def _signalled(self, trainer: L.Trainer) -> bool:
        """True in every process if any has got a signal: all must stop at the same step."""
        return trainer.strategy.reduce_boolean_decision(bool(self.signal), all=False)

    def _save(self, trainer: L.Trainer) -> None:
        trainer.save_checkpoint(self.folder / "checkpoints" / "last.ckpt")
        if self._signalled(trainer):
            stop = signal.Signals(self.signal or signal.SIGTERM)
            raise Interrupted(
                f"stopped by {stop.name} at step {trainer.global_step}; continue with: "
                f"python train.py resume={self.folder}",
                stop,
            )

    def on_save_checkpoint(self, trainer: L.Trainer, pl_module: L.LightningModule, checkpoint: dict[str, Any]) -> None:
        # a run that diverged stops before a checkpoint of it is written; not at every step: reading makes a GPU wait
        step_losses(trainer, pl_module)
        for name, weight in checkpoint["state_dict"].items():
            if not weight.isfinite().all():  # of a finite loss whose gradient was not
                refuse_infinite(f"an entry of {name}", math.nan, trainer)
        checkpoint["zoo"] = {
            "schema": SCHEMA,
            "zoo": VERSION,
            "torch": str(torch.__version__),
            "config": {**self.config, **dict(pl_module.hparams)},
            "command": self.command,
            "seconds": self.seconds,
            "best": self.best,
            **self.begun_with,
        }

    def on_load_checkpoint(self, trainer: L.Trainer, pl_module: L.LightningModule, checkpoint: dict[str, Any]) -> None:
        self.seconds, self.command, self.best = (checkpoint["zoo"][name] for name in ("seconds", "command", "best"))


def _step_done(trainer: L.Trainer, batch_idx: int) -> bool:
    """True after the last accumulated part of an optimiser step."""
    return (batch_idx + 1) % trainer.accumulate_grad_batches == 0


def step_losses(trainer: L.Trainer, pl_module: Any) -> dict[str, float]:
    """The losses of the last step, means over its parts and all processes, each of which must call this; raises
    ValueError if one is no number."""
    share = 1 / trainer.accumulate_grad_batches
    losses = {
        name: float(trainer.strategy.reduce(value * share, reduce_op="mean"))
        for name, value in pl_module.losses.items()
    }
    for name, value in losses.items():
        refuse_infinite("the training loss" if name == "loss" else f"the {name}", value, trainer)
    return losses


def refuse_infinite(name: str, value: float, trainer: L.Trainer) -> None:
    """Raises ValueError for a number that training cannot go on with."""
    if math.isfinite(value):
        return
    last = Path(trainer.default_root_dir, "checkpoints", "last.ckpt")
    good = f"the last good checkpoint is {last}" if last.exists() else "no checkpoint was written yet"
    raise ValueError(
        f"{name} is {value} at step {trainer.global_step}; {good}. A lower optim.lr, a longer optim.warmup or a "
        f"smaller optim.clip may help"
    )


class MetricsFile(Callback):
    """Logs the losses and appends a row to metrics.jsonl every log_every optimiser steps, a row at each validation."""

    def __init__(self, path: Path, log_every: int):
        self.path, self.log_every, self.lr = path, log_every, 0.0

    def on_train_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Drops rows that a killed run wrote after its last checkpoint."""
        if trainer.is_global_zero:
            rows = [row for row in read_rows(self.path) if row["step"] <= trainer.global_step]
            write(self.path, "".join(to_json(row) + "\n" for row in rows))  # a file of its own, never one of a link

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
        if _step_done(trainer, batch_idx) and trainer.global_step % self.log_every == 0:
            losses = step_losses(trainer, pl_module)
            for name, value in losses.items():  # here, not at every step: Lightning's log takes half a millisecond
                pl_module.log(name, value)
            self._append(trainer, {**losses, "lr": self.lr})

    def on_validation_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        names = [name for name in trainer.callback_metrics if name == "validation_loss" or name.startswith("layer")]
        row = {name: float(trainer.callback_metrics[name]) for name in names}
        refuse_infinite("the validation loss", row["validation_loss"], trainer)
        self._append(trainer, row)


def read_rows(path: Path) -> list[dict[str, Any]]:
    """The rows of metrics.jsonl that are whole: a kill may have cut one short."""
    rows = []
    for line in path.read_text(encoding="utf-8", errors="replace").splitlines() if path.is_file() else ():
        with suppress(ValueError, RecursionError):
            row = json.loads(line)
            rows += [row] if isinstance(row, dict) and isinstance(row.get("step"), int) else []
    return rows


class Progress(Callback):
    """Steps and losses on stdout: as a bar in a terminal, else, so that no log fills, as a line per validation."""

    bar = tqdm(disable=True)

    def __init__(self, log_every: int):
        self.log_every = log_every

    def on_train_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        self.since = monotonic()
        seen = trainer.is_global_zero and sys.stdout and sys.stdout.isatty()
        sizes: Any = {"total": trainer.max_steps, "initial": trainer.global_step, "disable": not seen}
        self.bar = tqdm(**sizes, unit="step", file=sys.stdout, dynamic_ncols=True)

    def on_train_batch_end(self, trainer: L.Trainer, *args: Any) -> None:
        if trainer.global_step % self.log_every == 0:  # at others nothing is read from the device
            self.bar.set_postfix_str(_losses(trainer), refresh=False)
        with suppress(OSError):  # the terminal was closed
            self.bar.update(trainer.global_step - self.bar.n)

    def on_validation_end(self, trainer: L.Trainer, *args: Any) -> None:
        with suppress(OSError):
            self.bar.set_postfix_str(_losses(trainer))
        if self.bar.disable and trainer.is_global_zero:
            step = f"step {trainer.global_step}/{trainer.max_steps}"
            say(f"{step}, {_losses(trainer)}, {monotonic() - self.since:.0f} s")

    def on_train_end(self, *args: Any) -> None:
        with suppress(OSError):
            self.bar.close()

    def on_exception(self, *args: Any) -> None:
        self.on_train_end()


def _losses(trainer: L.Trainer) -> str:
    names = {"loss": "loss", "validation_loss": "val"}
    metrics = trainer.callback_metrics
    return ", ".join(f"{text} {float(metrics[name]):.4f}" for name, text in names.items() if name in metrics)
