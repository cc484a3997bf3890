"""Whether the contents of a checkpoint fit this zoo: tried on the meta device, where weights take no memory.

Families and tasks decide alone what their options mean. A model is built from them until it has more parts than the
checkpoint has weights, and compared by name, shape and dtype; only then does anything of its size exist.
"""

from __future__ import annotations

import math
import re
import threading
from collections import Counter
from collections.abc import Container, Iterator
from contextlib import contextmanager
from itertools import chain
from pathlib import Path
from typing import Any

import lightning as L
import torch
from torch import Tensor
from torch.nn.modules import module as hooks

from zoo.config import lookup, one_line, show
from zoo.models import MODELS, Model
from zoo.models.base import OptimConfig
from zoo.training.untrusted import finite

OPTIONS = {"model": dict, "task": dict, "optim": dict, "seed": int}
DTYPES = (torch.float32, torch.float64, torch.bfloat16, torch.float16)
PARTS = 8  # modules and parameters made for each weight of the state_dict, at most; three are usual


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
    if not 0 <= options["seed"] < 2**32:
        raise ValueError(f"{path} holds seed={show(options['seed'])}, not one between 0 and {2**32 - 1}")
    _check_weights(weights, path)
    try:
        with torch.device("meta"), _at_most(PARTS * len(weights) + 100):
            meta = build(options)
        ours = dict(meta.hparams)
        filled = {key: {**ours[key], **value} if isinstance(value, dict) else value for key, value in options.items()}
        if ours != filled:
            raise ValueError("; ".join(differences(filled, ours)))
        _compare({name: tuple(t.shape) for name, t in meta.state_dict().items()}, weights)
        _same_under_all_names(meta, weights)
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


def _same_under_all_names(model: Model, weights: dict[str, Tensor]) -> None:
    first: dict[int, str] = {}
    for name, parameter in model.named_parameters(remove_duplicate=False):
        other = first.setdefault(id(parameter), name)
        if not torch.equal(weights[name], weights[other]):
            raise ValueError(f"{name} and {other} are one matrix in the model, two in the file")


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
    """The checkpoint with what Lightning restores: the optimizer's moments, each by its name and type. The schedule and
    the place in the run are those of its step; raises ValueError where the file says another."""
    configured: Any = meta.configure_optimizers()
    optimizer, schedule = configured["optimizer"], configured["lr_scheduler"]["scheduler"]
    for parameter in meta.decoder.parameters():
        parameter.grad = torch.zeros_like(parameter)
    optimizer.step()  # makes the state, of no memory either
    (saved,), (scheduled,) = (_one(checkpoint[name], name, path) for name in ("optimizer_states", "lr_schedulers"))
    step, began = checkpoint["global_step"], schedule.state_dict()
    loops = place(step, meta.optim)
    counted = like(checkpoint["loops"], loops, f"{path}: loops")["fit_loop"][COUNTED]["optimizer"]["step"]["total"]
    scheduled = like(scheduled, {"last_epoch": 0}, f"{path}: lr_schedulers.0")
    steps = {step, counted["completed"], scheduled["last_epoch"]}
    if len(steps) > 1 or not 0 <= step <= meta.optim.steps:
        raise ValueError(f"{path} must stand at one step of {meta.optim.steps}, not at {show(sorted(steps))}")
    if not re.fullmatch(r"2\.\d{1,4}(\.\w{1,20})*", checkpoint["pytorch-lightning_version"]):
        raise ValueError(f"{path} is of Lightning {show(checkpoint['pytorch-lightning_version'])}, not of 2.x")
    checkpoint = {**checkpoint, "pytorch-lightning_version": L.__version__}
    if mixed := "MixedPrecision" in checkpoint:  # 16-mixed, which passes over steps whose gradients are not finite
        scaler = torch.amp.GradScaler("cpu").state_dict()
        checkpoint["MixedPrecision"] = like(checkpoint["MixedPrecision"], scaler, f"{path}: MixedPrecision")
    rates = [base * rate(step) for base, rate in zip(schedule.base_lrs, schedule.lr_lambdas, strict=True)]
    checkpoint["loops"] = loops
    checkpoint["lr_schedulers"] = [{**began, "last_epoch": step, "_step_count": step + 1, "_last_lr": rates}]
    taken = range(step + 1) if mixed else (step,)
    checkpoint["optimizer_states"] = [
        _optimizer(saved, optimizer.state_dict(), rates, taken, f"{path}: optimizer_states.0")
    ]
    return checkpoint


COUNTED = "epoch_loop.automatic_optimization.optim_progress"


def place(steps: int, optim: OptimConfig) -> dict[str, Any]:
    """Where a run stands after so many steps, by Lightning's names."""

    def count(total: int, *names: str) -> dict[str, Any]:
        return {kind: dict.fromkeys(("ready", "completed", *names), total) for kind in ("total", "current")}

    def batches(total: int, last: bool) -> dict[str, Any]:
        return {**count(total, "started", "processed"), "is_last_batch": last}

    epoch = {"ready": 1, "started": 1, "processed": 0, "completed": 0}
    return {
        "fit_loop": {
            "epoch_progress": {"total": epoch, "current": epoch},
            "epoch_loop.state_dict": {"_batches_that_stepped": steps},
            "epoch_loop.batch_progress": batches(steps * optim.accumulate, steps == optim.steps),
            "epoch_loop.scheduler_progress": count(steps),
            COUNTED: {"optimizer": {"step": count(steps), "zero_grad": count(steps, "started")}},
            "epoch_loop.val_loop.batch_progress": batches(0, False),
        }
    }


def _one(states: list[Any], name: str, path: Path) -> list[Any]:
    if len(states) != 1:
        raise ValueError(f"{path} must hold one of {name}, got {len(states)}")
    return states


def _optimizer(
    saved: Any, ours: dict[str, Any], rates: list[float], taken: Container[int], where: str
) -> dict[str, Any]:
    """The moments of each parameter after `taken` steps; all else is as the options say."""
    groups = [{"params": group["params"]} for group in ours["param_groups"]]
    saved = like(saved, {"state": None, "param_groups": groups}, where)
    new = [
        {**group, **found, "lr": rate}
        for group, found, rate in zip(ours["param_groups"], saved["param_groups"], rates, strict=True)
    ]
    ids, own = (list(chain.from_iterable(group["params"] for group in side)) for side in (new, ours["param_groups"]))
    if sorted(ids) != sorted(own):
        raise ValueError(f"{where}.param_groups names other parameters than 0 to {len(own) - 1}")
    template = {index: ours["state"][place] for index, place in zip(ids, own, strict=True)}
    states = like(saved["state"], template, f"{where}.state")
    for index, state in states.items():
        if state["step"].item() not in taken:
            raise ValueError(f"{where}.state.{index}.step is {state['step'].item()}, the run stands at another")
        if (state["exp_avg_sq"] < 0).any():
            raise ValueError(f"{where}.state.{index}.exp_avg_sq holds numbers below 0")
    return {"state": states, "param_groups": new}


def like(value: Any, ours: Any, where: str) -> Any:
    """`value` with the names of `ours` alone and each tensor in memory of its own; raises ValueError where a type,
    length or shape is another, an integer is negative or a number not finite. None stands for any value."""
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
    return value.clone(memory_format=torch.contiguous_format) if isinstance(value, Tensor) else value
