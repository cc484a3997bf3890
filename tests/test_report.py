"""What a person reads: the opening lines name sizes, the closing table holds every number, the curve is a picture."""

import contextlib
import io
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import matplotlib.image
import pytest
import torch

import zoo
from runs import small
from zoo.records import summary as report


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, Any], str]:
    """A run's folder, metrics and what it printed."""
    torch.set_num_threads(1)
    folder, printed = tmp_path_factory.mktemp("report") / "run", io.StringIO()
    with contextlib.redirect_stdout(printed):
        metrics = small(folder, "moe")
    return folder, metrics, printed.getvalue()


def test_opening(run: tuple[Path, dict[str, Any], str]) -> None:
    folder, metrics, printed = run
    opening = printed.split("\n\n")[0]
    assert f"moe on regression: {metrics['params_total']:,} parameters\n" in opening
    assert "6 steps of 8 sequences of 8 tokens on 1 × cpu, 32-true" in opening
    assert f"run folder: {folder}" in opening


def test_closing_holds_every_number(run: tuple[Path, dict[str, Any], str]) -> None:
    folder, metrics, printed = run
    table = report.closing(metrics)
    assert table in printed
    for value in metrics["test"].values():
        assert f"  {value:.4f}\n" in table or f"  {value:.1e}\n" in table
    for text in (
        "moe on regression, seed 0, 6 steps",
        f"{metrics['params_total']:,} ({metrics['params_active']:,} active)",
        f"{metrics['flops_per_token']:,.0f}",
        f"{metrics['tokens_per_second']:,.0f} tokens/s",
        str(folder),
        f'zoo.load("{metrics["checkpoint"]}")',
    ):
        assert text in table
    rows = table.splitlines()[3:]
    start = next(row for row in rows if row.startswith("parameters")).index(f"{metrics['params_total']:,}")
    assert all(row[start - 2 : start] == "  " and row[start] != " " for row in rows)  # values stand in one column


@pytest.mark.parametrize(("value", "text"), [(0.0, "0.0000"), (0.12345, "0.1235"), (2e-15, "2.0e-15"), (-9, "-9.0000")])
def test_numbers(value: float, text: str, run: tuple[Path, dict[str, Any], str]) -> None:
    assert f"  {text}\n" in report.closing({**run[1], "test": {"nmse": value}})


def test_the_curve_is_a_picture(run: tuple[Path, dict[str, Any], str]) -> None:
    folder, _, _ = run
    picture = matplotlib.image.imread(folder / "curve.png")
    assert picture.shape[:2] == (480, 720)
    colours = {tuple(colour) for colour in (picture[..., :3] * 255).round().astype(int).reshape(-1, 3).tolist()}
    # training loss, validation loss, reference
    assert {(0x00, 0x72, 0xB2), (0xD5, 0x5E, 0x00)} <= colours
    assert any(r == g == b and 90 < r < 115 for r, g, b in colours)
    assert not list(folder.glob("*tmp*"))


def test_the_files_that_a_run_reads_are_printed(run: tuple[Path, dict[str, Any], str]) -> None:
    """Their names may come out of somebody else's checkpoint."""
    model: Any = zoo.load(run[0])
    model.task.config = SimpleNamespace(name="prompts", files=("a.jsonl", "b/c.jsonl"))
    trainer: Any = SimpleNamespace(
        world_size=1, precision="32-true", strategy=SimpleNamespace(root_device=model.device)
    )
    assert "\nreads a.jsonl, b/c.jsonl\n" in report.opening(model, trainer, run[0])
