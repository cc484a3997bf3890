"""Whether the contents of a checkpoint fit this zoo: tried on the meta device, where weights take no memory.

Families and tasks decide alone what their options mean. A model is built from them until it has more parts than the
checkpoint has weights, and compared by name, shape and dtype; only then does anything of its size exist.
"""

from __future__ import annotations

import math
import threading
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from itertools import chain
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.nn.modules import module as hooks

from zoo.config import lookup, one_line, show
from zoo.models import MODELS, Model
from zoo.untrusted import finite

OPTIONS = {"model": dict, "task": dict, "optim": dict, "seed": int}
DTYPES = (torch.float32, torch.float64, torch.bfloat16, torch.float16)
PARTS = 8  # modules and parameters made for each weight of the state_dict, at most; three are usual

READY: dict[str, Any] = {"ready": 0, "completed": 0}
STARTED = {**READY, "started": 0}
PROCESSED = {**STARTED, "processed": 0}
BATCHES = {"total": PROCESSED, "current": PROCESSED, "is_last_batch": False}
LOOPS = {
    "fit_loop": {
        "epoch_progress": {"total": PROCESSED, "current": PROCESSED},
        "epoch_loop.state_dict": {"_batches_that_stepped": 0},
        "epoch_loop.batch_progress": BATCHES,
        "epoch_loop.scheduler_progress": {"total": READY, "current": READY},
        "epoch_loop.automatic_optimization.optim_progress": {
            "optimizer": {
                "step": {"total": READY, "current": READY},
                "zero_grad": {"total": STARTED, "current": STARTED},
            }
        },
        "epoch_loop.val_loop.batch_progress": BATCHES,
    }
}
"""Where a run stands, by Lightning's names."""


def build(options: dict[str, Any]) -> Model:
    """The model of the options model, task, optim and seed; raises ValueError for wrong ones."""
    return lookup(options["model"].get("name"), MODELS, "model")(**options)


def model(checkpoint: dict[str, Any], path: Path) -> Model:
    """A model without memory that has the checkpoint's weights; options that it lacks are written into it.

    Raises ValueError if there is none: for unknown options, and for weights of other names, shapes or dtypes.
    """
    options, weights = checkpoint["hyper_parameters"], checkpoint["state_dict"]
    if {key: type(value) for key, value in options.items()} != OPTIONS:
        raise ValueError(f"{path} must hold the options {', '.join(OPTIONS)}, got {show(options, 200)}")
    _check_weights(weights, path)
    try:
        with torch.device("meta"), _at_most(PARTS * len(weights) + 100):
            meta = build(options)
        ours = dict(meta.hparams)
        filled = {key: {**ours[key], **value} if isinstance(value, dict) else value for key, value in options.items()}
        if ours != filled:
            raise ValueError("; ".join(differences(filled, ours)))
        _compare({name: tuple(t.shape) for name, t in meta.state_dict().items()}, weights)
        checkpoint["hyper_parameters"] = ours
        if "config" in checkpoint["zoo"]:
            checkpoint["zoo"]["config"].update(ours)
        meta.on_load_checkpoint(checkpoint)
    except Exception as error:  # sizes beyond any tensor, and what a family of somebody else makes of its options
        raise ValueError(f"{path} does not fit this zoo: {one_line(error, 400)}") from None
    return meta


@contextmanager
def _at_most(parts: int) -> Iterator[None]:
    """Raises ValueError inside as soon as more modules, parameters and buffers than that are made."""
    made, thread = 0, threading.get_ident()

    def count(*_: Any) -> None:
        nonlocal made
        made += threading.get_ident() == thread
        if made > parts:
            raise ValueError("the options make more layers or other parts than there are weights")

    handles = [
        hooks.register_module_module_registration_hook(count),
        hooks.register_module_parameter_registration_hook(count),
        hooks.register_module_buffer_registration_hook(count),
    ]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def _check_weights(weights: dict[Any, Any], path: Path) -> None:
    for name, weight in weights.items():
        if not isinstance(name, str) or not isinstance(weight, Tensor):
            raise ValueError(f"{path}: the weight {show(name)} is {show(weight)}, not a tensor with a name")
        if weight.dtype not in DTYPES:
            raise ValueError(f"{path}: the weight {show(name)} is of {weight.dtype}, not a real floating dtype")
        if not finite(weight):
            raise ValueError(f"{path}: the weight {show(name)} holds numbers that are not finite")
    kinds = Counter(weight.dtype for weight in weights.values()).most_common()
    for name, weight in weights.items():
        if weight.dtype != kinds[0][0]:
            raise ValueError(f"{path}: the weight {show(name)} is of {weight.dtype}, others of {kinds[0][0]}")


def _compare(ours: dict[str, tuple[int, ...]], weights: dict[str, Tensor]) -> None:
    lines = [f"Missing key {name}" for name in ours if name not in weights]
    lines += [f"Unexpected key {show(name)}" for name in weights if name not in ours]
    lines += [
        f"size mismatch for {name}: {tuple(weights[name].shape)} in the file, {shape} in the model"
        for name, shape in ours.items()
        if name in weights and tuple(weights[name].shape) != shape
    ]
    if lines:
        raise ValueError("; ".join(lines[:8]))


def differences(saved: dict[str, Any], asked: dict[str, Any], where: str = "") -> list[str]:
    """One line for each value of `asked` that `saved` lacks or holds differently."""
    lines = []
    for key, value in asked.items():
        old = saved.get(key)
        if key not in saved:
            lines.append(f"{where}{key}={show(value)} is not in the checkpoint")
        elif isinstance(value, dict) and isinstance(old, dict):
            lines += differences(old, value, f"{where}{key}.")
        elif old != value:
            lines.append(f"{where}{key} is {show(old)} in the checkpoint, {show(value)} asked")
    return lines


def progress(checkpoint: dict[str, Any], meta: Model, path: Path) -> dict[str, Any]:
    """The checkpoint with what Lightning restores, each value by its name and type: of its optimizer, its schedule and
    its place in the run; raises ValueError where a value is another."""
    configured: Any = meta.configure_optimizers()
    optimizer, schedule = configured["optimizer"], configured["lr_scheduler"]["scheduler"]
    for parameter in meta.decoder.parameters():
        parameter.grad = torch.zeros_like(parameter)
    began = schedule.state_dict()
    optimizer.step()  # makes the state, of no memory either
    (saved,), (scheduled,) = (_one(checkpoint[name], name, path) for name in ("optimizer_states", "lr_schedulers"))
    loops = like(checkpoint["loops"], LOOPS, f"{path}: loops")
    step = loops["fit_loop"]["epoch_loop.automatic_optimization.optim_progress"]["optimizer"]["step"]["total"]
    moved = {name: began[name] for name in ("last_epoch", "_step_count", "_last_lr")}
    schedules = [began | like(scheduled, moved, f"{path}: lr_schedulers.0")]
    steps = {checkpoint["global_step"], step["completed"], schedules[0]["last_epoch"]}
    if len(steps) > 1 or not 0 <= checkpoint["global_step"] <= meta.optim.steps:
        raise ValueError(f"{path} must stand at one step of {meta.optim.steps}, not at {show(sorted(steps))}")
    if not checkpoint["pytorch-lightning_version"].startswith("2."):
        raise ValueError(f"{path} is of Lightning {show(checkpoint['pytorch-lightning_version'])}, not of 2.x")
    if "MixedPrecision" in (checkpoint := dict(checkpoint)):  # 16-mixed
        scaler = torch.amp.GradScaler("cpu").state_dict()
        checkpoint["MixedPrecision"] = like(checkpoint["MixedPrecision"], scaler, f"{path}: MixedPrecision")
    optimizers = [_optimizer(saved, optimizer.state_dict(), f"{path}: optimizer_states.0")]
    return {**checkpoint, "loops": loops, "lr_schedulers": schedules, "optimizer_states": optimizers}


def _one(states: list[Any], name: str, path: Path) -> list[Any]:
    if len(states) != 1:
        raise ValueError(f"{path} must hold one of {name}, got {len(states)}")
    return states


def _optimizer(saved: Any, ours: dict[str, Any], where: str) -> dict[str, Any]:
    """The moments of each parameter, and the learning rate; all else is as the options say."""
    groups = [{"lr": group["lr"], "params": group["params"]} for group in ours["param_groups"]]
    saved = like(saved, {"state": None, "param_groups": groups}, where)
    new = [{**group, **found} for group, found in zip(ours["param_groups"], saved["param_groups"], strict=True)]
    ids, own = (list(chain.from_iterable(group["params"] for group in side)) for side in (new, ours["param_groups"]))
    if sorted(ids) != sorted(own):
        raise ValueError(f"{where}.param_groups names other parameters than 0 to {len(own) - 1}")
    template = {index: ours["state"][place] for index, place in zip(ids, own, strict=True)}
    return {"state": like(saved["state"], template, f"{where}.state"), "param_groups": new}


def like(value: Any, ours: Any, where: str) -> Any:
    """`value` with the names of `ours` alone; raises ValueError where a type, length or shape is another, an integer is
    negative or a number not finite. None stands for any value."""
    if ours is None:
        return value
    if isinstance(ours, dict) and isinstance(value, dict):
        for key in ours:
            if key not in value:
                raise ValueError(f"{where} lacks {show(key)}")
        return {key: like(value[key], item, f"{where}.{key}") for key, item in ours.items()}
    if isinstance(ours, list | tuple) and isinstance(value, list | tuple) and len(value) == len(ours):
        return type(ours)(
            like(item, own, f"{where}.{index}") for index, (item, own) in enumerate(zip(value, ours, strict=True))
        )
    if isinstance(ours, Tensor):
        fits = isinstance(value, Tensor) and value.shape == ours.shape and value.dtype in DTYPES and finite(value)
    elif isinstance(ours, float):
        fits = type(value) in (int, float) and math.isfinite(value)
    else:
        fits = type(value) is type(ours) in (int, bool, str) and not (type(ours) is int and value < 0)
    if not fits:
        raise ValueError(f"{where} is {show(value)}, not as {show(ours)}")
    return value
