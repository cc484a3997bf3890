"""What a task gives to every model: batches that are pure functions of (seed, split, k), a loss, and test metrics.

Axes: B sequences, T tokens, C tokens of the context, Q query tokens, V output numbers.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable
from typing import Any, ClassVar, NamedTuple

import numpy as np
import torch
from torch import Tensor

from zoo.config import strict

SPLITS = {"train": 0, "validation": 1, "test": 2}


class Batch(NamedTuple):
    """tokens (B,T) or (B,T,token_dim), the first n_context of them a separate context; targets of the rest;
    wrong_context: as many tokens of another sequence, (B,C) or (B,C,token_dim); group (B): which part of the data a
    sequence comes from, for analysis alone."""

    tokens: Tensor
    targets: Tensor
    n_context: int
    wrong_context: Tensor | None = None
    group: Tensor | None = None

    def rows(self, first: int, count: int) -> Batch:
        """The part of the batch that one process works on."""
        tensors = {name: value for name, value in self._asdict().items() if torch.is_tensor(value)}
        parts: dict[str, Any] = {name: value[first : first + count] for name, value in tensors.items()}
        return self._replace(**parts)


Predict = Callable[[Tensor, int], Tensor]
"""From tokens and n_context to the model's output (B,T,V)."""


class Task(ABC):
    """One training problem. Subclasses set the attributes below in __init__ and define batch, errors and evaluate."""

    Config: ClassVar[type]
    headline: ClassVar[str]
    """The test metric that sums up a run."""
    unit: ClassVar[str] = "nats per token"
    """Of the loss."""

    vocabulary: int | None = None
    token_dim: int | None = None
    output_dim: int
    n_context: int = 0
    independent_queries: bool = False
    tokens: int

    def __init__(self, options: dict[str, Any], seed: int):
        self.config: Any = strict(self.Config, options, "task")
        self.seed = seed

    def generator(self, split: str, k: int) -> torch.Generator:
        """Random numbers of batch k of a split; the streams of splits, seeds and batches are independent."""
        state = np.random.SeedSequence([self.seed, SPLITS[split], k]).generate_state(1, np.uint64)
        return torch.Generator().manual_seed(int(state[0] >> np.uint64(1)))

    def prepare(self) -> None:
        """Gets the data ready before a run starts; raises ValueError where it cannot be had."""
        return

    def state(self) -> dict[str, Any]:
        """What a checkpoint must hold beside the options, as plain values, such as a tokenizer."""
        return {}

    def restore(self, state: dict[str, Any]) -> None:
        """Takes over the state of a checkpoint; raises ValueError for what state() cannot have given."""
        if state:
            raise ValueError(f"task.name={self.config.name} has no state, got {', '.join(map(str, state))}")

    @abstractmethod
    def batch(self, split: str, k: int, size: int) -> Batch:
        """Global batch k of a split, `size` sequences; the same on every machine and process."""

    @abstractmethod
    def errors(self, output: Tensor, batch: Batch) -> Tensor:
        """The loss of each prediction, any shape."""

    def loss(self, output: Tensor, batch: Batch) -> Tensor:
        """What is trained on, the mean of the errors; without a shape made of values, for which a GPU is waited for."""
        return self.errors(output, batch).mean()

    @abstractmethod
    def references(self) -> dict[str, float]:
        """Losses to read a learning curve by, such as that of a trivial prediction."""

    @abstractmethod
    def evaluate(self, predict: Predict, batch: Batch) -> dict[str, Tensor]:
        """Per-prediction values whose means over the test set are the metrics, the model's and its baselines'."""
