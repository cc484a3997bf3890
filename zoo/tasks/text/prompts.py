"""Continuing a text given a separate context: an earlier passage of the same document, or what a file says.

    token      0 ... C-1             |   C    C+1 ...                        T-1
    carries    filling, the context  | START  the query, the target, filling       scored: the target and its end

A context enters by attention, or through weights alone, as the family says. Tokens are bytes. Filling holds the place
of what is missing and changes nothing. Documents go on after the target, which then has no end, and its last byte is
not read.
Axes: B sequences, C context tokens, Q tokens of the second part, T = C + Q.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor

from zoo.config import require_positive
from zoo.core.layers import FILLING
from zoo.tasks.base import SPLITS, Batch, Predict, nats
from zoo.tasks.text import corpus, examples, sources
from zoo.tasks.text.corpus import START
from zoo.tasks.text.domains import DOMAINS
from zoo.tasks.text.examples import ENOUGH, Examples, from_documents, from_rows
from zoo.tasks.text.finite import Pick
from zoo.tasks.text.language import domain_folders
from zoo.tasks.text.ngram import Trigram
from zoo.tasks.text.prepared import CorpusTask

IGNORE = -100  # torch's ignore_index: what is not predicted
FILE = "files"


@dataclass(frozen=True)
class PromptsConfig:
    """Bytes of the context, the query and the target. They come from documents of `domains` (null: all four), or from
    `files`, tables such as JSON Lines with the columns context, query and target, all text, the target not empty."""

    name: str = "prompts"
    context: int = 64
    query: int = 16
    target: int = 32
    domains: tuple[Literal["code", "medicine", "law", "speeches"], ...] | None = None
    files: tuple[str, ...] | None = None


class Prompts(CorpusTask):
    """Prediction of the target's bytes in bits per byte, with the own context, none, and that of another document."""

    Config = PromptsConfig
    main_metric = "bits_per_byte"
    vocabulary = output_dim = START + 1

    def __init__(self, options: dict[str, Any], seed: int):
        super().__init__(options, seed)
        config = self.config
        require_positive("task", context=config.context, query=config.query, target=config.target)
        self.n_context = config.context
        self.filled = config.files is not None
        self.tokens = config.context + config.query + config.target + self.filled  # a place for the target's last byte
        if config.files is None:
            object.__setattr__(config, "domains", tuple(DOMAINS) if config.domains is None else config.domains)
            if not config.domains or len(set(config.domains)) < len(config.domains):
                raise ValueError(f"task.domains={list(config.domains)} must be different names out of {list(DOMAINS)}")
        elif config.domains is not None:
            raise ValueError(f"task.domains={list(config.domains)} and task.files={list(config.files)}: choose one")
        elif not config.files:
            raise ValueError("task.files=[] must name a file, null for domains")

    @property
    def _kinds(self) -> Sequence[str]:
        return self.config.domains or ["prompts"]

    def _prepared(self) -> dict[str, Path]:
        if not self.config.files:
            return domain_folders(self.config.domains)
        files = sources.find(self.config.files, ())
        key, label = sources.fingerprint(files), sources.listed(files)
        parts = functools.partial(examples.parts, files)
        return {label: corpus.prepare("prompts", key, parts, ["rows"], ".jsonl", label)}

    @functools.cached_property
    def sources(self) -> dict[str, dict[str, Examples]]:
        """The examples of each domain, or of all files together, by split."""
        config = self.config
        if config.files:
            return {FILE: from_rows(examples.load(self._folders[0]), config.context)}
        sources = {}
        for domain, folder in zip(config.domains, self._folders, strict=True):
            ids = corpus.read(folder)
            sources[domain] = {
                split: from_documents(ids[split], config.context, config.query, config.target) for split in SPLITS
            }
            for split, blocks in sources[domain].items():
                found = len(np.unique(blocks.document))
                if found < ENOUGH:
                    raise ValueError(
                        f"task.context={config.context}, task.query={config.query}, task.target={config.target}: "
                        f"{found} documents of the {split} split of {domain} are that long, {ENOUGH} are needed"
                    )
        return sources

    def prepare(self) -> None:
        _ = self.sources

    def sizes(self, split: str) -> list[int]:
        return [len(splits[split].document) for splits in self.sources.values()]

    def rows(self, split: str, picks: list[Pick]) -> Batch:
        """The wrong context is that of the next example from another document."""
        sources = [splits[split] for splits in self.sources.values()]
        tokens = np.full((len(picks), self.tokens + 1), FILLING, np.int64)
        tokens[:, self.n_context] = START
        targets = np.full((len(picks), self.tokens - self.n_context), IGNORE, np.int64)
        wrong = np.full((len(picks), self.n_context), FILLING, np.int64)
        for row, (source, order, place) in enumerate(picks):
            examples, other = sources[source], place
            while examples.document[order[other]] == examples.document[order[place]]:
                other = (other + 1) % len(order)
            context, query, target = examples.parts(order[place])
            query, whole, target = query[-self.config.query :], len(target), target[: self.config.target]
            self._fill(tokens[row], context)
            self._fill(wrong[row], examples.parts(order[other])[0])
            first, last = len(query), len(query) + len(target)
            second = tokens[row, self.n_context + 1 :]
            second[:first], second[first:last], targets[row, first:last] = query, target, target
            if self.filled and len(target) == whole:
                targets[row, last] = START
        own, scored, other_context = (torch.from_numpy(array) for array in (tokens[:, :-1], targets, wrong))
        group = None if self.config.files else torch.tensor([pick.source for pick in picks])
        return Batch(own, scored, self.n_context, other_context, group)

    def _fill(self, row: np.ndarray, context: np.ndarray) -> None:
        """Writes the last bytes of a context before place C; what is free on the left stays as it is."""
        last = context[-self.n_context :]
        row[self.n_context - len(last) : self.n_context] = last

    def encode(self, text: str) -> list[int]:
        """START and the bytes of a query, which follow the context."""
        return [START, *text.encode()]

    def decode(self, ids: Iterable[int]) -> bytes:
        """The bytes among `ids`."""
        return bytes(i for i in ids if i < START)

    def encode_context(self, text: str) -> list[int]:
        """The tokens of a context: its last bytes, at most C."""
        return list(text.encode()[-self.n_context :])

    def token_losses(self, output: Tensor, batch: Batch) -> Tensor:
        """Nats of each byte of the targets, and of their ends."""
        return nats(output[:, -batch.targets.shape[1] :], batch.targets)

    def scored(self, batch: Batch) -> Tensor:
        return batch.targets != IGNORE

    def baselines(self) -> dict[str, float]:
        shares = []
        for splits in self.sources.values():
            ids, edges, _ = splits["train"]
            marks = np.zeros(len(ids) + 1, np.int64)
            np.add.at(marks, edges[:, 2], 1)
            np.add.at(marks, np.minimum(edges[:, 3], edges[:, 2] + self.config.target), -1)
            counts = np.bincount(ids[marks.cumsum()[:-1] > 0], minlength=START + 1)
            if self.filled:
                counts[START] = (edges[:, 3] - edges[:, 2] <= self.config.target).sum()
            shares.append(counts / counts.sum())
        p = np.mean(shares, 0)
        return {"best fixed byte distribution": float(-(p[p > 0] * np.log(p[p > 0])).sum())}

    @functools.cached_property
    def trigram(self) -> Trigram:
        """Counted over the training splits of all sources."""
        return Trigram(splits["train"].ids for splits in self.sources.values())

    def evaluate(self, predict: Predict, batch: Batch) -> dict[str, Tensor]:
        """Bits of each byte of the targets, of the model with three contexts and of the trigram; also by domain."""
        assert batch.wrong_context is not None
        n, scored = batch.n_context, (batch.targets >= 0) & (batch.targets < START)
        query = batch.tokens[:, n:]
        wrong = torch.cat([batch.wrong_context, query], 1)
        read, asked = query.where(query != FILLING, START), batch.targets.clamp(0, START - 1)
        counted = self.trigram.bits(read.cpu().numpy(), asked.cpu().numpy())
        bits = {
            "bits_per_byte": self.token_losses(predict(batch.tokens, n), batch) / math.log(2),
            "bits_per_byte_without_context": self.token_losses(predict(query, 0), batch) / math.log(2),
            "bits_per_byte_wrong_context": self.token_losses(predict(wrong, n), batch) / math.log(2),
            "bits_per_byte_trigram": torch.from_numpy(counted).float().to(scored.device),
        }
        bits = {name: values[scored] for name, values in bits.items()}
        if batch.group is None:
            return bits
        group = batch.group[:, None].expand_as(scored)[scored]
        parts = {
            f"{name}_{domain}": values[group == index]
            for index, domain in enumerate(self.sources)
            for name, values in bits.items()
        }
        return bits | parts
