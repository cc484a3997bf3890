"""From options to numbers: run(...) trains, tests and writes a run folder; train(...) is the same for Python users.

A run folder holds checkpoints/best.ckpt and last.ckpt, metrics.jsonl (one row per logged step), metrics.json (the
result) and curve.png. Everything a run depends on is in its checkpoints.
"""

from __future__ import annotations

import logging
import platform
import shlex
import subprocess
import sys
import warnings
from collections.abc import Mapping
from contextlib import ExitStack
from dataclasses import asdict, dataclass, fields, replace
from importlib.metadata import version
from pathlib import Path
from typing import Any

import lightning as L
import torch
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.loggers import Logger
from lightning.pytorch.utilities import rank_zero_only

from zoo.config import from_dict, lookup, plain, require_positive, show
from zoo.console import say
from zoo.files import home, to_json, write
from zoo.models import MODELS, Model, flops
from zoo.models.base import ModelConfig, OptimConfig
from zoo.tasks import Task
from zoo.tasks.text import sources
from zoo.training import checkpoint, validate
from zoo.training import summary as report
from zoo.training.callbacks import FiniteLoss, LastCheckpoint, MetricsFile, RunState
from zoo.training.data import Data
from zoo.training.progress import Progress
from zoo.training.run_folder import announced, default, taken
from zoo.training.safeguards import guarded, optional, trained
from zoo.training.trainer import arguments, begun, changes, logger_of, placement, stored
from zoo.training.trainer import make as make_trainer


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


def train(
    model: str | Mapping[str, Any] | None = None,
    task: str | Mapping[str, Any] | None = None,
    optim: Mapping[str, Any] | None = None,
    trainer: Mapping[str, Any] | None = None,
    logger: str | Mapping[str, Any] | None = None,
    **options: Any,
) -> dict[str, Any]:
    """Trains and tests a model and returns its metrics, as train.py does; e.g. train(model="moe", task="regression").

    model, task: a name, or a dict of options with the key `name` (default: transformer and regression, or what the run
    to resume was begun with); optim: options of OptimConfig; trainer: options of lightning.Trainer; logger: as model;
    further options: those of RunConfig. Raises ValueError for options that are wrong.
    """
    if not options.get("resume"):
        model, task = model or "transformer", task or "regression"
    for group, given in (("model", model), ("task", task)):
        if given:
            options[group] = {"name": given} if isinstance(given, str) else given
    logger = {"name": logger} if isinstance(logger, str) else logger
    return run({"optim": optim or {}, **options}, trainer or {}, logger)


def run(
    config: Mapping[str, Any],
    trainer: Mapping[str, Any],
    logger: Mapping[str, Any] | list[Logger] | None = None,
) -> dict[str, Any]:
    """Trains, tests and writes the run folder; returns what metrics.json holds.

    config: options of RunConfig; when it resumes, only those asked for explicitly, of trainer and logger too. trainer:
    keyword arguments of lightning.Trainer. logger: options of one in LOGGERS, or Lightning's own objects. Raises
    ValueError before anything starts if options are wrong, Interrupted if a signal stopped the run after its checkpoint
    was written.
    """
    with ExitStack() as stack:  # the folder and the logger, given back however the run ends
        return _run(plain(config), trainer, logger or {}, stack)


def _run(
    config: dict[str, Any], trainer: Mapping[str, Any], logger: Mapping[str, Any] | list[Logger], stack: ExitStack
) -> dict[str, Any]:
    groups = {**config, "trainer": trainer, "logger": {} if isinstance(logger, list) else logger}
    for name in ("model", "task", "optim", "trainer", "logger"):
        if not isinstance(groups.get(name, {}), Mapping):
            raise ValueError(f"{name} must be a group of options, got {show(groups[name])}")
    if isinstance(logger, list) and not all(isinstance(item, Logger) for item in logger):
        raise ValueError(f"logger must be a list of Lightning's loggers, got {show(logger)}")
    if config.get("resume") == "":
        raise ValueError("resume= names no run: give a run folder, or null for a new run")
    if "task" in config:
        config = {**config, "task": sources.absolute(config["task"])}
    for key in config.keys() - {field.name for field in fields(RunConfig)}:
        for group, kind in (("optim", OptimConfig), ("model", ModelConfig)):
            if key in {field.name for field in fields(kind)}:
                raise ValueError(f"{key} is an option of {group}: did you mean {group}.{key}?")
    resumed = checkpoint.find(config["resume"], "last") if config.get("resume") else None
    options, saved = _resume(config, resumed) if resumed else (from_dict(RunConfig, config, ""), {})
    begun_with = saved.get("zoo", {})
    trainer = arguments(trainer, begun_with.get("trainer"))
    for part, count in (("val", options.validation_batches), ("test", options.test_batches)):
        limit = trainer.get(f"limit_{part}_batches")
        if isinstance(limit, float) and 0 < limit * count < 1:
            raise ValueError(f"trainer.limit_{part}_batches={limit} of {count} batches is none: 0 for none, or more")
    log = logger_of({} if isinstance(logger, list) else plain(logger, "logger"), begun_with.get("logger"))
    if not 0 <= options.seed < 2**32:
        raise ValueError(f"seed={show(options.seed)} must lie between 0 and {2**32 - 1}")
    require_positive(
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
        _same_data(model.task, options, saved)
    model.task.prepare()
    model.decoder.activation_checkpointing = options.activation_checkpointing
    if options.compile:
        torch.compiler.reset()  # what earlier runs of this process compiled counts against a limit
        model.decoder.compile(fullgraph=True)  # in place: the names of the weights stay
    out, family = home(options.out) if options.out else None, f"{model.config.name}-{model.task.config.name}"
    writes = rank_zero_only.rank == 0  # type: ignore[attr-defined]
    folder = stack.enter_context(taken(out, family, bool(resumed))) if writes else (out or default(family)).absolute()
    saver = ModelCheckpoint(
        folder / "checkpoints",
        filename="best",
        monitor="validation_loss",
        enable_version_counter=False,
        save_on_train_epoch_end=False,
    )
    clock = RunState({**asdict(options), "resume": None, "out": None}, command())
    rows = MetricsFile(folder / "metrics.jsonl", options.log_every)
    callbacks = [clock, FiniteLoss(), rows, saver, LastCheckpoint(folder)]
    if trainer.get("enable_progress_bar", True):
        callbacks.append(Progress())
    fixed = {
        "max_steps": model.optim.steps,
        "accumulate_grad_batches": model.optim.accumulate,
        "gradient_clip_val": model.optim.clip or None,
        "val_check_interval": min(options.validate_every, model.optim.steps) * model.optim.accumulate,
        "log_every_n_steps": options.log_every,
        "default_root_dir": folder,
    }
    loggers = logger if isinstance(logger, list) else log.make(folder)
    engine = make_trainer(model, trainer, fixed, [*map(guarded, loggers)], callbacks)
    clock.started_with = {"trainer": stored(trainer, engine), "logger": asdict(log), "placement": placement(engine)}
    if not isinstance(logger, list):
        stack.enter_context(begun(loggers))
    if engine.world_size > 1 and not out:
        stack.enter_context(announced(folder))
    if engine.is_global_zero:
        say(report.opening(model, engine, folder))
        if resumed:
            say(f"continues at step {saved['global_step']} of {model.optim.steps}")
        if news := changes(begun_with.get("placement"), placement(engine)):
            say(news)
    data = Data(model, options.validation_batches, options.test_batches, options.overfit)
    # before Lightning restores weights, which is before it does the same: those of 64-true would be rounded
    engine.precision_plugin.convert_module(model)
    engine.fit(model, data, ckpt_path=resumed, weights_only=True)
    folder = Path(str(saver.dirpath)).parent  # that of the first process, in all of them
    if not engine.global_step:
        raise ValueError(f"trainer.max_time={show(trainer.get('max_time'))} was over before the first step")
    if engine.is_global_zero and engine.global_step < model.optim.steps:
        say(f"stopped by trainer.max_time at step {engine.global_step}; continue with: python train.py resume={folder}")
    with trained(folder):
        tested = checkpoint.find(folder, "best")
        model.load_state_dict(checkpoint.read(tested)["state_dict"])
        if engine.is_global_zero and tested.stem == "last":
            say(f"nothing was validated: {tested} is what is tested")
        engine.test(model, data, verbose=False)
        metrics = _metrics(model, options, engine, clock, tested)
        if engine.is_global_zero:
            write(folder / "metrics.json", to_json(metrics, 2) + "\n")
            with optional("curve.png"):
                report.curve(folder, report.title(metrics), model.task.unit, model.task.baselines())
            with optional("the table"):
                say(report.closing(metrics))
    return metrics


def _resume(config: Mapping[str, Any], file: Path) -> tuple[RunConfig, dict[str, Any]]:
    """The saved options, if nothing that was asked for contradicts them, and all that was saved beside the weights."""
    if file.absolute().parent.name != "checkpoints":
        raise ValueError(f"{file} lies in no RUN_DIR/checkpoints, and resume= continues in RUN_DIR")
    folder = file.absolute().parent.parent
    if config.get("out") and home(config["out"]).absolute() != folder:
        raise ValueError(
            f"resume={config['resume']} continues in its own folder, {folder}: leave out={config['out']} away"
        )
    saved = checkpoint.read(file, resume=True)
    options = from_dict(RunConfig, saved["zoo"]["config"], "")
    asked = {key: value for key, value in config.items() if key not in ("resume", "out")}
    for group in ("model", "task", "optim"):  # null leaves an option open: it is what the run made of it
        asked[group] = {name: value for name, value in (asked.get(group) or {}).items() if value is not None}
    task = dict(saved["zoo"]["config"]["task"])
    for place in sources.PLACES:  # may change; what lies there may not, see _same_data
        if task.get(place) and asked.get("task", {}).get(place):
            task[place] = asked["task"][place]
    options = replace(options, task=task)
    changed = validate.differences(asdict(options), asked)
    if changed:
        raise ValueError(f"resume={config['resume']} continues a run as it was begun, but {'; '.join(changed)}")
    return RunConfig(**{**asdict(options), "resume": str(file), "out": str(folder)}), saved


def _same_data(task: Task, options: RunConfig, saved: dict[str, Any]) -> None:
    """Raises ValueError where the data is not what the run was begun with."""
    state = saved.get("task", {})
    if options.task == saved["zoo"]["config"]["task"]:  # else what lies at the new place must be the same
        task.load_state_dict(state)
    with warnings.catch_warnings(action="ignore"):  # what prepare() warns of, restore() refuses
        task.prepare()
    task.load_state_dict(state)


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


def _metrics(model: Model, options: RunConfig, engine: L.Trainer, clock: RunState, tested: Path) -> dict[str, Any]:
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
        **placement(engine),
        "checkpoint": str(tested),
        "command": clock.command,
        "versions": {
            "python": platform.python_version(),
            **{name: version(name) for name in ("zoo", "torch", "lightning")},
            "commit": _commit(),
        },
        "config": clock.config
        | dict(model.hparams)
        | {name: clock.started_with[name] for name in ("trainer", "logger")},
        "main_metric": model.task.main_metric,
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
    known = ("Tip:", "💡", "GPU available:", "TPU available:", "`Trainer.fit` stopped", "Restor")
    return not any(text in record.getMessage() for text in known)
