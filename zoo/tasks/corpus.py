"""Documents as token ids on disk: a folder per domain with one flat file per split, and hashes that prove it whole.

Ids 0–255 are bytes, 256 marks the start of a document. The folders lie in $ZOO_CACHE, else ~/.cache/zoo. Any number
of processes may prepare the same domain at once; what is damaged or cut short is made anew.
"""

from __future__ import annotations

import hashlib
import json
import os
import tempfile
from collections.abc import Callable, Iterable
from pathlib import Path

import numpy as np

from zoo.tasks.base import SPLITS

START = 256
HELD_OUT = 0.05
FORMAT = 1  # part of every key: raise it when the files below would come out differently


def split_documents(domain: str, documents: Iterable[tuple[str, bytes]]) -> dict[str, np.ndarray]:
    """Token ids (uint16) of each split. Documents, ordered by the hash of DOMAIN/NAME, fill test, then validation, with
    5 % of all bytes each, at least one document; the rest trains. Raises ValueError for fewer than three documents."""
    ordered = sorted(documents, key=lambda document: hashlib.sha256(f"{domain}/{document[0]}".encode()).digest())
    if len(ordered) < len(SPLITS):
        raise ValueError(f"{len(ordered)} documents of {domain} are too few: each split needs one")
    parts = [np.concatenate([[START], np.frombuffer(text, np.uint8)]).astype(np.uint16) for _, text in ordered]
    share, splits = HELD_OUT * sum(map(len, parts)), {}
    for split, kept in (("test", 2), ("validation", 1), ("train", 0)):
        taken: list[np.ndarray] = []
        while len(parts) > kept and (split == "train" or sum(map(len, taken)) < share):
            taken.append(parts.pop(0))
        splits[split] = np.concatenate(taken)
    return splits


def prepare(domain: str, origin: str, documents: Callable[[], Iterable[tuple[str, bytes]]]) -> dict[str, np.ndarray]:
    """Token ids by split, memory-mapped; made from `documents` at the first call with this `origin`, which must change
    whenever the text would, and read back afterwards."""
    key = f"{FORMAT} {domain} {origin}"
    cache = Path(os.environ.get("ZOO_CACHE") or Path.home() / ".cache" / "zoo")
    folder = cache / f"{domain}-{hashlib.sha256(key.encode()).hexdigest()[:16]}"
    if not _whole(folder):
        try:
            _build(folder, key, split_documents(domain, documents()))
        except OSError as error:
            raise ValueError(f"task=text cannot prepare {domain}: {error}; ZOO_CACHE names another folder") from error
    return {split: np.memmap(folder / f"{split}.bin", np.uint16, "r") for split in SPLITS}


def _build(folder: Path, key: str, splits: dict[str, np.ndarray]) -> None:
    """Each file is moved into place whole; processes that build at once replace equal files."""
    files = {f"{split}.bin": ids.tobytes() for split, ids in splits.items()}
    hashes = {name: hashlib.sha256(content).hexdigest() for name, content in files.items()}
    files["manifest.json"] = json.dumps({"key": key, "sha256": hashes}, indent=2).encode()
    folder.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix=".new-", dir=folder.parent) as temporary:
        for name, content in files.items():
            path = Path(temporary, name)
            path.write_bytes(content)
            path.replace(folder / name)


def _whole(folder: Path) -> bool:
    try:
        hashes = json.loads((folder / "manifest.json").read_bytes())["sha256"]
        files = {f"{split}.bin": (folder / f"{split}.bin").read_bytes() for split in SPLITS}
        return hashes == {name: hashlib.sha256(content).hexdigest() for name, content in files.items()}
    except (OSError, ValueError, LookupError, TypeError):
        return False
