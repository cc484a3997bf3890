"""The growth of cost with experts, rank and length, with a figure and straight lines fitted to it.

Axes: T tokens of a sequence, E experts, n tokens per expert. Times are relative to the first size.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import torch

from zoo.bench.layers import DIM, emitting, routing
from zoo.bench.timing import Case, Row, Setting, backward, measure
from zoo.core.layers import Attention, Layout
from zoo.lens.figure import Figure, Lines, Series

TOKENS, PER_EXPERT = 4096, 128

EXPERTS = f"experts, n={PER_EXPERT}, K=1"
RANK = "rank"
LENGTHS = {name: f"{name} by length" for name in ("attention", "moe", "hypernet")}


def growth(setting: Setting) -> Iterator[Row]:
    """Cost against the number of experts, the rank of an update, and the length, at a constant number of tokens."""

    def by_size(name: str, sizes: tuple[int, ...], work: Callable[[int], Any]) -> Iterator[Row]:
        ends = (sizes[0], sizes[-1]) if setting.quick else sizes
        return measure(Case(name, str(sizes[0]), {str(size): work(size) for size in ends}), setting)

    def states(sequences: int, tokens: int) -> torch.Tensor:
        return torch.randn(sequences, tokens, DIM, device=setting.device)

    def attention(T: int) -> Callable[[], Any]:
        layout = Layout(torch.arange(T, device=setting.device), None)
        return backward(Attention(DIM, 8, 8), states(TOKENS // T, T), layout)

    z, lengths = states(8, 128), (128, 256, 512, 1024, 2048)
    yield from by_size(EXPERTS, (8, 16, 32, 64, 128), lambda E: backward(routing(E, 1), states(1, PER_EXPERT * E)))
    yield from by_size(RANK, (1, 4, 8, 16, 32, 64), lambda rank: backward(emitting(rank, None), z))
    yield from by_size(LENGTHS["attention"], lengths, attention)
    yield from by_size(LENGTHS["moe"], lengths, lambda T: backward(routing(16, 1), states(TOKENS // T, T)))
    yield from by_size(LENGTHS["hypernet"], lengths, lambda T: backward(emitting(8, 64), states(TOKENS // T, T)))


def figure(rows: list[Row]) -> Figure:
    """The time per token by size, relative to the first one, with its quartiles, and a line a + b·x fitted to it."""

    def panel(title: str, x_label: str, measured: dict[str, str]) -> Lines:
        series: list[Series] = []
        for label, case in measured.items():
            points = [row for row in rows if row.case == case]
            x = np.array([float(name) for name in (points[0].baseline, *(row.variant for row in points))])
            ranges = np.array([[1.0, 1.0, 1.0], *([row.low, row.ratio, row.high] for row in points)])
            tokens = x / x[0] if case == EXPERTS else np.ones_like(x)
            low, y, high = ranges.T / tokens
            b, a = np.polyfit(x, y, 1, w=1 / y)  # each point of equal relative weight
            series.append(Series(label, x.tolist(), y.tolist(), low.tolist(), high.tolist()))
            series.append(Series(f"fit {a:.2f} {b:+.2g}·x", x.tolist(), (a + b * x).tolist(), control=True))
        return Lines(title, x_label, "time per token / that at the first size", tuple(series))

    return Figure(
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
