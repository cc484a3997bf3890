"""The growth of cost with experts, rank and length, against what theory says, with a fit and a figure.

Axes: T tokens of a sequence, E experts, R rank, n tokens per expert. Time is per token and relative to the first size.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch

from zoo.bench import layers
from zoo.bench.timing import Case, Row, backward

TOKENS, PER_EXPERT = 4096, 128

EXPERTS = f"experts, n={PER_EXPERT}, K=1"
RANK = "rank"
LENGTHS = {name: f"{name} by length" for name in ("attention", "moe", "hypernet")}


def growth(sizes: layers.Sizes, device: torch.device, quick: bool) -> Iterator[Case]:
    """Experts at constant n and K, the rank of an update, the length of sequences at a constant number of tokens."""

    def case(name: str, work: dict[int, Callable[[], Any]]) -> Case:
        return Case("growth", name, str(next(iter(work))), {str(size): f for size, f in work.items()})

    experts = (8, 32) if quick else (8, 16, 32, 64, 128)
    states = {e: torch.randn(1, PER_EXPERT * e, sizes.dim, device=device) for e in experts}
    yield case(EXPERTS, {e: backward(layers.routing(sizes, e, 1), z) for e, z in states.items()})
    ranks = (1, 64) if quick else (1, 4, 8, 16, 32, 64)
    z = torch.randn(8, 128, sizes.dim, device=device)
    yield case(RANK, {r: backward(layers.emitting(sizes, r, None), z) for r in ranks})
    lengths = (128, 2048) if quick else (128, 256, 512, 1024, 2048)
    states = {T: torch.randn(TOKENS // T, T, sizes.dim, device=device) for T in lengths}
    yield case(LENGTHS["attention"], {T: layers.attention(z) for T, z in states.items()})
    yield case(LENGTHS["moe"], {T: backward(layers.routing(sizes, 16, 1), z) for T, z in states.items()})
    yield case(LENGTHS["hypernet"], {T: backward(layers.emitting(sizes, 8, 64), z) for T, z in states.items()})


def curves(rows: list[Row]) -> dict[str, tuple[np.ndarray, np.ndarray, np.ndarray]]:
    """By case: the sizes, the time per token relative to the first size, and its quartiles (2,·)."""
    found = {}
    for case in (EXPERTS, RANK, *LENGTHS.values()):
        points = [row for row in rows if row.section == "growth" and row.case == case]
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
    A = np.stack([np.ones_like(x), x], 1) / y[:, None]
    a, b = np.linalg.lstsq(A, np.ones_like(y), rcond=None)[0]
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
    from zoo.lens.draw import save
    from zoo.lens.figure import Figure, Lines, Series

    found = curves(rows)

    def measured(case: str, name: str) -> tuple[Series, ...]:
        x, y, (low, high) = found[case]
        a, b, _ = fit(x, y)
        return (
            Series(name, x.tolist(), y.tolist(), low=low.tolist(), high=high.tolist()),
            Series(f"fit {a:.2f} {b:+.2g}·x", x.tolist(), (a + b * x).tolist(), control=True),
        )

    unit = "time per token / that at the first size"
    lengths = sum((measured(case, name) for name, case in LENGTHS.items()), ())
    figure = Figure(
        "growth",
        "What a token costs, forward and backward",
        (
            Lines(f"a mixture at {PER_EXPERT} tokens per expert, K = 1", "experts", unit, measured(EXPERTS, "moe")),
            Lines("one low-rank update per 128 tokens", "rank", unit, measured(RANK, "hypernet")),
            Lines(f"sequences of T tokens, {TOKENS} tokens in all", "T", unit, lengths),
        ),
        "Attention alone costs more per token as sequences get longer. Medians and quartiles over rounds.",
        "that this holds at other widths, on other machines, or where caches or memory run out.",
        columns=3,
    )
    return save(figure, folder)
