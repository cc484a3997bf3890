"""Text as token ids on disk: a folder with one flat file per split, and hashes that prove it whole.

Ids 0–255 are bytes, 256 marks the start of a document. The folders lie in $ZOO_CACHE, else ~/.cache/zoo. They are
written as the text comes, so no corpus has to fit into memory. Any number of processes may prepare the same folder at
once; what is damaged or cut short is made anew.
"""

from __future__ import annotations

import hashlib
import json
import os
import tempfile
from array import array
from collections.abc import Iterable, Iterator, Sequence
from contextlib import ExitStack, suppress
from itertools import pairwise
from pathlib import Path
from typing import IO, Any

import numpy as np

from zoo.files import home, to_json, write
from zoo.tasks.base import SPLITS

START = 256
HELD_OUT = 0.05
FORMAT = 2  # part of every key: raise it when the files below would come out differently
STEP = 1 << 24  # ids that are handled at once
PASSAGE = 256  # bytes, the shortest that a long document is cut into
FILES = tuple(f"{split}.bin" for split in SPLITS)

Document = tuple[str, bytes]
"""A name, unique in its source, and the text."""
Part = tuple[str, Any]
"""The name of a file without its ending, a split for text, and what comes next in it: an array or bytes."""


def cache() -> Path:
    """The folder that holds all others; it is made if need be."""
    folder = home(os.environ.get("ZOO_CACHE") or "~/.cache/zoo")
    folder.mkdir(parents=True, exist_ok=True)
    return folder


def byte_ids(text: bytes) -> np.ndarray:
    """A document as ids (uint16), its start first."""
    ids = np.full(len(text) + 1, START, np.uint16)
    ids[1:] = np.frombuffer(text, np.uint8)
    return ids


def texts(ids: np.ndarray) -> Iterator[bytes]:
    """The documents that byte ids hold; ids begin with a start."""
    steps = range(0, len(ids), STEP)
    starts = np.concatenate([first + np.flatnonzero(ids[first : first + STEP] == START) for first in steps])
    for first, last in pairwise([*starts.tolist(), len(ids)]):
        yield ids[first + 1 : last].astype(np.uint8).tobytes()


def split_documents(
    source: str, documents: Iterable[Document], held: Sequence[str] = ("test", "validation")
) -> Iterator[Part]:
    """Byte ids of each split, document by document.

    In the order of the hash of SOURCE/NAME, documents fill the `held` splits with 5 % of all ids each; the rest trains.
    Equal documents stay together. One above 5 % is cut into passages that are dealt like documents. Where there are no
    more different documents than `held`, the last 5 % of all bytes are the first of `held`, those before the next."""
    with tempfile.TemporaryFile(dir=cache()) as spool:
        keys, hashes, ends = array("Q"), array("Q"), array("q", [0])
        for name, text in documents:
            spool.write(text)
            keys.append(_number(f"{source}/{name}".encode()))
            hashes.append(_number(text))
            ends.append(ends[-1] + len(text))
        if not ends[-1]:
            return
        first, places = np.unique(np.array(hashes), return_index=True)[1], np.array(ends)
        if len(first) > len(held):
            runs = _shared_out(spool, np.array(keys), np.array(hashes), places, held)
        else:
            first.sort()
            runs = _cut(places[first], places[first + 1], held)
        for split, begin, end in runs:
            yield split, np.array([START], np.uint16)
            spool.seek(begin)
            for place in range(begin, end, STEP):
                yield split, np.frombuffer(spool.read(min(STEP, end - place)), np.uint8).astype(np.uint16)


Run = tuple[str, int, int]
"""A split, and where in the spooled text a document of it, or consecutive passages of one, begin and end."""


def _cut(begins: np.ndarray, ends: np.ndarray, held: Sequence[str]) -> Iterator[Run]:
    """Documents one after the other, the last of their bytes held out."""
    total = int((ends - begins).sum())
    part = int(total * HELD_OUT)
    cuts = [0, *(total - turn * part for turn in range(len(held), -1, -1))]
    for split, (first, last) in zip(["train", *reversed(held)], pairwise(cuts), strict=True):
        place = 0
        for begin, end in zip(begins.tolist(), ends.tolist(), strict=True):
            if max(first, place) < min(last, place + end - begin):
                yield split, begin + max(first - place, 0), min(end, begin + last - place)
            place += end - begin


def _shared_out(
    spool: IO[bytes], keys: np.ndarray, hashes: np.ndarray, ends: np.ndarray, held: Sequence[str]
) -> Iterator[Run]:
    """Documents and passages of long ones, equal ones as one, in the order of their keys."""
    share = HELD_OUT * (ends[-1] + len(keys))
    size = int(min(max(share / 5, PASSAGE), STEP))
    counts = np.where(np.diff(ends) > max(share, size), -(-np.diff(ends) // size), 1)
    document = np.repeat(np.arange(len(keys)), counts)
    within = np.arange(len(document)) - np.repeat(counts.cumsum() - counts, counts)
    begins = ends[document] + within * size
    ends = np.minimum(ends[document + 1], np.where(counts[document] > 1, begins + size, ends[-1]))
    keys, hashes = keys[document], hashes[document]
    for i in np.flatnonzero(counts[document] > 1):
        spool.seek(begins[i])
        hashes[i] = _number(spool.read(ends[i] - begins[i]))
        keys[i] = _number(f"{keys[i]}/{within[i]}".encode())
    _, group = np.unique(hashes, return_inverse=True)
    key_of = np.full(group.max() + 1, np.iinfo(np.uint64).max, np.uint64)
    np.minimum.at(key_of, group, keys)
    order = np.argsort(key_of)
    split_of = np.empty(len(order), np.int64)
    split_of[order] = fill(np.bincount(group, ends - begins + 1)[order], held)
    split = split_of[group]
    # passages that follow each other in one split are one text
    opens = np.append(True, (document[1:] != document[:-1]) | (split[1:] != split[:-1]))
    first, last = np.flatnonzero(opens), np.append(np.flatnonzero(opens[1:]), len(opens) - 1)
    for turn, name in enumerate([*held, "train"]):
        runs = np.flatnonzero(split[first] == turn)
        for run in runs[np.lexsort((keys[first[runs]], key_of[group[first[runs]]]))]:
            yield name, int(begins[first[run]]), int(ends[last[run]])


def fill(sizes: np.ndarray, held: Sequence[str], enough: int = 1) -> np.ndarray:
    """The split of each thing, of things in a random order: the number of one of `held`, or len(held) for training.

    Each held-out split gets 5 % of all, less than 10 %, and `enough` things at least; what is above 5 % by itself is
    held out only where nothing else is left, the smallest first."""
    share = HELD_OUT * sizes.sum()
    order = np.argsort(np.where(sizes > share, sizes, 0), kind="stable")
    splits, place, small = np.full(len(sizes), len(held)), 0, int((sizes <= share).sum())
    for turn in range(len(held)):
        count = taken = 0
        kept = enough * (len(held) - 1 - turn)  # small ones for those that follow
        while place < len(order) - enough * (len(held) - turn):
            size = sizes[order[place]]
            if count >= enough and (taken >= share or place >= small - kept):
                break
            splits[order[place]] = turn
            count, taken, place = count + 1, taken + size, place + 1
    return splits


def _number(text: bytes) -> int:
    return int.from_bytes(hashlib.sha256(text).digest()[:8])


def prepare(
    name: str, origin: str, parts: Iterable[Part], files: Sequence[str] = FILES, label: str | None = None
) -> Path:
    """The folder with `files`; made from `parts` at the first call with this `origin`, which must change whenever they
    would, and found again afterwards. Raises ValueError, with `label`, if it cannot be written or a file is empty."""
    label, key = label or name, f"{FORMAT} {name} {origin}"
    try:
        folder = cache() / f"{name}-{hashlib.sha256(key.encode()).hexdigest()[:16]}"
        if _whole(folder):
            return folder
        with tempfile.TemporaryDirectory(prefix=".new-", dir=folder.parent) as temporary:
            new = {Path(file).stem: Path(temporary, file) for file in files}
            with ExitStack() as stack:
                opened = {part: stack.enter_context(path.open("wb")) for part, path in new.items()}
                for part, content in parts:
                    opened[part].write(content)
            if empty := [part for part, path in new.items() if not path.stat().st_size]:
                raise ValueError(f"{label} holds no text for {' and '.join(empty)}")
            manifest = {"key": key, "sha256": {path.name: _sha256(path) for path in new.values()}}
            write(Path(temporary, "manifest.json"), to_json(manifest, 2))
            folder.mkdir(exist_ok=True)
            for file in (*files, "manifest.json"):  # each is moved whole; who builds at once replaces equal files
                Path(temporary, file).replace(folder / file)
    except OSError as error:
        raise ValueError(f"cannot prepare {label}: {error}; ZOO_CACHE names another folder") from error
    return folder


def read(folder: Path, dtype: Any = np.uint16) -> dict[str, np.ndarray]:
    """The ids of each split, memory-mapped."""
    # as plain arrays on the same pages: slicing a memmap takes eight times as long
    return {split: np.asarray(np.memmap(folder / f"{split}.bin", dtype, "r")) for split in SPLITS}


def _hashes(folder: Path) -> dict[str, str]:
    """The hash of each file, as the manifest says; none where that is damaged."""
    with suppress(OSError, ValueError, LookupError, TypeError):
        return dict(json.loads((folder / "manifest.json").read_bytes())["sha256"])
    return {}


def digest(folder: Path) -> str:
    """A hash of all that a folder holds, wherever it came from."""
    return hashlib.sha256(json.dumps(_hashes(folder), sort_keys=True).encode()).hexdigest()


def find(name: str, digest_: str) -> Path | None:
    """A whole folder prepared under that name that holds what a digest stands for, if the cache has one."""
    folders = sorted(cache().glob(f"{name}-*"))
    return next((folder for folder in folders if digest(folder) == digest_ and _whole(folder)), None)


def _whole(folder: Path) -> bool:
    """Whether a folder holds what its manifest says."""
    hashes = _hashes(folder)
    with suppress(OSError, ValueError):
        return bool(hashes) and hashes == {name: _sha256(folder / name) for name in hashes}
    return False


def _sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
