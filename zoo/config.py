"""Strict options: frozen dataclasses filled from plain dicts, with every default written down and every typo named."""

from __future__ import annotations

import difflib
import math
import types
from collections.abc import Iterable, Mapping
from dataclasses import fields
from typing import Any, Literal, TypeVar, Union, get_args, get_origin, get_type_hints

T = TypeVar("T")


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
        raise ValueError(f"{what} {name!r} does not exist{did_you_mean(str(name), table)}")
    return table[name]


def strict(cls: type[T], values: Mapping[str, Any], where: str) -> T:
    """A `cls` from the plain values of group `where`, "" at the top; raises ValueError for unknown keys, wrong types
    and values that are not allowed."""
    if not isinstance(values, Mapping):
        raise ValueError(f"{where or 'config'} must be a group of options, got {values!r}")
    hints = get_type_hints(cls)
    names = [f.name for f in fields(cls)]  # type: ignore[arg-type]
    for key in values:
        if key not in names:
            raise ValueError(f"{_path(where, key)} is not an option of {cls.__name__}{did_you_mean(str(key), names)}")
    return cls(**{key: _coerce(value, hints[key], _path(where, key)) for key, value in values.items()})


def _path(where: str, key: object) -> str:
    return f"{where}.{key}" if where else str(key)


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
            raise ValueError(f"{where}={value!r} must be one of {', '.join(choices)}{_closest(str(value), choices)}")
        return value
    if origin is tuple:
        if not isinstance(value, list | tuple):
            raise ValueError(f"{where}={value!r} must be a list")
        return tuple(_coerce(item, args[0], where) for item in value)
    if hint is float and isinstance(value, int) and not isinstance(value, bool):
        return float(value)
    if isinstance(value, float) and hint is float and not math.isfinite(value):
        raise ValueError(f"{where}={value} must be a finite number")
    if not isinstance(value, hint) or (isinstance(value, bool) and hint is not bool):
        raise ValueError(f"{where}={value!r} must be of type {hint.__name__}, got {type(value).__name__}")
    return value


def positive(where: str, **values: float) -> None:
    """Raises ValueError for the first value that is not above zero."""
    for name, value in values.items():
        if not value > 0:
            raise ValueError(f"{_path(where, name)}={value} must be above 0")
