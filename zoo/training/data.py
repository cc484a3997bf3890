"""Batches as a model gets them in training: the slices of a task's global batches that one process works on."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
import torch

from zoo.core.layers import FILLING
from zoo.tasks import Batch, Task


class Stream:
    """The batches of one split as one process sees them: its slice of each global batch, from step `start` on.

    A held-out split that is smaller than what is drawn from it is passed over once, each sequence once.
    """

    def __init__(self, task: Task, split: str, size: int, batches: int, parts: int = 1, rank: int = 0, world: int = 1):
        self.task, self.split, self.size, self.batches = task, split, size, batches
        self.parts, self.rank, self.world, self.start, self.repeat = parts, rank, world, 0, False
        self.shuffled = False  # every sequence gets the context of another
        once = None if split == "train" else task.once(split, batches * size)
        self.passes: list[np.ndarray] = []
        """The sequences of a small split, cut so that every process has one in every batch, if there are as many."""
        if once is not None and len(once) < batches * size:
            self.passes = np.array_split(once, max(min(-(-len(once) // size), len(once) // world), 1))

    def __len__(self) -> int:
        return len(self.passes) or self.batches * self.parts

    def __iter__(self) -> Iterator[Batch]:
        for index_N in self.passes:
            shared = len(index_N) < self.world  # all processes count the same, so means stay
            own_N = index_N if shared else np.array_split(index_N, self.world)[self.rank]
            yield self._batch(self.task.at(self.split, own_N))
        all_parts = self.parts * self.world
        share = self.size // all_parts
        for k in () if self.passes else range(self.start, self.batches):
            batch = self._batch(self.task.batch(self.split, 0 if self.repeat else k, self.size))
            scored = float(self.task.scored(batch).sum()) / all_parts
            read = float((batch.tokens != FILLING).sum()) / all_parts if self.task.filled else 0.0
            for part in range(self.parts):
                rows = batch.rows((part * self.world + self.rank) * share, share)
                yield rows._replace(part=part, scored=scored, read=read)

    def _batch(self, batch: Batch) -> Batch:
        """The batch, or the null model's."""
        if not self.shuffled:
            return batch
        assert batch.wrong_context is not None
        return batch._replace(tokens=torch.cat([batch.wrong_context, batch.tokens[:, batch.n_context :]], 1))
