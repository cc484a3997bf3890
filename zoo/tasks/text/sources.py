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
from contextlib import contextmanager, suppress
from itertools import chain, islice
from pathlib import Path
from typing import IO, Any

from zoo.config import one_line, show
from zoo.files import home
from zoo.tasks.base import SPLITS
from zoo.tasks.text.corpus import Document, Part, byte_ids, split_documents

TEXTS = ("", ".txt", ".text", ".md", ".rst", ".tex", ".py", ".c", ".h", ".cpp", ".js", ".html", ".xml", ".log")
BATCH = 1000  # rows that are read at once, and after which a column that none of them has is missed
TIMEOUT = 5  # seconds for the hub to answer
PLACES = ("files", "hub", "tokenizer")  # the options of a task that may name paths
KINDS = ("bytes", "bpe", "base")  # of tokenizers, beside those of files
ADVICE = (
    "connect once (later starts read ZOO_CACHE), give the folder of a copy as task.hub=FOLDER, or other text as "
    "task.files=[…]; HF_HUB_OFFLINE=1 looks for a copy in the Hugging Face cache"
)

Row = tuple[str, dict[str, Any]]
"""Where a row of a table stands, and its values by column."""


def absolute(task: Mapping[str, Any]) -> dict[str, Any]:
    """The options of a task with absolute paths, so that a run is resumed from anywhere; links and globs stay."""
    task, paths, hub, tokenizer = dict(task), task.get("files"), task.get("hub"), task.get("tokenizer")
    if isinstance(paths, str | list):
        task["files"] = [str(_path(str(path))) for path in ([paths] if isinstance(paths, str) else paths)]
    if isinstance(hub, str) and os.path.isdir(_path(hub)):
        task["hub"] = str(_path(hub))
    if str(tokenizer).endswith(".json"):
        task["tokenizer"] = str(_path(str(tokenizer)))
    return task


def moved(task: Mapping[str, Any], asked: Mapping[str, Any]) -> dict[str, Any]:
    """The options of a task, its places those that are asked for: they may change, what lies there may not."""
    places = [place for place in PLACES if task.get(place) and asked.get(place)]
    return {
        **task,
        **{place: asked[place] for place in places if not {*map(str, (task[place], asked[place]))} & {*KINDS}},
    }


def _path(name: str) -> Path:
    return home(name).absolute()


@contextmanager
def named(what: str) -> Iterator[None]:
    """Turns whatever goes wrong in foreign files, formats and networks into a ValueError of one line."""
    try:
        yield
    except ValueError as error:
        raise ValueError(f"{what}: {one_line(error)}") from error
    except BaseException as error:  # readers of tables and the network fail in many ways, those in Rust by a panic
        if not isinstance(error, Exception) and type(error).__name__ != "PanicException":
            raise
        cause = error.__cause__ or error
        line = f"{what} cannot be read: {type(cause).__name__}: {one_line(cause, 300)}"
        network = isinstance(error, ConnectionError) or "httpx" in type(error).__module__
        raise ValueError(f"{line}; {ADVICE}" if network else line) from error


# files


def find(patterns: Sequence[str], kinds: Sequence[str] = TEXTS) -> list[Path]:
    """The files that paths and globs name, each once; raises ValueError for what is missing or neither a table nor one
    of `kinds`. The name that is given, not that of a file it links to, tells the kind."""
    found: dict[str, Path] = {}
    for pattern in patterns:
        path = _path(pattern)
        names = [str(path)] if os.path.isfile(path) else sorted(glob.glob(str(path), recursive=True))
        files = [Path(name) for name in names if os.path.isfile(name)]
        if not files:
            folder = "is a folder; name the files in it, such as FOLDER/**/*.txt"
            hint = folder if os.path.isdir(path) else "matches no file"
            raise ValueError(f"task.files: {show(pattern, 300)} {hint} (looked in {Path.cwd()})")
        for file in files:
            if kind(file) not in (*TABLES, *kinds):
                known = ", ".join(kind or "none, for plain text" for kind in (*TABLES, *kinds))
                raise ValueError(f"task.files: {file} has an unknown extension; known: {known}; with .gz, too")
            found.setdefault(os.path.realpath(file), file)
    return list(found.values())


def kind(path: Path) -> str:
    """The extension; the one before .gz."""
    return Path(path.name.lower().removesuffix(".gz")).suffix


def fingerprint(files: Iterable[Path]) -> str:
    """A hash of names, sizes and times of change."""
    states = ((path, path.stat()) for path in files)
    lines = [f"{path} {state.st_size} {state.st_mtime_ns}" for path, state in states]
    return hashlib.sha256("\n".join(lines).encode(errors="surrogateescape")).hexdigest()


def read_files(files: Sequence[Path], column: str) -> Iterator[Document]:
    """A document per text file and per row of a table. Raises ValueError for a file that cannot be read and a column
    that is missing."""
    for path in files:
        with named(f"task.files: {path}"):
            if kind(path) in TABLES:
                texts = _texts(rows(path, [column]), column)
            else:
                with opened(path) as file:
                    texts = filter(None, [file.read()])  # an empty document would teach that texts end at once
            yield from _documents(texts)


def _documents(texts: Iterable[bytes]) -> Iterator[Document]:
    """Named by the hash of their text: equal documents are neighbours in the order of names."""
    return ((hashlib.sha256(text).hexdigest(), text) for text in texts)


def _texts(rows: Iterable[Row], column: str) -> Iterator[bytes]:
    """The texts of a column; rows without are left out. Raises ValueError if it is in none of the first rows."""
    columns: dict[str, Any] = {}
    for number, (place, row) in enumerate(rows):
        if column not in columns:
            if number == BATCH:
                break
            columns.update(row)
        text = row.get(column)
        with named(place):
            if not isinstance(text, str | None):
                raise ValueError(f"column {column} holds {type(text).__name__}, not text")
            document = (text or "").encode()
        if document:
            yield document
    if columns and column not in columns:
        raise ValueError(f"has no column {column}: choose one of {', '.join(map(str, columns))} with task.column=…")


def rows(path: Path, columns: Sequence[str]) -> Iterator[Row]:
    """The rows of a table, with `columns` at least, where it has them."""
    with opened(path) as file:
        for place, row in TABLES[kind(path)](file, columns):
            if not isinstance(row, dict):
                raise ValueError(f"{place}: a row is an object, not {type(row).__name__}")
            yield place, row


def opened(path: Path) -> IO[bytes]:
    return gzip.open(path) if path.suffix.lower() == ".gz" else path.open("rb")  # type: ignore[return-value]


def _json(file: IO[bytes], columns: Sequence[str]) -> Iterator[Row]:
    """The objects of an array, or one a line."""
    lines = ((f"line {number}", line) for number, line in enumerate(file, 1) if line.strip())
    place, first = next(lines, ("", b"[]"))
    if first.lstrip(b"\xef\xbb\xbf \t\r\n").startswith(b"["):
        yield from _numbered(json.loads(first + file.read()))
        return
    every = chain([(place, first)], lines)
    for where, line in every:
        with named(where):
            row = json.loads(line)
        yield where, row


def _csv(file: IO[bytes], columns: Sequence[str]) -> Iterator[Row]:
    csv.field_size_limit(sys.maxsize)  # a field is a document
    reader = csv.DictReader(io.TextIOWrapper(file, "utf-8-sig", newline=""), strict=True)
    return ((f"line {reader.line_num}", row) for row in reader)


def _parquet(file: IO[bytes], columns: Sequence[str]) -> Iterator[Row]:
    from pyarrow import parquet

    table = parquet.ParquetFile(file)
    here = [name for name in table.schema_arrow.names if name in columns] or None
    return _numbered(row for batch in table.iter_batches(BATCH, columns=here) for row in batch.to_pylist())


def _numbered(rows: Iterable[dict[str, Any]]) -> Iterator[Row]:
    return ((f"row {number}", row) for number, row in enumerate(rows, 1))


TABLES: dict[str, Callable[[IO[bytes], Sequence[str]], Iterator[Row]]] = {
    ".json": _json,
    ".jsonl": _json,
    ".csv": _csv,
    ".parquet": _parquet,
}


# sets of the hub


def hub_origin(hub: str, subset: str | None, column: str, documents: int | None) -> str:
    """A name for all that a set's text depends on; raises ValueError if `hub` is neither a folder nor OWNER/NAME."""
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
    from huggingface_hub import HfApi
    from huggingface_hub.errors import OfflineModeIsEnabled

    with named(f"task.hub={hub}"):
        name, _, revision = hub.partition("@")
        options: dict[str, Any] = {"revision": revision or None}
        if os.path.isdir(_path(hub)):
            name, options = str(_path(hub)), {}
        else:
            with suppress(OfflineModeIsEnabled):  # HF_HUB_OFFLINE is set: a copy may lie in its cache
                HfApi().dataset_info(name, timeout=TIMEOUT, **options)  # `datasets` would try for half a minute
        builder = datasets.load_dataset_builder(name, subset, **options)
        if builder.name == "text":  # by lines it would lose the newlines
            builder = datasets.load_dataset_builder(name, subset, sample_by="document", **options)
        if documents is None:
            builder.download_and_prepare()
        sets = builder.as_streaming_dataset() if documents else builder.as_dataset()
        if "train" not in sets:
            raise ValueError(f"has the splits {', '.join(sets)}, but none named train")
        missing = [split for split in ("test", "validation") if split not in sets]
        for split in SPLITS.keys() & sets.keys():
            found = sets[split]
            if column in (found.column_names or ()):
                found = found.select_columns([column])
            batches = found.iter(min(BATCH, documents or BATCH))  # ten times as fast as row by row
            every = (
                dict(zip(batch, row, strict=True)) for batch in batches for row in zip(*batch.values(), strict=True)
            )
            texts = islice(_texts(_numbered(every), column), documents)
            if split == "train" and missing:
                yield from split_documents("hub", _documents(texts), missing)
            else:
                yield from ((split, byte_ids(text)) for text in texts)
