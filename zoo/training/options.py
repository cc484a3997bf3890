"""Options of a run, its trainer and its logger: those given, on top of those that it was begun with."""

from __future__ import annotations

import os
import re
import secrets
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import asdict, dataclass, fields, replace
from pathlib import Path
from typing import Any

import torch
from lightning.pytorch.loggers import Logger, WandbLogger
from lightning.pytorch.utilities.exceptions import MisconfigurationException

from zoo.config import from_dict, lookup, plain, require_positive, show
from zoo.files import home
from zoo.models.base import ModelConfig, OptimConfig
from zoo.tasks.text import sources
from zoo.training import checkpoint, validate


@dataclass(frozen=True)
class RunConfig:
    """Options of a run; model, task and optim are groups of their own.

    validate_every, log_every: optimiser steps; validation_batches, test_batches: batches of optim.batch_size
    sequences; overfit: train on the first batch alone; compile: translate the decoder with torch.compile first (takes
    a minute, then steps are faster); activation_checkpointing: keep what enters each layer and compute the rest anew in
    the backward pass; out: run folder, null for runs/MODEL-TASK/TIME; resume: a run folder or checkpoint to continue.
    """

    model: dict
    task: dict
    optim: dict
    seed: int = 0
    validate_every: int = 100
    log_every: int = 10
    validation_batches: int = 8
    test_batches: int = 20
    overfit: bool = False
    compile: bool = False
    activation_checkpointing: bool = False
    out: str | None = None
    resume: str | None = None

    def __post_init__(self) -> None:
        if not 0 <= self.seed < 2**32:
            raise ValueError(f"seed={show(self.seed)} must lie between 0 and {2**32 - 1}")
        counts = ("validate_every", "log_every", "validation_batches", "test_batches")
        require_positive("", **{name: getattr(self, name) for name in counts})


def _check_group(name: str, value: Any) -> None:
    if not isinstance(value, Mapping):
        raise ValueError(f"{name} must be a group of options, got {show(value)}")


def of_run(config: Mapping[str, Any]) -> tuple[RunConfig, dict[str, Any]]:
    """The options of a run, and the checkpoint it goes on with, {} for a new one. Raises ValueError for wrong ones."""
    for name in ("model", "task", "optim"):
        _check_group(name, config.get(name, {}))
    for key in config.keys() - {field.name for field in fields(RunConfig)}:
        for group, kind in (("optim", OptimConfig), ("model", ModelConfig)):
            if key in {field.name for field in fields(kind)}:
                raise ValueError(f"{key} is an option of {group}: did you mean {group}.{key}?")
    if "task" in config:
        config = {**config, "task": sources.absolute(config["task"])}
    if config.get("resume") == "":
        raise ValueError("resume= names no run: give a run folder, or null for a new run")
    return _resumed(config) if config.get("resume") else (from_dict(RunConfig, config, ""), {})


def _resumed(config: Mapping[str, Any]) -> tuple[RunConfig, dict[str, Any]]:
    """The saved options, if nothing that was asked for contradicts them."""
    file = checkpoint.find(config["resume"], "last")
    folder = file.absolute().parent.parent
    if file.absolute().parent.name != "checkpoints":
        raise ValueError(f"{file} lies in no RUN_DIR/checkpoints, and resume= continues in RUN_DIR")
    if config.get("out") and home(config["out"]).absolute() != folder:
        raise ValueError(
            f"resume={config['resume']} continues in its own folder, {folder}: leave out={config['out']} away"
        )
    saved = checkpoint.read(file, resume=True)
    options = asdict(from_dict(RunConfig, saved["zoo"]["config"], ""))
    asked = {key: value for key, value in config.items() if key not in ("resume", "out")}
    for group in ("model", "task", "optim"):  # null leaves an option open: it is what the run made of it
        asked[group] = {name: value for name, value in (asked.get(group) or {}).items() if value is not None}
    for place in sources.PLACES:  # may change; what lies there may not, see zoo.training.run
        if options["task"].get(place) and asked["task"].get(place):
            options["task"][place] = asked["task"][place]
    if changed := validate.differences(options, asked):
        raise ValueError(f"resume={config['resume']} continues a run as it was begun, but {'; '.join(changed)}")
    return RunConfig(**{**options, "resume": str(file), "out": str(folder)}), saved


FLAG = "True|False"
STORED = {
    "accelerator": "'(auto|cpu|gpu|cuda|mps)'",
    "strategy": "'(auto|ddp|ddp_find_unused_parameters_true|ddp_static_graph|fsdp)'",
    "precision": "'(32-true|64-true|bf16-mixed|bf16-true|16-mixed)'",
    "deterministic": f"{FLAG}|'warn'",
    **dict.fromkeys(("benchmark", "sync_batchnorm", "detect_anomaly", "enable_progress_bar"), FLAG),
    "devices": r"'auto'|-1|\d{1,9}|\[\d{1,9}(, \d{1,9}){0,1023}\]",
    "num_nodes": "1",
    **dict.fromkeys(("limit_val_batches", "limit_test_batches"), r"\d{1,9}|0\.\d+|1\.0|[1-9][.\d]*e-\d+"),
}
"""Arguments of lightning.Trainer that a run keeps when it is resumed, and how Python writes their values: never paths
or objects. null stands for Lightning's own default."""


def storable(key: Any, value: Any) -> bool:
    """Whether a run keeps this argument of its trainer when it is resumed."""
    return key in STORED and (value is None or bool(re.fullmatch(STORED[key], repr(value))))


def of_trainer(given: Mapping[str, Any], saved: dict[str, Any] | None = None) -> dict[str, Any]:
    """Arguments of lightning.Trainer: those `saved` with a run, below those `given`, which may be objects. Raises
    ValueError for saved ones that are not in STORED and not given again, and for more devices than there are."""
    _check_group("trainer", given)
    saved = {key: value for key, value in (saved or {}).items() if key not in given}
    for key, value in saved.items():
        if not storable(key, value):
            raise ValueError(
                f"the checkpoint holds trainer.{show(key)}={show(value)}, which is not taken from a file: "
                f"give it again, as trainer.NAME=VALUE"
            )
    devices = saved.get("devices")
    count = len(devices) if isinstance(devices, list) else devices
    here = max(2, os.cpu_count() or 1, torch.cuda.device_count())
    if isinstance(count, int) and count > here:
        raise ValueError(f"the run had {count} devices, here are at most {here}: give trainer.devices=")
    arguments = {**saved, **given}
    for key, value in arguments.items():
        with suppress(ValueError):  # a strategy, a profiler, plugins: Lightning's own objects
            arguments[key] = plain(value)
    return arguments


@dataclass(frozen=True)
class FilesConfig:
    """metrics.jsonl and metrics.json alone."""

    name: str = "files"

    def make(self, folder: Path) -> list[Logger]:
        return []


@dataclass(frozen=True)
class WandbConfig:
    """Weights & Biases besides; id: of the run there, under which a resumed one goes on, null for a new one."""

    name: str = "wandb"
    project: str = "zoo"
    offline: bool = True
    id: str | None = None

    def make(self, folder: Path) -> list[Logger]:
        for key, value in (("project", self.project), ("id", self.id or "-")):
            if not re.fullmatch(r"[\w-][\w.-]{0,100}", value):  # wandb names files by them
                raise ValueError(f"logger.{key}={show(value)} must be letters, digits, -, _ and .")
        try:
            return [WandbLogger(project=self.project, offline=self.offline, id=self.id, save_dir=folder)]
        except (ImportError, MisconfigurationException) as error:
            raise ValueError(f"logger=wandb cannot start: {error}") from None


LOGGERS: dict[str, type[FilesConfig] | type[WandbConfig]] = {"files": FilesConfig, "wandb": WandbConfig}


def of_logger(given: Mapping[str, Any], saved: dict[str, Any] | None = None) -> FilesConfig | WandbConfig:
    """The options of a logger: those `saved` with a run, below those `given`, unless these name another logger."""
    _check_group("logger", given)
    options = plain(given, "logger")
    if saved and options.get("name", saved.get("name")) == saved.get("name"):
        options = {**saved, **options}
    config = from_dict(lookup(options.get("name", "files"), LOGGERS, "logger"), options, "logger")
    return replace(config, id=secrets.token_hex(4)) if isinstance(config, WandbConfig) and not config.id else config
