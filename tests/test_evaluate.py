"""Tests of trained models on other data, and the error of each test sequence."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import lightning as L
import numpy as np
import pytest

import zoo
from runs import small
from zoo.evaluate import main
from zoo.training.data import Stream


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("evaluate") / "run"
    small(folder, "hypernet")
    return folder


def results(run: Path, name: str) -> tuple[dict[str, Any], Any]:
    folder = run / "evaluations"
    return json.loads((folder / f"{name}.json").read_text()), np.load(folder / f"{name}.npz")


def test_the_same_test_gives_the_same_numbers(run: Path) -> None:
    assert main([str(run)]) == 0
    metrics, sequences = json.loads((run / "metrics.json").read_text()), np.load(run / "test.npz")
    again, theirs = results(run, "test")
    for name in ("test", "evaluation", "params_total", "flops_per_token", "data", "main_metric", "task", "model"):
        assert again[name] == metrics[name], name
    assert all(np.array_equal(sequences[name], theirs[name]) for name in ("main", "weight"))
    assert again["steps"] <= metrics["steps"]  # of the best checkpoint


@pytest.mark.parametrize("task", ["regression", "text"])
def test_errors_of_sequences_are_those_of_the_test(run: Path, tmp_path: Path, task: str) -> None:
    folder = run if task == "regression" else tmp_path / "text"
    if task == "text":
        small(folder, task="text")
    metrics, sequences = json.loads((folder / "metrics.json").read_text()), np.load(folder / "test.npz")
    main_N, weight_N = sequences["main"].astype(float), sequences["weight"]
    assert len(main_N) == 2 * 8
    assert (main_N * weight_N).sum() / weight_N.sum() == pytest.approx(
        metrics["test"][metrics["main_metric"]], rel=1e-5
    )
    model = zoo.load(folder)
    one = model.task.evaluate(model, model.task.batch("test", 1, 8).rows(3, 1))  # sequence 11, alone
    value = one[metrics["main_metric"]]
    assert (float(value.detach().mean()), value.numel()) == pytest.approx((main_N[11], weight_N[11]), rel=1e-4)


def test_another_test(run: Path) -> None:
    assert main([str(run), "task.points=9", "seed=4", "test_batches=3", "--name", "longer"]) == 0
    metrics, sequences = results(run, "longer")
    assert metrics["config"]["task"]["points"] == 9
    assert metrics["evaluation"] == {"split": "test", "batches": 3, "batch_size": 8, "seed": 4}
    assert len(sequences["main"]) == 24
    assert metrics["test"]["nmse"] != json.loads((run / "metrics.json").read_text())["test"]["nmse"]


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["task.dimension=4"], "best.ckpt cannot be tested so: state_dict.decoder.embedding.weight must be"),
        (["task.point=4"], "task.point is not an option of RegressionConfig; did you mean points?"),
        (["optim.lr=1"], "'optim.lr' is no option of a test"),
        (["task.name=text"], "'task.name' is no option of a test"),
        (["test_batches=1.5", "seed=x"], "must be of type int"),
        (["test_batches=0"], "test_batches=0 must be above 0"),
        (["task=text"], "task='text' must be of type dict"),
        (["task.points=[1"], "task.points=[1 cannot be read: while parsing"),
        (["absent/seed=3"], "no checkpoint at absent/seed=3"),
        (["--name", "../x"], "--name '../x' must be letters"),
    ],
)
def test_what_cannot_be_tested(run: Path, capsys: pytest.CaptureFixture[str], words: list[str], message: str) -> None:
    assert main([str(run), *words]) == 2
    said = capsys.readouterr().err
    assert message in said
    assert len(said.splitlines()) == 1


def test_a_second_test_of_one_model_forgets_the_first(run: Path) -> None:
    model = zoo.load(run)
    engine = L.Trainer(logger=False, accelerator="cpu", enable_checkpointing=False, enable_progress_bar=False)
    for _ in range(2):
        engine.test(model, Stream(model.task, "test", 8, 2), verbose=False)
    assert sum(sums.shape[1] for sums in model.tested) == 16
