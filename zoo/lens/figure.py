"""Figures as data: every number that is drawn, its unit, what the figure shows and what it does not prove.

A figure is one or more panels: Lines or Heat. zoo.lens.draw makes pictures of them.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

from zoo.files import to_json


@dataclass(frozen=True)
class Series:
    """y at x, which are numbers, or names alike in all series of a panel, and the range low to high around y.

    control: a reference, drawn in grey. points: markers without a line and ranges as whiskers, as all values by name.
    """

    label: str
    x: Sequence[Any]
    y: Sequence[float]
    low: Sequence[float] = ()
    high: Sequence[float] = ()
    control: bool = False
    points: bool = False


@dataclass(frozen=True)
class Axes:
    """The words at a panel's axes."""

    title: str
    x_label: str
    y_label: str


@dataclass(frozen=True)
class Lines(Axes):
    """Curves over numbers, ranges as bands, or points over names, ranges as whiskers; marks: vertical lines {label: x}.

    On a logarithmic y axis with a value of 0, the axis is linear below the smallest other value.
    """

    series: tuple[Series, ...]
    log_x: bool = False
    log_y: bool = False
    marks: Mapping[str, float] = field(default_factory=dict)


@dataclass(frozen=True)
class Heat(Axes):
    """values[row][column] as colours, NaN left blank; diverging: colours symmetric about zero; texts: of the cells."""

    value_label: str
    values: Sequence[Sequence[float]]
    x_names: Sequence[str] = ()
    y_names: Sequence[str] = ()
    diverging: bool = False
    texts: Sequence[Sequence[str]] = ()


Panel = Lines | Heat


@dataclass(frozen=True)
class Figure:
    """Panels under one title; caption: what they show; caveat: what they do not prove; settings: how to repeat them."""

    name: str
    title: str
    panels: tuple[Panel, ...]
    caption: str
    caveat: str
    settings: Mapping[str, float | str] = field(default_factory=dict)
    columns: int = 2

    def plain(self) -> dict[str, Any]:
        """The figure as JSON data; panels name their kind, numbers that are not finite are null."""
        panels = [{"kind": type(panel).__name__, **asdict(panel)} for panel in self.panels]
        return json.loads(to_json({**asdict(self), "panels": panels}))
