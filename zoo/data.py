"""What reaches a model in training: the slices of a task's global batches that one process works on."""

from __future__ import annotations

from collections.abc import Iterator

import lightning as L

from zoo.models import Model
from zoo.tasks import Batch, Task


class Stream:
    """The batches of one split as one process sees them: its slice of each global batch, from step `start` on."""

    def __init__(self, task: Task, split: str, size: int, batches: int, parts: int = 1, rank: int = 0, world: int = 1):
        self.task, self.split, self.size, self.batches = task, split, size, batches
        self.parts, self.rank, self.world, self.start, self.repeat = parts, rank, world, 0, False

    def __len__(self) -> int:
        return self.batches * self.parts

    def __iter__(self) -> Iterator[Batch]:
        share = self.size // (self.parts * self.world)
        for k in range(self.start, self.batches):
            batch = self.task.batch(self.split, 0 if self.repeat else k, self.size)
            for part in range(self.parts):
                yield batch.rows((part * self.world + self.rank) * share, share)


class Data(L.LightningDataModule):
    """The three streams of a task; training continues where the trainer's step count stands."""

    def __init__(self, model: Model, validation_batches: int, test_batches: int, overfit: bool):
        super().__init__()
        self.model, self.overfit = model, overfit
        self.validation_batches, self.test_batches = validation_batches, test_batches

    def _stream(self, split: str, batches: int, parts: int = 1) -> Stream:
        trainer = self.trainer
        assert trainer is not None
        size = self.model.optim.batch_size
        return Stream(self.model.task, split, size, batches, parts, trainer.global_rank, trainer.world_size)

    def train_dataloader(self) -> Stream:
        optim = self.model.optim
        stream = self._stream("train", optim.steps, optim.accumulate)
        assert self.trainer is not None
        stream.start, stream.repeat = self.trainer.global_step, self.overfit
        return stream

    def val_dataloader(self) -> Stream:
        return self._stream("validation", self.validation_batches)

    def test_dataloader(self) -> Stream:
        return self._stream("test", self.test_batches)
