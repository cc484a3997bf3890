"""Text from local files and from sets of the Hugging Face hub, read as data: nothing in a file or set is executed.

Hub sets are read with the library `datasets`, Parquet with `pyarrow`; both are imported at the first use.
"""

from __future__ import annotations

import csv
import glob
import gzip
import hashlib
import io
import json
import os
import re
import sys
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from itertools import chain, islice
from pathlib import Path
from typing import IO, Any

from zoo.config import one_line, show
from zoo.files import home
from zoo.tasks.text.corpus import Part, byte_ids, split_documents

TEXTS = ("", ".txt", ".text", ".md", ".rst", ".tex", ".py", ".c", ".h", ".cpp", ".js", ".html", ".xml", ".log")
BATCH = 1000  # rows that are read at once
TIMEOUT = 5  # seconds for the hub to answer
PLACES = ("files", "hub")  # the options of a task that may name paths
LINE = 300  # characters of a path in a message

Row = tuple[str, Mapping[str, Any]]
"""Where a row of a table stands, and its values by column."""


def absolute(task: Mapping[str, Any]) -> dict[str, Any]:
    """The options of a task with absolute paths, so that a run is resumed from anywhere; links and globs stay."""
    paths, task = task.get("files"), dict(task)
    paths = [paths] if isinstance(paths, str) else paths
    if isinstance(paths, list | tuple):
        task["files"] = [str(_path(path)) if isinstance(path, str) else path for path in paths]
    hub = task.get("hub")
    if isinstance(hub, str) and os.path.isdir(_path(hub)):
        task["hub"] = str(_path(hub))
    return task


def _path(name: str) -> Path:
    return home(name).absolute()


def find(patterns: Sequence[str], kinds: Sequence[str] = TEXTS) -> list[Path]:
    """The files that paths and globs name, each once; raises ValueError for what is missing or neither a table nor one
    of `kinds`. The name that is given, not that of a file it links to, tells the kind."""
    found: dict[str, Path] = {}
    for pattern in patterns:
        path = _path(pattern)
        names = [str(path)] if os.path.isfile(path) else sorted(glob.glob(str(path), recursive=True))
        files = [name for name in names if os.path.isfile(name)]
        for file in files:
            found.setdefault(os.path.realpath(file), Path(file))
        if not files:
            folder = "is a folder; name the files in it, such as FOLDER/**/*.txt"
            hint = folder if os.path.isdir(path) else "matches no file"
            raise ValueError(f"task.files: {show(pattern, LINE)} {hint} (looked in {Path.cwd()})")
    for path in found.values():
        if _kind(path) not in (*TABLES, *kinds):
            known = ", ".join(kind or "none, for plain text" for kind in (*TABLES, *kinds))
            raise ValueError(
                f"task.files: {path} has an unknown extension; known: {known}; all but .parquet also with .gz"
            )
    return list(found.values())


def _kind(path: Path) -> str:
    """The extension; the one before .gz where that can be unpacked."""
    kind, last = Path(path.stem).suffix.lower(), path.suffix.lower()
    return kind if last == ".gz" and kind != ".parquet" else last


def listed(files: Sequence[Path]) -> str:
    """Files in a message."""
    more = f" and {len(files) - 1} more" if len(files) > 1 else ""
    return f"task.files: {files[0]}{more}"


def fingerprint(files: Iterable[Path]) -> str:
    """A hash of names, sizes and times of change."""
    states = ((path, path.stat()) for path in files)
    lines = [f"{path} {state.st_size} {state.st_mtime_ns}" for path, state in states]
    return hashlib.sha256("\n".join(lines).encode(errors="surrogateescape")).hexdigest()


def read_files(files: Sequence[Path], column: str) -> Iterator[tuple[str, bytes]]:
    """A document per text file and per row of a table, named by the hash of its text: equal documents are neighbours
    in the order of names. Raises ValueError for a file that cannot be read and a column that is missing."""
    for path in files:
        with named(f"task.files: {path}"):
            if _kind(path) in TABLES:
                texts = _texts(rows(path, [column]), column)
            else:
                with _open(path) as file:
                    texts = filter(None, [file.read()])  # an empty document would teach that texts end at once
            for text in texts:
                yield hashlib.sha256(text).hexdigest(), text


def rows(path: Path, columns: Sequence[str]) -> Iterator[Row]:
    """The rows of a table, with `columns` at least, where it has them."""
    for place, row in TABLES[_kind(path)](path, columns):
        if not isinstance(row, dict):
            raise ValueError(f"{place}: a row is an object, not {type(row).__name__}")
        yield place, row


def _open(path: Path) -> IO[bytes]:
    return gzip.open(path) if path.suffix.lower() == ".gz" else path.open("rb")  # type: ignore[return-value]


def _json(path: Path, columns: Sequence[str]) -> Iterator[Row]:
    """The objects of an array, or one a line."""
    with _open(path) as file:
        lines = ((number, line) for number, line in enumerate(file, 1) if line.strip())
        first = next(lines, (0, b"[]"))
        if first[1].lstrip(b"\xef\xbb\xbf \t\r\n").startswith(b"["):
            yield from ((f"row {place}", row) for place, row in enumerate(_value(first[1] + file.read()), 1))
            return
        for number, line in chain([first], lines):
            with at(f"line {number}"):
                row = _value(line)
            yield f"line {number}", row


def _value(text: bytes) -> Any:
    try:
        return json.loads(text, parse_int=lambda digits: 0)  # of other columns, thousands of digits maybe
    except (ValueError, RecursionError) as error:
        raise ValueError(f"no JSON: {error}") from error


def _csv(path: Path, columns: Sequence[str]) -> Iterator[Row]:
    csv.field_size_limit(sys.maxsize)  # a field is a document
    with _open(path) as file:
        reader = csv.DictReader(io.TextIOWrapper(file, "utf-8-sig", newline=""), strict=True)
        try:
            for row in reader:
                yield f"line {reader.line_num}", row
        except csv.Error as error:
            raise ValueError(f"line {reader.reader.line_num}: no CSV: {error}") from error


def _parquet(path: Path, columns: Sequence[str]) -> Iterator[Row]:
    from pyarrow import parquet

    with parquet.ParquetFile(path) as file:
        here = [name for name in file.schema_arrow.names if name in columns] or None
        batches = file.iter_batches(BATCH, columns=here)
        for number, row in enumerate(chain.from_iterable(batch.to_pylist() for batch in batches), 1):
            yield f"row {number}", row


TABLES: dict[str, Callable[[Path, Sequence[str]], Iterator[Row]]] = {
    ".json": _json,
    ".jsonl": _json,
    ".csv": _csv,
    ".parquet": _parquet,
}


def _texts(rows: Iterable[Row], column: str) -> Iterator[bytes]:
    """The texts of a column; rows without are left out. Raises ValueError if it is in none of the first rows."""
    others: dict[str, None] | None = {}
    for number, (place, row) in enumerate(rows, 1):
        if others is not None:
            others = None if column in row else others | dict.fromkeys(row)
        if others and number == BATCH:
            break
        if (text := row.get(column)) is not None:
            with at(place):
                if not isinstance(text, str):
                    raise ValueError(f"column {column} holds {type(text).__name__}, not text")
                document = text.encode()
            if document:
                yield document
    if others:
        raise ValueError(f"has no column {column}: choose one of {', '.join(map(str, others))} with task.column=…")


@contextmanager
def at(place: str) -> Iterator[None]:
    """Names a place in messages."""
    try:
        yield
    except ValueError as error:
        raise ValueError(f"{place}: {error}") from error


def hub_origin(hub: str, subset: str | None, column: str, documents: int | None) -> str:
    """A name for all that a set's text depends on; one of the hub is asked for its state once, before reading. Raises
    ValueError if `hub` is neither a folder nor OWNER/NAME."""
    options, folder = f"{hub} {subset} {column} {documents}", _path(hub)
    if os.path.isdir(folder):
        return f"{options} {fingerprint(sorted(path.resolve() for path in folder.rglob('*') if path.is_file()))}"
    if not re.fullmatch(r"[\w.-]+/[\w.-]+(@[\w./-]+)?", hub):
        raise ValueError(f"task.hub={show(hub)} is neither a folder nor OWNER/NAME, or OWNER/NAME@REVISION, on the hub")
    return options


def read_hub(hub: str, subset: str | None, column: str, documents: int | None) -> Iterator[Part]:
    """Byte ids of each split, document by document; what a set lacks of validation and test is taken from its training
    split. Raises ValueError if the set cannot be had, or lacks the subset, column or training split."""
    import datasets

    name, _, revision = hub.partition("@")
    options: dict[str, Any] = {"revision": revision} if revision else {}
    if os.path.isdir(_path(hub)):
        name, options = str(_path(hub)), {}
    else:
        _reach(name, revision or None)
    with named(f"task.hub={hub}"):
        builder = datasets.load_dataset_builder(name, subset, **options)
        if builder.name == "text":  # by lines it would lose the newlines
            builder = datasets.load_dataset_builder(name, subset, sample_by="document", **options)
        sets: Any = _tables(builder)
        if not sets:
            if documents is None:
                builder.download_and_prepare()
            sets = builder.as_streaming_dataset() if documents else builder.as_dataset()
        if "train" not in sets:
            raise ValueError(f"has the splits {', '.join(sets)}, but none named train")
        missing = [split for split in ("test", "validation") if split not in sets]
        for split in ("train", "validation", "test"):
            found = islice(_documents(sets[split], column, documents), documents) if split in sets else iter(())
            if split == "train" and missing:
                yield from split_documents("hub", ((hashlib.sha256(text).hexdigest(), text) for text in found), missing)
            else:
                yield from ((split, byte_ids(text)) for text in found)


def _tables(builder: Any) -> dict[str, list[Path]]:
    """The files of each split, where all are JSON or CSV on this machine: `datasets` would take dates for times, and
    fail on columns that nobody asked for."""
    files = {str(split): [Path(path) for path in paths] for split, paths in (builder.config.data_files or {}).items()}
    known = all(os.path.isfile(path) and _kind(path) in TABLES for paths in files.values() for path in paths)
    return files if known and builder.name in ("json", "csv") else {}


def _documents(found: Any, column: str, wanted: int | None) -> Iterator[bytes]:
    """The texts of a split: of files, or of a set, where a stream is read little beyond what is wanted."""
    if isinstance(found, list):
        for path in found:
            with named(str(path)):
                yield from _texts(rows(path, [column]), column)
        return
    if any(column in first for first in islice(found.iter(1), 1)):
        found = found.select_columns([column])
    batches = found.iter(min(BATCH, wanted or BATCH))
    every = (dict(zip(batch, row, strict=True)) for batch in batches for row in zip(*batch.values(), strict=True))
    yield from _texts(((f"row {number}", row) for number, row in enumerate(every, 1)), column)


def _reach(name: str, revision: str | None) -> None:
    """Raises ValueError at once where the hub cannot be reached: `datasets` would try for half a minute."""
    from huggingface_hub import HfApi
    from huggingface_hub.errors import OfflineModeIsEnabled

    try:
        with named(f"task.hub={name}"):
            HfApi().dataset_info(name, revision=revision, timeout=TIMEOUT)
    except ValueError as error:
        if not isinstance(error.__cause__, OfflineModeIsEnabled):  # HF_HUB_OFFLINE is set: a copy may lie in its cache
            raise


ADVICE = (
    "connect once (later starts read ZOO_CACHE), give the folder of a copy as task.hub=FOLDER, or other text as "
    "task.files=[…]; HF_HUB_OFFLINE=1 looks for a copy in the Hugging Face cache"
)


@contextmanager
def named(what: str) -> Iterator[None]:
    """Turns whatever goes wrong in foreign files, formats and networks into a ValueError of one line."""
    try:
        yield
    except ValueError as error:
        raise ValueError(f"{what}: {one_line(error)}") from error
    except Exception as error:  # readers of tables and the network fail in many ways
        cause = error.__cause__ or error
        line = f"{what} cannot be read: {type(cause).__name__}: {one_line(cause, 300)}"
        network = isinstance(error, ConnectionError) or "httpx" in type(error).__module__
        raise ValueError(f"{line}; {ADVICE}" if network else line) from error
