"""Byte-level language modelling of Python source code: the standard library of the interpreter that runs.

Files are read as bytes, never imported. Token ids 0–255 are bytes, 256 marks the start of a document.
Axes: B sequences, T tokens.
"""

from __future__ import annotations

import functools
import hashlib
import math
import sysconfig
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from zoo.config import positive
from zoo.tasks.base import SPLITS, Batch, Predict, Task

START = 256
HELD_OUT = 0.05
SKIPPED = {"test", "tests", "idlelib", "site-packages", "dist-packages", "__pycache__", "pydoc_data"}


@dataclass(frozen=True)
class TextConfig:
    """Sequences of `tokens` bytes."""

    name: str = "text"
    tokens: int = 128


@functools.cache
def corpus(folder: str) -> dict[str, np.ndarray]:
    """Token ids (uint16) of each split of the .py files under `folder`; 5 % of the bytes for each held-out split.

    Documents are ordered by the hash of their path, so a split does not depend on the file system.
    Raises ValueError if there is not enough text.
    """
    root = Path(folder)
    paths = [p.relative_to(root) for p in root.rglob("*.py") if not SKIPPED & set(p.relative_to(root).parts)]
    paths.sort(key=lambda path: hashlib.sha256(path.as_posix().encode()).digest())
    documents = [np.frombuffer((root / path).read_bytes(), np.uint8).astype(np.uint16) for path in paths]
    if len(documents) < len(SPLITS):
        raise ValueError(f"task=text needs at least {len(SPLITS)} Python files, {folder} has {len(documents)}")
    share, splits = HELD_OUT * sum(map(len, documents)), {}
    for split in ("test", "validation", "train"):
        taken: list[np.ndarray] = []
        while documents and (split == "train" or sum(map(len, taken)) < share):
            taken += [np.array([START], np.uint16), documents.pop(0)]
        splits[split] = np.concatenate(taken)
    return splits


@functools.lru_cache(maxsize=4)
def _order(blocks: int, seed: int, split: str, epoch: int) -> np.ndarray:
    return np.random.default_rng([seed, SPLITS[split], epoch]).permutation(blocks)


class Text(Task):
    """Next-byte prediction; reported in bits per byte, beside the best fixed byte distribution (unigram)."""

    Config = TextConfig
    headline = "bits_per_byte"
    vocabulary = output_dim = 257

    def __init__(self, options: dict[str, Any], seed: int):
        super().__init__(options, seed)
        positive("task", tokens=self.config.tokens)
        self.tokens = self.config.tokens

    def batch(self, split: str, k: int, size: int) -> Batch:
        """Blocks of T+1 ids that overlap by one, in a new order every epoch; held-out splits always in the same."""
        ids = corpus(sysconfig.get_path("stdlib"))[split]
        blocks = (len(ids) - 1) // self.tokens
        per_epoch = blocks // size
        if not per_epoch:
            raise ValueError(f"a batch of {size} needs more than the {blocks} blocks of {self.tokens} bytes in {split}")
        seed = self.seed if split == "train" else 0
        epoch, first = k // per_epoch if split == "train" else 0, k % per_epoch * size
        starts = _order(blocks, seed, split, epoch)[first : first + size, None] * self.tokens
        window = torch.from_numpy(ids[starts + np.arange(self.tokens + 1)].astype(np.int64))
        return Batch(window[:, :-1], window[:, 1:], 0)

    def errors(self, output: Tensor, batch: Batch) -> Tensor:
        """Nats of each byte; starts of documents are given, not predicted."""
        targets = batch.targets.flatten()
        return F.cross_entropy(output.flatten(0, 1).float(), targets, reduction="none")[targets != START]

    @functools.cached_property
    def _unigram(self) -> Tensor:
        counts = np.bincount(corpus(sysconfig.get_path("stdlib"))["train"], minlength=self.vocabulary)[:START] + 1
        return torch.from_numpy(-np.log2(counts / counts.sum()))

    def references(self) -> dict[str, float]:
        return {"best fixed byte distribution": float((2**-self._unigram * self._unigram).sum()) * math.log(2)}

    def evaluate(self, predict: Predict, batch: Batch) -> dict[str, Tensor]:
        targets = batch.targets.flatten()
        return {
            "bits_per_byte": self.errors(predict(batch.tokens, 0), batch) / math.log(2),
            "bits_per_byte_unigram": self._unigram.to(targets.device)[targets[targets != START]],
        }
