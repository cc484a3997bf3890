"""The lightning.Trainer and the logger of a run: made from plain options, which are stored with the run."""

from __future__ import annotations

import os
import re
import secrets
import sys
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import lightning as L
import torch
from lightning.fabric.plugins.environments import LightningEnvironment, SLURMEnvironment, TorchElasticEnvironment
from lightning.pytorch.callbacks import Callback
from lightning.pytorch.loggers import Logger, WandbLogger
from lightning.pytorch.plugins import HalfPrecision
from lightning.pytorch.utilities.exceptions import MisconfigurationException

from zoo.config import from_dict, lookup, one_line, plain, show
from zoo.models import Model
from zoo.training import checkpoint

FLAG = (True, False)
STORED: dict[str, tuple[Any, ...]] = {
    "accelerator": ("auto", "cpu", "gpu", "cuda", "mps"),
    "strategy": ("auto", "ddp", "ddp_find_unused_parameters_true", "ddp_static_graph", "fsdp"),
    "precision": ("32-true", "64-true", "bf16-mixed", "bf16-true", "16-mixed"),
    "deterministic": (*FLAG, "warn"),
    **dict.fromkeys(("benchmark", "sync_batchnorm", "detect_anomaly", "enable_progress_bar"), FLAG),
    "devices": ("auto", -1),  # or a number of them, or their indices
    "num_nodes": (1,),
    **dict.fromkeys(("limit_val_batches", "limit_test_batches"), ()),  # numbers
}
"""Arguments of lightning.Trainer that a run keeps when it is resumed, and their values: never paths or objects. null
stands for Lightning's own default."""

DECIDED_BY = {
    "max_steps": "optim.steps",
    "max_epochs": "optim.steps",
    "min_steps": "optim.steps",
    "min_epochs": "optim.steps",
    "limit_train_batches": "optim.steps",
    "fast_dev_run": "optim.steps (debug=fast: a run of 4)",
    "overfit_batches": "overfit",
    "accumulate_grad_batches": "optim.accumulate",
    "gradient_clip_val": "optim.clip",
    "val_check_interval": "validate_every",
    "check_val_every_n_epoch": "validate_every",
    "log_every_n_steps": "log_every",
    "logger": "logger",
    "default_root_dir": "out",
}
"""Arguments of lightning.Trainer that options of this project stand for."""


def arguments(given: Mapping[str, Any], saved: Any = None) -> dict[str, Any]:
    """Arguments of lightning.Trainer: those `saved` with a run, below those `given`, which may be objects. Raises
    ValueError for saved ones that are not in STORED and not given again, and for more devices than there are."""
    saved = {} if saved is None else saved
    if not isinstance(saved, dict):
        raise ValueError(f"the checkpoint holds {show(saved)} as arguments of a trainer, not a dict")
    saved = {key: value for key, value in saved.items() if key not in given}
    for key, value in saved.items():
        if not _storable(key, value):
            raise ValueError(
                f"the checkpoint holds trainer.{show(key)}={show(value)}, which is not taken from a file: "
                f"give it again, as trainer.NAME=VALUE"
            )
    devices = saved.get("devices")
    count = len(devices) if isinstance(devices, list) else devices
    here = max(2, os.cpu_count() or 1, torch.cuda.device_count())
    if isinstance(count, int) and count > here:
        raise ValueError(f"the run had {count} devices, here are at most {here}: give trainer.devices=")
    return {**saved, **{key: _plain(value) for key, value in given.items()}}


def _storable(key: Any, value: Any) -> bool:
    if not isinstance(key, str) or key not in STORED:
        return False
    if key == "devices" and isinstance(value, list):
        return len(value) <= 1024 and all(type(item) is int and item >= 0 for item in value)
    if key == "devices" and type(value) is int and value >= 0:
        return True
    if STORED[key] == ():
        return value is None or (type(value) is int and value >= 0) or (type(value) is float and 0 <= value <= 1)
    return value is None or (isinstance(value, str | int) and value in STORED[key])


def _plain(value: Any) -> Any:
    try:
        return plain(value)
    except ValueError:  # a strategy, a profiler, plugins: Lightning's own objects
        return value


def stored(given: Mapping[str, Any], engine: L.Trainer) -> dict[str, Any]:
    """What the checkpoints of a run say of its trainer; objects must be given again when it is resumed."""
    kept = {key: value for key, value in given.items() if _storable(key, value)}
    return {**kept, "precision": engine.precision}


def placement(engine: L.Trainer) -> dict[str, Any]:
    """Where and how a run computes."""
    strategy = getattr(engine.strategy, "strategy_name", type(engine.strategy).__name__)
    device = engine.strategy.root_device.type
    return {
        "accelerator": device,
        "devices": engine.world_size,
        "strategy": str(strategy),
        "precision": str(engine.precision),
    }


def changes(saved: Any, now: dict[str, Any]) -> str:
    """One line on what a resumed run does otherwise than before, "" if nothing."""
    saved = saved if isinstance(saved, dict) else {}
    changed = [f"{key} {new} (was {show(saved[key])})" for key, new in now.items() if saved.get(key, new) != new]
    lost = saved.get("strategy", "ddp") not in ("ddp", "single_device", now["strategy"])
    advice = "; a strategy that is an object is not stored: give trainer= again to keep it" if lost else ""
    return f"this run goes on with {', '.join(changed)}{advice}" if changed else ""


def make(
    model: Model, given: Mapping[str, Any], fixed: dict[str, Any], loggers: list[Logger], callbacks: list[Callback]
) -> L.Trainer:
    """The trainer of a run; `fixed`: arguments of it that options decide. Raises ValueError for arguments that are
    wrong, fixed, or not those of the processes that were started."""
    given = {"accelerator": "auto", "devices": 1, **given}
    if given.get("precision") in (None, "auto"):
        # what an accelerator will be is only known to Lightning; on a GPU bfloat16 where the hardware has it
        gpu = given["accelerator"] in ("auto", "gpu", "cuda") and torch.cuda.is_available()
        given["precision"] = "bf16-mixed" if gpu and torch.cuda.is_bf16_supported() else "32-true"
    fixed = {
        **fixed,
        "limit_train_batches": None,
        "fast_dev_run": False,
        "overfit_batches": 0.0,
        "max_epochs": -1,
        "check_val_every_n_epoch": None,
        "num_sanity_val_steps": 0,
        "logger": loggers,
        "callbacks": callbacks,
        "enable_model_summary": False,
        "use_distributed_sampler": False,
    }
    clash = sorted((set(fixed) | set(DECIDED_BY)) & set(given))
    if clash:
        option = DECIDED_BY.get(clash[0])
        raise ValueError(f"trainer.{clash[0]} is {f'decided by the option {option}' if option else 'fixed here'}")
    given["plugins"] = [checkpoint.AtomicCheckpointIO(), *_alone(), *(given.get("plugins") or [])]
    if given["precision"] == "16-true":
        raise ValueError(
            "trainer.precision=16-true trains nothing: the squares of gradients that AdamW keeps are zero in float16; "
            "take 16-mixed or bf16-true"
        )
    if given["precision"] == "bf16-true":
        given["plugins"].append(HalfWeights(given["precision"]))
        given["precision"] = None
    if isinstance(given["devices"], int) and given["devices"] > 0:
        _started(given["devices"] * given.get("num_nodes", 1))
    try:
        engine = L.Trainer(**given, **fixed)
    except Exception as error:  # each argument fails in its own way
        raise ValueError(f"trainer: {one_line(error)}") from error
    if getattr(engine.strategy, "_start_method", "popen") not in (None, "popen"):  # of a notebook, or ddp_spawn
        raise ValueError(
            f"trainer.strategy={show(given.get('strategy', 'auto'))} loses what its processes trained; take ddp, "
            f"from the command line, or trainer.devices=1"
        )
    _started(engine.num_devices * engine.num_nodes)
    share = model.optim.accumulate * engine.world_size
    if model.optim.batch_size % share:
        raise ValueError(
            f"optim.batch_size={model.optim.batch_size} must be a multiple of {share}, that is optim.accumulate="
            f"{model.optim.accumulate} times {engine.world_size} processes"
        )
    return engine


def _srun() -> bool:
    """True if srun started this process: in a batch script or a shell Slurm sets the same variables but for the step,
    and the numbers of its own steps are huge."""
    return SLURMEnvironment.detect() and int(os.environ.get("SLURM_STEP_ID", 2**32)) < 2**31


def _alone() -> list[Any]:
    """What tells Lightning that Slurm did not start the other processes, where it would think so."""
    alone = SLURMEnvironment.detect() and not _srun() and not TorchElasticEnvironment.detect()
    return [LightningEnvironment()] if alone else []


def _started(asked: int) -> None:
    if TorchElasticEnvironment.detect():
        starter, count = "torchrun", int(os.environ["WORLD_SIZE"])
    elif _srun():
        starter, count = "srun", int(os.environ["SLURM_NTASKS"])
    else:
        return
    if count != asked:
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


def logger_of(given: Mapping[str, Any], saved: Any = None) -> FilesConfig | WandbConfig:
    """The options of a logger: those `saved` with a run, below those `given`, unless these name another logger."""
    options = dict(given)
    if isinstance(saved, dict) and given.get("name", saved.get("name")) == saved.get("name"):
        options = {**saved, **given}
    name = options.get("name", "files")
    config: FilesConfig | WandbConfig = from_dict(lookup(name, LOGGERS, "logger"), options, "logger")
    return replace(config, id=secrets.token_hex(4)) if isinstance(config, WandbConfig) and not config.id else config


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
