"""Continuing a text given a separate context: an earlier passage of the same document, or what a file says.

    token      0 ... C-1             |   C    C+1 ...                        T-1
    carries    filling, the context  | START  the query, the target, filling       scored: the target and its end

A context enters by attention, or through weights alone, as the family says. Filling holds the place of what is missing
and changes nothing. Documents go on after the target, which then has no end, and its last token is not read.
Axes: C context tokens, T tokens, N examples of a split.
"""

from __future__ import annotations

import functools
import hashlib
import json
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any, NamedTuple, Self

import numpy as np

from zoo.config import show
from zoo.core.layers import FILLING
from zoo.tasks.base import IGNORE, SPLITS
from zoo.tasks.text import corpus, sources
from zoo.tasks.text.base import TextTask
from zoo.tasks.text.corpus import START, Part, fill
from zoo.tasks.text.language import SourceConfig
from zoo.tasks.text.tokenizer import Tokenizer, encoded

PARTS = ("context", "query", "target")
ENOUGH = 2  # documents of a split: the context of another one is the control of every test


@dataclass(frozen=True)
class PromptsConfig(SourceConfig):
    """Tokens of the context, the query and the target. They come from documents of `domains` (null: all four), or from
    `files`, tables such as JSON Lines with the columns context, query and target, all text, the target not empty."""

    name: str = "prompts"
    context: int = 64
    query: int = 16
    target: int = 32

    def resolve(self) -> Self:
        if self.files and self.tokenizer == "bpe":
            raise ValueError("task.tokenizer=bpe is learned from task.domains: take bytes, or a file, with task.files")
        return super().resolve()


class Prompts(TextTask):
    """Prediction of the target in bits per byte, with the own context, none, and that of another document."""

    Config = PromptsConfig

    def __init__(self, options: dict[str, Any], seed: int):
        super().__init__(options, seed)
        config = self.config
        self.sources = config.domains or ("prompts",)
        self.n_context = config.context
        self.filled = config.files is not None
        self.tokens = config.context + config.query + config.target + self.filled  # a place for the target's last token

    def prepare_source(self) -> dict[str, Path]:
        files, label = sources.find(self.config.files, ()), f"task.files: {', '.join(self.config.files)}"
        return {label: corpus.prepare("prompts", sources.fingerprint(files), read_rows(files), ["rows.jsonl"], label)}

    @functools.cached_property
    def examples(self) -> list[dict[str, Examples]]:
        """The examples of each domain, or of all files together, by split."""
        config = self.config
        if not config.domains:
            with Path(*self.folders.values(), "rows.jsonl").open("rb") as file:
                return [from_rows(map(json.loads, file), config.context, self.tokenizer)]
        made = []
        for domain, folder in zip(self.sources, self.folders.values(), strict=True):
            ids = encoded(folder, self.tokenizer)
            sizes = config.context, config.query, config.target
            made.append({split: from_documents(ids[split], *sizes) for split in SPLITS})
            for split, blocks in made[-1].items():
                if (found := len(np.unique(blocks.document))) < ENOUGH:
                    needed = f"{ENOUGH} documents of {sum(sizes)} tokens, context, query and target"
                    raise ValueError(f"the {split} split of {domain} has {found}, but needs {needed}")
        return made

    def sizes(self, split: str) -> list[int]:
        return [len(splits[split].document) for splits in self.examples]

    def sequence(self, split: str, source: int, order: np.ndarray, place: int) -> tuple[np.ndarray, ...]:
        """The wrong context is that of the next example from another document."""
        found, other = self.examples[source][split], place
        while found.document[order[other]] == found.document[order[place]]:
            other = (other + 1) % len(order)
        context, query, target = self._parts(found, order[place])
        of_other, _, _ = self._parts(found, order[other])
        C = self.n_context
        tokens, wrong = np.full(self.tokens + 1, FILLING), np.full(C, FILLING)
        read = np.concatenate([context, [START], query, target[target != START]])
        start = C - len(context)
        tokens[start : start + len(read)] = read
        wrong[C - len(of_other) :] = of_other
        targets = np.full(self.tokens - C, IGNORE)
        targets[len(query) :][: len(target)] = target
        return tokens[:-1], targets, wrong

    def _parts(self, found: Examples, index: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """The context, query and target of an example, cut to size; in files START ends a target that was not cut."""
        context, query, target = (found.ids[first:last] for first, last in pairwise(found.edges[index]))
        if self.filled and len(target) <= self.config.target:
            target = np.append(target, START)
        else:
            target = target[: self.config.target]
        return context[-self.n_context :], query[-self.config.query :], target

    def train_bytes(self) -> Iterable[np.ndarray]:
        return (self.tokenizer.respelled(splits["train"].ids) for splits in self.examples)

    def train_targets(self) -> Iterable[np.ndarray]:
        for splits in self.examples:
            train = splits["train"]
            yield np.concatenate([self._parts(train, index)[2] for index in range(len(train.edges))])


class Examples(NamedTuple):
    """One split. ids: flat token ids; edges (N,4): the context lies from edge 0 to 1, the query to 2, the target to 3;
    document (N): examples of one document share its context, or stand in it; those of two never do."""

    ids: np.ndarray
    edges: np.ndarray
    document: np.ndarray


def from_documents(ids: np.ndarray, context: int, query: int, target: int) -> Examples:
    """Documents cut into blocks, one after the other, each a context and the query and target that follow it.

    ids: documents that begin with START each; what is left at their ends, all of a short one, is not used."""
    size, first = context + query + target, np.flatnonzero(ids == START) + 1
    blocks = (np.diff(np.append(first, len(ids) + 1)) - 1) // size
    document = np.repeat(np.arange(len(first)), blocks)
    within = np.arange(len(document)) - np.repeat(blocks.cumsum() - blocks, blocks)
    edges = (first[document] + within * size)[:, None] + np.cumsum((0, context, query, target))
    return Examples(ids, edges, document)


def read_rows(files: Iterable[Path]) -> Iterator[Part]:
    """The rows of tables as a file of a corpus, the same in whatever order and under whatever names they come; raises
    ValueError with the file and the place of one that is none."""
    found = []
    for path in files:
        with sources.named(f"task.files: {path}"):
            for place, row in sources.rows(path, PARTS):
                with sources.named(place):
                    parts: list[Any] = [row.get(part) for part in PARTS]
                    if not all(isinstance(part, str) for part in parts) or not row["target"]:
                        raise ValueError(f"{', '.join(PARTS)} must be strings, the target not empty, in {show(row)}")
                    "".join(parts).encode()  # not all strings of JSON are text
                found.append(parts)
    for parts in sorted(found):
        yield "rows", json.dumps(parts).encode() + b"\n"


def from_rows(rows: Iterable[list[str]], context: int, tokenizer: Tokenizer) -> dict[str, Examples]:
    """Rows of a context, a query and a target by split: in the order of their contexts' hashes, they fill test, then
    validation, with 5 % of all tokens and two contexts each at least; the rest trains. A context with more than 5 %
    trains too, if others are left. Raises ValueError for too few contexts.

    Rows whose last `context` tokens agree stay together, so that no context of the test was trained on; a row without
    one goes with its equals."""
    documents: dict[bytes, list[list[np.ndarray]]] = {}
    for texts in rows:
        row = [np.concatenate([*tokenizer.encode([text.encode()])])[1:] for text in texts]
        key = tokenizer.decode(row[0][-context:]) or "\0".join(texts).encode()
        documents.setdefault(hashlib.sha256(key).digest(), []).append(row)
    if len(documents) < ENOUGH * len(SPLITS):
        raise ValueError(f"task.files: {len(documents)} different contexts are too few, each split needs {ENOUGH}")
    ordered = [documents[key] for key in sorted(documents)]
    sizes = np.array([sum(len(part) for row in document for part in row) for document in ordered])
    names = ("test", "validation", "train")
    chosen = fill(sizes, names[:2], ENOUGH)
    return {
        name: _flat([ordered[place] for place in np.flatnonzero(chosen == turn)]) for turn, name in enumerate(names)
    }


def _flat(documents: list[list[list[np.ndarray]]]) -> Examples:
    rows = [row for document in documents for row in document]
    edges = np.cumsum([[1, *map(len, row)] for row in rows]).reshape(-1, 4)  # 1: the START before a context
    start = np.array([START], rows[0][0].dtype)
    ids = np.concatenate([part for row in rows for part in (start, *row)])
    return Examples(ids, edges, np.repeat(np.arange(len(documents)), [len(document) for document in documents]))
