"""Independent uniform tokens: nobody can predict them, so any loss below ln V means that the future leaks."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from zoo.tasks.base import Batch, Predict, Task, TaskConfig


@dataclass(frozen=True)
class NoiseConfig(TaskConfig):
    """Sequences of `tokens` ids, each drawn from `vocabulary` ids."""

    name: str = "noise"
    vocabulary: int = 8
    tokens: int = 64


class Noise(Task):
    """Next-token prediction in nats; the floor is ln V."""

    Config = NoiseConfig
    main_metric = "nats"
    labels: ClassVar = {"nats": "test loss in nats per token", "nats_floor": "  floor, ln of the vocabulary"}

    def batch(self, split: str, k: int, size: int) -> Batch:
        shape = (size, self.tokens + 1)
        ids = torch.randint(self.config.vocabulary, shape, generator=self.generator(split, k))
        return Batch(ids[:, :-1], ids[:, 1:], 0)

    def baselines(self) -> dict[str, float]:
        return {"floor, ln V": math.log(self.config.vocabulary)}

    def evaluate(self, predict: Predict, batch: Batch) -> dict[str, Tensor]:
        errors = self.errors(predict, batch)
        return errors | {"nats_floor": torch.full_like(errors["nats"], math.log(self.config.vocabulary))}
