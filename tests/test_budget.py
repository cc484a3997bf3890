"""Widths at which families cost the same."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import pytest

import zoo
from cases import FAMILIES
from runs import one_line, small
from test_cli import SHORT, TINY, command  # noqa: F401
from zoo.models import flops
from zoo.records.budget import MEASURES, fitted
from zoo.training import validate

OPTIONS: dict[str, Any] = {"task": {"name": "regression"}, "optim": {}, "seed": 0}


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("budget", MEASURES)
def test_a_width_that_fits_is_the_best_one(family: str, budget: str) -> None:
    options = {**OPTIONS, "model": {"name": family, **FAMILIES[family].busy}}
    wanted = MEASURES[budget][1](validate.build({**OPTIONS, "model": {"name": "transformer", "dim": 64}}))
    model, said = fitted({**options, "model": {**options["model"], "dim": 32}}, budget, None)

    def off(hidden: int) -> float:
        return abs(MEASURES[budget][1](validate.build({**options, "model": {**model, "hidden": hidden}})) - wanted)

    assert off(model["hidden"]) == min(off(model["hidden"] + step) for step in (-4, 0, 4))
    assert f"model.hidden={model['hidden']}: " in said
    assert "the default transformer" in said


def test_a_run_that_fits_another(tmp_path: Path) -> None:
    small(tmp_path / "reference", model_options={"hidden": 40})
    metrics = small(tmp_path / "run", "moe", budget="active_params", budget_of=str(tmp_path / "reference"))
    reference = flops.parameters(zoo.load(tmp_path / "reference"))["active"]
    assert metrics["params_active"] == pytest.approx(reference, rel=0.05)  # 4 units of a width of 20
    assert metrics["config"]["model"]["hidden"] == 20
    assert "absent" in one_line(lambda: small(tmp_path / "none", budget="params", budget_of=str(tmp_path / "absent")))


def test_a_model_that_is_too_large_without_its_ffn() -> None:
    said = one_line(lambda: fitted({**OPTIONS, "model": {"name": "hypernet", "code_dim": 400}}, "params", None))
    assert said.startswith("budget=params: hypernet has 384,384 parameters without an FFN, of the 123,648 of")


def test_a_width_that_is_given_is_not_to_be_fitted(command: Any, tmp_path: Path) -> None:  # noqa: F811
    few = [*TINY[:-1], *SHORT, "debug=fast", "budget=params"]
    assert TINY[-1] == "model.hidden=16"
    said = "budget=params decides model.hidden: leave model.hidden=16 away, or the budget"
    answer = command(*few, "model.hidden=16", "out=run")
    assert (answer.code, answer.err) == (2, f"error: {said}\n")
    assert one_line(lambda: zoo.train({"name": "moe", "hidden": 16}, budget="params")) == said
    sweep = ["-m", *few, "seed=0,1", "hydra.sweep.dir=sweep"]
    assert command(*sweep).code == 0
    shutil.rmtree(tmp_path / "sweep/seed=1")
    assert command(*sweep).code == 0  # the one is complete, the other begins anew
    assert "4 of 4, its last; optim.steps=N trains it longer" in command("resume=sweep/seed=0", "budget=params").out
    assert "model.hidden is " in command("resume=sweep/seed=0", "budget=params", "model.hidden=16").err
