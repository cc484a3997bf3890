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
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from contextlib import ExitStack
from itertools import pairwise
from pathlib import Path

import numpy as np

from zoo.files import home, to_json, write
from zoo.tasks.base import SPLITS

START = 256
HELD_OUT = 0.05
FORMAT = 1  # part of every key: raise it when the files below would come out differently
STEP = 1 << 24  # ids that are handled at once

Part = tuple[str, np.ndarray | bytes]
"""The name of a file, a split for text, and what comes next in it."""


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


def split_documents(source: str, documents: Iterable[tuple[str, bytes]]) -> Iterator[Part]:
    """Byte ids of each split, document by document. Documents, ordered by the hash of SOURCE/NAME, fill test, then
    validation, with 5 % of all ids each, at least one document; the rest trains. Fewer than three documents are cut:
    the first 90 % of their bytes train, then 5 % validate, then 5 % test. Raises ValueError if there is no document."""
    with tempfile.TemporaryFile(dir=cache()) as spool:
        keys, ends = [], [0]
        for name, text in documents:
            spool.write(text)
            keys.append(hashlib.sha256(f"{source}/{name}".encode()).digest())
            ends.append(ends[-1] + len(text))

        def read(first: int, last: int) -> Iterator[np.ndarray]:
            yield np.array([START], np.uint16)
            spool.seek(first)
            for place in range(first, last, STEP):
                yield np.frombuffer(spool.read(min(STEP, last - place)), np.uint8).astype(np.uint16)

        if not keys:
            raise ValueError(f"{source} holds no text")
        if len(keys) < len(SPLITS):
            held = int(ends[-1] * HELD_OUT)
            cuts = [0, ends[-1] - 2 * held, ends[-1] - held, ends[-1]]
            for split, (first, last) in zip(SPLITS, pairwise(cuts), strict=True):
                for begin, end in pairwise(ends):  # in the order in which they came
                    if max(first, begin) < min(last, end):
                        yield from ((split, ids) for ids in read(max(first, begin), min(last, end)))
            return
        order = deque(sorted(range(len(keys)), key=keys.__getitem__))
        share = HELD_OUT * (ends[-1] + len(keys))
        for split, kept in (("test", 2), ("validation", 1), ("train", 0)):
            taken = 0
            while len(order) > kept and (split == "train" or taken < share):
                document = order.popleft()
                taken += ends[document + 1] - ends[document] + 1
                yield from ((split, ids) for ids in read(ends[document], ends[document + 1]))


def prepare(
    name: str,
    origin: str,
    parts: Callable[[], Iterable[Part]],
    files: Iterable[str] = tuple(SPLITS),
    suffix: str = ".bin",
) -> Path:
    """The folder with `files`; made from `parts` at the first call with this `origin`, which must change whenever they
    would, and found again afterwards. Raises ValueError if it cannot be written or a file has no part."""
    key = f"{FORMAT} {name} {origin}"
    names = {file: file + suffix for file in files}
    try:
        folder = cache() / f"{name}-{hashlib.sha256(key.encode()).hexdigest()[:16]}"
        if not _whole(folder, set(names.values())):
            _build(folder, key, names, parts())
    except OSError as error:
        raise ValueError(f"task=text cannot prepare {name}: {error}; ZOO_CACHE names another folder") from error
    return folder


def read(folder: Path) -> dict[str, np.ndarray]:
    """The ids (uint16) of each split, memory-mapped."""
    # as plain arrays on the same pages: slicing a memmap takes eight times as long
    return {split: np.asarray(np.memmap(folder / f"{split}.bin", np.uint16, "r")) for split in SPLITS}


def digest(folder: Path) -> str:
    """A hash of all that a folder holds, wherever it came from."""
    hashes = json.loads((folder / "manifest.json").read_bytes())["sha256"]
    return hashlib.sha256(json.dumps(hashes, sort_keys=True).encode()).hexdigest()


def _build(folder: Path, key: str, names: dict[str, str], parts: Iterable[Part]) -> None:
    """Each file is moved into place whole; processes that build at once replace equal files."""
    hashes = {name: hashlib.sha256() for name in names.values()}
    with tempfile.TemporaryDirectory(prefix=".new-", dir=folder.parent) as temporary:
        with ExitStack() as stack:
            opened = {name: stack.enter_context(Path(temporary, name).open("wb")) for name in hashes}
            for file, content in parts:
                data = content if isinstance(content, bytes) else content.data
                opened[names[file]].write(data)
                hashes[names[file]].update(data)
            empty = [file for file, name in names.items() if not opened[name].tell()]
        if empty:
            raise ValueError(f"{key.split()[1]} holds no text for {' and '.join(empty)}")
        manifest = {"key": key, "sha256": {name: value.hexdigest() for name, value in hashes.items()}}
        write(Path(temporary, "manifest.json"), to_json(manifest, 2))
        folder.mkdir(exist_ok=True)
        for name in [*hashes, "manifest.json"]:
            Path(temporary, name).replace(folder / name)


def _whole(folder: Path, names: set[str]) -> bool:
    try:
        hashes = json.loads((folder / "manifest.json").read_bytes())["sha256"]
        return set(hashes) == names and all(hashes[name] == _sha256(folder / name) for name in names)
    except (OSError, ValueError, LookupError, TypeError):
        return False


def _sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
