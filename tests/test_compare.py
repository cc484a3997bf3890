"""Comparisons of runs: intervals hold what they say, what cannot be compared is refused, files and the page are right.

Axes: S seeds, N sequences of a test.
"""

from __future__ import annotations

import csv
import json
import re
import runpy
import subprocess
import sys
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from compared import write_run, write_sweep
from runs import small
from zoo.compare.__main__ import main
from zoo.compare.figures import all_figures, curve, front
from zoo.compare.runs import BYTES, find, read
from zoo.compare.statistics import estimate, weighted
from zoo.compare.systems import Difference, System, compare, group, values

DOCS = Path(__file__).parents[1] / "docs"


def read_all(*paths: Path) -> list[System]:
    return group([read(path) for path in find([*paths])])


def one_line(options: list[Any], capsys: pytest.CaptureFixture[str]) -> str:
    """What the command says of a mistake."""
    assert main([*map(str, options)]) == 2
    error = capsys.readouterr().err
    assert len(error.splitlines()) == 1
    return error


@pytest.fixture
def sweep(tmp_path: Path) -> Path:
    return write_sweep(tmp_path / "sweep")


def drawn(draw: np.random.Generator, S: int, sizes: tuple[float, float, float], shift: float = 0.0) -> np.ndarray:
    """Differences (S,N) of two systems: noise of seeds, of sequences that all seeds share, and of each seed's own."""
    seed, shared, own = sizes
    heavy = (draw.normal(size=(1, 100)) ** 2 - 1) / 2**0.5  # as squared errors are
    return shift + seed * draw.normal(size=(S, 1)) + shared * heavy + own * draw.normal(size=(S, 100))


def rate(happens: Callable[[np.ndarray], bool], *options: Any) -> float:
    """How often it happens in 500 simulations."""
    draw = np.random.default_rng(0)
    return float(np.mean([happens(drawn(draw, *options)) for _ in range(500)]))


def tied(values_SN: np.ndarray) -> bool:
    return Difference("a", "b", estimate(values_SN), len(values_SN), 0).verdict == "tied"


POPULATIONS = {"seeds": (1.0, 0.0, 0.5), "own": (0.0, 0.0, 1.0), "both": (0.1, 0.5, 1.0), "shared": (0.01, 1.0, 0.5)}


@pytest.mark.parametrize("S", [3, 5])
@pytest.mark.parametrize("sizes", POPULATIONS.values(), ids=POPULATIONS)
def test_equal_systems_are_tied(sizes: tuple[float, float, float], S: int) -> None:
    assert rate(tied, S, sizes) >= 0.9


@pytest.mark.parametrize("S", [3, 5])
def test_a_bootstrap_of_few_seeds_finds_differences_that_are_not_there(S: int) -> None:
    pick = np.random.default_rng(1).integers(0, S, (400, S))

    def inside(values_SN: np.ndarray) -> bool:
        low, high = np.quantile(values_SN.mean(1)[pick].mean(1), [0.025, 0.975])
        return low <= 0 <= high

    assert rate(inside, S, POPULATIONS["seeds"]) < 0.9


@pytest.mark.parametrize("S", [3, 5])
def test_a_difference_of_three_standard_errors_is_found(S: int) -> None:
    seed, shared, own = sizes = POPULATIONS["shared"]
    error = (seed**2 / S + shared**2 / 100 + own**2 / (100 * S)) ** 0.5
    assert rate(tied, S, sizes, 3 * error) <= 0.2


def test_between_seeds_it_takes_five_of_them_and_three_deviations() -> None:
    """Of three seeds Student's t, the sharpest test that keeps its level, finds three standard errors in 39 %."""
    sizes = POPULATIONS["seeds"]
    assert rate(tied, 5, sizes, 3 * sizes[0]) <= 0.2
    assert 0.5 < rate(tied, 3, sizes, 3 * sizes[0] / 3**0.5) < 0.7


def test_one_number_a_seed_is_students_interval() -> None:
    one = estimate(np.array([[1.0], [2.0], [3.0]]))
    assert one.mean == 2
    assert one[1:3] == pytest.approx((2 - 4.302653 / 3**0.5, 2 + 4.302653 / 3**0.5), rel=1e-6)
    # two degrees of freedom have a closed form: P(T ≤ t) = 1/2 + t / (2 √(2 + t²))
    t = -2 * 3**0.5
    assert one.below == pytest.approx(0.5 + t / (2 * (2 + t * t) ** 0.5), abs=1e-7)
    assert estimate(np.array([[1.0], [2.0]]))[1:] == (None, None, None)
    assert estimate(np.zeros((3, 4))) == (0, 0, 0, 0.5)
    assert estimate(np.full((3, 4), 2.0)) == (2, 2, 2, 0)


def test_sequences_weigh_as_their_predictions_do() -> None:
    draw = np.random.default_rng(0)
    errors_SN, weight_SN = draw.random((3, 50)), draw.integers(0, 9, (3, 50)).astype(float)
    parts_SN = weighted(errors_SN, weight_SN)
    assert parts_SN.mean(1) == pytest.approx([np.average(errors_SN[s], weights=weight_SN[s]) for s in range(3)])
    kept = [np.arange(50) != n for n in range(50)]
    jackknife = [np.average(errors_SN[0, keep], weights=weight_SN[0, keep]) for keep in kept]
    assert parts_SN[0].std() / 50**0.5 == pytest.approx((49 * np.var(jackknife)) ** 0.5, rel=0.05)


def test_pairing_takes_out_what_seeds_and_sequences_have_in_common(tmp_path: Path) -> None:
    draw = np.random.default_rng(0)
    for seed in range(3):
        hard_N = draw.random(64) + seed
        write_run(tmp_path / f"a{seed}", "moe", seed, hard_N)
        write_run(tmp_path / f"b{seed}", "hypernet", seed, hard_N + 0.05 + 0.01 * draw.random(64))
    systems = read_all(tmp_path)
    (one,) = compare(systems)
    assert one.verdict == "moe is better"
    assert one.wins == one.seeds == 3
    alone = [system.error() for system in systems]
    assert alone[0].high > alone[1].mean  # type: ignore[operator]  # apart, each varies more than they differ
    a, b = (np.stack([run.errors_N for run in system.runs]) for system in systems)  # type: ignore[misc]
    assert values(systems[0].runs, systems[1].runs) == pytest.approx(a - b)


def test_systems_are_what_differs_beside_the_seed(tmp_path: Path) -> None:
    options: dict[str, dict[str, Any]] = {
        **{"transformer": {"config__optim__steps": 200}, "hypernet": {"config__model__code": "constant"}},
        **{"moe": {"config__model__top_k": 1, "precision": "bf16-mixed"}},
    }
    for k, (model, changes) in enumerate(options.items()):
        for seed in range(2):
            write_run(tmp_path / f"{k}-{seed}", model, seed, config__trainer={"devices": seed})
            write_run(tmp_path / f"{k}-{seed}-other", model, seed, **changes)
    labels = {system.label for system in read_all(tmp_path)}
    usual = "precision=32-true"
    assert labels == {
        *(f"transformer, steps={steps}, {usual}" for steps in (100, 200)),
        *(f"hypernet, code={code}, steps=100, {usual}" for code in ("null", "constant")),
        *(f"moe, top_k={k}, steps=100, precision={p}" for k, p in ((2, "32-true"), (1, "bf16-mixed"))),
    }


def test_a_label_has_no_option_that_follows_from_another(tmp_path: Path) -> None:
    for router, weight, steps in (("learned", 0.01, 100), ("frozen", 0.0, 100), ("learned", 0.01, 200)):
        options: dict[str, Any] = {"router": router, "balance_weight": weight}
        changes = {f"config__model__{name}": value for name, value in options.items()}
        changes |= {"config__optim__steps": steps, "config__optim__warmup": steps // 20}
        write_run(tmp_path / f"{router}{steps}", "moe", **changes)
    write_run(tmp_path / "own", "moe", **changes | {"config__optim__warmup": 0})
    assert {system.label for system in read_all(tmp_path / "frozen100", tmp_path / "learned100")} == {
        "moe, router=frozen",
        "moe, router=learned",
    }
    chosen = {system.label for system in read_all(tmp_path)}
    assert "moe, router=learned, steps=200, warmup=0" in chosen
    assert len(chosen) == 4


def test_the_command_writes_everything(sweep: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    write_run(sweep / "late" / "moe", "moe", 7, steps=50)
    (sweep / "begun").mkdir()
    (sweep / "begun" / "metrics.jsonl").touch()
    (out := tmp_path / "out").mkdir()
    (out / "curves-2.png").touch()  # of what was compared here before
    assert main([str(sweep), str(sweep / "moe-0"), "--out", str(out)]) == 0
    printed = capsys.readouterr()
    assert "begun is left out: the run has not ended" in printed.err
    pictures = {f"{name}.{ending}" for name in ("curves", "pareto", "layers") for ending in ("png", "json")}
    assert {path.name for path in out.iterdir()} == {"table.md", "table.csv", "table.json", "index.html", *pictures}
    data = json.loads((out / "table.json").read_text())
    assert [system["label"] for system in data["systems"]] == ["hypernet", "moe", "transformer"]
    moe = data["systems"][1]
    assert moe["error"]["mean"] == pytest.approx(np.mean([run["error"] for run in moe["runs"]]))
    assert [run["seed"] for run in moe["runs"]] == [0, 1, 2, 7]
    assert [*data["references"]] == ["nmse_zero", "nmse_zero_5"]
    drawn_as = {series["label"] for series in json.loads((out / "pareto.json").read_text())["panels"][0]["series"]}
    assert drawn_as >= {"predicting zero", "front"}
    assert not any("5" in label for label in drawn_as)  # of a part of the data
    assert "nmse_wrong_context" in moe["test"]
    assert data["notes"][0] == "Unequal steps: 100 (hypernet, moe, transformer); 50 (moe)"
    assert re.fullmatch(r"Unequal seed: (\d \(hypernet, moe, transformer\); ){3}7 \(moe\)", data["notes"][1])
    assert {one["seeds"] for one in data["differences"] if one["second"] == "transformer"} == {3}
    table = list(csv.DictReader((out / "table.csv").open()))
    assert [row["system"] for row in table] == [
        "hypernet",
        "moe",
        "transformer",
        "predicting zero",
        "predicting zero, 5",
    ]
    assert float(table[0]["nmse"]) == data["systems"][0]["error"]["mean"]
    text = (out / "table.md").read_text()
    assert text in printed.out
    assert "| predicting zero | 3.5 |" in text
    assert "| with another function's context |" in text


def test_older_runs_and_other_evaluations(sweep: Path, tmp_path: Path) -> None:
    for path in sweep.iterdir():
        metrics = json.loads((path / "metrics.json").read_text())
        new = {**metrics, "test": {"nmse": 5.0}, "evaluation": {"split": "validation", "seed": 0}}
        (path / "evaluations").mkdir()
        (path / "evaluations" / "far.json").write_text(json.dumps(new))
        for name in ("flops", "mfu", "memory_bytes", "data", "evaluation"):
            del metrics[name]
        (path / "metrics.json").write_text(json.dumps(metrics))
        (path / "metrics.jsonl").write_text('{"step": 50, "validation_loss": 1.0}\n')
        (path / "test.npz").unlink()
    out = tmp_path / "out"
    assert main([str(sweep), "--out", str(out)]) == 0
    data = json.loads((out / "table.json").read_text())
    assert data["systems"][0]["flops"] == 537_600_000
    assert data["systems"][0]["memory_bytes"] is None
    assert [note.partition(",")[0] for note in data["notes"]] == ["No errors of sequences"]
    found = curve(read_all(sweep)[0])
    assert found
    assert found.x == {"tokens": [44_800], "flops": [268_800_000]}
    assert main([str(sweep), "--out", str(out), "--evaluation", "far"]) == 0
    assert json.loads((out / "table.json").read_text())["systems"][0]["error"]["mean"] == 5


REFUSED: dict[str, tuple[dict[str, Any], str]] = {
    "task": ({"task": "noise"}, "task is 'regression' and 'noise'"),
    "option": ({"config__task__points": 40}, "task.points is 20 and 40"),
    "data": ({"data": ["b"]}, r"data is \['a'\] and \['b'\]"),
    "tokenizer": ({"tokenizer": "b", "config__task__tokenizer": "x"}, "task.tokenizer is None and 'x'"),
    "evaluation": ({"evaluation__batches": 3}, "evaluation.batches is 2 and 3"),
    "seed": ({"evaluation__seed": 8}, "evaluation.seed is 0 and 8"),
    "metric": ({"main_metric": "nmse_zero", "test": {"nmse_zero": 0.3}}, "main_metric is 'nmse' and 'nmse_zero'"),
    "sequences": ({"errors": [0.3] * 65}, "65 sequences of 520 predictions and 64 sequences of 512"),
    "twice": ({"model": "transformer"}, "the same system with the same seed, 0"),
    "another test": ({"test": {"nmse": 9.0}}, "test.npz is of another test: its mean is"),
    "no number": ({"test": {"nmse": None}}, "has no finite nmse"),
    "no type": ({"steps": "9"}, "steps is '9', which no run writes"),
}


@pytest.mark.parametrize(("changes", "message"), REFUSED.values(), ids=REFUSED)
def test_what_cannot_be_compared_is_refused_in_one_line(
    changes: dict[str, Any], message: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    write_run(tmp_path / "a", data=["a"])
    same = {"data": ["a"], "model": "moe"}
    if "main_metric" in changes:
        changes = {**changes, "errors": [0.3] * 64}
    write_run(tmp_path / "b", **{**same, **changes})
    assert re.search(message, one_line([tmp_path / "a", tmp_path / "b", "--out", tmp_path / "out"], capsys))
    assert not (tmp_path / "out").exists()


def test_moved_data_of_equal_digests_are_one_test(tmp_path: Path) -> None:
    for k in range(2):
        moved = {"config__task__files": [f"/at/{k}.txt"], "config__task__tokenizer": f"/at/{k}.json"}
        write_run(tmp_path / str(k), seed=k, data=["a"], tokenizer="b", evaluation__seed=9, **moved)
    assert main([str(tmp_path), "--out", str(tmp_path / "out")]) == 0


class Touch:
    """Unpickled, it makes the file `unpickled`."""

    def __reduce__(self) -> Any:
        return Path.touch, (Path("unpickled"),)


def bomb(path: Path) -> None:
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as file:
        file.writestr("main.npy", b"\0" * (BYTES[".npz"] + 1))


def arrays(main: Any, weight: Any = None) -> Callable[[Path], None]:
    return lambda path: np.savez(path, main=main, weight=np.ones(len(main)) if weight is None else weight)


SPOILT: dict[str, Callable[[Path], Any]] = {
    **{"object": arrays(np.array([Touch()], object)), "bomb": bomb, "nan": arrays(np.full(4, np.nan))},
    **{"shape": arrays(np.ones((2, 2))), "negative": arrays(np.ones(3), -np.ones(3)), "nothing": arrays(np.ones(0))},
    **{"short": lambda path: path.write_bytes(path.read_bytes()[:-30]), "text": lambda path: path.write_text("no")},
    **{"deep": lambda path: path.write_text("[" * 100_000), "list": lambda path: path.write_text("[1]")},
}


@pytest.mark.parametrize("kind", SPOILT)
def test_damaged_files_are_one_line(
    kind: str, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    name = "metrics.json" if kind in ("deep", "list") else "test.npz"
    SPOILT[kind](write_run(tmp_path / "run") / name)
    error = one_line([tmp_path / "run", "--out", tmp_path / "out"], capsys)
    assert f"{name} is damaged" in error
    assert ("unpacked it has more" in error) == (kind == "bomb")
    assert not Path("unpickled").exists()


def test_paths_that_hold_no_run(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = ["--out", tmp_path / "out"]
    assert "gone is no folder" in one_line([tmp_path / "gone", *out], capsys)
    assert "no metrics.json" in one_line([tmp_path, *out], capsys)
    assert "must be a name" in one_line([tmp_path, *out, "--evaluation", "../run"], capsys)


def test_schedules_have_panels_of_their_own_and_the_front_is_not_beaten(sweep: Path) -> None:
    write_run(sweep / "cosine", "moe", 0, config__optim__schedule="cosine")
    names = {figure.name: figure for figure in all_figures(read_all(sweep))}
    assert names.keys() == {"curves-1", "curves-2", "pareto", "layers"}
    labels = [{series.label for series in names[f"curves-{k}"].panels[0].series} for k in (1, 2)]  # type: ignore[union-attr]
    assert {"moe, schedule=cosine"} in labels
    assert not labels[0] & labels[1]
    points = [(float(x), float(y)) for x, y in np.random.default_rng(0).random((40, 2))]
    naive = [p for p in points if not any(q[0] <= p[0] and q[1] <= p[1] for q in points if q != p)]
    assert front(points) == sorted(naive)


def test_without_plotly_all_else_is_written(
    sweep: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setitem(sys.modules, "plotly.offline", None)
    said = one_line([sweep, "--out", tmp_path / "out"], capsys)
    assert said.startswith("error: index.html needs plotly, all else is written")
    written = {path.name for path in (tmp_path / "out").iterdir()}
    assert {"table.md", "table.csv", "table.json", "pareto.png"} <= written - {"index.html"} == written


def test_a_file_is_no_folder_to_write_to(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "file").touch()
    said = one_line([tmp_path / "absent", "--out", tmp_path / "file"], capsys)  # before anything is read
    assert said.startswith(f"error: --out {tmp_path / 'file'} is a file: name a folder")


def test_runs_of_today_are_read(tmp_path: Path) -> None:
    for seed in range(2):
        small(tmp_path / "sweep" / str(seed), "moe", seed=seed)
    assert main([str(tmp_path / "sweep"), "--out", str(tmp_path / "out")]) == 0
    assert len(json.loads((tmp_path / "out" / "table.json").read_text())["systems"][0]["runs"]) == 2


@pytest.mark.slow
def test_two_hundred_runs_take_seconds(tmp_path: Path) -> None:
    draw = np.random.default_rng(0)
    for k in range(200):
        write_run(tmp_path / "sweep" / str(k), "hypernet", k % 4, draw.random(1280), config__model__rank=k // 4)
    command = [sys.executable, "-m", "zoo.compare", str(tmp_path / "sweep"), "--out", str(tmp_path / "out")]
    assert not subprocess.run(command, capture_output=True, timeout=20).returncode


@pytest.mark.slow
def test_the_table_of_simulations_is_that_of_its_command(capsys: pytest.CaptureFixture[str]) -> None:
    runpy.run_path(str(DOCS / "intervals.py"))
    assert capsys.readouterr().out in (DOCS / "compare.md").read_text()
