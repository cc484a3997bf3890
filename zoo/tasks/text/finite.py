"""Tasks of finitely many sequences: in which order a split gives them, and each of them once.

Axes: N sequences, D sources.
"""

from __future__ import annotations

import functools
from abc import abstractmethod
from typing import NamedTuple

import numpy as np

from zoo.tasks.base import SPLITS, Batch, Task


@functools.lru_cache(maxsize=16)
def _order(size: int, seed: int, split: str, epoch: int) -> np.ndarray:
    return np.random.default_rng([seed, SPLITS[split], epoch]).permutation(size)


class Pick(NamedTuple):
    """One sequence: that at `place` in the `order` of a source's own."""

    source: int
    order: np.ndarray
    place: int


class FiniteTask(Task):
    """Sequence j of a split comes from source j mod D, which gives all its own in a new order every epoch; held-out
    ones always in the same."""

    @abstractmethod
    def sizes(self, split: str) -> list[int]:
        """How many sequences each source has."""

    @abstractmethod
    def rows(self, split: str, picks: list[Pick]) -> Batch:
        """The batch of these sequences."""

    def batch(self, split: str, k: int, size: int) -> Batch:
        return self.at(split, k * size + np.arange(size))

    def at(self, split: str, index_N: np.ndarray) -> Batch:
        sizes, picks = self.sizes(split), []
        for j in index_N.tolist():
            turn, source = divmod(j, len(sizes))
            epoch, place = divmod(turn, sizes[source])
            key = (self.seed, split, epoch) if split == "train" else (0, split, 0)
            picks.append(Pick(source, _order(sizes[source], *key), place))
        return self.rows(split, picks)

    def once(self, split: str, draws: int) -> np.ndarray:
        sizes = np.array(self.sizes(split))
        turn_N, source_N = np.divmod(np.arange(min(draws, len(sizes) * sizes.max())), len(sizes))
        return np.flatnonzero(turn_N < sizes[source_N])
