"""Text from local files and from sets of the Hugging Face hub, read as data: nothing in a file or set is executed.

Tables (JSON, Parquet) and hub sets are read with the library `datasets`, which is imported at the first use.
"""

from __future__ import annotations

import glob
import hashlib
import re
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from itertools import islice
from pathlib import Path
from typing import Any

from zoo.tasks.corpus import Part, byte_ids

TABLES = {".json": "json", ".jsonl": "json", ".parquet": "parquet"}
TEXTS = ("", ".txt", ".text", ".md", ".rst", ".tex", ".py", ".c", ".h", ".cpp", ".js", ".html", ".xml", ".log")
EVERY = 20  # one document in so many goes to each split that a set lacks
BATCH = 1000  # rows that are read at once
TIMEOUT = 5  # seconds for the hub to answer


def find(patterns: Sequence[str]) -> list[Path]:
    """The files that paths and globs name, each once; raises ValueError for what is missing or of an unknown kind."""
    found: dict[Path, None] = {}
    for pattern in patterns:
        path = Path(pattern).expanduser()
        matches = [path] if path.is_file() else [Path(match) for match in sorted(glob.glob(str(path), recursive=True))]
        files = [match.resolve() for match in matches if match.is_file()]
        if not files:
            hint = f"is a folder; name files in it, such as {pattern}/**/*.txt" if path.is_dir() else "matches no file"
            raise ValueError(f"task.files: {pattern} {hint} (looked in {Path.cwd()})")
        found |= dict.fromkeys(files)
    for path in found:
        if path.suffix.lower() not in (*TABLES, *TEXTS):
            known = ", ".join([*TABLES, *filter(None, TEXTS)])
            raise ValueError(f"task.files: {path} has an unknown extension; known: {known}, or none for plain text")
    return list(found)


def files_origin(files: Sequence[Path], column: str) -> str:
    """What the text of files depends on."""
    return f"{column} {fingerprint(files)}"


def fingerprint(files: Iterable[Path]) -> str:
    """A hash of names, sizes and times of change."""
    lines = [f"{path} {status.st_size} {status.st_mtime_ns}" for path in files for status in [path.stat()]]
    return hashlib.sha256("\n".join(lines).encode()).hexdigest()


def read_files(files: Sequence[Path], column: str) -> Iterator[tuple[str, bytes]]:
    """A document per text file and per row of a table, named by the hash of its text: equal documents are neighbours
    in the order of names. Raises ValueError for a file that cannot be read and a column that is missing."""
    for path in files:
        with _names(f"task.files: {path}"):
            for text in _read_file(path, column):
                yield hashlib.sha256(text).hexdigest(), text


def _read_file(path: Path, column: str) -> Iterator[bytes]:
    kind = TABLES.get(path.suffix.lower())
    if kind is None:
        yield path.read_bytes()
        return
    import datasets

    escaped = glob.escape(str(path))  # the library takes names for globs
    yield from _rows(datasets.load_dataset(kind, data_files=escaped, split="train", streaming=True), column)


def hub_origin(hub: str, subset: str | None, column: str, documents: int | None) -> str:
    """What the text of a set depends on; a set of the hub is not asked for its state again once it was read. Raises
    ValueError if `hub` is neither a folder nor OWNER/NAME."""
    options, folder = f"{hub} {subset} {column} {documents}", Path(hub).expanduser()
    if folder.is_dir():
        return f"{options} {fingerprint(sorted(path.resolve() for path in folder.rglob('*') if path.is_file()))}"
    if not re.fullmatch(r"[\w.-]+/[\w.-]+(@[\w./-]+)?", hub):
        raise ValueError(f"task.hub={hub} is neither a folder nor OWNER/NAME, or OWNER/NAME@REVISION, on the hub")
    return options


def read_hub(hub: str, subset: str | None, column: str, documents: int | None) -> Iterator[Part]:
    """Byte ids of each split, document by document; a set without validation or test gives every 20th document of its
    training split to it. Raises ValueError if the set cannot be had, or lacks the subset, column or training split."""
    import datasets

    name, _, revision = hub.partition("@")
    options: dict[str, Any] = {"revision": revision} if revision else {}
    if (folder := Path(hub).expanduser()).is_dir():
        name, options = str(folder), {}
    else:
        _reach(name, revision or None)
    with _names(f"task.hub={hub}"):
        builder = datasets.load_dataset_builder(name, subset, **options)
        if builder.name == "text":  # by lines it would lose the newlines
            builder = datasets.load_dataset_builder(name, subset, sample_by="document", **options)
        if documents is None:
            builder.download_and_prepare()
        sets: Any = builder.as_streaming_dataset() if documents else builder.as_dataset()
        if "train" not in sets:
            raise ValueError(f"has the splits {', '.join(sets)}, but none named train")
        missing = [split for split in ("validation", "test") if split not in sets]
        for split in ("train", "validation", "test"):
            if split not in sets:
                continue
            for place, text in enumerate(islice(_rows(sets[split], column, documents), documents)):
                turn = place % EVERY
                lent = split == "train" and turn < len(missing)
                yield missing[turn] if lent else split, byte_ids(text)


def _rows(rows: Any, column: str, wanted: int | None = None) -> Iterator[bytes]:
    """The texts of a column of a set; rows without text are left out. A stream is read little beyond what is wanted."""
    for first in rows.iter(1):
        if column not in first:
            raise ValueError(f"has no column {column}: choose one of {', '.join(first)} with task.column=…")
        break
    else:
        return
    for batch in rows.select_columns([column]).iter(min(BATCH, wanted or BATCH)):
        for text in batch[column]:
            if not isinstance(text, str | None):
                raise ValueError(f"column {column} holds {type(text).__name__}, not text")
            if text:
                yield text.encode()


def _reach(name: str, revision: str | None) -> None:
    """Raises ValueError at once where the hub cannot be reached: `datasets` would try for half a minute."""
    from huggingface_hub import HfApi
    from huggingface_hub.errors import OfflineModeIsEnabled

    try:
        with _names(f"task.hub={name}"):
            HfApi().dataset_info(name, revision=revision, timeout=TIMEOUT)
    except ValueError as error:
        if not isinstance(error.__cause__, OfflineModeIsEnabled):  # offline by will: a copy may lie in its cache
            raise


ADVICE = (
    "connect once (later starts read ZOO_CACHE), give the folder of a copy as task.hub=FOLDER, or other text as "
    "task.files=[…]; HF_HUB_OFFLINE=1 looks for a copy in the Hugging Face cache"
)


@contextmanager
def _names(what: str) -> Iterator[None]:
    """Turns whatever goes wrong in foreign files, formats and networks into a ValueError of one line."""
    try:
        yield
    except ValueError as error:
        raise ValueError(f"{what}: {' '.join(str(error).split())}") from error
    except Exception as error:  # readers of tables and the network fail in many ways
        cause = error.__cause__ or error
        line = f"{what} cannot be read: {type(cause).__name__}: {' '.join(str(cause).split())[:300]}"
        network = isinstance(error, ConnectionError) or "httpx" in type(error).__module__
        raise ValueError(f"{line}; {ADVICE}" if network else line) from error
