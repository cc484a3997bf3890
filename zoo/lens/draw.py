"""Pictures of figures: a PNG to look at and a JSON with every number in it.

Colours are safe for the colour-blind; results are coloured, controls are grey and dashed, legends cover no data.
"""

from __future__ import annotations

import json
import math
import textwrap
from pathlib import Path
from typing import Any

from zoo.lens.figure import Bars, Figure, Heat, Lines, Panel, Series, Strip

COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000")  # Okabe & Ito 2008
MARKERS, DASHES = "os^Dvph", ("--", ":", "-.")
STYLE: Any = {"font.size": 10, "axes.titlesize": 10.5, "legend.fontsize": 9, "axes.grid": True, "grid.alpha": 0.25}


def save(figure: Figure, folder: Path) -> Path:
    """Writes folder/NAME.json and folder/NAME.png, each under a temporary name first; returns the PNG's path."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    folder.mkdir(parents=True, exist_ok=True)
    numbers, picture = folder / f"{figure.name}.json", folder / f"{figure.name}.png"
    parts = {path: path.with_suffix(f".tmp{path.suffix}") for path in (numbers, picture)}
    parts[numbers].write_text(json.dumps(figure.plain(), indent=1, ensure_ascii=False, allow_nan=False) + "\n")
    columns = min(figure.columns, len(figure.panels))
    grid = [figure.panels[i : i + columns] for i in range(0, len(figure.panels), columns)]
    heights = [max(_height(panel) for panel in row) for row in grid]
    with plt.rc_context(STYLE):
        width = 6.0 * columns if columns > 1 else 8.0
        text = [
            textwrap.fill(part, int(width * 14))
            for part in (figure.caption, f"What it does not prove: {figure.caveat}")
        ]
        height = sum(heights) + 0.4 + 0.17 * sum(part.count("\n") + 1 for part in text)
        canvas, axes = plt.subplots(
            len(grid), columns, figsize=(width, height), height_ratios=heights, squeeze=False, layout="constrained"
        )
        for row, row_axes in zip(grid, axes, strict=True):
            for panel, ax in zip(row, row_axes, strict=False):
                ax.set_title(panel.title)
                _DRAW[type(panel)](ax, panel)
            for ax in row_axes[len(row) :]:
                ax.set_axis_off()
        canvas.suptitle(figure.title, fontsize=12, fontweight="bold")
        canvas.supxlabel("\n".join(text), x=0.01, ha="left", fontsize=9, color="0.25")
        canvas.savefig(parts[picture], dpi=140)
        plt.close(canvas)
    for path, part in parts.items():
        part.replace(path)
    return picture


def _height(panel: Panel) -> float:
    if isinstance(panel, Strip):
        return 0.9 + 0.36 * len(panel.rows) * len(_broken(panel))
    if isinstance(panel, Bars) and panel.horizontal:
        return 1.3 + 0.3 * len(panel.series[0].x)
    return 4.2


def _styles(series: tuple[Series, ...]) -> list[dict[str, Any]]:
    """Colour, dashes and marker of each series: own colours for results, dashed greys for controls."""
    styles, results, controls = [], 0, 0
    for one in series:
        if one.control:
            styles.append({"color": "0.45", "linestyle": DASHES[controls % 3], "marker": "x+1"[controls % 3]})
            controls += 1
        else:
            styles.append({"color": COLOURS[results % 7], "linestyle": "-", "marker": MARKERS[results % 7]})
            results += 1
    return styles


def _above_zero(series: tuple[Series, ...], log: bool) -> tuple[Any, float]:
    """What to draw for y on a log axis, where a zero stands at a floor below all other values; and that floor."""
    if not log:
        return (lambda values: list(values)), -math.inf
    floor = min((v for s in series for v in (*s.y, *s.low) if v > 0), default=1.0) / 10
    return (lambda values: [v if not v <= 0 else floor for v in values]), floor


def _draw_lines(ax: Any, panel: Lines) -> None:
    drawn, floor = _above_zero(panel.series, panel.log_y)
    for one, style in zip(panel.series, _styles(panel.series), strict=True):
        marker = style.pop("marker")
        if one.points:
            style |= {"linestyle": "none", "marker": marker, "markerfacecolor": "none", "markersize": 6}
        elif len(one.x) <= 15 and not one.control:
            style |= {"marker": marker, "markersize": 5}
        ax.plot(one.x, drawn(one.y), label=one.label, linewidth=1.8, **style)
        if one.low:
            ax.fill_between(one.x, drawn(one.low), drawn(one.high), color=style["color"], alpha=0.18, linewidth=0)
    ax.set(xlabel=panel.x_label, ylabel=panel.y_label)
    ax.set_xscale("log" if panel.log_x else "linear")
    ax.set_yscale("log" if panel.log_y else "linear")
    _floor_note(ax, panel.series, floor)
    for label, x in panel.marks.items():
        ax.axvline(x, color="0.2", linewidth=1, linestyle=(0, (1, 2)))
        where = {"xy": (x, 0.5), "xycoords": ("data", "axes fraction"), "rotation": 90, "ha": "center", "va": "center"}
        ax.annotate(label, **where, fontsize=9, bbox={"facecolor": "white", "edgecolor": "none", "pad": 1})
    _legend(ax)


def _legend(ax: Any) -> None:
    handles, labels = ax.get_legend_handles_labels()
    if len(labels) > 1:  # below the axes: it covers no data
        columns = 1 if len(labels) < 3 and max(map(len, labels)) > 40 else 2
        ax.legend(handles, labels, loc="upper center", bbox_to_anchor=(0.5, -0.13), ncols=columns, frameon=False)


def _floor_note(ax: Any, series: tuple[Series, ...], floor: float, horizontal: bool = False) -> None:
    if math.isfinite(floor) and any(v <= 0 for one in series for v in one.y):
        (ax.axvline if horizontal else ax.axhline)(floor, color="0.6", linewidth=0.8, label="exactly 0 is drawn here")


def _draw_bars(ax: Any, panel: Bars) -> None:
    names, count, across = panel.series[0].x, len(panel.series), panel.horizontal
    drawn, floor = _above_zero(panel.series, panel.log_y)
    for k, (one, style) in enumerate(zip(panel.series, _styles(panel.series), strict=True)):
        place = [i + (k - (count - 1) / 2) * 0.8 / count for i in range(len(names))]
        y, colour = drawn(one.y), style["color"]
        low, high = (drawn(edge) if edge else y for edge in (one.low, one.high))
        whiskers = [[v - a for v, a in zip(y, low, strict=True)], [b - v for v, b in zip(y, high, strict=True)]]
        if not panel.log_y:
            (ax.barh if across else ax.bar)(place, y, 0.8 / count, label=one.label, color=colour, alpha=0.85)
        look = {"fmt": "none", "ecolor": "0.1"} if not panel.log_y else {"fmt": style["marker"], "color": colour}
        if panel.log_y or one.low:
            error = {"xerr" if across else "yerr": whiskers if one.low else None}
            label = one.label if panel.log_y else None
            ax.errorbar(*((y, place) if across else (place, y)), **error, **look, label=label, capsize=3, markersize=6)
    value, name = ("x", "y") if across else ("y", "x")
    ax.set(**{f"{value}scale": "log" if panel.log_y else "linear", f"{value}label": panel.y_label})
    ax.set(**{f"{name}ticks": range(len(names)), f"{name}ticklabels": names, f"{name}label": panel.x_label})
    ax.grid(False, axis=name)
    if across:
        ax.invert_yaxis()
    _floor_note(ax, panel.series, floor, across)
    _legend(ax)


def _draw_heat(ax: Any, panel: Heat) -> None:
    rows, columns = len(panel.values), len(panel.values[0])
    known = [v for row in panel.values for v in row if math.isfinite(v)]
    limit = max(map(abs, known), default=1.0)
    colours = {"cmap": "RdBu_r", "vmin": -limit, "vmax": limit} if panel.diverging else {"cmap": "cividis"}
    image = ax.imshow(panel.values, aspect="auto", interpolation="nearest", **colours)
    ax.figure.colorbar(image, ax=ax, label=panel.value_label)
    ax.set(xlabel=panel.x_label, ylabel=panel.y_label)
    for axis, names in ((ax.xaxis, panel.x_names), (ax.yaxis, panel.y_names)):
        if names:
            axis.set_ticks(range(len(names)), names)
    if rows <= 12 and columns <= 12:
        for i, row in enumerate(panel.values):
            for j, value in enumerate(row):
                if math.isfinite(value):
                    red, green, blue, _ = image.cmap(image.norm(value))
                    ink = "black" if 0.3 * red + 0.6 * green + 0.1 * blue > 0.5 else "white"
                    ax.text(j, i, f"{value:.2g}", ha="center", va="center", fontsize=9, color=ink)
    ax.grid(False)


def _broken(panel: Strip, width: int = 88) -> list[list[int]]:
    """Token numbers, broken into lines of at most `width` characters of the widest token at each place."""
    lines: list[list[int]] = [[]]
    used = 0
    for i, size in enumerate(_widths(panel)):
        if used + size > width and lines[-1]:
            lines.append([])
            used = 0
        lines[-1].append(i)
        used += size
    return lines


def _widths(panel: Strip) -> list[int]:
    return [max(len(_shown(token)) for token in column) + 1 for column in zip(*panel.rows.values(), strict=True)]


def _shown(token: str) -> str:
    return token.replace("\n", "⏎").replace("\t", "⇥").replace(" ", "·")


def _draw_strip(ax: Any, panel: Strip) -> None:
    from matplotlib.patches import Patch, Rectangle

    widths, lines, count = _widths(panel), _broken(panel), len(panel.rows)
    tints = ("#B3D9F2", "#F5B995", "#BFE5D6", "#E9CBDD")
    for n, line in enumerate(lines):
        for r, (label, tokens) in enumerate(panel.rows.items()):
            y, x = n * (count + 0.5) + r, 0
            ax.text(-1, y, label, ha="right", va="center", fontsize=9)
            for i in line:
                kind = panel.kind_of[label][i]
                ax.add_patch(Rectangle((x, y - 0.45), widths[i] - 0.15, 0.9, color=tints[kind % 4], linewidth=0))
                middle = x + (widths[i] - 0.15) / 2
                weight = "bold" if kind else "normal"
                look = {"family": "monospace", "parse_math": False, "fontsize": 9, "weight": weight}
                ax.text(middle, y, _shown(tokens[i]), ha="center", va="center", **look)
                x += widths[i]
    ax.set(xlim=(0, max(sum(widths[i] for i in line) for line in lines)), ylim=(len(lines) * (count + 0.5) - 0.5, -0.6))
    ax.set_axis_off()
    handles = [Patch(color=tints[k % 4], label=kind) for k, kind in enumerate(panel.kinds)]
    ax.legend(handles=handles, loc="upper center", bbox_to_anchor=(0.5, 0), ncols=len(handles), frameon=False)


_DRAW: dict[type, Any] = {Lines: _draw_lines, Bars: _draw_bars, Heat: _draw_heat, Strip: _draw_strip}
