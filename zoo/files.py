"""Whole files or none: what is written appears under its name when it is complete, or not at all."""

from __future__ import annotations

import json
import os
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from zoo.config import show


def home(path: str | Path) -> Path:
    """`path` with ~ and ~name written out; raises ValueError for a name that nobody has."""
    try:
        return Path(path).expanduser()
    except RuntimeError:
        raise ValueError(f"{show(str(path))}: nobody of that name has a home folder here") from None


def named(path: str | Path) -> Path:
    """The file to write that a user names, of a link what it leads to; raises ValueError for a folder or a device."""
    place = Path(path).resolve()
    if place.exists() and not place.is_file():
        raise ValueError(f"{path} is a {'folder' if place.is_dir() else 'device'}: give a file")
    return place


@contextmanager
def whole(path: str | Path) -> Iterator[Path]:
    """A temporary path beside `path` to write to; afterwards it is renamed to `path`, or removed if writing failed."""
    path = Path(path)
    # the ending stays last: writers of pictures choose their format by it
    temporary = path.with_name(f".{path.stem}.{os.getpid()}{path.suffix}")
    try:
        yield temporary
        temporary.replace(path)
    except BaseException as error:
        with suppress(OSError):
            temporary.unlink(missing_ok=True)
        if isinstance(error, OSError) and error.errno and error.filename is None:
            error.filename = str(path)  # a full disk names no file
        raise


def write(path: str | Path, text: str) -> None:
    """The whole text as UTF-8, or nothing; the bytes of file names that are no text stay what they are."""
    with whole(path) as temporary:
        temporary.write_text(text, encoding="utf-8", errors="surrogateescape")


def to_json(value: Any, indent: int | None = None) -> str:
    """JSON that every reader takes: ASCII, and null for nan and infinity, which JSON does not have."""
    return json.dumps(json.loads(json.dumps(value), parse_constant=lambda name: None), indent=indent)
