"""The growth of cost with experts, rank and length, against what theory says, with a fit and a figure.

Axes: T tokens of a sequence, E experts, R rank, n tokens per expert. Time is per token and relative to the first size.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch

from zoo.bench.layers import DIM, attention, emitting, routing
from zoo.bench.timing import Case, Row, backward
from zoo.lens.draw import save
from zoo.lens.figure import Figure, Lines, Series

TOKENS, PER_EXPERT = 4096, 128

EXPERTS = f"experts, n={PER_EXPERT}, K=1"
RANK = "rank"
LENGTHS = {name: f"{name} by length" for name in ("attention", "moe", "hypernet")}


def growth(device: torch.device, quick: bool) -> Iterator[Case]:
    """Experts at constant n and K, the rank of an update, the length of sequences at a constant number of tokens."""

    def case(name: str, sizes: tuple[int, ...], work: Callable[[int], Any]) -> Case:
        ends = (sizes[0], sizes[-1]) if quick else sizes
        return Case(name, str(sizes[0]), {str(size): work(size) for size in ends})

    def states(sequences: int, tokens: int) -> torch.Tensor:
        return torch.randn(sequences, tokens, DIM, device=device)

    yield case(EXPERTS, (8, 16, 32, 64, 128), lambda e: backward(routing(e, 1), states(1, PER_EXPERT * e)))
    z, lengths = states(8, 128), (128, 256, 512, 1024, 2048)
    yield case(RANK, (1, 4, 8, 16, 32, 64), lambda r: backward(emitting(r, None), z))
    yield case(LENGTHS["attention"], lengths, lambda T: attention(states(TOKENS // T, T)))
    yield case(LENGTHS["moe"], lengths, lambda T: backward(routing(16, 1), states(TOKENS // T, T)))
    yield case(LENGTHS["hypernet"], lengths, lambda T: backward(emitting(8, 64), states(TOKENS // T, T)))


def curves(rows: list[Row]) -> dict[str, tuple[np.ndarray, np.ndarray, np.ndarray]]:
    """By case: the sizes, the time per token relative to the first size, and its quartiles (2,·)."""
    found = {}
    for case in (EXPERTS, RANK, *LENGTHS.values()):
        points = [row for row in rows if row.case == case]
        if points:
            first = float(points[0].baseline)
            x = np.array([first, *(float(row.variant) for row in points)])
            y = np.array([[1.0, 1.0, 1.0], *([row.low, row.ratio, row.high] for row in points)]).T
            if case == EXPERTS:
                y = y * first / x  # these have more tokens in proportion
            found[case] = (x, y[1], y[[0, 2]])
    return found


def fit(x: np.ndarray, y: np.ndarray) -> tuple[float, float, float]:
    """a, b and R² of y ≈ a + b·x by least squares on y/y, each point of equal relative weight."""
    b, a = np.polyfit(x, y, 1, w=1 / y)
    spread = ((y - y.mean()) ** 2).sum()
    return float(a), float(b), float(1 - ((y - a - b * x) ** 2).sum() / spread) if spread else 1.0


def lines(rows: list[Row]) -> list[str]:
    """The fits of the curves, one line each."""
    fits = [(case, x, y, *fit(x, y)) for case, (x, y, _) in curves(rows).items()]
    return [
        f"- {case}: time per token {a:.2f} {b:+.2g}·x, R² {r2:.3f}; from {x[0]:.0f} to {x[-1]:.0f} it grows "
        f"{y[-1]:.2f} times"
        for case, x, y, a, b, r2 in fits
    ]


def draw(rows: list[Row], folder: Path) -> Path:
    """The figure growth.png and its numbers, growth.json, in `folder`."""
    found = curves(rows)

    def panel(title: str, x_label: str, measured: dict[str, str]) -> Lines:
        series: list[Series] = []
        for name, case in measured.items():
            x, y, (low, high) = found[case]
            a, b, _ = fit(x, y)
            series.append(Series(name, x.tolist(), y.tolist(), low.tolist(), high.tolist()))
            series.append(Series(f"fit {a:.2f} {b:+.2g}·x", x.tolist(), (a + b * x).tolist(), control=True))
        return Lines(title, x_label, "time per token / that at the first size", tuple(series))

    figure = Figure(
        "growth",
        "What a token costs, forward and backward",
        (
            panel(f"a mixture at {PER_EXPERT} tokens per expert, K = 1", "experts", {"moe": EXPERTS}),
            panel("one low-rank update per 128 tokens", "rank", {"hypernet": RANK}),
            panel(f"sequences of T tokens, {TOKENS} tokens in all", "T", LENGTHS),
        ),
        "Attention alone costs more per token as sequences get longer. Medians and quartiles over rounds.",
        "that this holds at other widths, on other machines, or where caches or memory run out.",
        columns=3,
    )
    return save(figure, folder)
