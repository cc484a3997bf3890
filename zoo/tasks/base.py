"""Tasks: batches that are pure functions of (seed, split, k), a loss, and test metrics.

Axes: B sequences, T tokens, C tokens of the context, Q query tokens, K sample queries, V output numbers.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any, ClassVar, NamedTuple, Self

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from zoo.config import from_dict, require_positive
from zoo.core.layers import FILLING

SPLITS = {"train": 0, "validation": 1, "test": 2}
IGNORE = -100  # torch's ignore_index: a target that is not predicted


class Batch(NamedTuple):
    """tokens (B,T) or (B,T,token_dim), the first n_context of them a separate context; targets of those after it;
    wrong_context (B,C): that of another sequence; group (B): the part of the data a sequence is of, for analysis alone.

    A process works on parts of a step's global batch, numbered by `part`. scored and read are the predictions and
    tokens of the global batch over the number of all parts: sums over a part are divided by them, so that every
    prediction weighs the same in whatever part it is. 0: this batch is the whole."""

    tokens: Tensor
    targets: Tensor
    n_context: int
    wrong_context: Tensor | None = None
    group: Tensor | None = None
    part: int = 0
    scored: float = 0.0
    read: float = 0.0

    def rows(self, first: int, count: int) -> Batch:
        """The part of the batch that one process works on."""
        rows = slice(first, first + count)
        parts: dict[str, Any] = {name: x[rows] for name, x in self._asdict().items() if torch.is_tensor(x)}
        return self._replace(**parts)

    def unfilled(self) -> Tensor:
        """The tokens up to where filling begins in one of the rows after its context."""
        if self.tokens.is_floating_point():
            return self.tokens
        return self.tokens[:, : self.n_context + int((self.tokens[:, self.n_context :] != FILLING).sum(1).min())]


Predict = Callable[[Tensor, int], Tensor]
"""From tokens and n_context to the model's output (B,T,V)."""


@dataclass(frozen=True)
class TaskConfig:
    """The options of a task."""

    name: str = ""

    def resolve(self) -> Self:
        """This with every open default written down; raises ValueError for options that do not fit each other, here
        for numbers that are not above 0."""
        require_positive("task", **{key: value for key, value in vars(self).items() if type(value) in (int, float)})
        return self


class Task(ABC):
    """One training problem. Subclasses set the attributes below and define batch, baselines and evaluate."""

    Config: ClassVar[type[TaskConfig]]
    main_metric: ClassVar[str]
    """The test metric that sums up a run."""
    labels: ClassVar[dict[str, str]] = {}
    """Metrics in words, for the table at the end of a run."""
    unit: ClassVar[str] = "nats per token"
    """Of the loss."""
    lr: ClassVar[float] = 6e-3
    muon_lr: ClassVar[float] = 0.01
    """Learning rates where optim leaves them open, beside each other: of AdamW, and of Muon."""
    has_text: ClassVar[bool] = False
    """Whether token ids stand for text: then encode and decode are defined."""

    vocabulary: int | None = None
    token_dim: int | None = None
    output_dim: int
    n_context: int = 0
    independent_queries: bool = False
    """Whether the tokens after the context are blind to each other."""
    filled: bool = False
    """Whether token ids may be FILLING, which holds the places of what is missing."""
    tokens: int

    def __init__(self, options: dict[str, Any], seed: int):
        self.config: Any = from_dict(self.Config, options, "task").resolve()
        self.seed = seed
        if ids := getattr(self.config, "vocabulary", None):  # options of these names are sizes of the task
            self.vocabulary = self.output_dim = ids
        self.tokens = getattr(self.config, "tokens", 0)

    def generator(self, split: str, k: int = 0) -> torch.Generator:
        """Random numbers of batch k of a split, or of what is `fixed` by the seed; the streams are independent."""
        state = np.random.SeedSequence([self.seed, {**SPLITS, "fixed": 3}[split], k]).generate_state(1, np.uint64)
        return torch.Generator().manual_seed(int(state[0] >> np.uint64(1)))

    def prepare(self) -> None:
        """Gets the data ready before a run starts; raises ValueError where it cannot be had."""
        return

    def origin(self) -> str:
        """Where the data come from, and under which licence."""
        return f"Drawn at random from the seed, {self.seed}; no data of others."

    def state_dict(self) -> dict[str, Any]:
        """The state of the task beside its options, as plain values for a checkpoint, such as a tokenizer."""
        return {}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Takes over the state of a checkpoint; raises ValueError for what state_dict() cannot have given."""
        if state:
            raise ValueError(f"task.name={self.config.name} has no state {', '.join(map(str, state))}")

    @abstractmethod
    def batch(self, split: str, k: int, size: int) -> Batch:
        """Global batch k of a split, `size` sequences; the same on every machine and process."""

    def at(self, split: str, index_N: np.ndarray) -> Batch:
        """The sequences of these numbers, counted over all batches of a split; for tasks where `once` gives any."""
        raise NotImplementedError

    def once(self, split: str, draws: int) -> np.ndarray | None:
        """The numbers of those of the first `draws` sequences that did not come before; None: no two are the same."""
        return None

    def sample_queries(self, context: Tensor, count: int, split: str = "train", k: int = 0) -> Tensor:
        """The tokens of `context` (n) or (n,token_dim), each followed by queries of batch k of `split`: those that are
        blind to each other in one row (1,n+count), others in one each (count,n+T), with 16 tokens at most."""
        if self.independent_queries:
            rows = -(-count // (self.tokens - self.n_context))
            queries = self.batch(split, k, rows).tokens[:, self.n_context :].flatten(0, 1)[:count]
            return torch.cat([context, queries.to(context)])[None]
        queries_KT = self.batch(split, k, count).unfilled()[:, self.n_context :][:, :16].to(context)
        return torch.cat([context.expand(count, -1), queries_KT], 1)

    def token_losses(self, output: Tensor, batch: Batch) -> Tensor:
        """The loss of each prediction (B,Q), 0 where nothing is predicted; here nats, in at least float32."""
        logits = output[:, -batch.targets.shape[1] :].flatten(0, 1)
        logits = logits.to(torch.promote_types(logits.dtype, torch.float32))
        losses = F.cross_entropy(logits, batch.targets.flatten(), ignore_index=IGNORE, reduction="none")
        return losses.view(batch.targets.shape)

    def scored(self, batch: Batch) -> Tensor:
        """Which predictions count (B,Q)."""
        return batch.targets != IGNORE

    def loss(self, output: Tensor, batch: Batch) -> Tensor:
        """The training loss: the sum of the errors over `batch.scored`, so that the mean over parts is the mean over
        the predictions of the global batch; no shape depends on values, which would make the host wait for a GPU."""
        total = batch.scored or self.scored(batch).sum().clamp(min=1)
        return self.token_losses(output, batch).sum() / total

    @abstractmethod
    def baselines(self) -> dict[str, float]:
        """Losses to read a learning curve by, such as that of a trivial prediction."""

    @abstractmethod
    def evaluate(self, predict: Predict, batch: Batch) -> dict[str, Tensor]:
        """Per-prediction values whose means over the test set are the metrics, the model's and its baselines'."""

    def rows(self, batch: Batch) -> Tensor:
        """The sequence that each value of the main metric is of, in the order of evaluate's, flattened."""
        return torch.arange(len(batch.targets), device=batch.targets.device).repeat_interleave(batch.targets.shape[1])

    def errors(self, predict: Predict, batch: Batch) -> dict[str, Tensor]:
        """The losses (B,Q) by metric: with the context, and, where there is another's, without one and with that."""
        n, query = batch.n_context, batch.tokens[:, batch.n_context :]
        inputs = {self.main_metric: (batch.tokens, n)}
        if batch.wrong_context is not None:
            inputs[f"{self.main_metric}_without_context"] = query, 0
            inputs[f"{self.main_metric}_wrong_context"] = torch.cat([batch.wrong_context, query], 1), n
        return {name: self.token_losses(predict(*given), batch) for name, given in inputs.items()}

    @classmethod
    def explain(cls, metric: str) -> str:
        """The label of a metric, or its bare name; NAME_PART is the metric NAME of one part of the data."""
        name, _, part = metric.rpartition("_")
        if metric in cls.labels or name not in cls.labels:
            return cls.labels.get(metric, metric)
        return f"{cls.labels[name]}, {part}"

    def encode(self, text: str) -> list[int]:
        """The ids of a text, the start of a document first; raises ValueError for a task without text."""
        raise ValueError(f"task.name={self.config.name} has no text: give a model that was trained on text or prompts")

    def encode_context(self, text: str) -> list[int]:
        """The ids of a separate context: the last ones of a text, as many as there are places."""
        return self.encode(text)[1:][-self.n_context :]

    def decode(self, ids: Iterable[int]) -> bytes:
        """The bytes that ids of a text stand for; starts of documents have none."""
        raise NotImplementedError
