"""Options are strict: typos are named with a suggestion, and values have the types and choices that were declared."""

from __future__ import annotations

from collections import OrderedDict
from dataclasses import dataclass
from enum import Enum
from pathlib import Path
from typing import Any, Literal, Optional

import numpy as np
import pytest
import torch

import zoo
from runs import one_line, small
from zoo.config import from_dict, lookup, plain, require_positive, show


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
    ("loud", 1, "where.loud=1 must be true or false, got int"),
    ("kind", "hihg", "where.kind 'hihg' does not exist; did you mean high?"),
    ("kind", None, "where.kind None does not exist; known: low, high"),
    ("kind", 1, "where.kind 1 does not exist; known: low, high"),
    ("rank", "4", "where.rank='4' must be of type int, got str"),
    ("choice", "z", "where.choice 'z' does not exist; known: x, y"),
    ("items", 1, "where.items=1 must be a list"),
    ("items", [1], "where.items=1 must be of type str, got int"),
    ("items", None, "where.items=None must be a list"),
    ("sise", 1, "where.sise is not an option of Options; did you mean size?"),
    ("zzz", 1, "where.zzz is not an option of Options; known: size, rate, name, loud, kind, rank"),
]


@pytest.mark.parametrize(("key", "value", "stored"), ACCEPTED)
def test_values_of_the_declared_type_are_taken(key: str, value: Any, stored: Any) -> None:
    taken = getattr(from_dict(Options, {key: value}, "where"), key)
    assert taken == stored
    assert type(taken) is type(stored)


@pytest.mark.parametrize(("key", "value", "message"), REFUSED)
def test_other_values_are_refused_by_name(key: str, value: Any, message: str) -> None:
    assert message in one_line(lambda: from_dict(Options, {key: value}, "where"))


@pytest.mark.parametrize("values", [None, "transformer", ["a"], 3])
def test_a_group_must_be_a_mapping(values: Any) -> None:
    with pytest.raises(ValueError, match="where must be a group of options, got"):
        from_dict(Options, values, "where")


def test_lookup_names_what_exists() -> None:
    table = {"transformer": 1, "moe": 2}
    assert lookup("moe", table, "model") == 2
    with pytest.raises(ValueError, match=r"model 'transfomer' does not exist; did you mean transformer\?"):
        lookup("transfomer", table, "model")
    for wrong in (None, 3, ["q"], "zzz"):
        with pytest.raises(ValueError, match="does not exist; known: transformer, moe"):
            lookup(wrong, table, "model")


@pytest.mark.parametrize("wrong", [0, -1, 0.0, float("nan")])
def test_positive_names_the_first_that_is_not(wrong: float) -> None:
    require_positive("model", dim=1, layers=0.1)
    with pytest.raises(ValueError, match=f"model.layers={wrong} must be above 0"):
        require_positive("model", dim=1, layers=wrong, heads=0)


def test_messages_show_any_value_in_a_few_characters() -> None:
    nested: Any = []
    for _ in range(40):
        nested = [nested, nested]
    deep: Any = []
    for _ in range(200_000):
        deep = [deep]
    for value in (nested, deep, {"a": nested}, "x" * 10**6, torch.zeros(10**6)):
        assert len(show(value)) <= 80, show(value)
        assert len(one_line(lambda value=value: from_dict(Options, {"size": value}, "a"))) < 300
    assert len(show(10**4000)) <= 80
    assert show([1, "a", {"b": (2.5, None)}]) == "[1, 'a', {'b': (2.5, None)}]"


class Colour(Enum):
    RED = np.str_("red")


@pytest.mark.parametrize(
    ("value", "meant"),
    [
        *(
            (np.float64(0.5), 0.5),
            (np.float32(0.5), 0.5),
            (np.int64(3), 3),
            (np.bool_(True), True),
            (np.str_("a"), "a"),
        ),
        *((np.array([1, 2]), [1, 2]), ([np.int8(1)], [1]), ((1, (2.5,)), [1, [2.5]]), (range(2), [0, 1])),
        *((Path("a/b"), "a/b"), (Colour.RED, "red"), (torch.tensor(2), 2), (torch.ones(2), [1.0, 1.0]), (None, None)),
        *((OrderedDict(a=np.float64(1)), {"a": 1.0}), (True, True), (1e3, 1e3)),
    ],
    ids=str,
)
def test_values_become_plain(value: Any, meant: Any) -> None:
    made = plain(value)
    assert repr(made) == repr(meant)  # the types, too


@pytest.mark.parametrize("value", [b"a", {1, 2}, 1j, object(), np.complex128(1), np.datetime64("2020-01-01")], ids=type)
def test_what_has_no_plain_meaning_is_refused_before_anything_starts(value: Any, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"^(optim\.lr|model\.hidden)=.* cannot be stored: give a number"):
        small(tmp_path / "run", optim={"lr": value})
    with pytest.raises(ValueError, match=r"^model\.hidden=.* cannot be stored"):
        small(tmp_path / "run", model_options={"hidden": [[value]]})
    assert not (tmp_path / "run").exists()


def test_endless_values_are_refused() -> None:
    endless: list[Any] = []
    endless.append(endless)
    with pytest.raises(ValueError, match=r"a=.* cannot be stored"):
        plain({"a": endless})


def test_a_run_takes_what_users_have_at_hand_and_can_be_read_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setenv("ZOO_CACHE", "~/cache")
    (tmp_path / "a.txt").write_text("To be, or not to be. " * 99)
    zoo.train(
        model={"name": np.str_("transformer"), "dim": np.int64(16), "layers": 1.0, "heads": torch.tensor(2)},
        task={"name": "text", "files": "~/a.txt", "tokens": 3e1},
        optim={"lr": np.logspace(-3, -2, 3)[1], "steps": np.int32(2), "batch_size": 4, "betas": np.array([0.9, 0.95])},
        trainer={"accelerator": np.str_("cpu"), "devices": np.int64(1), "enable_progress_bar": np.bool_(False)},
        validation_batches=1,
        test_batches=1,
        out=Path("~/run"),
    )
    model = zoo.load("~/run")
    assert model.optim.lr == pytest.approx(10**-2.5)
    assert (model.optim.betas, model.task.config.tokens) == ((0.9, 0.95), 30)
    assert zoo.train(resume="~/run")["steps"] == 2
    assert {path.name for path in tmp_path.iterdir()} == {"a.txt", "run", "cache"}


@pytest.mark.parametrize(("steps", "warmup"), [(1, 0), (2, 0), (40, 2), (1000, 50), (10**6, 50)])
def test_warmup_fits_the_steps(steps: int, warmup: int) -> None:
    optim = zoo.models.Transformer({"name": "transformer"}, {"name": "noise"}, {"steps": steps}, 0).optim
    assert (optim.steps, optim.warmup) == (steps, warmup)
