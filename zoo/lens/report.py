"""A report on trained models: figures, the few numbers that matter, and one JSON with every number plotted."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any

import torch

from zoo import files
from zoo.console import say
from zoo.lens import draw, figures, structure
from zoo.lens.figure import Figure
from zoo.lens.figures import Models, example
from zoo.lens.routing import routed_layers
from zoo.models import Model

Makers = dict[str, Callable[..., Figure]]
TRAINED: Makers = {
    "law-residuals": figures.law_residuals,
    "norms-and-alignment": figures.norms_and_alignment,
    "changed-experts": figures.changed_experts,
    "expert-use": figures.expert_use,
    "static-error": figures.static_error,
    "generation-strip": figures.generation_strip,
}
"""Figures of checkpoints."""
NEEDS: dict[str, tuple[str, Callable[[Model], Any]]] = {
    "changed-experts": ("a mixture of experts", routed_layers),
    "expert-use": ("a mixture of experts", routed_layers),
    "static-error": ("queries that are blind to each other", lambda model: model.task.independent_queries),
    "generation-strip": ("running text", lambda model: model.task.has_text and not model.task.n_context),
}


def fitting(name: str, models: Models) -> Models:
    """The models that the figure `name` can show."""
    return {label: model for label, model in models.items() if name not in NEEDS or NEEDS[name][1](model)}


def make(name: str, models: Models) -> Figure:
    """The figure `name`; raises ValueError where it can show none of the models."""
    if shown := fitting(name, models):
        return TRAINED[name](shown)
    raise ValueError(f"{name} needs {NEEDS[name][0]} among the checkpoints")


def write(models: Models, folder: Path, sources: Mapping[str, Path], makers: Makers = TRAINED) -> dict[str, Any]:
    """Makes all fitting figures of the models in `folder`, report.md and report.json; returns what the JSON holds."""
    made: list[Figure] = []
    for name, maker in makers.items():
        if shown := fitting(name, models):
            made.append(maker(shown))
            say(str(draw.save(made[-1], folder)))
    numbers = {name: summary(model) for name, model in models.items()}
    content = {
        "checkpoints": {name: str(path) for name, path in sources.items()},
        "numbers": numbers,
        "figures": {figure.name: figure.plain() for figure in made},
    }
    files.write(folder / "report.json", files.to_json(content, 1) + "\n")
    files.write(folder / "report.md", markdown(models, numbers, made, sources))
    return content


@torch.no_grad()
def summary(model: Model, size: int = 16) -> dict[str, float]:
    """The numbers that matter: sizes, effective rank, who decides the update, and what the context is worth."""
    task = model.task
    tokens, n = example(model, size)
    tokens = tokens[:, : n + 8]
    relative = structure.relative_norms(model, tokens, n).mean((2, 3))
    name = structure.names(model)[int(relative[-1].nan_to_num().argmax())]
    update, W = structure.grid(model, tokens[:4], n)[name], model.decoder.blocks[-1].ffn.weight(name)
    ranks = structure.participation_ratio(torch.linalg.svdvals(update))
    numbers = {
        "parameters": float(sum(p.numel() for p in model.decoder.parameters())),
        "size of the update, |ΔW|/|W|": float(relative.nanmean()),
        f"effective rank of ΔW, last layer, {name}": float(ranks.nanmean()),
        f"variance of ΔW between contexts, last layer, {name}": float(structure.context_share(update, W)),
    }
    batch = task.batch("test", 0, 64)
    if batch.wrong_context is not None:
        values = task.evaluate(lambda tokens, n: model(tokens, n), batch)
        gap = values[f"{task.main_metric}_wrong_context"] - values[task.main_metric]
        numbers["error with a wrong context minus right"] = float(gap.mean())
    return numbers


def markdown(
    models: Models, numbers: Mapping[str, Mapping[str, float]], made: Iterable[Figure], sources: Mapping[str, Path]
) -> str:
    """The report as a page; figures lie beside it."""
    lines = ["# What the context does to the weights", ""]
    lines += [f"- {name}: {models[name].task.config.name}, `{path}`" for name, path in sources.items()]
    lines += ["", table(numbers), ""]
    for figure in made:
        lines += [f"## {figure.title}", "", f"![{figure.title}]({figure.name}.png)", "", figure.caption, ""]
        lines += [f"What it does not prove: {figure.caveat}", ""]
    return "\n".join(lines)


def table(numbers: Mapping[str, Mapping[str, float]]) -> str:
    """Numbers by model, as Markdown."""
    rows = list(dict.fromkeys(row for values in numbers.values() for row in values))
    lines = ["| | " + " | ".join(numbers) + " |", "|---" * (len(numbers) + 1) + "|"]
    for row in rows:
        cells = [_number(values[row]) if row in values else "" for values in numbers.values()]
        name = row.replace("|", "\\|")  # |ΔW|/|W| in a cell
        lines.append(f"| {name} | " + " | ".join(cells) + " |")
    return "\n".join(lines)


def _number(value: float) -> str:
    return f"{value:,.0f}" if abs(value) >= 1000 else f"{value:.3g}"
