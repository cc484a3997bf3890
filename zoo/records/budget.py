"""The width of the FFN at which a model costs as much as another, so that families can be compared fairly."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

from zoo.models import Model, flops
from zoo.training import checkpoint, validate

MEASURES: dict[str, tuple[str, Callable[[Model], float]]] = {
    "params": ("parameters", lambda model: flops.parameters(model)["total"]),
    "active_params": ("active parameters", lambda model: flops.parameters(model)["active"]),
    "flops": ("FLOPs per token", flops.flops_per_token),
}
ALIGNED = 4
"""Widths are multiples of it: rows of whole 16 bytes, which the grouped product of experts wants, too."""


def fitted(options: dict[str, Any], budget: str, reference: str | None) -> tuple[dict[str, Any], str]:
    """The options of a model with model.hidden such that it costs what the run `reference` would on the same task, or
    the default transformer, and one line on that.

    options: model, task, optim and seed; budget: which of MEASURES. All of them grow by the same for each unit, so two
    widths tell all. Raises ValueError where hidden is given, or the rest of the model is over the budget.
    """
    name, measure = MEASURES[budget]
    if "hidden" in options["model"]:
        given = f"model.hidden={options['model']['hidden']}"
        raise ValueError(f"budget={budget} decides model.hidden: leave {given} away, or the budget")

    def at(model: dict[str, Any]) -> float:
        with torch.device("meta"):
            built = validate.build({**{name: options[name] for name in validate.OPTIONS}, "model": model})
        return measure(built)

    other = {"name": "transformer"}
    if reference is not None:
        other = checkpoint.read(checkpoint.find(reference, "best"))["hyper_parameters"]["model"]
    with torch.device("meta"):
        start = validate.build({name: options[name] for name in validate.OPTIONS}).config.hidden
    wanted, (one, two) = at(other), (at({**options["model"], "hidden": n * start}) for n in (1, 2))
    hidden = ALIGNED * round((start + start * (wanted - one) / (two - one)) / ALIGNED)
    of = f"the {wanted:,.0f} of {reference or 'the default transformer'}"
    if hidden < ALIGNED:
        rest = 2 * one - two
        raise ValueError(
            f"budget={budget}: {options['model'].get('name')} has {rest:,.0f} {name} without an FFN, of {of}"
        )
    model = {**options["model"], "hidden": hidden}
    found = at(model)
    return model, f"model.hidden={hidden}: {found:,.0f} {name}, {found / wanted - 1:+.1%} beside {of}"
