"""Strict options: frozen dataclasses filled from plain dicts, with every default written down and every typo named."""

from __future__ import annotations

import difflib
import math
import types
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import MISSING, fields
from enum import Enum
from importlib.metadata import version
from itertools import islice
from pathlib import PurePath
from typing import Any, Literal, TypeVar, Union, get_args, get_origin, get_type_hints

VERSION = version("zoo")
T = TypeVar("T")


def show(value: Any, limit: int = 80) -> str:
    """repr(value) of at most `limit` characters, however large, deep or shared the value is: for all messages."""
    text = _show(value, 4, limit)
    return text if len(text) <= limit else f"{text[: limit - 1]}…"


def _show(value: Any, depth: int, limit: int) -> str:
    if isinstance(value, str | bytes):
        return repr(value[:limit])
    if isinstance(value, int) and not isinstance(value, bool) and value.bit_length() > 256:
        return f"an integer of {value.bit_length()} bits"
    if isinstance(value, dict | list | tuple | set | frozenset):
        if not depth:
            return "…"
        items = [_show(item, depth - 1, limit) for item in islice(value, 8)]
        if isinstance(value, dict):
            values = [_show(item, depth - 1, limit) for item in islice(value.values(), 8)]
            items = [f"{key}: {item}" for key, item in zip(items, values, strict=True)]
        inside = ", ".join(items + ["…"] * (len(value) > 8))
        return (
            f"[{inside}]" if isinstance(value, list) else f"({inside})" if isinstance(value, tuple) else f"{{{inside}}}"
        )
    if shape := getattr(value, "shape", None):  # the numbers of a tensor are read from the device
        return f"{type(value).__name__} of shape {_show(tuple(shape), 4, limit)}, {getattr(value, 'dtype', None)}"
    return repr(value)[: limit + 1]


def one_line(message: object, limit: int | None = None) -> str:
    """The words of a message, which may have been of many lines."""
    return " ".join(str(message).split())[:limit]


def did_you_mean(name: str, known: Iterable[str]) -> str:
    """'; did you mean X?' where a close name exists, else the list of all known names."""
    known = list(known)
    return _closest(name, known) or f"; known: {', '.join(known)}"


def _closest(name: str, known: Iterable[str]) -> str:
    close = difflib.get_close_matches(name, list(known), n=1)
    return f"; did you mean {close[0]}?" if close else ""


def lookup(name: Any, table: Mapping[str, T], what: str) -> T:
    """table[name]; raises ValueError with the names that exist."""
    if not isinstance(name, str) or name not in table:
        raise ValueError(f"{what} {show(name)} does not exist{did_you_mean(_short(name), table)}")
    return table[name]


def plain(value: Any, where: str = "", depth: int = 8) -> Any:
    """`value` in None, bool, int, float, str, list and dict alone, which a checkpoint can hold: numbers and
    arrays of numpy and torch, paths and enums become such. Raises ValueError for what has no such meaning."""
    if isinstance(value, Enum):
        return plain(value.value, where, depth)
    for kind in (bool, int, float, str):  # subclasses too: numpy.float64 is a float, numpy.str_ a str
        if isinstance(value, kind):
            return kind(value)
    if value is None or isinstance(value, PurePath):
        return None if value is None else str(value)
    if depth and hasattr(value, "tolist"):
        return plain(value.tolist(), where, depth - 1)
    if depth and isinstance(value, Mapping):
        return {str(key): plain(item, _path(where, key), depth - 1) for key, item in value.items()}
    if depth and isinstance(value, Sequence) and not isinstance(value, bytes | bytearray):
        return [plain(item, where, depth - 1) for item in value]
    raise ValueError(f"{where or 'an option'}={show(value)} cannot be stored: give a number, a text, a list or a dict")


def from_dict(cls: type[T], values: Mapping[str, Any], where: str) -> T:
    """A `cls` from the plain values of group `where`, "" at the top; raises ValueError for unknown keys, wrong types
    and values that are not allowed."""
    if not isinstance(values, Mapping):
        raise ValueError(f"{where or 'config'} must be a group of options, got {show(values)}")
    hints = get_type_hints(cls)
    names = [f.name for f in fields(cls)]  # type: ignore[arg-type]
    for key in values:
        if key not in names:
            raise ValueError(
                f"{_path(where, key)} is not an option of {cls.__name__}{did_you_mean(_short(key), names)}"
            )
    for field in fields(cls):  # type: ignore[arg-type]
        if field.name not in values and field.default is MISSING and field.default_factory is MISSING:
            raise ValueError(f"{_path(where, field.name)} must be given")
    return cls(**{key: _coerce(value, hints[key], _path(where, key)) for key, value in values.items()})


def _path(where: str, key: object) -> str:
    return f"{where}.{_short(key)}" if where else _short(key)


def _short(name: object) -> str:
    return name[:80] if isinstance(name, str) else show(name)


def _coerce(value: Any, hint: Any, where: str) -> Any:
    origin, args = get_origin(hint), get_args(hint)
    if origin in (Union, types.UnionType):
        if value is None:
            return None
        hint = next(arg for arg in args if arg is not type(None))
        return _coerce(value, hint, where)
    if origin is Literal:
        if value not in args:
            choices = [str(arg) for arg in args]
            raise ValueError(
                f"{where}={show(value)} must be one of {', '.join(choices)}{_closest(_short(value), choices)}"
            )
        return value
    if origin is tuple:
        if isinstance(value, str):
            value = [value]
        if not isinstance(value, list | tuple):
            raise ValueError(f"{where}={show(value)} must be a list")
        return tuple(_coerce(item, args[0], where) for item in value)
    if isinstance(value, int) and not -(2**63) <= value < 2**63:
        raise ValueError(f"{where}={show(value)} must be a number of 64 bits")  # a checkpoint holds no other
    if hint is float and isinstance(value, int) and not isinstance(value, bool):
        return float(value)
    if hint is int and isinstance(value, float) and value.is_integer():
        return _coerce(int(value), hint, where)  # 1e3
    if isinstance(value, float) and hint is float and not math.isfinite(value):
        raise ValueError(f"{where}={value} must be a finite number")
    if not isinstance(value, hint) or (isinstance(value, bool) and hint is not bool):
        raise ValueError(f"{where}={show(value)} must be of type {hint.__name__}, got {type(value).__name__}")
    return value


def require_positive(where: str, **values: float) -> None:
    """Raises ValueError for the first value that is not above zero."""
    for name, value in values.items():
        if not value > 0:
            raise ValueError(f"{_path(where, name)}={value} must be above 0")
