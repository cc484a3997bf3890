"""Pictures of figures: a PNG to look at and a JSON with every number in it.

Colours are safe for the colour-blind; results are coloured, controls grey and dashed; legends cover no data.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from zoo.files import to_json, whole, write
from zoo.lens.figure import Bars, Figure, Heat, Lines, Panel, Series, Strip

COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000")  # Okabe & Ito 2008
TINTS = ("#B3D9F2", "#F5B995", "#BFE5D6", "#E9CBDD")
MARKERS, DASHES = "os^Dvph", ("--", ":", "-.")
HATCHES = {"+": "////", "1": "...."}  # of the second and the third control, by marker
DPI = 140
STYLE: Any = {"font.size": 10, "axes.titlesize": 10.5, "legend.fontsize": 9, "axes.grid": True, "grid.alpha": 0.25}


def save(figure: Figure, folder: Path) -> Path:
    """Writes folder/NAME.json and folder/NAME.png, each whole or not at all; returns the PNG's path."""
    import matplotlib
    from matplotlib.figure import Figure as Canvas

    folder.mkdir(parents=True, exist_ok=True)
    numbers, picture = folder / f"{figure.name}.json", folder / f"{figure.name}.png"
    columns = min(figure.columns, len(figure.panels))
    grid = [figure.panels[i : i + columns] for i in range(0, len(figure.panels), columns)]
    heights = [max(map(_height, row)) for row in grid]
    width = 6.0 * columns if columns > 1 else 8.0
    words = (figure.caption, f"What it does not prove: {figure.caveat}")
    text = "\n".join(_wrapped(part, 0.97 * width) for part in words)
    with matplotlib.rc_context(STYLE):
        canvas = Canvas((width, sum(heights) + 0.6 + 0.17 * text.count("\n")), layout="constrained")
        axes = canvas.subplots(len(grid), columns, height_ratios=heights, squeeze=False)
        for ax in axes.flat[len(figure.panels) :]:
            ax.set_axis_off()
        for ax, panel in zip(axes.flat, figure.panels, strict=False):
            ax.set_title(panel.title)
            _DRAW[type(panel)](ax, panel)
        canvas.suptitle(figure.title, fontsize=12, fontweight="bold")
        canvas.supxlabel(text, x=0.01, ha="left", fontsize=9, color="0.25")
        with whole(picture) as temporary:
            canvas.savefig(temporary, dpi=DPI)
    write(numbers, to_json(figure.plain(), 1) + "\n")
    return picture


def _wrapped(text: str, width: float, size: float = 9) -> str:
    """`text` in lines of at most `width` inches, as the font has it: a W takes three times the room of an i."""
    from matplotlib.backends.backend_agg import RendererAgg
    from matplotlib.font_manager import FontProperties

    measure, font, lines = RendererAgg(1, 1, DPI).get_text_width_height_descent, FontProperties(size=size), [""]
    for word in text.split():
        longer = f"{lines[-1]} {word}".strip()
        if measure(longer, font, ismath=False)[0] <= width * DPI or not lines[-1]:
            lines[-1] = longer
        else:
            lines.append(word)
    return "\n".join(lines)


def _height(panel: Panel) -> float:
    if isinstance(panel, Strip):
        tokens = len(next(iter(panel.rows.values())))
        return 0.9 + 0.3 * (len(panel.rows) + 0.5) * math.ceil(tokens / _cells(panel)[1])
    if isinstance(panel, Bars) and panel.horizontal:
        return 1.3 + 0.3 * len(panel.series[0].x)
    return 4.3


def _styles(series: Sequence[Series]) -> list[dict[str, Any]]:
    """Colour, dashes and marker of each series, results and controls counted apart."""
    styles: list[dict[str, Any]] = []
    count = {False: 0, True: 0}
    for one in series:
        k = count[one.control]
        grey = {"color": "0.45", "linestyle": DASHES[k % 3], "marker": "x+1"[k % 3]}
        styles.append(grey if one.control else {"color": COLOURS[k % 7], "linestyle": "-", "marker": MARKERS[k % 7]})
        count[one.control] += 1
    return styles


def _floor(panel: Lines | Bars) -> float:
    """Where a zero stands on a log axis: a decade below all other values."""
    if not panel.log_y:
        return -math.inf
    return min((v for one in panel.series for v in (*one.y, *one.low) if v > 0), default=1.0) / 10


def _lifted(values: Sequence[float], floor: float) -> list[float]:
    return [floor if v < floor else v for v in values]


def _legend(ax: Any, panel: Lines | Bars, line: Any) -> None:
    floor = _floor(panel)
    if any(v < floor for one in panel.series for v in one.y):
        line(floor, color="0.6", linewidth=0.8, label="exactly 0 is drawn here")
    handles, labels = ax.get_legend_handles_labels()
    if len(labels) > 1:
        below = {"loc": "upper center", "bbox_to_anchor": (0.5, 0), "borderaxespad": 4.2}
        ax.legend(handles, labels, ncols=2 if max(map(len, labels)) < 45 else 1, frameon=False, **below)


def _draw_lines(ax: Any, panel: Lines) -> None:
    floor = _floor(panel)
    for one, style in zip(panel.series, _styles(panel.series), strict=True):
        if one.points:
            style |= {"linestyle": "none", "markerfacecolor": "none"}
        elif len(one.x) > 15 or one.control:
            style["marker"] = ""
        ax.plot(one.x, _lifted(one.y, floor), label=one.label, linewidth=1.8, markersize=5.5, **style)
        if one.low:
            band = (_lifted(one.low, floor), _lifted(one.high, floor))
            ax.fill_between(one.x, *band, color=style["color"], alpha=0.18, linewidth=0)
    ax.set(xlabel=panel.x_label, ylabel=panel.y_label)
    ax.set(xscale="log" if panel.log_x else "linear", yscale="log" if panel.log_y else "linear")
    for k, x in enumerate(dict.fromkeys(panel.marks.values())):
        label = ", ".join(name for name, place in panel.marks.items() if place == x)
        ax.axvline(x, color="0.2", linewidth=1, linestyle=(":", "-.")[k % 2], label=label)
    _legend(ax, panel, ax.axhline)


def _draw_bars(ax: Any, panel: Bars) -> None:
    names, count, across, floor = panel.series[0].x, len(panel.series), panel.horizontal, _floor(panel)
    for k, (one, style) in enumerate(zip(panel.series, _styles(panel.series), strict=True)):
        place = [i + (k - (count - 1) / 2) * 0.8 / count for i in range(len(names))]
        y, low, high = (_lifted(edge or one.y, floor) for edge in (one.y, one.low, one.high))
        reach = [
            [max(v - a, 0) for v, a in zip(y, low, strict=True)],
            [max(b - v, 0) for v, b in zip(y, high, strict=True)],
        ]
        look = {"fmt": style["marker"], "color": style["color"], "label": one.label}
        if not panel.log_y:
            bars = {"color": style["color"], "edgecolor": "white", "hatch": HATCHES.get(style["marker"])}
            (ax.barh if across else ax.bar)(place, y, 0.8 / count, **bars, linewidth=0, label=one.label)
            for at, size in zip(place, y, strict=True):
                if not size:  # nothing would be seen
                    ax.annotate("0", (size, at) if across else (at, size), ha="center", va="bottom", fontsize=9)
            look = {"fmt": "none", "ecolor": "0.1"}
        whiskers = {"xerr" if across else "yerr": reach if one.low else None}
        ax.errorbar(*((y, place) if across else (place, y)), **whiskers, **look, capsize=3, markersize=6)
    value, name = ("x", "y") if across else ("y", "x")
    ax.set(**{f"{value}scale": "log" if panel.log_y else "linear", f"{value}label": panel.y_label})
    ax.set(**{f"{name}ticks": range(len(names)), f"{name}ticklabels": names, f"{name}label": panel.x_label})
    ax.grid(False, axis=name)
    if across:
        ax.invert_yaxis()
    _legend(ax, panel, ax.axvline if across else ax.axhline)


def _draw_heat(ax: Any, panel: Heat) -> None:
    limit = max((abs(v) for row in panel.values for v in row if math.isfinite(v)), default=1.0)
    colours = {"cmap": "RdBu_r", "vmin": -limit, "vmax": limit} if panel.diverging else {"cmap": "cividis"}
    image = ax.imshow(panel.values, aspect="auto", interpolation="nearest", **colours)
    ax.figure.colorbar(image, ax=ax, label=panel.value_label)
    ax.set(xlabel=panel.x_label, ylabel=panel.y_label)
    for axis, names in ((ax.xaxis, panel.x_names), (ax.yaxis, panel.y_names)):
        if names:
            axis.set_ticks(range(len(names)), names)
    if max(len(panel.values), len(panel.values[0])) <= 12:
        for i, row in enumerate(panel.values):
            for j, value in enumerate(row):
                if math.isfinite(value):
                    red, green, blue, _ = image.cmap(image.norm(value))
                    ink = "black" if 0.3 * red + 0.6 * green + 0.1 * blue > 0.5 else "white"
                    ax.text(j, i, f"{value:.2g}", ha="center", va="center", fontsize=9, color=ink)
    ax.grid(False)


def _draw_strip(ax: Any, panel: Strip) -> None:
    from matplotlib.patches import Patch, Rectangle

    (width, per_line), step = _cells(panel), len(panel.rows) + 0.5
    for r, (label, tokens) in enumerate(panel.rows.items()):
        for i, (token, kind) in enumerate(zip(tokens, panel.kind_of[label], strict=True)):
            line, place = divmod(i, per_line)
            x, y = place * width, line * step + r
            if not place:
                ax.text(-1, y, label, ha="right", va="center", fontsize=9)
            ax.add_patch(Rectangle((x, y - 0.44), width - 0.2, 0.88, color=TINTS[kind % 4], linewidth=0))
            look = {"family": "monospace", "fontsize": 9, "weight": "bold" if kind else "normal"}
            ax.text(x + width / 2, y, _shown(token), ha="center", va="center", parse_math=False, **look)
    ax.set(xlim=(0, width * min(per_line, len(tokens))), ylim=(step * (line + 1) - 0.5, -0.6))
    ax.set_axis_off()
    handles = [Patch(color=TINTS[k % 4], label=kind) for k, kind in enumerate(panel.kinds)]
    ax.legend(handles=handles, loc="upper center", bbox_to_anchor=(0.5, 0), ncols=len(handles), frameon=False)


def _cells(panel: Strip) -> tuple[int, int]:
    """Characters that the longest token and a gap take, and how many of such cells a line of 88 has."""
    width = 1 + max(len(_shown(token)) for row in panel.rows.values() for token in row)
    return width, max(88 // width, 1)


def _shown(token: str) -> str:
    return token.replace("\n", "⏎").replace("\t", "⇥").replace(" ", "·")


_DRAW: dict[type, Any] = {Lines: _draw_lines, Bars: _draw_bars, Heat: _draw_heat, Strip: _draw_strip}
