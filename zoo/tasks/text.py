"""Byte-level language modelling of real text, an equal share from each domain.

Axes: B sequences, T tokens.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from zoo.config import positive
from zoo.tasks import corpus
from zoo.tasks.base import SPLITS, Batch, Predict, Task
from zoo.tasks.corpus import START
from zoo.tasks.domains import DOMAINS, origin
from zoo.tasks.ngram import Trigram


@dataclass(frozen=True)
class TextConfig:
    """Sequences of `tokens` bytes out of one of `domains` each."""

    name: str = "text"
    tokens: int = 128
    domains: tuple[Literal["code", "medicine", "law", "speeches"], ...] = ("code", "medicine", "law", "speeches")


def domain_ids(domains: Sequence[str]) -> list[dict[str, np.ndarray]]:
    """Byte ids of each domain by split; raises ValueError where a domain's package is missing."""
    return [corpus.prepare(domain, origin(domain), DOMAINS[domain]) for domain in domains]


@functools.lru_cache(maxsize=16)
def _order(blocks: int, seed: int, split: str, epoch: int) -> np.ndarray:
    return np.random.default_rng([seed, SPLITS[split], epoch]).permutation(blocks)


class Text(Task):
    """Next-byte prediction in bits per byte, on average and by domain, beside one trigram model for all domains."""

    Config = TextConfig
    headline = "bits_per_byte"
    vocabulary = output_dim = START + 1

    def __init__(self, options: dict[str, Any], seed: int):
        super().__init__(options, seed)
        positive("task", tokens=self.config.tokens)
        self.tokens, self.domains = self.config.tokens, self.config.domains
        if not self.domains or len(set(self.domains)) < len(self.domains):
            raise ValueError(f"task.domains={list(self.domains)} must be different names out of {list(DOMAINS)}")

    @functools.cached_property
    def ids(self) -> list[dict[str, np.ndarray]]:
        """Token ids of each domain by split."""
        ids = domain_ids(self.domains)
        shortest = min(len(split) for splits in ids for split in splits.values())
        if self.tokens >= shortest:
            raise ValueError(f"task.tokens={self.tokens} must be below {shortest}, the bytes of the shortest split")
        return ids

    def prepare(self) -> None:
        _ = self.ids

    def encode(self, text: str) -> list[int]:
        """The ids of a document, its start first."""
        return [START, *text.encode()]

    def decode(self, ids: Iterable[int]) -> bytes:
        """The bytes that ids stand for; starts of documents have none."""
        return bytes(token for token in ids if token != START)

    def batch(self, split: str, k: int, size: int) -> Batch:
        """Sequence j of a split comes from domain j mod D. A domain gives blocks of T+1 ids that overlap by one, all of
        them in a new order every epoch; held-out ones always in the same."""
        place, rows = k * size + np.arange(size), np.empty((size, self.tokens + 1), np.int64)
        turn, group = np.divmod(place, len(self.domains))
        for row in range(size):
            ids = self.ids[group[row]][split]
            blocks = (len(ids) - 1) // self.tokens
            epoch, index = divmod(int(turn[row]), blocks)
            order = _order(blocks, self.seed, split, epoch) if split == "train" else _order(blocks, 0, split, 0)
            start = order[index] * self.tokens
            rows[row] = ids[start : start + self.tokens + 1]
        window = torch.from_numpy(rows)
        return Batch(window[:, :-1], window[:, 1:], 0, group=torch.from_numpy(group))

    def errors(self, output: Tensor, batch: Batch) -> Tensor:
        """Nats of each byte; starts of documents are given, not predicted."""
        targets = batch.targets.flatten()
        return F.cross_entropy(output.flatten(0, 1).float(), targets, reduction="none")[targets != START]

    def references(self) -> dict[str, float]:
        counts = np.stack([np.bincount(splits["train"], minlength=START)[:START] for splits in self.ids])
        p = (counts / counts.sum(1, keepdims=True)).mean(0)
        return {"best fixed byte distribution": float(-(p[p > 0] * np.log(p[p > 0])).sum())}

    @functools.cached_property
    def trigram(self) -> Trigram:
        """Counted over the training splits of all domains."""
        return Trigram(splits["train"] for splits in self.ids)

    def evaluate(self, predict: Predict, batch: Batch) -> dict[str, Tensor]:
        """Bits of each byte, of the model and of the trigram, for all domains and for each one."""
        assert batch.group is not None
        scored = batch.targets != START
        tokens, targets = batch.tokens.cpu().numpy(), batch.targets.clamp(max=START - 1).cpu().numpy()
        counted = torch.from_numpy(self.trigram.bits(tokens, targets)).float().to(scored.device)
        bits = {
            "bits_per_byte": self.errors(predict(batch.tokens, 0), batch) / math.log(2),
            "bits_per_byte_trigram": counted[scored],
        }
        group = batch.group[:, None].expand_as(scored)[scored]
        parts = {
            f"{name}_{domain}": values[group == index]
            for index, domain in enumerate(self.domains)
            for name, values in bits.items()
        }
        return bits | parts
