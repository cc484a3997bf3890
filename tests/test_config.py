"""Options are strict: typos are named with a suggestion, and values have the types and choices that were declared."""

from __future__ import annotations

from collections import OrderedDict
from dataclasses import dataclass
from typing import Any, Literal, Optional

import pytest
import torch

from zoo.config import did_you_mean, lookup, positive, show, strict


@dataclass(frozen=True)
class Options:
    size: int = 1
    rate: float = 0.5
    name: str = "a"
    loud: bool = False
    kind: Literal["low", "high"] = "low"
    rank: int | None = None
    old: Optional[float] = None  # noqa: UP045  both spellings of an optional option
    choice: Literal["x", "y"] | None = None
    items: tuple[str, ...] = ("a",)
    group: dict[str, Any] | None = None


ACCEPTED = [
    ("size", 3, 3),
    ("rate", 0.25, 0.25),
    ("rate", 2, 2.0),
    ("name", "b", "b"),
    ("loud", True, True),
    ("kind", "high", "high"),
    ("rank", None, None),
    ("rank", 4, 4),
    ("old", 1, 1.0),
    ("old", None, None),
    ("choice", "y", "y"),
    ("choice", None, None),
    ("items", ["b", "c"], ("b", "c")),
    ("items", ("b",), ("b",)),
    ("items", [], ()),
    ("items", "ab", ("ab",)),
    ("size", 1e3, 1000),
]
REFUSED = [
    ("size", "3", "where.size='3' must be of type int, got str"),
    ("size", 3.5, "where.size=3.5 must be of type int, got float"),
    ("size", True, "where.size=True must be of type int, got bool"),
    ("size", None, "where.size=None must be of type int, got NoneType"),
    ("rate", "0.1", "where.rate='0.1' must be of type float, got str"),
    ("rate", False, "where.rate=False must be of type float, got bool"),
    ("rate", None, "where.rate=None must be of type float"),
    ("rate", float("nan"), "where.rate=nan must be a finite number"),
    ("rate", float("inf"), "where.rate=inf must be a finite number"),
    ("name", 1, "where.name=1 must be of type str, got int"),
    ("loud", 1, "where.loud=1 must be of type bool, got int"),
    ("kind", "hihg", "where.kind='hihg' must be one of low, high; did you mean high?"),
    ("kind", None, "where.kind=None must be one of low, high"),
    ("kind", 1, "where.kind=1 must be one of low, high"),
    ("rank", "4", "where.rank='4' must be of type int, got str"),
    ("choice", "z", "where.choice='z' must be one of x, y"),
    ("items", 1, "where.items=1 must be a list"),
    ("items", [1], "where.items=1 must be of type str, got int"),
    ("items", None, "where.items=None must be a list"),
]


@pytest.mark.parametrize(("key", "value", "stored"), ACCEPTED)
def test_values_of_the_declared_type_are_taken(key: str, value: Any, stored: Any) -> None:
    taken = getattr(strict(Options, {key: value}, "where"), key)
    assert taken == stored
    assert type(taken) is type(stored)


@pytest.mark.parametrize(("key", "value", "message"), REFUSED)
def test_other_values_are_refused_by_name(key: str, value: Any, message: str) -> None:
    with pytest.raises(ValueError) as error:  # noqa: PT011  the whole message is compared below
        strict(Options, {key: value}, "where")
    assert message in str(error.value)


def test_no_options_are_all_defaults() -> None:
    assert strict(Options, {}, "where") == Options()


@pytest.mark.parametrize(
    ("key", "hint"), [("sise", "; did you mean size?"), ("zzz", "; known: size, rate, name, loud, kind, rank")]
)
def test_unknown_keys_are_named(key: str, hint: str) -> None:
    with pytest.raises(ValueError, match=f"where.{key} is not an option of Options{hint}".replace("?", r"\?")):
        strict(Options, {"size": 1, key: 1}, "where")


@pytest.mark.parametrize("values", [None, "transformer", ["a"], 3])
def test_a_group_must_be_a_mapping(values: Any) -> None:
    with pytest.raises(ValueError, match="where must be a group of options, got"):
        strict(Options, values, "where")


def test_lookup_names_what_exists() -> None:
    table = {"transformer": 1, "moe": 2}
    assert lookup("moe", table, "model") == 2
    with pytest.raises(ValueError, match=r"model 'transfomer' does not exist; did you mean transformer\?"):
        lookup("transfomer", table, "model")
    for wrong in (None, 3, ["q"], "zzz"):
        with pytest.raises(ValueError, match="does not exist; known: transformer, moe"):
            lookup(wrong, table, "model")


def test_did_you_mean_lists_all_names_where_none_is_close() -> None:
    assert did_you_mean("hypernett", ["hypernet", "moe"]) == "; did you mean hypernet?"
    assert did_you_mean("q", ["hypernet", "moe"]) == "; known: hypernet, moe"


@pytest.mark.parametrize("wrong", [0, -1, 0.0, float("nan")])
def test_positive_names_the_first_that_is_not(wrong: float) -> None:
    positive("model", dim=1, layers=0.1)
    with pytest.raises(ValueError, match=f"model.layers={wrong} must be above 0"):
        positive("model", dim=1, layers=wrong, heads=0)


def test_messages_show_any_value_in_a_few_characters() -> None:
    nested: Any = []
    for _ in range(40):
        nested = [nested, nested]
    deep: Any = []
    for _ in range(200_000):
        deep = [deep]
    for value in (nested, deep, {"a": nested}, OrderedDict(a=nested), "x" * 10**6, torch.zeros(10**6)):
        assert len(show(value)) <= 80, show(value)
        with pytest.raises(ValueError, match="size") as error:
            strict(Options, {"size": value}, "a")
        assert len(str(error.value)) < 300
    assert show(10**10**5) == "an integer of 332193 bits"
    assert show([1, "a", {"b": (2.5, None)}]) == "[1, 'a', {'b': (2.5, None)}]"
