"""card.md: what a trained model is, in words and numbers, for whoever finds its folder."""

from __future__ import annotations

from typing import Any

from zoo.models import MODELS
from zoo.records.pretrained import use
from zoo.records.summary import title
from zoo.tasks import Task


def card(metrics: dict[str, Any], task: Task) -> str:
    """Data and licence, command, test with its controls, cost and limits of a run, as Markdown."""
    family = " ".join((MODELS[metrics["model"]].__doc__ or "").split("\n\n")[0].split())
    what = " ".join((type(task).__doc__ or "").split("\n\n")[0].split())
    rows = [(task.explain(name).strip(), f"{value:.4g}") for name, value in metrics["test"].items()]
    rows += [
        ("parameters, active", f"{metrics['params_total']:,}, {metrics['params_active']:,}"),
        ("FLOPs per token, forward; of training", f"{metrics['flops_per_token']:,.0f}; {metrics['flops']:.2e}"),
        ("seconds of training", f"{metrics['seconds']:.0f} on {metrics['devices']} × {metrics['accelerator']}"),
    ]
    lines = [
        f"# {title(metrics)}",
        family,
        f"**Task.** {what}",
        f"**Data.** {task.origin()}",
        f"**Use.** `zoo.load(PATH{use(metrics)})`, PATH being this folder or file.",
        f"**Command.** `{metrics['command']}` (zoo {metrics['versions']['zoo']}, torch {metrics['versions']['torch']})",
        "| test | value |\n|---|---|\n" + "\n".join(f"| {name} | {value} |" for name, value in rows),
        "**Limits.** One seed, at these sizes and steps; nothing is known of other data, lengths or tasks than those "
        "of the test. Rows without context, with a wrong one, and of simple predictors are the controls to read it by.",
    ]
    return "\n\n".join(lines) + "\n"
