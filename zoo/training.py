"""From options to numbers: run(...) trains, tests and writes a run folder; train(...) is the same for Python users.

A run folder holds checkpoints/best.ckpt and last.ckpt, metrics.jsonl (one row per logged step), metrics.json (the
result) and curve.png. Everything a run depends on is in its checkpoints.
"""

from __future__ import annotations

import json
import logging
import os
import platform
import shlex
import subprocess
import sys
import time
import warnings
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any

import lightning as L
import torch
from lightning.pytorch.callbacks import Callback, ModelCheckpoint, TQDMProgressBar
from lightning.pytorch.loggers import Logger
from lightning.pytorch.utilities.exceptions import MisconfigurationException

from zoo import checkpoint, flops, report
from zoo.callbacks import Clock, FiniteLoss, LastCheckpoint, MetricsFile
from zoo.config import lookup, positive, strict
from zoo.data import Data
from zoo.files import write
from zoo.models import MODELS, Model
from zoo.tasks import Task, sources


@dataclass(frozen=True)
class RunConfig:
    """What a run is made of; model, task and optim are groups of options of their own.

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


DECIDED_BY = {
    "max_steps": "optim.steps",
    "max_epochs": "optim.steps",
    "accumulate_grad_batches": "optim.accumulate",
    "gradient_clip_val": "optim.clip",
    "val_check_interval": "validate_every",
    "check_val_every_n_epoch": "validate_every",
    "log_every_n_steps": "log_every",
    "logger": "logger",
    "default_root_dir": "out",
}
"""Arguments of lightning.Trainer that options of this project stand for."""


def train(
    model: str | Mapping[str, Any] | None = None,
    task: str | Mapping[str, Any] | None = None,
    optim: Mapping[str, Any] | None = None,
    trainer: Mapping[str, Any] | None = None,
    **options: Any,
) -> dict[str, Any]:
    """Trains and tests a model and returns its metrics, as train.py does; e.g. train(model="moe", task="regression").

    model, task: a name, or a dict of options with the key `name` (default: transformer and regression, or what the run
    to resume was begun with); optim: options of OptimConfig; trainer: options of lightning.Trainer; further options:
    those of RunConfig. Raises ValueError for options that are wrong.
    """
    if not options.get("resume"):
        model, task = model or "transformer", task or "regression"
    for group, given in (("model", model), ("task", task)):
        if given:
            options[group] = {"name": given} if isinstance(given, str) else dict(given)
    return run({"optim": dict(optim or {}), **options}, dict(trainer or {}))


def run(config: Mapping[str, Any], trainer: Mapping[str, Any], loggers: list[Logger] | None = None) -> dict[str, Any]:
    """Trains, tests and writes the run folder; returns what metrics.json holds.

    config: options of RunConfig, plain values; when it resumes, only those asked for explicitly. trainer: keyword
    arguments of lightning.Trainer. Raises ValueError before anything starts if options are wrong, Interrupted if a
    signal stopped the run after its checkpoint was written.
    """
    if isinstance(config.get("task"), Mapping):
        config = {**config, "task": sources.absolute(config["task"])}
    resumed = checkpoint.find(config["resume"], "last") if config.get("resume") else None
    options = _resume(config, resumed) if resumed else strict(RunConfig, config, "")
    positive(
        "",
        validate_every=options.validate_every,
        log_every=options.log_every,
        validation_batches=options.validation_batches,
        test_batches=options.test_batches,
    )
    _quiet()
    L.seed_everything(options.seed, workers=True, verbose=False)
    build = lookup(options.model.get("name"), MODELS, "model")
    model = build(model=options.model, task=options.task, optim=options.optim, seed=options.seed)
    if resumed:
        _same_data(model.task, options, checkpoint.read(resumed))
    model.task.prepare()
    model.decoder.activation_checkpointing = options.activation_checkpointing
    if options.compile:
        torch.compiler.reset()  # what earlier runs of this process compiled counts against a limit
        model.decoder.compile(fullgraph=True)  # in place: the names of the weights stay
    folder = Path(options.out or default_folder(model)).absolute()
    saver = ModelCheckpoint(
        folder / "checkpoints",
        filename="best",
        monitor="validation_loss",
        enable_version_counter=False,
        save_on_train_epoch_end=False,
    )
    clock = Clock({**asdict(options), "resume": None, "out": None}, command())
    rows = MetricsFile(folder / "metrics.jsonl", options.log_every)
    callbacks = [clock, FiniteLoss(folder), rows, saver, LastCheckpoint(folder)]
    if trainer.get("enable_progress_bar", True):
        callbacks.append(TQDMProgressBar(leave=True))
    engine = _trainer(model, options, dict(trainer), loggers or [], callbacks, folder)
    share = model.optim.accumulate * engine.world_size
    if model.optim.batch_size % share:
        raise ValueError(
            f"optim.batch_size={model.optim.batch_size} must be a multiple of {share}, that is optim.accumulate="
            f"{model.optim.accumulate} times {engine.world_size} processes"
        )
    if engine.is_global_zero:
        folder.mkdir(parents=True, exist_ok=True)
        if resumed is None and (folder / "checkpoints" / "last.ckpt").exists():
            raise ValueError(f"{folder} holds a run already: continue it with resume={folder}, or choose another out=")
        print(report.opening(model, engine, folder), flush=True)
    data = Data(model, options.validation_batches, options.test_batches, options.overfit)
    engine.fit(model, data, ckpt_path=resumed, weights_only=True)
    best = checkpoint.read(checkpoint.find(folder, "best"))
    model.load_state_dict(best["state_dict"])
    engine.test(model, data, verbose=False)
    metrics = _metrics(model, options, engine, clock, folder)
    if engine.is_global_zero:
        write(folder / "metrics.json", json.dumps(metrics, indent=2) + "\n")
        report.curve(folder, report.title(metrics), model.task.unit, model.task.references())
        print(report.closing(metrics), flush=True)
    return metrics


def _resume(config: Mapping[str, Any], file: Path) -> RunConfig:
    """The saved options, if nothing that was asked for contradicts them."""
    if file.absolute().parent.name != "checkpoints":
        raise ValueError(f"{file} lies in no RUN_DIR/checkpoints, and resume= continues in RUN_DIR")
    saved = checkpoint.read(file)["zoo"]["config"]
    asked = {key: value for key, value in config.items() if key not in ("resume", "out")}
    for place in sources.PLACES:  # may change; what lies there may not, see _same_data
        if saved["task"].get(place) and asked.get("task", {}).get(place):
            saved["task"][place] = asked["task"][place]
    changed = checkpoint.differences(saved, asked)
    if changed:
        raise ValueError(f"resume={config['resume']} continues a run as it was begun, but {'; '.join(changed)}")
    options = strict(RunConfig, saved, "")
    return RunConfig(**{**asdict(options), "resume": str(file), "out": str(file.absolute().parent.parent)})


def _same_data(task: Task, options: RunConfig, saved: dict[str, Any]) -> None:
    """Raises ValueError where the data is not what the run was begun with."""
    state = saved.get("task", {})
    if options.task == saved["zoo"]["config"]["task"]:  # else what lies at the new place must be the same
        task.restore(state)
    with warnings.catch_warnings(action="ignore"):  # what prepare() warns of, restore() refuses
        task.prepare()
    task.restore(state)


def _trainer(
    model: Model,
    options: RunConfig,
    arguments: dict[str, Any],
    loggers: list[Logger],
    callbacks: list[Callback],
    folder: Path,
) -> L.Trainer:
    optim = model.optim
    precision = arguments.pop("precision", None) or "auto"
    if precision == "auto":
        # what an accelerator will be is only known to Lightning; on a GPU bfloat16 where the hardware has it
        gpu = arguments.get("accelerator", "auto") in ("auto", "gpu", "cuda") and torch.cuda.is_available()
        precision = "bf16-mixed" if gpu and torch.cuda.is_bf16_supported() else "32-true"
    fixed: dict[str, Any] = {
        "max_steps": optim.steps,
        "max_epochs": -1,
        "accumulate_grad_batches": optim.accumulate,
        "gradient_clip_val": optim.clip or None,
        "val_check_interval": min(options.validate_every, optim.steps) * optim.accumulate,
        "check_val_every_n_epoch": None,
        "num_sanity_val_steps": 0,
        "log_every_n_steps": options.log_every,
        "logger": loggers,
        "callbacks": callbacks,
        "enable_model_summary": False,
        "use_distributed_sampler": False,
        "default_root_dir": folder,
    }
    clash = sorted(set(fixed) & set(arguments))
    if clash:
        option = DECIDED_BY.get(clash[0])
        raise ValueError(f"trainer.{clash[0]} is {f'decided by the option {option}' if option else 'fixed here'}")
    plugins = [checkpoint.Files(), *arguments.pop("plugins", [])]
    given = {"accelerator": "auto", "devices": 1, **arguments, "precision": precision, "plugins": plugins}
    try:
        return L.Trainer(**given, **fixed)
    except (TypeError, RuntimeError, MisconfigurationException) as error:
        raise ValueError(f"trainer: {' '.join(str(error).split())}") from error


def default_folder(model: Model) -> Path:
    """runs/MODEL-TASK/ID; ID is $ZOO_RUN_ID, which all processes of a run must share, else the time."""
    name = os.environ.get("ZOO_RUN_ID") or time.strftime("%Y-%m-%d_%H-%M-%S")
    return Path("runs", f"{model.config.name}-{model.task.config.name}", name)


def command() -> str:
    """What was typed, shell-quoted."""
    return shlex.join([Path(sys.executable).name, *sys.orig_argv[1:]])


def _commit() -> str | None:
    try:
        answer = subprocess.run(
            ["git", "-C", str(Path(__file__).parent), "rev-parse", "HEAD"], capture_output=True, text=True, timeout=10
        )
    except (OSError, subprocess.TimeoutExpired):
        return None
    return answer.stdout.strip() or None


def _metrics(model: Model, options: RunConfig, engine: L.Trainer, clock: Clock, folder: Path) -> dict[str, Any]:
    count = flops.parameters(model)
    tokens = engine.global_step * model.optim.batch_size * model.task.tokens
    return {
        "task": model.task.config.name,
        "model": model.config.name,
        "seed": options.seed,
        "steps": engine.global_step,
        "seconds": round(clock.seconds, 3),
        "tokens": tokens,
        "tokens_per_second": round(tokens / clock.seconds, 1),
        "params_total": count["total"],
        "params_active": count["active"],
        "params": count,
        "flops_per_token": flops.flops_per_token(model),
        "checkpoint": str(folder / "checkpoints" / "best.ckpt"),
        "command": clock.command,
        "versions": {
            "python": platform.python_version(),
            **{name: version(name) for name in ("zoo", "torch", "lightning")},
            "commit": _commit(),
        },
        "config": clock.config | dict(model.hparams),
        "headline": model.task.headline,
        "test": {name: float(value) for name, value in engine.callback_metrics.items()},
    }


def _quiet() -> None:
    """Silences what Lightning says about matters that this project has decided."""
    for message in (
        ".*does not have many workers.*",
        ".*dataloader is not resumable.*",
        ".*Checkpoint directory .* exists and is not empty.*",
        ".*isinstance.treespec, LeafSpec.. is deprecated.*",
        ".*No .*logger.* configured.*",
    ):
        warnings.filterwarnings("ignore", message)
    logging.getLogger("lightning.pytorch.utilities.rank_zero").addFilter(_is_news)
    logging.getLogger("lightning.pytorch.trainer.connectors.checkpoint_connector").setLevel(logging.WARNING)


def _is_news(record: logging.LogRecord) -> bool:
    """False for tips and for what the opening lines of a run say better."""
    known = ("Tip:", "💡", "GPU available:", "TPU available:", "`Trainer.fit` stopped")
    return not any(text in record.getMessage() for text in known)
