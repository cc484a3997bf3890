"""Where a run logs besides its own files: options, stored with it, and Lightning's loggers, which may fail."""

from __future__ import annotations

import re
import secrets
from collections.abc import Callable, Iterable, Mapping
from contextlib import ExitStack
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any, Literal

from lightning.pytorch.loggers import CSVLogger, Logger, TensorBoardLogger, WandbLogger

from zoo.config import from_dict, one_line, plain, show
from zoo.console import describe, warn


@dataclass(frozen=True)
class LoggerConfig:
    """Where losses are logged besides metrics.jsonl: nowhere else (files), in a table (csv), for TensorBoard, or in
    Weights & Biases (wandb); id: of the run there, under which a resumed one goes on, null for a new one."""

    name: Literal["files", "csv", "tensorboard", "wandb"] = "files"
    project: str = "zoo"
    offline: bool = True
    id: str | None = None

    def __post_init__(self) -> None:
        if self.id is not None and not re.fullmatch(r"[\w-][\w.-]{0,100}", self.id):  # wandb names files by it
            raise ValueError(f"logger.id={show(self.id)} must be letters, digits, -, _ and .")
        if self.name != "wandb" and replace(self, name="wandb") != LoggerConfig("wandb"):
            raise ValueError(f"logger.project, offline and id need logger=wandb, not {self.name}")

    def begun(self, folder: Path, stack: ExitStack) -> list[Logger]:
        """The loggers, started before anything could be lost, and ended by `stack`; raises ValueError for one that
        cannot start."""
        if self.name == "files":
            return []
        try:
            if self.name == "csv":
                return [CSVLogger(folder, name="", version="csv")]
            if self.name == "tensorboard":
                board = TensorBoardLogger(folder, name="", version="tensorboard")
                board.finalize = lambda status: board.experiment.flush()  # type: ignore[method-assign]
                stack.callback(board.experiment.close)  # not after training: the test would begin another file
                return [board]
            import wandb

            logger = WandbLogger(project=self.project, offline=self.offline, id=self.id, save_dir=folder)
            _ = logger.experiment
        except Exception as error:  # wandb's errors have no common kind
            advice = "; logger.offline=true needs no network" if self.name == "wandb" else ""
            raise ValueError(f"logger={self.name} cannot start: {one_line(error, 200)}{advice}") from error
        stack.callback(wandb.finish)  # else the next run of this process would go on with this one
        return [logger]


def of_logger(given: Mapping[str, Any], saved: Mapping[str, Any]) -> LoggerConfig:
    """The options of a logger: those `saved` with the run that goes on, below those `given`, unless these name another
    logger."""
    options = plain(given, "logger")
    if isinstance(options, dict) and options.get("name", saved.get("name")) == saved.get("name"):
        options = {**saved, **options}
    config = from_dict(LoggerConfig, options, "logger")
    return replace(config, id=secrets.token_hex(4)) if config.name == "wandb" and not config.id else config


def guarded(logger: Logger) -> Logger:
    """`logger`, each method of which warns where it fails and is not called again; that it starts is not optional.
    Raises ValueError for what is none."""
    if not isinstance(logger, Logger):
        raise ValueError(f"logger must be a name, options, or a list of Lightning's loggers, got {show(logger)}")

    def call(name: str, method: Callable[..., Any], *args: Any, **options: Any) -> Any:
        try:
            return method(*args, **options)
        except Exception as error:
            setattr(logger, name, lambda *args, **options: None)
            warn(f"{type(logger).__name__}.{name} failed: {describe(error)}; the run goes on without it")

    for name in ("log_metrics", "log_hyperparams", "log_graph", "save", "finalize"):
        setattr(logger, name, partial(call, name, getattr(logger, name)))
    return logger


def tell_again(loggers: Iterable[Logger], rows: Iterable[dict[str, Any]]) -> None:
    """Gives tables, which begin anew where a run goes on, its rows of metrics.jsonl so far."""
    for logger in loggers:
        if isinstance(logger, CSVLogger):
            for row in rows:
                told = {name: row[name] for name in row.keys() - {"seconds", "tokens", "flops"}}
                logger.log_metrics(told, row["step"])
            logger.save()
