"""Recall: keys are written with values, some of them twice; each key that is asked has the value written last.

    token       0    1     2    3   ...  C-1   |   C   C+1  ...
    carries    key  value key  value ... value |  key  key  ...     Q queries, all at position C, blind to each other

Multi-query associative recall (Arora et al. 2023, arXiv 2312.04927) with overwriting (Schlag et al. 2021, arXiv
2102.11174): a memory that only adds up keeps the old value beside the new one. In a haystack other ids, which say
nothing, stand between the pairs, each of which begins at an even place.
Axes: B sequences, N keys, W writes, C context tokens, H = C/2 places of pairs, Q queries, K keys and as many values.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any, ClassVar, Self

import torch
from torch import Tensor

from zoo.config import require_positive
from zoo.tasks.base import Batch, Predict, Task, TaskConfig

HAY, MOST = 240, 1 << 20
"""Ids that say nothing, with 8 keys and 8 values as many as bytes, and the most tokens of a context."""


@dataclass(frozen=True)
class RecallConfig(TaskConfig):
    """Of `vocabulary` ids the first half are keys, the others values; `pairs` different keys are written, and the share
    `overwritten` of them once more, with another value. haystack: the least and the most tokens of a context, drawn
    anew for each batch; null: as many as are written."""

    name: str = "recall"
    vocabulary: int = 16
    pairs: int = 4
    overwritten: float = 0.5
    queries: int = 8
    haystack: tuple[int, int] | None = None

    def resolve(self) -> Self:
        if not 0 <= self.overwritten <= 1:
            raise ValueError(f"task.overwritten={self.overwritten} is a share of keys: 0 to 1")
        if self.vocabulary % 2 or self.vocabulary < 4:
            raise ValueError(f"task.vocabulary={self.vocabulary} must be even, and 4 at least: keys and as many values")
        if self.pairs > self.vocabulary // 2:
            raise ValueError(
                f"task.pairs={self.pairs} exceeds the {self.vocabulary // 2} keys of task.vocabulary={self.vocabulary}"
            )
        require_positive("task", pairs=self.pairs, queries=self.queries)
        if self.haystack and not 2 * self.writes <= self.haystack[0] <= self.haystack[1] <= MOST:
            named = f"task.haystack={list(self.haystack)} must be the least and the most tokens of a context"
            raise ValueError(f"{named}, from the {2 * self.writes} that are written to {MOST}")
        return self

    @property
    def writes(self) -> int:
        return self.pairs + round(self.overwritten * self.pairs)


class Recall(Task):
    """The newest value of each key that is asked, in nats; the metric is the share of wrong answers."""

    Config = RecallConfig
    main_metric = "error"
    labels: ClassVar = {
        "error": "share of wrong answers",
        "error_without_context": "  with its context removed",
        "error_wrong_context": "  with other values for the same keys",
        "error_first": "  saying the value written first",
        "error_last": "  saying the value written last",
        "error_chance": "  guessing one of the values",
    }
    independent_queries = True

    def __init__(self, options: dict[str, Any], seed: int):
        super().__init__(options, seed)
        config = self.config
        if config.haystack:
            self.vocabulary = self.output_dim = config.vocabulary + HAY
        self.n_context = max(config.haystack or (2 * config.writes,)) // 2 * 2
        self.tokens = self.n_context + config.queries

    def batch(self, split: str, k: int, size: int) -> Batch:
        config, generator = self.config, self.generator(split, k)
        K, N, W = config.vocabulary // 2, config.pairs, config.writes
        key_BN = torch.rand(size, K, generator=generator).argsort(-1)[:, :N]
        first_BN = torch.randint(K, (size, N), generator=generator)
        step_BN = torch.randint(1, K, (size, N), generator=generator)  # from the first value to the second, another one
        number_BW = torch.rand(size, W, generator=generator).argsort(-1) % N  # of the key; the first of them come twice
        again_BW = (number_BW[:, :, None] == number_BW[:, None, :]).tril(-1).any(-1)
        value_BW = (first_BN.gather(1, number_BW) + again_BW * step_BN.gather(1, number_BW)) % K
        newest_BN = (first_BN + (torch.arange(N) < W - N) * step_BN) % K
        asked_BQ = torch.randint(N, (size, config.queries), generator=generator)
        written_BW = key_BN.gather(1, number_BW)
        others_BW = (value_BW + torch.randint(1, K, (size, 1), generator=generator)) % K
        least, most = (tokens // 2 for tokens in config.haystack or (2 * W, 2 * W))
        H = int(torch.randint(least, most + 1, (), generator=generator))
        place_BW = torch.rand(size, H, generator=generator).argsort(-1)[:, :W].sort(-1).values
        hay_BH2 = 2 * K + torch.randint(HAY, (size, H, 2), generator=generator)
        index_BW2 = place_BW[..., None].expand(-1, -1, 2)
        context_BC, wrong_BC = (
            hay_BH2.scatter(1, index_BW2, torch.stack([written_BW, K + value_BW], -1)).flatten(1)
            for value_BW in (value_BW, others_BW)
        )
        tokens = torch.cat([context_BC, key_BN.gather(1, asked_BQ)], 1)
        return Batch(tokens, K + newest_BN.gather(1, asked_BQ), 2 * H, wrong_BC)

    def baselines(self) -> dict[str, float]:
        return {"guessing one of the values": math.log(self.config.vocabulary // 2)}

    def evaluate(self, predict: Predict, batch: Batch) -> dict[str, Tensor]:
        assert batch.wrong_context is not None
        n, query_BQ, targets_BQ = batch.n_context, batch.tokens[:, batch.n_context :], batch.targets
        written_BWQ = batch.tokens[:, :n:2, None] == query_BQ[:, None]
        value_BW, W = batch.tokens[:, 1:n:2], n // 2
        place_W1 = torch.arange(W, device=query_BQ.device)[:, None]
        first_BQ = torch.where(written_BWQ, place_W1, W).amin(1)
        last_BQ = torch.where(written_BWQ, place_W1, -1).amax(1)

        def answer(*given: Any) -> Tensor:
            return predict(*given)[:, -query_BQ.shape[1] :].argmax(-1)

        answers = {
            "error": answer(batch.tokens, n),
            "error_without_context": answer(query_BQ, 0),
            "error_wrong_context": answer(torch.cat([batch.wrong_context, query_BQ], 1), n),
            "error_first": value_BW.gather(1, first_BQ),
            "error_last": value_BW.gather(1, last_BQ),
        }
        errors = {name: (answer_BQ != targets_BQ).float() for name, answer_BQ in answers.items()}
        parts = {"error_overwritten": first_BQ < last_BQ, "error_once": first_BQ == last_BQ}
        chance = torch.full_like(errors["error"], 1 - 2 / self.config.vocabulary)
        return errors | {name: errors["error"][part] for name, part in parts.items()} | {"error_chance": chance}
