"""Pictures of figures: a PNG to look at and a JSON with every number in it.

Colours are safe for the colour-blind; results are coloured, controls grey and dashed; legends cover no data.
"""

from __future__ import annotations

import textwrap
from itertools import cycle, zip_longest
from pathlib import Path
from typing import Any

import numpy as np

from zoo.files import to_json, whole, write
from zoo.lens.figure import Figure, Heat, Lines

COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000")  # Okabe & Ito 2008
RESULTS = [{"color": COLOURS[k], "linestyle": "-", "marker": "os^Dvph"[k]} for k in range(7)]
CONTROLS = [{"color": "0.45", "linestyle": ("--", ":", "-.")[k], "marker": "x+1"[k]} for k in range(3)]
DPI = 140
LETTERS = 14  # of a caption, to the inch
STYLE: Any = {"font.size": 10, "axes.titlesize": 10.5, "legend.fontsize": 9, "axes.grid": True, "grid.alpha": 0.25}


def save(figure: Figure, folder: Path) -> Path:
    """Writes folder/NAME.json and folder/NAME.png, each whole or not at all; returns the PNG's path."""
    import matplotlib
    from matplotlib.figure import Figure as Canvas

    folder.mkdir(parents=True, exist_ok=True)
    picture, count = folder / f"{figure.name}.png", len(figure.panels)
    columns = min(figure.columns, count)
    rows = [len(panel.y_names) if isinstance(panel, Heat) else 0 for panel in figure.panels]
    heights = [max(4.3, 1 + 0.28 * max(rows[i : i + columns])) for i in range(0, count, columns)]
    width = 6.0 * columns if columns > 1 else 8.0
    words = (figure.caption, f"What it does not prove: {figure.caveat}")
    text = "\n".join(textwrap.fill(part, int(LETTERS * width)) for part in words)
    with matplotlib.rc_context(STYLE):
        canvas = Canvas((width, sum(heights) + 0.6 + 0.17 * text.count("\n")), layout="constrained")
        axes = canvas.subplots(len(heights), columns, height_ratios=heights, squeeze=False).flat
        for ax, panel in zip_longest(axes, figure.panels):
            if panel:
                ax.set_title(panel.title)
                _DRAW[type(panel)](ax, panel)
            else:
                ax.set_axis_off()
        canvas.suptitle(figure.title, fontsize=12, fontweight="bold")
        canvas.supxlabel(text, x=0.01, ha="left", fontsize=9, color="0.25")
        with whole(picture) as temporary:
            canvas.savefig(temporary, dpi=DPI)
    write(picture.with_suffix(".json"), to_json(figure.plain(), 1) + "\n")
    return picture


def _styles(panel: Lines) -> list[dict[str, Any]]:
    """Colour, dashes and marker of each series; results and controls are counted apart."""
    results, controls = cycle(RESULTS), cycle(CONTROLS)
    return [dict(next(controls if one.control else results)) for one in panel.series]


def _draw_lines(ax: Any, panel: Lines) -> None:
    named = any(isinstance(x, str) for one in panel.series for x in one.x)
    for k, (one, style) in enumerate(zip(panel.series, _styles(panel), strict=True)):
        x: Any = one.x
        if named:  # side by side
            x = np.arange(len(one.x)) + 0.1 * (k - (len(panel.series) - 1) / 2)
        if one.points or named:
            style |= {"linestyle": "none", "markerfacecolor": "none"}
        elif len(x) > 15 or one.control:
            style["marker"] = ""
        ax.plot(x, one.y, label=one.label, linewidth=1.8, markersize=5.5, **style)
        if len(one.low) and (named or one.points):
            ax.vlines(x, one.low, one.high, color=style["color"], linewidth=1)
        elif len(one.low):
            ax.fill_between(x, one.low, one.high, color=style["color"], alpha=0.18, linewidth=0)
    for k, (name, place) in enumerate(panel.marks.items()):
        ax.axvline(place, color="0.2", linewidth=1, linestyle=(":", "-.")[k % 2], label=name)
    ax.set(xlabel=panel.x_label, ylabel=panel.y_label, xscale="log" if panel.log_x else "linear")
    above = [y for one in panel.series for y in one.y if y > 0]
    if panel.log_y and len(above) < sum(len(one.y) for one in panel.series):
        ax.set_yscale("symlog", linthresh=min(above, default=1))
    elif panel.log_y:
        ax.set_yscale("log")
    names = [textwrap.fill(name, 15) for name in panel.series[0].x] if named else []
    if names:
        ax.set_xticks(range(len(names)), names)
    handles, labels = ax.get_legend_handles_labels()
    if len(labels) > 1:
        rows = max((name.count("\n") for name in names), default=0)
        below = {"loc": "upper center", "bbox_to_anchor": (0.5, 0), "borderaxespad": 4.2 + 1.3 * rows}
        ax.legend(handles, labels, ncols=2 if max(map(len, labels)) < 45 else 1, frameon=False, **below)


def _draw_heat(ax: Any, panel: Heat) -> None:
    values = np.array(panel.values)
    limit = abs(values[np.isfinite(values)]).max(initial=0) or 1
    colours = {"cmap": "RdBu_r", "vmin": -limit, "vmax": limit} if panel.diverging else {"cmap": "cividis"}
    pale = 0.4 if panel.texts else 1  # black letters stand out
    image = ax.imshow(values, aspect="auto", interpolation="nearest", alpha=pale, **colours)
    ax.figure.colorbar(image, ax=ax, label=panel.value_label)
    ax.set(xlabel=panel.x_label, ylabel=panel.y_label)
    for axis, names in ((ax.xaxis, panel.x_names), (ax.yaxis, panel.y_names)):
        if names:
            long = {"rotation": 30, "ha": "right"} if axis is ax.xaxis and sum(map(len, names)) > 60 else {}
            axis.set_ticks(range(len(names)), names, **long)
    for (i, j), text in np.ndenumerate(np.array(panel.texts)):
        ax.text(j, i, _shown(text), ha="center", va="center", family="monospace", fontsize=9, parse_math=False)
    ax.grid(False)


def _shown(token: str) -> str:
    marks = {"\n": "⏎", "\t": "⇥", " ": "·"}
    return "".join(marks.get(c, c if c.isprintable() else "\N{REPLACEMENT CHARACTER}") for c in token)


_DRAW: dict[type, Any] = {Lines: _draw_lines, Heat: _draw_heat}
