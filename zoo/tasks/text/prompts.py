"""Continuing a text given a separate context: an earlier passage of the same document, or what a file says.

    token      0 ... C-1             |   C    C+1 ...                        T-1
    carries    filling, the context  | START  the query, the target, filling       scored: the target and its end

A context enters by attention, or through weights alone, as the family says. Tokens are bytes. Filling holds the place
of what is missing and changes nothing. Documents go on after the target, which then has no end, and its last byte is
not read.
Axes: C context tokens, T tokens.
"""

from __future__ import annotations

import functools
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, Self

import numpy as np
import torch

from zoo.config import require_positive
from zoo.core.layers import FILLING
from zoo.tasks.base import SPLITS, Batch, TaskConfig
from zoo.tasks.text import corpus, examples, sources
from zoo.tasks.text.base import IGNORE, Pick, TextTask, one_source
from zoo.tasks.text.corpus import START
from zoo.tasks.text.examples import ENOUGH, Examples


@dataclass(frozen=True)
class PromptsConfig(TaskConfig):
    """Bytes of the context, the query and the target. They come from documents of `domains` (null: all four), or from
    `files`, tables such as JSON Lines with the columns context, query and target, all text, the target not empty."""

    name: str = "prompts"
    context: int = 64
    query: int = 16
    target: int = 32
    domains: tuple[Literal["code", "medicine", "law", "speeches"], ...] | None = None
    files: tuple[str, ...] | None = None

    def resolve(self) -> Self:
        require_positive("task", context=self.context, query=self.query, target=self.target)
        return one_source(self, "domains", "files")


class Prompts(TextTask):
    """Prediction of the target's bytes in bits per byte, with the own context, none, and that of another document."""

    Config = PromptsConfig
    kind = "prompts"

    def __init__(self, options: dict[str, Any], seed: int):
        super().__init__(options, seed)
        config = self.config
        self.n_context = config.context
        self.filled = config.files is not None
        self.tokens = config.context + config.query + config.target + self.filled  # a place for the target's last byte

    def prepare_source(self) -> dict[str, Path]:
        files = sources.find(self.config.files, ())
        key, label = sources.fingerprint(files), sources.listed(files)
        return {label: corpus.prepare("prompts", key, examples.parts(files), ["rows.jsonl"], label)}

    @functools.cached_property
    def examples(self) -> list[dict[str, Examples]]:
        """The examples of each domain, or of all files together, by split."""
        config = self.config
        if not self.domains:
            return [examples.from_rows(examples.load(self.folders[0]), config.context)]
        made = []
        for domain, folder in zip(self.domains, self.folders, strict=True):
            ids = corpus.read(folder)
            sizes = config.context, config.query, config.target
            made.append({split: examples.from_documents(ids[split], *sizes) for split in SPLITS})
            for split, blocks in made[-1].items():
                if (found := len(np.unique(blocks.document))) < ENOUGH:
                    raise ValueError(
                        f"task.context={config.context}, task.query={config.query}, task.target={config.target}: "
                        f"{found} documents of the {split} split of {domain} are that long, {ENOUGH} are needed"
                    )
        return made

    def sizes(self, split: str) -> list[int]:
        return [len(splits[split].document) for splits in self.examples]

    def rows(self, split: str, picks: list[Pick]) -> Batch:
        """The wrong context is that of the next example from another document."""
        C = self.n_context
        tokens = np.full((len(picks), self.tokens + 1), FILLING, np.int64)
        tokens[:, C] = START
        targets = np.full((len(picks), self.tokens - C), IGNORE, np.int64)
        wrong = np.full((len(picks), C), FILLING, np.int64)
        for row, (source, order, place) in enumerate(picks):
            found, other = self.examples[source][split], place
            while found.document[order[other]] == found.document[order[place]]:
                other = (other + 1) % len(order)
            context, query, target = found.parts(order[place])
            query, whole, target = query[-self.config.query :], len(target), target[: self.config.target]
            for part, where in ((context, tokens), (found.parts(order[other])[0], wrong)):
                last = part[-C:]
                where[row, C - len(last) : C] = last
            first, end = len(query), len(query) + len(target)
            tokens[row, C + 1 : C + 1 + end] = np.concatenate([query, target])
            targets[row, first:end] = target
            if self.filled and len(target) == whole:
                targets[row, end] = START
        own, scored, other_context = map(torch.from_numpy, (tokens[:, :-1], targets, wrong))
        return Batch(own, scored, C, other_context)

    def encode_context(self, text: str) -> list[int]:
        """The tokens of a context: its last bytes, at most C."""
        return list(text.encode()[-self.n_context :])

    def train_bytes(self) -> Iterable[np.ndarray]:
        return (splits["train"].ids for splits in self.examples)

    def train_targets(self) -> Iterable[np.ndarray]:
        for splits in self.examples:
            ids, edges, _ = splits["train"]
            first, end = edges[:, 2], np.minimum(edges[:, 3], edges[:, 2] + self.config.target)
            whole = int((end == edges[:, 3]).sum()) if self.filled else 0
            parts = [ids[a:b] for a, b in zip(first, end, strict=True)]
            yield np.concatenate([*parts, np.full(whole, START)])
