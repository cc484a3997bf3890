"""How far training is: a bar where somebody watches, elsewhere one line per validation."""

from __future__ import annotations

import sys
from contextlib import suppress
from time import monotonic
from typing import Any

import lightning as L
from lightning.pytorch.callbacks import ProgressBar
from tqdm import tqdm

from zoo.console import say


class Progress(ProgressBar):
    """Steps and losses on stdout: as a bar in a terminal, else, so that no log fills, as a line per validation."""

    def __init__(self) -> None:
        super().__init__()
        self.enabled, self.bar, self.since = True, None, 0.0

    def disable(self) -> None:  # by the trainer, in all processes but one
        self.enabled = False

    def enable(self) -> None:
        self.enabled = True

    def on_train_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        self.since = monotonic()
        if self.enabled and sys.stdout and sys.stdout.isatty():
            sizes: Any = {"total": trainer.max_steps, "initial": trainer.global_step}
            self.bar = tqdm(**sizes, unit="step", file=sys.stdout, dynamic_ncols=True)

    def on_train_batch_end(self, trainer: L.Trainer, *args: Any) -> None:
        if self.bar:
            with suppress(OSError):  # the terminal was closed
                if trainer.global_step % trainer.log_every_n_steps == 0:  # at others nothing is read from the device
                    self.bar.set_postfix_str(_losses(trainer), refresh=False)
                self.bar.update(trainer.global_step - self.bar.n)

    def on_validation_end(self, trainer: L.Trainer, *args: Any) -> None:
        if self.bar:
            with suppress(OSError):
                self.bar.set_postfix_str(_losses(trainer))
        elif self.enabled:
            step = f"step {trainer.global_step}/{trainer.max_steps}"
            say(f"{step}, {_losses(trainer)}, {monotonic() - self.since:.0f} s")

    def on_train_end(self, *args: Any) -> None:
        if self.bar:
            with suppress(OSError):
                self.bar.close()
            self.bar = None

    def on_exception(self, *args: Any) -> None:
        self.on_train_end()


def _losses(trainer: L.Trainer) -> str:
    names = {"loss": "loss", "validation_loss": "val"}
    metrics = trainer.callback_metrics
    return ", ".join(f"{text} {float(metrics[name]):.4f}" for name, text in names.items() if name in metrics)
