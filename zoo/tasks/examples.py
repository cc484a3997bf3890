"""Prompts with answers: where the context, the query and the target of each example lie in one flat array of ids.

Axes: N examples of a split.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Iterator
from itertools import pairwise
from typing import NamedTuple

import numpy as np

from zoo.tasks.base import SPLITS
from zoo.tasks.corpus import HELD_OUT, START

PARTS = ("context", "query", "target")
ENOUGH = 2  # documents of a split: the context of another one is the control of every test


class Examples(NamedTuple):
    """One split. ids: flat token ids; edges (N,4): the context lies from edge 0 to 1, the query to 2, the target to 3;
    document (N): examples of one document share its context, or stand in it; those of two never do."""

    ids: np.ndarray
    edges: np.ndarray
    document: np.ndarray

    def parts(self, index: int) -> list[np.ndarray]:
        """The ids of the context, the query and the target of one example."""
        return [self.ids[first:last] for first, last in pairwise(self.edges[index])]


def from_documents(ids: np.ndarray, context: int, query: int, target: int) -> Examples:
    """Documents cut into blocks, one after the other, each a context and the query and target that follow it.

    ids: documents that begin with START each; what is left at their ends, all of a short one, is not used."""
    lengths = (context, query, target)
    size, first = sum(lengths), np.flatnonzero(ids == START) + 1
    blocks = np.diff(np.append(first - 1, len(ids))) - 1
    blocks //= size
    document = np.repeat(np.arange(len(first)), blocks)
    within = np.arange(len(document)) - np.repeat(blocks.cumsum() - blocks, blocks)
    edges = (first[document] + within * size)[:, None] + np.cumsum((0, *lengths))
    return Examples(ids, edges, document)


def read(path: str) -> Iterator[tuple[bytes, bytes, bytes]]:
    """Context, query and target (UTF-8) of each line of a JSON Lines file; raises ValueError with the line's number."""
    try:
        with open(path, "rb") as file:
            for number, line in enumerate(file, 1):
                if line.strip():
                    try:
                        yield _row(line)
                    except (ValueError, RecursionError) as error:
                        raise ValueError(f"task.files: {path}, line {number}: {error}") from error
    except OSError as error:
        raise ValueError(f"task.files: cannot read {path}: {error.strerror}") from error


def _row(line: bytes) -> tuple[bytes, bytes, bytes]:
    try:
        row = json.loads(line)
    except (ValueError, RecursionError) as error:
        raise ValueError(f"no JSON: {error}") from error
    if not isinstance(row, dict):
        raise ValueError(f"a row is an object with the keys {', '.join(PARTS)}, not {type(row).__name__}")
    for part in PARTS:
        if part not in row:
            raise ValueError(f"the key {part} is missing, there are: {', '.join(map(str, row)) or 'none'}")
        if not isinstance(row[part], str):
            raise ValueError(f"{part} must be a string, not {type(row[part]).__name__}")
    if not row["target"]:
        raise ValueError("the target is empty: there is nothing to predict")
    context, query, target = (row[part].encode() for part in PARTS)
    return context, query, target


def from_rows(rows: Iterable[tuple[bytes, bytes, bytes]], context: int) -> dict[str, Examples]:
    """Rows by split: in the order of their contexts' hashes, they fill test, then validation, with 5 % of all bytes and
    two contexts each at least; the rest trains.

    Rows whose last `context` bytes agree stay together, so that no context of the test was trained on; a row without
    one stands alone. Raises ValueError for too few contexts."""
    documents: dict[bytes, list[tuple[bytes, bytes, bytes]]] = {}
    for row in rows:
        key = row[0][-context:] or b"\0".join(row)
        documents.setdefault(hashlib.sha256(key).digest(), []).append(row)
    if len(documents) < ENOUGH * len(SPLITS):
        raise ValueError(
            f"task.files: {len(documents)} different contexts are too few, each of {', '.join(SPLITS)} needs {ENOUGH}"
        )
    ordered = [documents[key] for key in sorted(documents, reverse=True)]
    share = HELD_OUT * sum(len(part) for document in ordered for row in document for part in row)
    splits = {}
    for split, kept in (("test", 2 * ENOUGH), ("validation", ENOUGH), ("train", 0)):
        taken: list[list[tuple[bytes, bytes, bytes]]] = []
        size = 0
        while len(ordered) > kept and (split == "train" or size < share or len(taken) < ENOUGH):
            taken.append(ordered.pop())
            size += sum(len(part) for row in taken[-1] for part in row)
        splits[split] = _flat(taken)
    return splits


def _flat(documents: list[list[tuple[bytes, bytes, bytes]]]) -> Examples:
    rows = [row for document in documents for row in document]
    edges = np.cumsum([[1, *map(len, row)] for row in rows]).reshape(-1, 4)  # 1: the START before a context
    ids = np.frombuffer(b"".join(b"\0" + b"".join(row) for row in rows), np.uint8).astype(np.uint16)
    ids[edges[:, 0] - 1] = START
    return Examples(ids, edges, np.repeat(np.arange(len(documents)), [len(document) for document in documents]))
