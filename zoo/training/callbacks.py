"""Around training steps: checkpoints, clean stops, rows of metrics, and what a person sees meanwhile."""

from __future__ import annotations

import json
import math
import signal
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from time import monotonic
from types import FrameType
from typing import Any

import lightning as L
import torch
from lightning.pytorch.callbacks import Checkpoint

from zoo.config import VERSION
from zoo.console import Interrupted, say
from zoo.files import to_json, write
from zoo.models.flops import step_cost
from zoo.records.loggers import tell_again
from zoo.training.checkpoint import SCHEMA, read


class Keeper(Checkpoint):
    """Keeps what a run is, its checkpoints and its rows in metrics.jsonl, and stops it after the step in which Ctrl-C,
    SIGTERM or SIGUSR1 came; a second Ctrl-C stops it at once. It is a Checkpoint because Lightning calls those last.

    config, command, begun_with: what checkpoints say of their run besides the seconds of training, over all its parts,
    and the score of the best; says: a line on stdout after each validation.
    """

    says = False

    def __init__(self, folder: Path, config: dict[str, Any], command: str):
        self.folder, self.config, self.command = folder, config, command
        self.begun_with: dict[str, Any] = {}
        self.best: float | None = None
        self.seconds, self.since, self.signal, self.lr = 0.0, 0.0, 0, 0.0
        self.step_cost: dict[str, float] = {}  # tokens and FLOPs of one step

    @property
    def safe(self) -> str:
        """What is left of a run whose test did not end."""
        again = f"test again with: python train.py resume={self.folder}"
        return f"training is complete and saved in {self.folder}/checkpoints; {again}"

    def left(self) -> str:
        """What to do with a run that ended within its training."""
        saved = (self.folder / "checkpoints/last.ckpt").exists()
        return f"continue with: python train.py resume={self.folder}" if saved else "no checkpoint was written yet"

    def setup(self, trainer: L.Trainer, pl_module: L.LightningModule, stage: str) -> None:
        self.folder = Path(trainer.strategy.broadcast(str(self.folder)))  # others have read the clock later

    def on_train_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        if trainer.is_global_zero:  # a killed run has written rows after its last checkpoint
            path = self.folder / "metrics.jsonl"
            rows = [row for row in read_rows(path) if row["step"] <= trainer.global_step]
            write(path, "".join(to_json(row) + "\n" for row in rows))  # a file of its own, never one of a link
        self.since = monotonic() - self.seconds
        self.step_cost = step_cost(pl_module)  # type: ignore[arg-type]
        handle(self._note)

    def _note(self, number: int, frame: FrameType | None) -> None:
        if self.signal and number == signal.SIGINT:
            raise Interrupted(f"stopped by SIGINT at once; {self.left()}", number)  # Lightning ends others by 1
        self.signal = number

    def on_test_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        def stop(number: int, frame: FrameType | None) -> None:
            raise Interrupted(f"stopped by {signal.Signals(number).name}; {self.safe}", number)

        handle(stop)

    def on_before_optimizer_step(self, trainer: L.Trainer, pl_module: L.LightningModule, optimizer: Any) -> None:
        self.lr = optimizer.param_groups[0]["lr"]  # after the step it is that of the next one

    def on_train_batch_end(
        self, trainer: L.Trainer, pl_module: L.LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        self.seconds = monotonic() - self.since
        stepped = (batch_idx + 1) % trainer.accumulate_grad_batches == 0
        if stepped and trainer.global_step % min(self.config["log_every"], trainer.max_steps) == 0:
            losses = self._losses(trainer, pl_module)
            pl_module.log_dict(losses, prog_bar=True, logger=False)  # not at every step: it takes half a millisecond
            self._append(trainer, {**losses, "lr": self.lr})
        if trainer.global_step >= trainer.max_steps:
            trainer.should_stop = True  # the last step is validated even if validate_every does not divide the steps
        assert trainer.val_check_batch is not None
        due = (batch_idx + 1) % trainer.val_check_batch == 0 or trainer.should_stop
        # a step that is validated next is complete after that: a resumed run would not make up for it
        if due and trainer.enable_validation:
            return
        if stepped and (due or self._signalled(trainer) or self._falls_next(trainer, pl_module)):
            self._save(trainer)

    def on_validation_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        names = [name for name in trainer.callback_metrics if name == "validation_loss" or name.startswith("layer")]
        row = {name: float(trainer.callback_metrics[name]) for name in names}
        loss = row["validation_loss"]
        self._refuse("the validation loss", loss, trainer.global_step)
        self._append(trainer, row)
        if self.says and trainer.is_global_zero:
            trained = trainer.callback_metrics.get("loss")
            losses = ("" if trained is None else f"loss {float(trained):.4f}, ") + f"val {loss:.4f}"
            say(f"step {trainer.global_step}/{trainer.max_steps}, {losses}, {self.seconds:.0f} s")
        if self.best is None or loss < self.best:
            self.best = loss
            trainer.save_checkpoint(self.folder / "checkpoints" / "best.ckpt")
        self._save(trainer)

    def _append(self, trainer: L.Trainer, row: dict[str, Any]) -> None:
        if trainer.is_global_zero:
            self.folder.mkdir(parents=True, exist_ok=True)  # where it was removed, the rest of the run is not lost
            used = {name: trainer.global_step * cost for name, cost in self.step_cost.items()}
            line = to_json({"step": trainer.global_step, "seconds": round(self.seconds, 3), **used, **row})
            with (self.folder / "metrics.jsonl").open("a", encoding="utf-8") as file:
                file.write(line + "\n")
            for logger in trainer.loggers:  # not by Lightning, which counts steps from 0
                logger.log_metrics(row, trainer.global_step)
                logger.save()

    def _signalled(self, trainer: L.Trainer) -> bool:
        """True in every process if any has got a signal: all must stop at the same step."""
        return trainer.strategy.reduce_boolean_decision(bool(self.signal), all=False)

    def _falls_next(self, trainer: L.Trainer, pl_module: Any) -> bool:
        """Whether the rates, flat so far, depend on optim.steps from here on: a longer run goes on from this step."""
        return pl_module.optim.schedule == "wsd" and trainer.global_step == pl_module.optim.flat_until

    def _save(self, trainer: L.Trainer) -> None:
        if self._falls_next(trainer, trainer.lightning_module):
            trainer.save_checkpoint(self.folder / "checkpoints" / "stable.ckpt")
        trainer.save_checkpoint(self.folder / "checkpoints" / "last.ckpt")
        if self._signalled(trainer):
            stop = signal.Signals(self.signal or signal.SIGTERM)
            raise Interrupted(f"stopped by {stop.name} at step {trainer.global_step}; {self.left()}", stop)

    def on_save_checkpoint(self, trainer: L.Trainer, pl_module: L.LightningModule, checkpoint: dict[str, Any]) -> None:
        # a run that diverged stops before a checkpoint of it is written; not at every step: reading makes a GPU wait
        self._losses(trainer, pl_module)
        # of a finite loss whose gradient was not; the first process alone has what is cut
        bad = [name for name, weight in checkpoint["state_dict"].items() if not weight.isfinite().all()]
        for name in trainer.strategy.broadcast(bad):
            self._refuse(f"an entry of {name}", math.nan, trainer.global_step)
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

    def on_load_checkpoint(self, trainer: L.Trainer, pl_module: Any, checkpoint: dict[str, Any]) -> None:
        run, hparams = checkpoint["zoo"], pl_module.hparams
        longer = run["config"].get("optim", {}).get("steps") != pl_module.optim.steps
        self.seconds, self.command = run["seconds"], run["command"] + (f"; {self.command}" if longer else "")
        rows = [row for row in read_rows(self.folder / "metrics.jsonl") if row["step"] <= checkpoint["global_step"]]
        tell_again(trainer.loggers, rows)
        ours = False  # a best checkpoint that is gone, damaged or of another run is replaced by the next
        with suppress(ValueError):
            best = read(self.folder / "checkpoints" / "best.ckpt")
            # text may lie at another place now, and training go on for longer
            a, b = ({**x, "task": 0, "optim": {**x["optim"], "steps": 0}} for x in (best["hyper_parameters"], hparams))
            ours = a == b and best["global_step"] <= checkpoint["global_step"]
        self.best = run["best"] if trainer.strategy.broadcast(ours) else None

    def _losses(self, trainer: L.Trainer, pl_module: Any) -> dict[str, float]:
        """The losses of the last step, means over its parts and all processes, each of which must call this."""
        losses, parts = {}, trainer.accumulate_grad_batches
        for name, value in pl_module.losses.items():
            losses[name] = float(trainer.strategy.reduce(value / parts, reduce_op="mean"))
            self._refuse("the training loss" if name == "loss" else f"the {name}", losses[name], trainer.global_step)
        return losses

    def _refuse(self, name: str, value: float, step: int) -> None:
        """Raises ValueError for a number that training cannot go on with."""
        if not math.isfinite(value):
            last = self.folder / "checkpoints" / "last.ckpt"
            good = f"the last good checkpoint is {last}" if last.exists() else "no checkpoint was written yet"
            advice = "A lower optim.lr, a longer optim.warmup or a smaller optim.clip may help"
            raise ValueError(f"{name} is {value} at step {step}; {good}. {advice}")


def read_rows(path: Path) -> list[dict[str, Any]]:
    """The rows of metrics.jsonl that are whole: a kill may have cut one short."""
    rows = []
    for line in path.read_text(encoding="utf-8", errors="replace").splitlines() if path.is_file() else ():
        with suppress(ValueError, RecursionError):
            row = json.loads(line)
            rows += [row] if isinstance(row, dict) and isinstance(row.get("step"), int) else []
    return rows


def handle(handler: Callable[[int, FrameType | None], None]) -> None:
    """Has `handler` called for these signals until Lightning, when it ends, puts the handlers so far back."""
    with suppress(ValueError):  # no other thread than the main one may do this
        for name in {"SIGINT", "SIGTERM", "SIGUSR1"} & {*dir(signal)}:  # the last is no signal everywhere
            signal.signal(signal.Signals[name], handler)
