"""Output for people: the opening lines of a run, its closing table, and its learning curve."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import lightning as L

from zoo.devices.plan import told
from zoo.files import whole
from zoo.models import Model, flops
from zoo.records.pretrained import begun_on, use
from zoo.tasks import TASKS
from zoo.training.callbacks import read_rows


def opening(model: Model, trainer: L.Trainer, folder: Path) -> str:
    """Model, data, device and folder of a run that begins, and what each of several processes holds and does."""
    config, task, optim = model.config, model.task, model.optim
    devices = f"{trainer.world_size} × {trainer.strategy.root_device.type}, {trainer.precision}\n{told(model, trainer)}"
    files = getattr(task.config, "files", None)
    read = f"reads {', '.join(files)}\n" if files else ""  # a checkpoint may be somebody else's
    return (
        f"{config.name} on {task.config.name}: {flops.parameters(model)['total']:,} parameters\n"
        f"{optim.steps} steps of {optim.batch_size} sequences of {task.tokens} tokens on {devices}{read}"
        f"run folder: {folder}{begun_on(model)}"
    )


def closing(metrics: dict[str, Any]) -> str:
    """The table at the end of a run."""
    explain, test = TASKS[metrics["task"]].explain, metrics["test"]
    rows = [(explain(name), f"{x:.1e}" if 0 < abs(x) < 1e-3 else f"{x:.4f}") for name, x in test.items()]
    rows += [
        ("parameters", f"{metrics['params_total']:,} ({metrics['params_active']:,} active)"),
        ("FLOPs per token, forward", f"{metrics['flops_per_token']:,.0f}"),
        ("training", f"{metrics['seconds']:.0f} s, {metrics['tokens_per_second']:,.0f} tokens/s"),
        ("run folder", str(Path(metrics["checkpoint"]).parent.parent)),
        ("load it with", f'zoo.load("{metrics["checkpoint"]}"{use(metrics)})'),
    ]
    width, head = max(len(name) for name, _ in rows), title(metrics)
    return "\n".join(["", head, "─" * len(head), *(f"{name:<{width}}  {value}" for name, value in rows)])


def title(metrics: dict[str, Any]) -> str:
    """One line that names a run."""
    return f"{metrics['model']} on {metrics['task']}, seed {metrics['seed']}, {metrics['steps']} steps"


def curve(folder: Path, head: str, unit: str, references: dict[str, float]) -> None:
    """curve.png: training and validation loss against steps, from metrics.jsonl, beside losses to read them by."""
    from matplotlib.figure import Figure  # without pyplot: no backend, no display

    if not (rows := read_rows(folder / "metrics.jsonl")):
        raise ValueError(f"{folder}/metrics.jsonl is gone or damaged")
    figure = Figure((6, 4))
    axes = figure.subplots(gridspec_kw={"left": 0.15, "right": 0.98, "bottom": 0.12, "top": 0.92})
    styles = {"loss": ("training loss", "#0072B2", ""), "validation_loss": ("validation loss", "#D55E00", "o")}
    for name, (label, colour, marker) in styles.items():
        steps = {row["step"]: row[name] for row in rows if row.get(name) is not None}
        axes.plot([*steps], [*steps.values()], label=label, color=colour, marker=marker)
    for name, level in references.items():
        axes.axhline(level, color="0.4", linestyle="--", label=name)
    axes.set(xlabel="optimiser steps", ylabel=f"loss, {unit}", title=head)
    low, high = axes.get_ylim()
    if low <= 0 or high > 10 * low:  # within one decade, logarithmic ticks are hard to read
        axes.set_yscale("log")
    axes.legend()
    with whole(folder / "curve.png") as temporary:
        figure.savefig(temporary, dpi=120)
