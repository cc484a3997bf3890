"""Batches as a model gets them in training: the slices of a task's global batches that one process works on."""

from __future__ import annotations

from collections.abc import Iterator

import lightning as L
import numpy as np

from zoo.core.layers import FILLING
from zoo.models import Model
from zoo.tasks import Batch, Task
from zoo.training.options import RunConfig


class Stream:
    """The batches of one split as one process sees them: its slice of each global batch, from step `start` on.

    A held-out split that is smaller than what is drawn from it is passed over once, each sequence once.
    """

    def __init__(self, task: Task, split: str, size: int, batches: int, parts: int = 1, rank: int = 0, world: int = 1):
        self.task, self.split, self.size, self.batches = task, split, size, batches
        self.parts, self.rank, self.world, self.start, self.repeat = parts, rank, world, 0, False
        self.once = None if split == "train" else task.once(split, batches * size)

    def __len__(self) -> int:
        return len(self._passes) if self._small else self.batches * self.parts

    @property
    def _small(self) -> bool:
        return self.once is not None and len(self.once) < self.batches * self.size

    @property
    def _passes(self) -> list[np.ndarray]:
        """The sequences of a small split, cut so that every process has one in every batch, if there are as many."""
        assert self.once is not None
        batches = min(-(-len(self.once) // self.size), len(self.once) // self.world)
        return np.array_split(self.once, max(batches, 1))

    def __iter__(self) -> Iterator[Batch]:
        if self._small:
            for index_N in self._passes:
                shared = len(index_N) < self.world  # all processes count the same, so means stay
                yield self.task.at(self.split, index_N if shared else np.array_split(index_N, self.world)[self.rank])
            return
        all_parts = self.parts * self.world
        share = self.size // all_parts
        for k in range(self.start, self.batches):
            batch = self.task.batch(self.split, 0 if self.repeat else k, self.size)
            scored = float(self.task.scored(batch).sum()) / all_parts
            read = float((batch.tokens != FILLING).sum()) / all_parts if self.task.filled else 0.0
            for part in range(self.parts):
                rows = batch.rows((part * self.world + self.rank) * share, share)
                yield rows._replace(part=part, scored=scored, read=read)


class Data(L.LightningDataModule):
    """The three streams of a task; training continues where the trainer's step count stands."""

    def __init__(self, model: Model, options: RunConfig):
        super().__init__()
        self.model, self.options = model, options

    def _stream(self, split: str, batches: int, parts: int = 1) -> Stream:
        trainer = self.trainer
        assert trainer is not None
        size = self.model.optim.batch_size
        stream = Stream(self.model.task, split, size, batches, parts, trainer.global_rank, trainer.world_size)
        stream.start = trainer.global_step if split == "train" else 0
        return stream

    def train_dataloader(self) -> Stream:
        stream = self._stream("train", self.model.optim.steps, self.model.optim.accumulate)
        stream.repeat = self.options.overfit
        return stream

    def val_dataloader(self) -> Stream:
        return self._stream("validation", self.options.validation_batches)

    def test_dataloader(self) -> Stream:
        return self._stream("test", self.options.test_batches)
