"""The lightning.Trainer of a run, where it computes, and the processes it is made of."""

from __future__ import annotations

import os
import sys
from collections.abc import Mapping
from contextlib import nullcontext
from typing import Any

import lightning as L
import torch
from lightning.fabric.plugins.environments import LightningEnvironment, SLURMEnvironment, TorchElasticEnvironment
from lightning.pytorch.callbacks import TQDMProgressBar
from lightning.pytorch.plugins import HalfPrecision
from lightning.pytorch.profilers import Profiler

from zoo.config import one_line, show
from zoo.devices.strategies import strategy_of
from zoo.models import Model
from zoo.training.callbacks import Keeper
from zoo.training.checkpoint import AtomicCheckpointIO
from zoo.training.options import RunConfig

UNCHECKED: dict[str, tuple[Any, str]] = {
    "callbacks": (L.Callback, "callbacks of Lightning"),
    "profiler": (str | Profiler, "the name of a profiler, or one of Lightning"),
    "detect_anomaly": (bool, "true or false"),
}
"""What Lightning's trainer takes as it is, and training fails at."""


def several(value: Any) -> list[Any]:
    """An argument that may be a list, one object, or None."""
    return [] if value is None else [*value] if isinstance(value, list | tuple) else [value]


def make(model: Model, options: RunConfig, given: Mapping[str, Any], keeper: Keeper) -> L.Trainer:
    """The trainer of a run from the arguments `given`, still without loggers. Raises ValueError for those that are
    wrong, that options decide, or that are not those of the processes that were started."""
    given, optim = {"accelerator": "auto", "devices": 1, "precision": None, **given}, model.optim
    shown = bool(given.pop("enable_progress_bar", True))
    bar = shown and bool(sys.stdout) and sys.stdout.isatty()
    keeper.says = shown and not bar
    for name, (kind, words) in UNCHECKED.items():
        if wrong := [one for one in several(given.get(name)) if not isinstance(one, kind)]:
            raise ValueError(f"trainer.{name} must be {words}, got {show(wrong[0])}")
    callbacks, plugins = several(given.pop("callbacks", None)), several(given.get("plugins"))
    if str(count := given["devices"]).isdecimal() and int(count) > optim.batch_size:  # Lightning makes a list of them
        raise ValueError(f"trainer.devices={show(count)} is more than optim.batch_size={optim.batch_size}")
    decided: dict[str, tuple[Any, str]] = {
        "max_steps": (optim.steps, "optim.steps"),
        "max_epochs": (-1, "optim.steps"),
        **dict.fromkeys(("min_steps", "min_epochs", "limit_train_batches"), (None, "optim.steps")),
        "limit_test_batches": (None, "test_batches"),
        "fast_dev_run": (False, "optim.steps (debug=fast: a run of 4)"),
        "overfit_batches": (0.0, "overfit"),
        "accumulate_grad_batches": (optim.accumulate, "optim.accumulate"),
        "gradient_clip_val": (optim.clip or None, "optim.clip"),
        "val_check_interval": (min(options.validate_every, optim.steps) * optim.accumulate, "validate_every"),
        "check_val_every_n_epoch": (None, "validate_every"),
        "log_every_n_steps": (options.log_every, "log_every"),
        "default_root_dir": (keeper.folder, "out"),
        "logger": (False, "logger"),
        # between rows of metrics a bar reads nothing from the device
        "callbacks": ([*callbacks, *([TQDMProgressBar(options.log_every)] if bar else []), keeper], ""),
        "num_sanity_val_steps": (0, ""),
        "enable_progress_bar": (bar, ""),
        **dict.fromkeys(("enable_model_summary", "use_distributed_sampler"), (False, "")),
    }
    for name, option in sorted((name, decided[name][1]) for name in decided.keys() & given.keys()):
        raise ValueError(f"trainer.{name} is {f'decided by the option {option}' if option else 'fixed here'}")
    if given["precision"] in (None, "auto"):
        # what an accelerator will be is only known to Lightning; on a GPU bfloat16 where the hardware has it
        gpu = given["accelerator"] in ("auto", "gpu", "cuda") and torch.cuda.is_available()
        given["precision"] = "bf16-mixed" if gpu and torch.cuda.is_bf16_supported() else "32-true"
    if given["precision"] == "16-true":  # the squares of gradients that AdamW keeps are zero in float16
        raise ValueError("trainer.precision=16-true trains nothing: take 16-mixed or bf16-true")
    given["strategy"] = strategy_of(given, model, options.compile)
    given["plugins"] = [AtomicCheckpointIO(), *plugins]
    # a shell of Slurm sets srun's variables but for the step, its own have huge numbers; a lone task starts the others
    srun = int(os.environ.get("SLURM_STEP_ID", 2**32)) < 2**31 and os.environ.get("SLURM_NTASKS") != "1"
    if SLURMEnvironment.detect() and not TorchElasticEnvironment.detect():
        # else Lightning takes the other processes for started, or writes a checkpoint of its own where SIGUSR1 comes
        given["plugins"].append(SLURMEnvironment(auto_requeue=False) if srun else LightningEnvironment())
    try:
        engine = L.Trainer(**given, **{name: value for name, (value, _) in decided.items()})
    except Exception as error:  # each argument fails in its own way
        raise ValueError(f"trainer: {one_line(error, 300)}") from error
    if isinstance(engine.precision_plugin, HalfPrecision):  # data stay as they are: baselines do not depend on it
        engine.precision_plugin.convert_input = lambda data: data  # type: ignore[method-assign]
        engine.precision_plugin.forward_context = nullcontext  # type: ignore[assignment,method-assign]
    if getattr(engine.strategy, "_start_method", "popen") not in (None, "popen"):  # an object's, as of ddp_spawn
        raise ValueError(f"trainer.strategy={show(given['strategy'])} loses what its processes trained: take ddp")
    asked, started = engine.num_devices * engine.num_nodes, engine._accelerator_connector.cluster_environment
    if (own := not started.creates_processes_externally) and engine.num_nodes > 1 and "MASTER_ADDR" not in os.environ:
        raise ValueError(f"trainer.num_nodes={engine.num_nodes} wants torchrun or srun, see docs/cluster.md")
    begun = torch.distributed.is_initialized()  # by an earlier run of this script, which every process works through
    here = torch.distributed.get_world_size() if begun else asked if own else started.world_size()
    if here != asked:
        raise ValueError(f"{here} processes were started, trainer.devices × num_nodes is {asked}")
    if (blocks := getattr(engine.strategy, "apart", asked)) % asked:
        raise ValueError(f"model.experts + model.shared={blocks} must be a multiple of the {asked} processes")
    if (size := optim.batch_size) % ((parts := optim.accumulate) * asked):
        raise ValueError(f"optim.batch_size={size} must be a multiple of optim.accumulate={parts} × {asked} processes")
    return engine


def placement(engine: L.Trainer) -> dict[str, Any]:
    """Where and how a run computes."""
    return {
        "accelerator": engine.strategy.root_device.type,
        "devices": engine.world_size,
        "strategy": str(getattr(engine.strategy, "strategy_name", type(engine.strategy).__name__)),
        "precision": str(engine.precision),
    }
