"""Whether a checkpoint fits this zoo: a model is built from its options on the meta device, where weights take no
memory, and the file compared with that; only then does anything of its size exist."""

from __future__ import annotations

import math
from typing import Any

import lightning as L
import torch
from torch import Tensor

from zoo.config import lookup, show
from zoo.models import MODELS, Model
from zoo.models.optim import OptimConfig
from zoo.records import pretrained
from zoo.training.untrusted import finite

OPTIONS: dict[str, Any] = {"model": {}, "task": {}, "optim": {}, "seed": 0}
DTYPES = (torch.float32, torch.float64, torch.bfloat16, torch.float16)
KINDS = {int: "a whole number from 0 on", float: "a finite number", bool: "true or false", str: "text", dict: "a dict"}


def build(options: dict[str, Any], base: Any = None) -> Model:
    """The model of the options model, task, optim and seed, on its base's folder; raises ValueError for wrong ones."""
    return pretrained.built(lookup(options["model"].get("name"), MODELS, "model"), options, base)


def model(checkpoint: dict[str, Any]) -> Model:
    """A model without memory that has the checkpoint's weights; options that it lacks are written into it. Raises
    ValueError for unknown options, and for weights of other names, shapes or dtypes."""
    options, weights = checkpoint["hyper_parameters"], checkpoint["state_dict"]
    like(options, OPTIONS, "hyper_parameters")
    layers, most = options["model"].get("layers"), 1000 if options["model"].get("base") else len(weights) // 4
    if isinstance(layers, int | float) and layers > most:  # the only option that makes more modules
        raise ValueError(f"model.layers={show(layers)} is more than its {len(weights)} weights can make")
    with torch.device("meta"):
        meta = build(options)
    ours = meta.state_dict()
    like(weights, ours, "state_dict")
    if unknown := weights.keys() - ours.keys():
        raise ValueError(f"state_dict holds {show(unknown)}, which the model lacks")
    checkpoint["hyper_parameters"] = dict(meta.hparams)
    meta.on_load_checkpoint(checkpoint)
    return meta


def state(checkpoint: dict[str, Any], meta: Model) -> dict[str, Any]:
    """All that a run goes on with, by Lightning's names: the file says the options, the weights, the moments and the
    step, all else follows from these. Raises ValueError for what cannot have been."""
    if checkpoint["zoo"].get("config", {}).get("init_frozen") is True:
        meta.freeze_decoder()
    configured: Any = meta.configure_optimizers()
    optimizer, schedule = configured["optimizer"], configured["lr_scheduler"]["scheduler"]
    for parameter in meta.decoder.parameters():
        parameter.grad = torch.zeros_like(parameter)
    optimizer.step()  # makes the moments, of no memory either
    ours = optimizer.state_dict()
    groups = [{"params": group["params"]} for group in ours["param_groups"]]
    zoo = {"best": None, **checkpoint["zoo"]}
    begun_with = {name: zoo.get(name) or {} for name in ("trainer", "logger", "placement")}
    best = None if zoo["best"] is None else 0.0
    described = {
        "global_step": 0,
        "zoo": {"config": {}, "command": "", "seconds": 0.0, "best": best, **{name: {} for name in begun_with}},
        "optimizer_states": [{"state": ours["state"], "param_groups": groups}],
    }
    if "MixedPrecision" in checkpoint:  # of 16-mixed
        described["MixedPrecision"] = torch.amp.GradScaler("cpu").state_dict()
    found = like({**checkpoint, "zoo": {**zoo, **begun_with}}, described, "")
    step, moments = found["global_step"], found["optimizer_states"][0]["state"]
    if found["optimizer_states"][0]["param_groups"] != groups:
        raise ValueError("optimizer_states.0.param_groups names other parameters, or in another order")
    if step > meta.optim.steps:
        raise ValueError(f"global_step is {step}, beyond optim.steps={meta.optim.steps}")
    for number, moment in moments.items():
        if not 0 <= moment.get("step", 0) <= step:  # 16-mixed passes over steps whose gradients are not finite
            raise ValueError(f"optimizer_states.0.state.{number}.step is {moment['step']}, the run stands at {step}")
        if "exp_avg_sq" in moment and (moment["exp_avg_sq"] < 0).any():
            raise ValueError(f"optimizer_states.0.state.{number}.exp_avg_sq is negative, and no square is")
        moments[number] = {name: t.clone(memory_format=torch.contiguous_format) for name, t in moment.items()}
    schedule.last_epoch = step - 1
    schedule.step()  # computes the learning rates of this step
    return {
        **found,
        **{name: checkpoint[name] for name in ("hyper_parameters", "state_dict", "task", "family")},
        "zoo": {**zoo, **begun_with, "config": {**zoo["config"], **checkpoint["hyper_parameters"]}},
        "optimizer_states": [{"state": moments, "param_groups": optimizer.state_dict()["param_groups"]}],
        "lr_schedulers": [schedule.state_dict()],
        "loops": place(step, meta.optim),
        "callbacks": {},
        "pytorch-lightning_version": L.__version__,
    }


def place(steps: int, optim: OptimConfig) -> dict[str, Any]:
    """Where a run stands after so many steps, by Lightning's names."""

    def done(count: int) -> dict[str, Any]:
        numbers = dict.fromkeys(("ready", "started", "processed", "completed"), count)
        return {"total": numbers, "current": numbers}

    optimizer = {"step": done(steps), "zero_grad": done(steps)}
    return {
        "fit_loop": {
            "epoch_loop.state_dict": {"_batches_that_stepped": steps},
            "epoch_loop.batch_progress": {**done(steps * optim.accumulate), "is_last_batch": steps == optim.steps},
            "epoch_loop.automatic_optimization.optim_progress": {"optimizer": optimizer},
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
    if isinstance(ours, list) and isinstance(value, list) and len(value) == len(ours):
        return [like(item, own, f"{where}.{index}") for index, (item, own) in enumerate(zip(value, ours, strict=True))]
    if isinstance(ours, Tensor):
        fits = isinstance(value, Tensor) and value.shape == ours.shape and value.dtype in DTYPES and finite(value)
    elif isinstance(ours, float):
        fits = type(value) in (int, float) and math.isfinite(value)
    else:
        fits = type(value) is type(ours) in (int, bool, str) and not (type(ours) is int and value < 0)
    if not fits:
        raise ValueError(f"{where} must be {KINDS.get(type(ours), f'a finite {show(ours)}')}, got {show(value)}")
    return value
