"""Options of a run and its trainer: those given, on top of those that it was begun with."""

from __future__ import annotations

import os
import re
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any, Literal

import torch

from zoo.config import flat, from_dict, plain, require_positive, show
from zoo.files import home
from zoo.models.optim import OptimConfig
from zoo.records import pretrained
from zoo.tasks.text import sources
from zoo.training import checkpoint


@dataclass(frozen=True)
class RunConfig:
    """Options of a run, see docs/configuration.md; model, task and optim are groups of their own. validate_every and
    log_every count optimiser steps, validation_batches and test_batches batches of optim.batch_size sequences. init:
    whose weights a run begins with; init_frozen: it trains the family's own alone. budget: model.hidden is such that it
    costs what the default transformer does, or the run budget_of. shuffle_context: contexts are those of others."""

    model: dict = field(default_factory=dict)
    task: dict = field(default_factory=dict)
    optim: dict = field(default_factory=dict)
    seed: int = 0
    validate_every: int = 100
    log_every: int = 10
    validation_batches: int = 8
    test_batches: int = 20
    overfit: bool = False
    shuffle_context: bool = False
    compile: bool = False
    activation_checkpointing: bool = False
    budget: Literal["params", "active_params", "flops"] | None = None
    budget_of: str | None = None
    init: str | None = None
    init_frozen: bool = False
    out: str | None = None
    resume: str | None = None

    def __post_init__(self) -> None:
        if not 0 <= self.seed < 2**32:
            raise ValueError(f"seed={show(self.seed)} must lie between 0 and {2**32 - 1}")
        if self.init_frozen and not self.init:
            raise ValueError("init_frozen=true needs init=RUN: else the frozen weights would be random")
        if self.budget_of and not self.budget:
            raise ValueError("budget_of=RUN needs budget=params, active_params or flops: what is to be the same")
        counts = ("validate_every", "log_every", "validation_batches", "test_batches")
        require_positive("", **{name: getattr(self, name) for name in counts})


def of_run(config: Mapping[str, Any]) -> tuple[RunConfig, dict[str, Any]]:
    """The options of a run, and the checkpoint it goes on with, {} for a new one. Raises ValueError for wrong ones, and
    for those that contradict the checkpoint."""
    asked = from_dict(RunConfig, config, "")
    asked = replace(asked, task=sources.absolute(asked.task))
    if asked.resume is None:
        return replace(asked, **pretrained.decided(asked)), {}
    if not asked.resume:
        raise ValueError("resume= names no run: give its folder or a checkpoint")
    file = checkpoint.find(asked.resume, "last")
    folder = file.absolute().parent.parent
    if file.absolute().parent.name != "checkpoints":
        raise ValueError(f"{file} lies in no RUN_DIR/checkpoints, and resume= continues in RUN_DIR")
    if asked.out and home(asked.out).absolute() != folder:
        raise ValueError(f"resume={asked.resume} continues in its own folder, {folder}: leave out={asked.out} away")
    saved = checkpoint.read(file, resume=True)
    options = asdict(from_dict(RunConfig, saved["zoo"]["config"], ""))
    options["task"] = sources.moved(options["task"], asked.task)  # see zoo.training.run
    asked = replace(asked, **pretrained.decided(asked, options["model"]))
    old = flat(options)
    new = flat({key: getattr(asked, key) for key in config.keys() - {"resume", "out"}})
    changed = {  # null leaves an option open: it is what the run made of it
        key: f"{key} is {show(old[key]) if key in old else 'not'} in the checkpoint, {show(value)} asked"
        for key, value in sorted(new.items())
        if value is not None and old.get(key) != value
    }
    steps = new.get("optim.steps")
    if [*changed] == ["optim.steps"] and isinstance(steps, int | float) and steps > old["optim.steps"]:
        file, saved = _longer(file, saved, steps)
        options["optim"]["steps"] = steps
    elif changed:
        but = "; ".join([*changed.values(), "trainer, logger, a larger optim.steps and the place of text may change"])
        raise ValueError(f"resume={asked.resume} continues a run as it was begun, but {but}")
    return RunConfig(**{**options, "resume": str(file), "out": str(folder)}), saved


def _longer(file: Path, saved: dict[str, Any], steps: float) -> tuple[Path, dict[str, Any]]:
    """The checkpoint from which a run goes on for more `steps`, as if it had been begun so; raises ValueError where its
    learning rates have fallen, or will, with an end in sight."""
    optim = OptimConfig(**saved["hyper_parameters"]["optim"])
    if saved["global_step"] > optim.flat_until and optim.schedule == "wsd" and file.with_name("stable.ckpt").is_file():
        file = file.with_name("stable.ckpt")
        saved = checkpoint.read(file, resume=True)
    if saved["global_step"] > optim.flat_until:
        then = f"optim.schedule={optim.schedule} has its end at step {optim.steps}"
        advice = "wsd and constant go on, or begin a new run with init="
        raise ValueError(f"optim.steps={steps}: {file} cannot be trained longer, {then}; {advice}")
    return file, saved


STORED: dict[str, Any] = {
    **dict.fromkeys(("accelerator", "precision", "strategy"), str | None),
    **dict.fromkeys(("benchmark", "sync_batchnorm", "detect_anomaly", "enable_progress_bar"), bool | None),
    **dict.fromkeys(("limit_val_batches", "timeout"), int | float | None),
    "deterministic": bool | str | None,
    "devices": int | list | str | None,
}
"""Arguments of lightning.Trainer that a run keeps when it is resumed, and their types: never paths or objects. None
stands for Lightning's own default."""


def stored(arguments: Mapping[str, Any]) -> dict[str, Any]:
    """Those arguments of its trainer that a run keeps when it is resumed."""
    return {name: x for name, x in arguments.items() if name in STORED and isinstance(x, STORED[name])}


def of_trainer(given: Mapping[str, Any], saved: Mapping[str, Any]) -> dict[str, Any]:
    """Arguments of lightning.Trainer: those of `saved`, of the run that goes on, that are STORED, below those `given`,
    which may be objects. Raises ValueError for more saved devices than there are."""
    if not isinstance(given, Mapping):
        raise ValueError(f"trainer must be a group of options, got {show(given)}")
    arguments = {**stored(saved), **given}
    devices, here = arguments.get("devices"), max(2, os.cpu_count() or 1, torch.cuda.device_count())
    count = len(devices) if isinstance(devices, list) else devices
    fits = count in (None, "auto") or (re.fullmatch("-?[0-9]{1,9}", str(count)) and int(count) <= here)
    if "devices" not in given and not fits:
        raise ValueError(f"the run had {show(count)} devices, here are at most {here}: give trainer.devices=")
    for key, value in given.items():
        with suppress(ValueError):  # a strategy, a profiler, plugins: Lightning's own objects
            arguments[key] = plain(value)
    return arguments
