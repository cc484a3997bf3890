"""Whether the contents of a checkpoint fit this zoo: tried on the meta device, where weights take no memory.

Families and tasks decide alone what their options mean. A model is built from them until it has more parts than the
checkpoint has weights, and the file is compared with it by name, shape and dtype; only then does anything of its size
exist.
"""

from __future__ import annotations

import math
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import lightning as L
import torch
from torch import Tensor
from torch.nn.modules import module as hooks

from zoo.config import lookup, show
from zoo.models import MODELS, Model
from zoo.models.base import OptimConfig
from zoo.training.untrusted import finite

OPTIONS = {"model": dict, "task": dict, "optim": dict, "seed": int}
DTYPES = (torch.float32, torch.float64, torch.bfloat16, torch.float16)
PARTS = 8  # modules and parameters made for each weight of the state_dict, at most; three are usual


def build(options: dict[str, Any]) -> Model:
    """The model of the options model, task, optim and seed; raises ValueError for wrong ones."""
    return lookup(options["model"].get("name"), MODELS, "model")(**options)


def model(checkpoint: dict[str, Any]) -> Model:
    """A model without memory that has the checkpoint's weights; options that it lacks are written into it.

    Raises ValueError if there is none: for unknown options, and for weights of other names, shapes or dtypes.
    """
    options, weights = checkpoint["hyper_parameters"], checkpoint["state_dict"]
    if {key: type(value) for key, value in options.items()} != OPTIONS:
        raise ValueError(f"it must hold the options {', '.join(OPTIONS)}, got {show(options, 200)}")
    if not 0 <= options["seed"] < 2**32:
        raise ValueError(f"it holds seed={show(options['seed'])}, not one between 0 and {2**32 - 1}")
    with torch.device("meta"), _at_most(PARTS * len(weights) + 100):
        meta = build(options)
    ours = dict(meta.hparams)
    filled = {key: {**ours[key], **value} if isinstance(value, dict) else value for key, value in options.items()}
    if ours != filled:
        raise ValueError("; ".join(differences(filled, ours)))
    like(weights, meta.state_dict(), "state_dict")
    if unknown := weights.keys() - meta.state_dict().keys():
        raise ValueError(f"state_dict holds {show(unknown)}, which the model lacks")
    if len(kinds := {weight.dtype for weight in weights.values()}) > 1:
        raise ValueError(f"state_dict is of {', '.join(map(str, kinds))}, not of one of them")
    first: dict[int, str] = {}
    for name, parameter in meta.named_parameters(remove_duplicate=False):
        other = first.setdefault(id(parameter), name)
        if not torch.equal(weights[name], weights[other]):
            raise ValueError(f"{name} and {other} are one matrix in the model, two in the file")
    checkpoint["hyper_parameters"] = ours
    meta.on_load_checkpoint(checkpoint)
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


def state(checkpoint: dict[str, Any], meta: Model) -> dict[str, Any]:
    """All that a run goes on with, by Lightning's names; raises ValueError for what cannot have been.

    The file says the options, the weights, the moments and the step; all else follows from these.
    """
    configured: Any = meta.configure_optimizers()
    optimizer, schedule = configured["optimizer"], configured["lr_scheduler"]["scheduler"]
    for parameter in meta.decoder.parameters():
        parameter.grad = torch.zeros_like(parameter)
    optimizer.step()  # makes the moments, of no memory either
    ours, began = optimizer.state_dict(), schedule.state_dict()
    groups = [{"params": group["params"]} for group in ours["param_groups"]]
    given = [name for name in ("trainer", "logger", "placement") if checkpoint["zoo"].get(name) is not None]
    score = 0.0 if checkpoint["zoo"].get("best") is not None else None
    described = {
        "global_step": 0,
        "zoo": {"config": {}, "command": "", "seconds": 0.0, "best": score, **{name: {} for name in given}},
        "optimizer_states": [{"state": None, "param_groups": groups}],
        # of 16-mixed, which passes over steps whose gradients are not finite
        **({"MixedPrecision": torch.amp.GradScaler("cpu").state_dict()} if "MixedPrecision" in checkpoint else {}),
    }
    found = like(checkpoint, described, "")
    step, (saved,), seconds = found["global_step"], found["optimizer_states"], found["zoo"]["seconds"]
    if seconds < 0:
        raise ValueError(f"zoo.seconds must be a number from 0 on, got {seconds}")
    if step > meta.optim.steps:
        raise ValueError(f"global_step is {step}, beyond optim.steps={meta.optim.steps}")
    kept, own = ([number for group in side for number in group["params"]] for side in (saved["param_groups"], groups))
    if sorted(kept) != sorted(own):
        raise ValueError(f"optimizer_states.0.param_groups names other parameters than 0 to {len(own) - 1}")
    template = {number: ours["state"][place] for number, place in zip(kept, own, strict=True)}
    moments = like(saved["state"], template, "optimizer_states.0.state")
    for number, moment in moments.items():
        steps = moment["step"].item()
        if steps != step and not ("MixedPrecision" in found and steps in range(step)):
            raise ValueError(f"optimizer_states.0.state.{number}.step is {steps}, the run stands at {step}")
        if (moment["exp_avg_sq"] < 0).any():
            raise ValueError(f"optimizer_states.0.state.{number}.exp_avg_sq holds numbers below 0")
        moments[number] = {name: t.clone(memory_format=torch.contiguous_format) for name, t in moment.items()}
    rates = [base * rate(step) for base, rate in zip(schedule.base_lrs, schedule.lr_lambdas, strict=True)]
    new = [
        {**group, **numbers, "lr": rate}
        for group, numbers, rate in zip(ours["param_groups"], saved["param_groups"], rates, strict=True)
    ]
    return {
        **found,
        **{name: checkpoint[name] for name in ("hyper_parameters", "state_dict", "task", "family")},
        "zoo": {**checkpoint["zoo"], "config": {**checkpoint["zoo"]["config"], **checkpoint["hyper_parameters"]}},
        "optimizer_states": [{"state": moments, "param_groups": new}],
        "lr_schedulers": [{**began, "last_epoch": step, "_step_count": step + 1, "_last_lr": rates}],
        "loops": place(step, meta.optim),
        "callbacks": {},
        "epoch": 0,
        "pytorch-lightning_version": L.__version__,
    }


def place(steps: int, optim: OptimConfig) -> dict[str, Any]:
    """Where a run stands after so many steps, by Lightning's names."""

    def count(total: int, **more: Any) -> dict[str, Any]:
        numbers = dict.fromkeys(("ready", "started", "processed", "completed"), total)
        return {"total": {**numbers, **more}, "current": {**numbers, **more}}

    stepped = {"step": count(steps), "zero_grad": count(steps)}
    return {
        "fit_loop": {
            "epoch_progress": count(0, ready=1, started=1),
            "epoch_loop.state_dict": {"_batches_that_stepped": steps},
            "epoch_loop.batch_progress": {**count(steps * optim.accumulate), "is_last_batch": steps == optim.steps},
            "epoch_loop.scheduler_progress": count(steps),
            "epoch_loop.automatic_optimization.optim_progress": {"optimizer": stepped},
        }
    }


def like(value: Any, ours: Any, where: str) -> Any:
    """`value` with the names of `ours` alone; raises ValueError where a type, length or shape is another, an integer is
    negative or a number not finite. None stands for any value."""
    if ours is None:
        return value
    if isinstance(ours, dict) and isinstance(value, dict):
        for key in ours:
            if key not in value:
                raise ValueError(f"{where or 'it'} lacks {show(key)}")
        return {key: like(value[key], item, f"{where}.{key}".lstrip(".")) for key, item in ours.items()}
    if isinstance(ours, list | tuple) and isinstance(value, list | tuple) and len(value) == len(ours):
        return [like(item, own, f"{where}.{index}") for index, (item, own) in enumerate(zip(value, ours, strict=True))]
    if isinstance(ours, Tensor):
        fits = isinstance(value, Tensor) and value.shape == ours.shape and value.dtype in DTYPES and finite(value)
    elif isinstance(ours, float):
        fits = type(value) in (int, float) and math.isfinite(value)
    else:
        fits = type(value) is type(ours) in (int, bool, str) and not (type(ours) is int and value < 0)
    if not fits:
        numbers = {int: "a whole number from 0 on", float: "a finite number", list: f"a list as {show(ours)}"}
        kind = f"a finite {show(ours)}" if isinstance(ours, Tensor) else numbers.get(type(ours), type(ours).__name__)
        raise ValueError(f"{where} must be {kind}, got {show(value)}")
    return value
