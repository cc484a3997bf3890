"""Runs that begin with the weights of others, or go on for longer than they were begun for."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.pytorch.callbacks import EarlyStopping

import zoo
from runs import QUIET, one_line, rows, same_weights, saved, small, weights
from zoo.console import Interrupted
from zoo.records.start import take_weights
from zoo.training import validate


@pytest.fixture(scope="module")
def dense(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("dense") / "run"
    small(folder, "transformer", model_options={"hidden": 8})
    return folder


def fresh(dense: Path, model: dict[str, Any]) -> zoo.models.Model:
    options = saved(dense, "best")["hyper_parameters"]
    return validate.build({**options, "model": {**options["model"], **model}, "seed": 9})


def test_a_dense_network_becomes_experts_of_the_same_function(dense: Path) -> None:
    source, mixture = zoo.load(dense), fresh(dense, {"name": "moe", "experts": 4, "top_k": 2})
    batch = source.task.batch("test", 0, 8)
    with torch.no_grad():
        wanted, before = source(batch.tokens, batch.n_context), mixture(batch.tokens, batch.n_context)
        assert "each of 4 experts" in take_weights(mixture, str(dense))
        found = mixture(batch.tokens, batch.n_context)
        mixture.decoder.blocks[1].ffn.down[:8] *= 1.5  # one expert of the four
        after = mixture(batch.tokens, batch.n_context)
    assert (found - wanted).abs().max() < 1e-5 * wanted.abs().max()
    assert min((other - wanted).abs().max() for other in (before, after)) > 1e-2 * wanted.abs().max()


@pytest.mark.parametrize(
    ("model", "message"),
    [
        ({"name": "moe", "top_k": 1}, r"sum to 1, not to 0\.\d+: take model.renormalise=true"),
        ({"name": "moe", "shared": 1}, r"sum to 1, not to 2"),
        (
            {"name": "moe", "hidden": 4},
            r"model=moe: decoder.blocks.0.ffn.gate \(32, 16\), here \(16, 16\) and 5 more; its FFN has model.hidden=8",
        ),
        ({"layers": 3}, r"decoder.blocks.2.norm1.weight, which it lacks and 8 more"),
        ({"layers": 1}, r"decoder.blocks.1.norm1.weight \(16,\), here none"),
    ],
)
def test_weights_that_do_not_fit(dense: Path, model: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        take_weights(fresh(dense, {"hidden": 8, **model}), str(dense))


def test_the_familys_own_weights_alone_are_trained(
    dense: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    options: Any = {"model": "hypernet", "model_options": {"hidden": 8}, "init": str(dense), "init_frozen": True}
    small(tmp_path / "whole", **options)
    before, after = weights(dense, "best"), weights(tmp_path / "whole", "last")
    assert all(torch.equal(after[name], weight) for name, weight in before.items())
    own = {name for name in after if name not in before}
    assert own
    assert all(name.startswith("decoder.context_to_delta.") for name in own)
    assert any(after[name].abs().sum() > 0 for name in own if "_u" in name)  # which begin at zero
    from runs import signalled

    signalled(monkeypatch, 3)
    with pytest.raises(Interrupted):
        small(tmp_path / "cut", **options)
    dense.rename(dense.with_name("moved"))  # a run that goes on has its weights
    try:
        zoo.train(resume=tmp_path / "cut", trainer=QUIET)
    finally:
        dense.with_name("moved").rename(dense)
    same_weights(tmp_path / "whole", tmp_path / "cut")


def test_what_cannot_be_frozen(dense: Path, tmp_path: Path) -> None:
    assert "init_frozen=true needs init=RUN" in one_line(lambda: small(tmp_path, init_frozen=True))
    frozen: Any = {"init": str(dense), "init_frozen": True, "model_options": {"hidden": 8}}
    assert "model=transformer has none" in one_line(lambda: small(tmp_path / "run", **frozen))
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("optim", [{"schedule": "wsd", "decay": 2}, {"schedule": "constant", "muon_lr": 1.0}])
def test_a_run_goes_on_for_longer_as_if_it_had_been_begun_so(tmp_path: Path, optim: dict[str, Any]) -> None:
    small(tmp_path / "long", "moe", optim={**optim, "steps": 10})
    small(tmp_path / "short", "moe", optim=optim)
    metrics = zoo.train(resume=tmp_path / "short", optim={"steps": 1e1}, trainer=QUIET)
    same_weights(tmp_path / "long", tmp_path / "short")
    assert rows(tmp_path / "short") == rows(tmp_path / "long")
    assert metrics["config"]["optim"]["steps"] == metrics["steps"] == 10


def test_what_cannot_go_on_for_longer(tmp_path: Path) -> None:
    small(tmp_path / "run")
    longer: Any = {"resume": tmp_path / "run", "trainer": QUIET}
    said = one_line(lambda: zoo.train(optim={"steps": 10}, **longer))
    assert "optim.schedule=cosine has its end at step 6; wsd and constant go on, or begin a new run with init=" in said
    assert "optim.steps is 6 in the checkpoint, 4 asked" in one_line(lambda: zoo.train(optim={"steps": 4}, **longer))


def test_of_several_runs_none_is_guessed_to_go_on(tmp_path: Path) -> None:
    for seed in range(2):
        small(tmp_path / f"sweep/seed={seed}", seed=seed)
    said = one_line(lambda: zoo.train(resume=tmp_path / "sweep", trainer=QUIET))
    assert said == f"{tmp_path}/sweep holds 2 runs, name one: ['seed=0', 'seed=1']"
    assert zoo.load(tmp_path / "sweep").hparams["seed"] == 1  # which trains nothing


def test_callbacks_of_the_user_are_called(tmp_path: Path) -> None:
    stop = EarlyStopping("validation_loss", patience=1, min_delta=100.0)
    metrics = small(tmp_path / "run", trainer={"callbacks": [stop]}, optim={"steps": 20})
    assert metrics["steps"] == 4  # the first validation that is not better by 100
    assert saved(tmp_path / "run")["global_step"] == 4
