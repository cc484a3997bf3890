"""Figures of systems: curves of the validation loss, what error costs, and what layers tell."""

from __future__ import annotations

import math
from typing import NamedTuple

import numpy as np

from zoo.compare.systems import System, references
from zoo.lens.figure import Figure, Lines, Series
from zoo.tasks import TASKS

COSTS = {
    "params_total": "parameters",
    "params_active": "active",
    "flops_per_token": "FLOPs per token",
    "flops": "FLOPs of training",
    "steps": "steps",
    "tokens": "tokens",
    "seconds": "seconds",
    "tokens_per_second": "tokens/s",
    "memory_bytes": "memory, MB",
}
"""Numbers of metrics.json beside the error, in words."""
AXES = {name: COSTS[name] for name in ("tokens", "flops", "seconds")}
SHOWN = 7  # systems in one picture, as many as there are colours; the page shows all
NEAR = 30  # a reference this many times away from all systems is named below a figure, and not drawn
BUDGET = "that one is better at another budget, size or learning rate."


def explain(systems: list[System], metric: str | None = None) -> str:
    """A metric in words; the main one if none is given."""
    metrics = systems[0].runs[0].metrics
    metric, task = metric or metrics["main_metric"], TASKS.get(metrics["task"])
    return (task.explain(metric) if task else metric).strip()


class Curve(NamedTuple):
    """Validation losses of a system at the steps that all its runs have: y the mean over seeds, low to high their
    range; x: by those names of AXES that all runs know."""

    x: dict[str, list[float]]
    y: list[float]
    low: list[float]
    high: list[float]


def curve(system: System) -> Curve | None:
    """The curve of a system, None where its runs have no step in common."""
    by_run = [{row["step"]: row for row in run.rows if "validation_loss" in row} for run in system.runs]
    steps = sorted(set.intersection(*map(set, by_run)))
    if not steps:
        return None
    loss_SK = np.array([[rows[step]["validation_loss"] for step in steps] for rows in by_run])
    x: dict[str, list[float]] = {}
    for name in AXES:
        # rows of older runs do not say where they are: tokens and FLOPs follow from their step, seconds do not
        each = math.nan if name == "seconds" else system.number(name) / max(system.number("steps"), 1)
        place_K = np.mean([[rows[step].get(name, step * each) for step in steps] for rows in by_run], 0)
        x |= {name: place_K.tolist()} if np.isfinite(place_K).all() else {}
    return Curve(x, loss_SK.mean(0).tolist(), loss_SK.min(0).tolist(), loss_SK.max(0).tolist())


def curves(systems: list[System], rest: str) -> list[Figure]:
    """A figure for each schedule of the learning rate: the loss before the end depends on it."""
    found = {system.label: (system.schedule, one) for system in systems if (one := curve(system))}
    schedules = dict.fromkeys(schedule for schedule, _ in found.values())
    figures = []
    for k, name in enumerate(schedules):
        chosen = {label: one for label, (schedule, one) in found.items() if schedule == name}
        log = max(one.y[0] for one in chosen.values()) > 10 * min(min(one.y) for one in chosen.values()) > 0
        panels = []
        for axis, words in AXES.items():
            series = tuple(Series(label, c.x[axis], c.y, c.low, c.high) for label, c in chosen.items() if axis in c.x)
            panels += [Lines(f"against {words}", words, "validation loss", series, log_y=log)] if series else []
        file = "curves" if len(schedules) == 1 else f"curves-{k + 1}"
        title, caption = f"Validation loss, schedule {name}", f"Means over seeds, and their range.{rest}"
        figures.append(Figure(file, title, tuple(panels), caption, BUDGET, columns=3))
    return figures


def front(points: list[tuple[float, float]]) -> list[tuple[float, float]]:
    """The points (cost, error) that no other beats in both, by cost."""
    best: list[tuple[float, float]] = []
    for cost, error in sorted(points):
        if not best or error < best[-1][1]:
            best.append((cost, error))
    return best


def pareto(systems: list[System], rest: str) -> Figure:
    """The error against FLOPs, with the front of all systems and the references."""
    errors = [system.error() for system in systems]
    means = [one.mean for one in errors]
    known = references(systems)  # those of a part of the data, NAME_PART, are no levels of the whole
    whole = [name for name in known if not any(name.startswith(f"{other}_") for other in known)]
    levels = {explain(systems, name): known[name].mean for name in whole}
    near = {name: y for name, y in levels.items() if min(means) / NEAR <= y <= max(means) * NEAR}
    far = "; ".join(f"{name} {y:.3g}" for name, y in levels.items() if name not in near)
    panels = []
    for cost in ("flops", "flops_per_token"):
        x = [system.number(cost) for system in systems]
        series = []
        for system, place, one in list(zip(systems, x, errors, strict=True))[:SHOWN]:
            low, high = ([] if end is None else [end] for end in (one.low, one.high))
            series.append(Series(system.label, [place], [one.mean], low, high, points=True))
        best = front(list(zip(x, means, strict=True)))
        places, heights = [place for place, _ in best], [y for _, y in best]
        series.append(Series("front", [*places, max(x)], [*heights, heights[-1]], control=True))
        series += [Series(name, [min(x), max(x)], [y, y], control=True) for name, y in near.items()]
        log = max([*means, *near.values()]) > 10 * min([*means, *near.values()]) > 0
        panels.append(Lines(f"against {COSTS[cost]}", COSTS[cost], explain(systems), tuple(series), log_y=log))
    caption = f"Means over seeds, and their intervals; no system is below and left of the front.{rest}"
    return Figure("pareto", "Error and cost", tuple(panels), caption + (f" Not drawn: {far}." if far else ""), BUDGET)


def layers(systems: list[System], rest: str) -> list[Figure]:
    """What each layer told last: of routers, how far experts have specialised."""
    told: dict[str, list[Series]] = {}
    for system in systems:
        ends = [{name: value for row in run.rows for name, value in row.items()} for run in system.runs]
        for name in dict.fromkeys(key.partition("/")[2] for key in ends[0] if key.startswith("layer0/")):
            y: list[list[float]] = []
            while all(f"layer{len(y)}/{name}" in end for end in ends):
                y.append([end[f"layer{len(y)}/{name}"] for end in ends])
            spread = [*map(min, y)], [*map(max, y)]
            one = Series(system.label, [*map(str, range(len(y)))], [sum(v) / len(v) for v in y], *spread)
            told.setdefault(name, []).append(one)
    alone = {name: series[0].label if len(series) == 1 else "" for name, series in told.items()}
    panels = tuple(Lines(alone[name], "layer", name.replace("_", " "), tuple(series)) for name, series in told.items())
    caption = f"As validated last: means over seeds, and their range; the entropy of routers is in nats.{rest}"
    why = "that experts which differ are why an error is low."
    return [Figure("layers", "What layers tell", panels, caption, why, columns=3)] if panels else []


def all_figures(systems: list[System]) -> list[Figure]:
    """What is drawn of these systems, the lowest error first."""
    labels = [x.label if len(x.label) < 45 else f"{k}: {x.label[:40]}…" for k, x in enumerate(systems, 1)]
    # a dollar sign would begin a formula
    systems = [System(label.replace("$", r"\$"), one.runs) for label, one in zip(labels, systems, strict=True)]
    chosen, more = systems[:SHOWN], len(systems) - SHOWN
    rest = f" {more} further systems are in index.html and the tables." if more > 0 else ""
    return [*curves(chosen, rest), pareto(systems, rest), *layers(chosen, rest)]
