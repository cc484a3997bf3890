"""What a person reads: the opening lines name sizes, the closing table holds every number, the curve is a picture."""

import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import matplotlib.image
import pytest
import torch

import zoo
from zoo.training import summary as report

QUIET = {"accelerator": "cpu", "enable_progress_bar": False}


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, Any], str]:
    """A run's folder, metrics and what it printed."""
    import contextlib
    import io

    torch.set_num_threads(1)
    folder, printed = tmp_path_factory.mktemp("report") / "run", io.StringIO()
    with contextlib.redirect_stdout(printed):
        metrics = zoo.train(
            model={"name": "moe", "dim": 16, "layers": 1, "heads": 2, "hidden": 8},
            task={"name": "regression", "points": 5, "queries": 3},
            optim={"steps": 4, "batch_size": 8, "warmup": 1},
            trainer=QUIET,
            out=str(folder),
            validate_every=2,
            log_every=1,
            validation_batches=1,
            test_batches=1,
        )
    return folder, metrics, printed.getvalue()


def test_opening(run: tuple[Path, dict[str, Any], str]) -> None:
    folder, metrics, printed = run
    opening = printed.split("\n\n")[0]
    assert f"moe on regression: {metrics['params_total']:,} parameters (" in opening
    for part, count in metrics["params"].items():
        assert part in ("total", "active") or not count or f"{part} {count:,}" in opening
    assert "4 steps of 8 sequences of 8 tokens on 1 × cpu, 32-true" in opening
    assert f"run folder: {folder}" in opening


def test_closing_holds_every_number(run: tuple[Path, dict[str, Any], str]) -> None:
    folder, metrics, printed = run
    table = report.closing(metrics)
    assert table in printed
    assert "moe on regression, seed 0, 4 steps" in table
    for value in metrics["test"].values():
        assert any(float(f"{value:.1e}") == float(f"{float(word):.1e}") for word in table.split() if _is_number(word))
    for text in (
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


def _is_number(word: str) -> bool:
    try:
        float(word)
    except ValueError:
        return False
    return True


@pytest.mark.parametrize(
    ("value", "text"), [(0.0, "0.0000"), (0.12345, "0.1235"), (2e-15, "2.0e-15"), (-0.5, "-0.5000"), (12.0, "12.0000")]
)
def test_numbers(value: float, text: str) -> None:
    assert report._number(value) == text


def test_the_curve_is_a_picture(run: tuple[Path, dict[str, Any], str]) -> None:
    folder, _, _ = run
    picture = matplotlib.image.imread(folder / "curve.png")
    assert picture.shape[:2] == (480, 720)
    colours = {tuple(colour) for colour in (picture[..., :3] * 255).round().astype(int).reshape(-1, 3).tolist()}
    # training loss, validation loss, reference
    assert {(0x00, 0x72, 0xB2), (0xD5, 0x5E, 0x00)} <= colours
    assert any(r == g == b and 90 < r < 115 for r, g, b in colours)
    assert not list(folder.glob("*tmp*"))


def test_a_curve_is_drawn_whole_or_not_at_all(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    row = {"step": 1, "loss": 1.0, "lr": 0.1}
    (tmp_path / "metrics.jsonl").write_text(json.dumps(row) + "\n")
    report.curve(tmp_path, "a run", "nats", {})
    before = (tmp_path / "curve.png").read_bytes()

    def die(self: Any, path: Path, **options: Any) -> None:
        path.write_bytes(b"half")
        raise OSError("no space left on device")

    monkeypatch.setattr("matplotlib.figure.Figure.savefig", die)
    with pytest.raises(OSError, match="no space"):
        report.curve(tmp_path, "a run", "nats", {})
    assert (tmp_path / "curve.png").read_bytes() == before


def test_the_files_that_a_run_reads_are_printed(run: tuple[Path, dict[str, Any], str]) -> None:
    """Their names may come out of somebody else's checkpoint."""
    model: Any = zoo.load(run[0])
    model.task.config = SimpleNamespace(name="prompts", files=("a.jsonl", "b/c.jsonl"))
    trainer: Any = SimpleNamespace(
        world_size=1, precision="32-true", strategy=SimpleNamespace(root_device=model.device)
    )
    assert "\nreads a.jsonl, b/c.jsonl\n" in report.opening(model, trainer, run[0])
