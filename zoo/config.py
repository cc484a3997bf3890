"""Strict options: frozen dataclasses filled from plain dicts, with every default written down and every typo named."""

from __future__ import annotations

import difflib
import math
import types
from collections.abc import Iterable, Mapping
from dataclasses import fields
from itertools import islice
from typing import Any, Literal, TypeVar, Union, get_args, get_origin, get_type_hints

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
        return f"{type(value).__name__} of shape {show(tuple(shape))}"
    return repr(value)[: limit + 1]


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


def strict(cls: type[T], values: Mapping[str, Any], where: str) -> T:
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
        if not isinstance(value, list | tuple):
            raise ValueError(f"{where}={show(value)} must be a list")
        return tuple(_coerce(item, args[0], where) for item in value)
    if hint is float and isinstance(value, int) and not isinstance(value, bool):
        return float(value)
    if isinstance(value, float) and hint is float and not math.isfinite(value):
        raise ValueError(f"{where}={value} must be a finite number")
    if not isinstance(value, hint) or (isinstance(value, bool) and hint is not bool):
        raise ValueError(f"{where}={show(value)} must be of type {hint.__name__}, got {type(value).__name__}")
    return value


def positive(where: str, **values: float) -> None:
    """Raises ValueError for the first value that is not above zero."""
    for name, value in values.items():
        if not value > 0:
            raise ValueError(f"{_path(where, name)}={value} must be above 0")
