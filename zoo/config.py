"""Strict options: frozen dataclasses filled from plain dicts, with every default written down and every typo named."""

from __future__ import annotations

import difflib
import math
import reprlib
import types
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import fields
from enum import Enum
from importlib.metadata import version
from pathlib import PurePath
from typing import Any, Literal, TypeVar, Union, get_args, get_origin, get_type_hints

VERSION = version("zoo")
T = TypeVar("T")


class _Short(reprlib.Repr):
    """repr() of a few items of a few levels; of a tensor its shape: its numbers are read from the device."""

    def repr_int(self, x: int, level: int) -> str:
        return f"an integer of {x.bit_length()} bits" if x.bit_length() > 256 else repr(x)

    def repr_instance(self, x: Any, level: int) -> str:
        if shape := getattr(x, "shape", None):
            return f"{type(x).__name__} of shape {self.repr(tuple(shape))}, {getattr(x, 'dtype', None)}"
        return super().repr_instance(x, level)


def show(value: Any, limit: int = 80) -> str:
    """repr(value) of at most `limit` characters, however large, deep or shared the value is: for all messages."""
    short = _Short()
    short.maxlevel, short.maxstring, short.maxother, short.fillvalue = 4, limit, limit, "…"
    text = short.repr(value)
    return text if len(text) <= limit else f"{text[: limit - 1]}…"


def one_line(message: object, limit: int | None = None) -> str:
    """The words of a message, which may have been of many lines."""
    return " ".join(str(message).split())[:limit]


def did_you_mean(name: object, known: Iterable[str]) -> str:
    """'; did you mean X?' where a close name exists, else the list of all known names."""
    known = list(known)
    close = difflib.get_close_matches(name[:80], known, n=1) if isinstance(name, str) else []
    return f"; did you mean {close[0]}?" if close else f"; known: {', '.join(known)}"


def lookup(name: Any, table: Mapping[str, T], what: str) -> T:
    """table[name]; raises ValueError with the names that exist."""
    if not isinstance(name, str) or name not in table:
        raise ValueError(f"{what} {show(name)} does not exist{did_you_mean(name, table)}")
    return table[name]


def plain(value: Any, where: str = "", depth: int = 8) -> Any:
    """`value` in None, bool, int, float, str, list and dict alone, which a checkpoint can hold: numbers and
    arrays of numpy and torch, paths and enums become such. Raises ValueError for what has no such meaning."""
    if isinstance(value, Enum):
        value = value.value
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


def flat(options: Mapping[str, Any], where: str = "") -> dict[str, Any]:
    """Options of groups by their whole names, as model.dim."""
    named: dict[str, Any] = {}
    for key, value in options.items():
        named |= flat(value, _path(where, key)) if isinstance(value, dict) else {_path(where, key): value}
    return named


def from_dict(cls: type[T], values: Mapping[str, Any], where: str) -> T:
    """A `cls` from the plain values of group `where`, "" at the top; raises ValueError for unknown keys, wrong types
    and values that are not allowed."""
    if not isinstance(values, Mapping):
        raise ValueError(f"{where or 'config'} must be a group of options, got {show(values)}")
    hints = get_type_hints(cls)
    known = [field.name for field in fields(cls)]  # type: ignore[arg-type]
    for key in values:
        if key not in known:
            raise ValueError(f"{_path(where, key)} is not an option of {cls.__name__}{did_you_mean(key, known)}")
    return cls(**{key: _coerce(value, hints[key], _path(where, key)) for key, value in values.items()})


def _path(where: str, key: object) -> str:
    name = str(key)[:80]
    return f"{where}.{name}" if where else name


def _coerce(value: Any, hint: Any, where: str) -> Any:
    origin, args = get_origin(hint), get_args(hint)
    if origin in (Union, types.UnionType):  # X | None
        return None if value is None else _coerce(value, args[0], where)
    if origin is Literal:
        return lookup(value, {choice: choice for choice in args}, where)
    if origin is tuple:
        items = [value] if isinstance(value, str) else value
        if not isinstance(items, list | tuple):
            raise ValueError(f"{where}={show(value)} must be a list")
        if args[-1] is not ... and len(items) != len(args):
            raise ValueError(f"{where}={show(value)} must be {len(args)} numbers")
        return tuple(_coerce(item, args[0], where) for item in items)
    if hint is int and isinstance(value, float) and value.is_integer():  # 1e3
        value = int(value)
    if isinstance(value, int) and value.bit_length() > 63:
        raise ValueError(f"{where}={show(value)} must be a number of 64 bits")  # a checkpoint holds no other
    if hint is float and type(value) is int:
        value = float(value)
    if isinstance(value, float) and not math.isfinite(value):
        raise ValueError(f"{where}={value} must be a finite number")
    if not isinstance(value, hint) or (isinstance(value, bool) and hint is not bool):
        kind = "true or false" if hint is bool else f"of type {hint.__name__}"
        raise ValueError(f"{where}={show(value)} must be {kind}, got {type(value).__name__}")
    return value


def require_positive(where: str, **values: float) -> None:
    """Raises ValueError for the first value that is not above zero."""
    for name, value in values.items():
        if not value > 0:
            raise ValueError(f"{_path(where, name)}={value} must be above 0")
