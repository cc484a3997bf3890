"""The lightning.Trainer of a run, where it computes, and the processes it is made of."""

from __future__ import annotations

import logging
import os
import sys
import warnings
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, nullcontext
from pathlib import Path
from typing import Any

import lightning as L
import torch
from lightning.fabric.plugins.environments import LightningEnvironment, SLURMEnvironment, TorchElasticEnvironment
from lightning.pytorch.callbacks import Callback
from lightning.pytorch.loggers import Logger
from lightning.pytorch.plugins import HalfPrecision

from zoo.config import one_line, show
from zoo.console import describe, warn
from zoo.models import Model
from zoo.training.callbacks import Progress
from zoo.training.checkpoint import AtomicCheckpointIO
from zoo.training.options import RunConfig, storable


def make(
    model: Model,
    options: RunConfig,
    given: Mapping[str, Any],
    folder: Path,
    loggers: list[Logger],
    callbacks: list[Callback],
) -> L.Trainer:
    """The trainer of a run from the arguments `given`. Raises ValueError for those that are wrong, that options decide,
    or that are not those of the processes that were started."""
    given, optim = {"accelerator": "auto", "devices": 1, "precision": None, **given}, model.optim
    shown = [Progress(options.log_every)] if given.pop("enable_progress_bar", True) else []
    decided: dict[str, tuple[Any, str]] = {
        "max_steps": (optim.steps, "optim.steps"),
        "max_epochs": (-1, "optim.steps"),
        "min_steps": (None, "optim.steps"),
        "min_epochs": (None, "optim.steps"),
        "limit_train_batches": (None, "optim.steps"),
        "fast_dev_run": (False, "optim.steps (debug=fast: a run of 4)"),
        "overfit_batches": (0.0, "overfit"),
        "accumulate_grad_batches": (optim.accumulate, "optim.accumulate"),
        "gradient_clip_val": (optim.clip or None, "optim.clip"),
        "val_check_interval": (min(options.validate_every, optim.steps) * optim.accumulate, "validate_every"),
        "check_val_every_n_epoch": (None, "validate_every"),
        "log_every_n_steps": (options.log_every, "log_every"),
        "default_root_dir": (folder, "out"),
        "logger": ([*map(_guarded, loggers)], "logger"),
        "callbacks": ([*callbacks, *shown], ""),
        "num_sanity_val_steps": (0, ""),
        "enable_progress_bar": (False, ""),
        "enable_model_summary": (False, ""),
        "use_distributed_sampler": (False, ""),
    }
    for name in sorted(decided.keys() & given.keys()):
        option = decided[name][1]
        raise ValueError(f"trainer.{name} is {f'decided by the option {option}' if option else 'fixed here'}")
    for part, count in (("val", options.validation_batches), ("test", options.test_batches)):
        limit = given.get(f"limit_{part}_batches")
        if isinstance(limit, float) and 0 < limit * count < 1:
            raise ValueError(f"trainer.limit_{part}_batches={limit} of {count} batches is none: 0 for none, or more")
    if given["precision"] in (None, "auto"):
        # what an accelerator will be is only known to Lightning; on a GPU bfloat16 where the hardware has it
        gpu = given["accelerator"] in ("auto", "gpu", "cuda") and torch.cuda.is_available()
        given["precision"] = "bf16-mixed" if gpu and torch.cuda.is_bf16_supported() else "32-true"
    if given["precision"] == "16-true":
        raise ValueError(
            "trainer.precision=16-true trains nothing: the squares of gradients that AdamW keeps are zero in float16; "
            "take 16-mixed or bf16-true"
        )
    given["plugins"] = [AtomicCheckpointIO(), *(given.get("plugins") or [])]
    if SLURMEnvironment.detect() and not _srun() and not TorchElasticEnvironment.detect():
        given["plugins"].append(LightningEnvironment())  # else Lightning takes the other processes for started
    if given["precision"] == "bf16-true":
        given["plugins"].append(HalfWeights(given["precision"]))
        given["precision"] = None
    if isinstance(given["devices"], int) and given["devices"] > 0:
        _check_started(given["devices"] * given.get("num_nodes", 1))
    try:
        engine = L.Trainer(**given, **{name: value for name, (value, _) in decided.items()})
    except Exception as error:  # each argument fails in its own way
        raise ValueError(f"trainer: {one_line(error)}") from error
    if getattr(engine.strategy, "_start_method", "popen") not in (None, "popen"):  # of a notebook, or ddp_spawn
        raise ValueError(
            f"trainer.strategy={show(given.get('strategy', 'auto'))} loses what its processes trained; take ddp, "
            f"from the command line, or trainer.devices=1"
        )
    _check_started(engine.num_devices * engine.num_nodes)
    share = optim.accumulate * engine.world_size
    if optim.batch_size % share:
        raise ValueError(
            f"optim.batch_size={optim.batch_size} must be a multiple of {share}, that is optim.accumulate="
            f"{optim.accumulate} times {engine.world_size} processes"
        )
    return engine


def _srun() -> bool:
    """True if srun started this process: in a batch script or a shell Slurm sets the same variables but for the step,
    and the numbers of its own steps are huge."""
    return SLURMEnvironment.detect() and int(os.environ.get("SLURM_STEP_ID", 2**32)) < 2**31


def _check_started(asked: int) -> None:
    torchrun = TorchElasticEnvironment.detect()
    if not torchrun and not _srun():
        return
    starter, variable = ("torchrun", "WORLD_SIZE") if torchrun else ("srun", "SLURM_NTASKS")
    if (count := int(os.environ[variable])) != asked:
        raise ValueError(
            f"{starter} started {count} processes, but trainer.devices times trainer.num_nodes is {asked}: start as "
            f"many processes (srun --ntasks-per-node, torchrun --nproc-per-node) as there are devices"
        )


class HalfWeights(HalfPrecision):
    """Weights in half precision; data and what is counted stay as they are: a baseline must not depend on it."""

    def convert_input(self, data: Any) -> Any:
        return data

    def forward_context(self) -> Any:
        return nullcontext()


def stored(given: Mapping[str, Any], engine: L.Trainer) -> dict[str, Any]:
    """The arguments of its trainer that a run stores; objects must be given again when it is resumed."""
    return {**{key: value for key, value in given.items() if storable(key, value)}, "precision": engine.precision}


def placement(engine: L.Trainer) -> dict[str, Any]:
    """Where and how a run computes."""
    strategy = getattr(engine.strategy, "strategy_name", type(engine.strategy).__name__)
    return {
        "accelerator": engine.strategy.root_device.type,
        "devices": engine.world_size,
        "strategy": str(strategy),
        "precision": str(engine.precision),
    }


def changes(saved: dict[str, Any] | None, now: dict[str, Any]) -> str:
    """One line on what a resumed run does otherwise than before, "" if nothing."""
    saved = saved or {}
    changed = [f"{key} {new} (was {show(saved[key])})" for key, new in now.items() if saved.get(key, new) != new]
    lost = saved.get("strategy", "ddp") not in ("ddp", "single_device", now["strategy"])
    advice = "; a strategy that is an object is not stored: give trainer= again to keep it" if lost else ""
    return f"this run goes on with {', '.join(changed)}{advice}" if changed else ""


def _guarded(logger: Logger) -> Logger:
    """`logger`, each method of which warns where it fails and is not called again; that it starts is not optional."""

    def guard(name: str, method: Callable[..., Any]) -> Callable[..., Any]:
        def call(*args: Any, **options: Any) -> Any:
            try:
                return method(*args, **options)
            except Exception as error:
                setattr(logger, name, lambda *args, **options: None)
                warn(f"{type(logger).__name__}.{name} failed: {describe(error)}; the run goes on without it")

        return call

    for name in ("log_metrics", "log_hyperparams", "log_graph", "after_save_checkpoint", "save", "finalize"):
        if method := getattr(logger, name, None):
            setattr(logger, name, guard(name, method))
    return logger


@contextmanager
def begun(loggers: list[Logger]) -> Iterator[None]:
    """Starts loggers, before anything could be lost, and ends them; raises ValueError for one that cannot start."""
    try:
        try:
            for logger in loggers:
                _ = logger.experiment  # type: ignore[attr-defined]
        except Exception as error:  # wandb's errors have no common kind
            raise ValueError(
                f"logger=wandb cannot start: {one_line(error, 200)}; logger.offline=true needs no network"
            ) from error
        yield
    finally:
        if loggers and "wandb" in sys.modules:  # else the next run of this process would go on with this one
            sys.modules["wandb"].finish()


def quiet() -> None:
    """Silences what Lightning says about matters that this project has decided."""
    for message in (
        ".*does not have many workers.*",
        ".*dataloader is not resumable.*",
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
