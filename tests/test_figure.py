"""Figures: what is drawn is what is stored, and wrong data is refused."""

import json
import math
from pathlib import Path
from typing import Any

import pytest

from zoo.lens import draw
from zoo.lens.figure import Figure, Heat, Lines, Panel, Series

NAMES = ("transformer", "hypernet", "moe")
LINES = Lines(
    "growth",
    "steps",
    "loss (nats)",
    (
        Series("with ΔW", [*range(1, 5)], [4.0, 2.0, 1.0, 0.0], [3, 1, 0.5, 0], [5, 3, 2, 1]),
        Series("same, other path", (1, 2, 3, 4), (4.0, 2.0, 1.0, 0.5), points=True),
        Series("control: no ΔW", (1, 2, 3, 4), (5.0, 5.0, 5.0, 5.0), control=True),
    ),
    log_x=True,
    log_y=True,
    marks={"K = D": 3},
)
NAMED = Lines(
    "residuals",
    "",
    "largest |difference|",
    (
        Series("law", NAMES, (1e-15, 0.0, 2e-15), (1e-16, 0.0, 1e-15), (2e-15, 0.0, 3e-15)),
        Series("control: no patch", NAMES, (1.0, 2.0, 3.0), control=True),
    ),
    log_y=True,
)
HEAT = Heat("alignment", "token", "token", "cosine", ((1.0, math.nan), (-0.5, 1.0)), diverging=True)
TEXT = Heat(
    "text", "", "", "changed", ((0, 1), (0, 0)), y_names=("with", "without"), texts=(("a", "\n"), ("$x$", " b"))
)


def figure(*panels: Panel) -> Figure:
    return Figure("example", "A title", panels, "What is seen.", "that it is true.", {"seed": 0})


def axes_of(panel: Panel) -> Any:
    from matplotlib.figure import Figure as Canvas

    ax = Canvas().subplots()
    draw._DRAW[type(panel)](ax, panel)
    return ax


def test_every_kind_is_written_with_all_its_numbers(tmp_path: Path) -> None:
    path = draw.save(figure(LINES, NAMED, HEAT, TEXT), tmp_path / "new")
    assert path.read_bytes()[:8] == b"\x89PNG\r\n\x1a\n"
    assert sorted(p.name for p in path.parent.iterdir()) == ["example.json", "example.png"]
    data = json.loads((path.parent / "example.json").read_text())
    assert [panel["kind"] for panel in data["panels"]] == ["Lines", "Lines", "Heat", "Heat"]
    lines, named, heat, text = data["panels"]
    band = {"y": [4.0, 2.0, 1.0, 0.0], "low": [3, 1, 0.5, 0], "high": [5, 3, 2, 1]}
    assert lines["series"][0] == {"label": "with ΔW", "x": [1, 2, 3, 4], **band, "control": False, "points": False}
    assert lines["marks"] == {"K = D": 3}
    assert named["y_label"] == "largest |difference|"
    assert named["series"][1] == {**named["series"][1], "x": list(NAMES), "y": [1.0, 2.0, 3.0], "control": True}
    assert heat["values"] == [[1.0, None], [-0.5, 1.0]]
    assert text["texts"] == [["a", "\n"], ["$x$", " b"]]
    assert {"title", "caption", "caveat", "settings"} <= data.keys()


def test_a_failed_picture_leaves_the_old_files(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    draw.save(figure(LINES), tmp_path)
    before = {path.name: path.read_bytes() for path in tmp_path.iterdir()}

    def fail(ax: object, panel: object) -> None:
        raise RuntimeError("no picture")

    monkeypatch.setitem(draw._DRAW, Heat, fail)
    with pytest.raises(RuntimeError, match="no picture"):
        draw.save(figure(HEAT), tmp_path)
    assert {name: (tmp_path / name).read_bytes() for name in before} == before


@pytest.mark.parametrize("panel", [LINES, NAMED])
def test_numbers_drawn_are_those_given_and_zero_on_a_log_axis_stands_below_them(panel: Lines) -> None:
    ax = axes_of(panel)
    drawn = {line.get_label(): line for line in ax.get_lines()}
    for series in panel.series:
        assert list(drawn[series.label].get_ydata()) == list(series.y)
    assert (ax.get_xlabel(), ax.get_ylabel()) == (panel.x_label, panel.y_label)
    smallest = min(y for series in panel.series for y in series.y if y)
    zero, above, end = (ax.transData.transform((1, y))[1] for y in (0, smallest, 10 * smallest))
    assert end - above > 0.5 * (above - zero) > 1  # pixels
    assert axes_of(Lines("", "x", "y", (Series("a", (1, 2), (1.0, 2.0)),), log_y=True)).get_yscale() == "log"


def test_values_by_name_stand_side_by_side_with_their_ranges() -> None:
    ax = axes_of(NAMED)
    law, control = (line.get_xdata() for line in ax.get_lines())
    assert (control - law).tolist() == pytest.approx([0.1] * 3)
    assert [text.get_text() for text in ax.get_xticklabels()] == list(NAMES)
    (ranges,) = ax.collections
    assert [sorted(line[:, 1]) for line in ranges.get_segments()] == [[1e-16, 2e-15], [0.0, 0.0], [1e-15, 3e-15]]


def test_controls_are_grey_and_dashed_and_results_are_not() -> None:
    series = tuple(Series(str(k), (), (), control=k % 2 == 1) for k in range(6))
    styles = draw._styles(Lines("", "", "", series))
    controls, results = styles[1::2], styles[::2]
    assert {style["color"] for style in controls} == {"0.45"}
    assert "-" not in {style["linestyle"] for style in controls}
    assert len({style["linestyle"] for style in controls}) == 3
    assert len({style["color"] for style in results}) == 3
    assert {style["linestyle"] for style in results} == {"-"}


def test_texts_of_cells_are_shown_letter_by_letter() -> None:
    assert [text.get_text() for text in axes_of(TEXT).texts] == ["a", "⏎", "$x$", "·b"]
    assert not any(text.get_parse_math() for text in axes_of(TEXT).texts)


def test_a_caption_stays_within_its_picture(tmp_path: Path) -> None:
    import matplotlib.image

    wide = Figure("wide", "A title", (HEAT,), "An update W + ΔW stands for its context. " * 9, "that " * 60, columns=1)
    picture = matplotlib.image.imread(draw.save(wide, tmp_path))[..., :3]
    assert (picture[:, -4:] == 1).all()
    assert (picture[-100:, :400] < 0.5).any()
