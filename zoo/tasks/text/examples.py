"""Prompts with answers: where the context, the query and the target of each example lie in one flat array of ids.

Axes: N examples of a split.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Iterator, Mapping
from itertools import pairwise
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from zoo.tasks.base import SPLITS
from zoo.tasks.text import sources
from zoo.tasks.text.corpus import START, Part, fill

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


Row = tuple[bytes, bytes, bytes]
"""A context, a query and a target in UTF-8."""


def _row(row: Mapping[str, Any]) -> Row:
    for part in PARTS:
        if part not in row:
            raise ValueError(f"the key {part} is missing, there are: {', '.join(map(str, row)) or 'none'}")
        if not isinstance(row[part], str):
            raise ValueError(f"{part} must be a string, not {type(row[part]).__name__}")
    if not row["target"]:
        raise ValueError("the target is empty: there is nothing to predict")
    context, query, target = (row[part].encode() for part in PARTS)
    return context, query, target


def parts(files: Iterable[Path]) -> Iterator[Part]:
    """The rows of tables as a file of a corpus, the same in whatever order and under whatever names they come; raises
    ValueError with the file and the place of one that is none."""
    found = []
    for path in files:
        with sources.named(f"task.files: {path}"):
            for place, values in sources.rows(path, PARTS):
                with sources.at(place):
                    found.append(_row(values))
    for row in sorted(found):
        yield "rows", json.dumps([part.decode() for part in row]).encode() + b"\n"


def load(folder: Path) -> Iterator[Row]:
    """The rows of such a corpus."""
    with (folder / "rows.jsonl").open("rb") as file:
        for line in file:
            context, query, target = (part.encode() for part in json.loads(line))
            yield context, query, target


def from_rows(rows: Iterable[Row], context: int) -> dict[str, Examples]:
    """Rows by split: in the order of their contexts' hashes, they fill test, then validation, with 5 % of all bytes and
    two contexts each at least; the rest trains. A context with more than 5 % trains too, if others are left.

    Rows whose last `context` bytes agree stay together, so that no context of the test was trained on; a row without
    one goes with its equals. Raises ValueError for too few contexts."""
    documents: dict[bytes, list[Row]] = {}
    for row in rows:
        key = row[0][-context:] or b"\0".join(row)
        documents.setdefault(hashlib.sha256(key).digest(), []).append(row)
    if len(documents) < ENOUGH * len(SPLITS):
        raise ValueError(
            f"task.files: {len(documents)} different contexts are too few, each of {', '.join(SPLITS)} needs {ENOUGH}"
        )
    ordered = [documents[key] for key in sorted(documents)]
    sizes = np.array([sum(len(part) for row in document for part in row) for document in ordered])
    names = ("test", "validation", "train")
    chosen = fill(sizes, names[:2], ENOUGH)
    return {
        name: _flat([ordered[place] for place in np.flatnonzero(chosen == turn)]) for turn, name in enumerate(names)
    }


def _flat(documents: list[list[Row]]) -> Examples:
    rows = [row for document in documents for row in document]
    edges = np.cumsum([[1, *map(len, row)] for row in rows]).reshape(-1, 4)  # 1: the START before a context
    ids = np.frombuffer(b"".join(b"\0" + b"".join(row) for row in rows), np.uint8).astype(np.uint16)
    ids[edges[:, 0] - 1] = START
    return Examples(ids, edges, np.repeat(np.arange(len(documents)), [len(document) for document in documents]))
