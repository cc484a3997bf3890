"""Checkpoints: what zoo.load gives back, and what it refuses in one line."""

import copy
import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

import zoo
from runs import QUIET, one_line, small
from zoo.models import MODELS
from zoo.training import checkpoint
from zoo.training import run as training
from zoo.training.checkpoint import SCHEMA, UPGRADES, AtomicCheckpointIO, find, read

OPTIONS: dict[str, Any] = {"optim": {"steps": 3, "batch_size": 4, "warmup": 1}, "validate_every": 1, "seed": 3}
OPTIONS["model_options"] = SIZES = {"dim": 8, "layers": 1, "heads": 1, "hidden": 8}


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> dict[str, tuple[Path, Any]]:
    """A tiny run folder of each family, and the model as it stood at the end of its test."""
    torch.set_num_threads(1)
    kept: dict[str, tuple[Path, Any]] = {}
    for name in MODELS:
        folder, trained = tmp_path_factory.mktemp(name) / "run", []
        build = MODELS[name]
        original, build.on_test_end = build.on_test_end, lambda self, into=trained: into.append(self)  # type: ignore
        try:
            small(folder, name, **OPTIONS)
        finally:
            build.on_test_end = original  # type: ignore[method-assign]
        kept[name] = folder, trained[0]
    return kept


@pytest.fixture
def best(runs: dict[str, tuple[Path, Any]]) -> Path:
    return runs["hypernet"][0] / "checkpoints" / "best.ckpt"


def tampered(best: Path, to: Path, change: Callable[[dict[str, Any]], Any]) -> Path:
    """A copy of the checkpoint after `change`."""
    content = torch.load(best, weights_only=True)
    change(content)
    torch.save(content, to / "tampered.ckpt")
    return to / "tampered.ckpt"


@pytest.mark.parametrize("name", MODELS)
def test_load_gives_the_trained_model_back(runs: dict[str, tuple[Path, Any]], name: str) -> None:
    folder, trained = runs[name]
    for path in (folder, str(folder), folder / "checkpoints" / "best.ckpt"):
        model = zoo.load(path)
        assert type(model) is MODELS[name]
        assert not model.training
        assert dict(model.hparams) == dict(trained.hparams)
        batch = model.task.batch("test", 0, 4)
        with torch.no_grad():
            assert torch.equal(model(batch.tokens, 5), trained.eval()(batch.tokens, 5))
    assert model.task.seed == 3


def test_load_of_a_folder_is_the_best_not_the_last(runs: dict[str, tuple[Path, Any]], tmp_path: Path) -> None:
    folder = runs["transformer"][0]
    (tmp_path / "checkpoints").mkdir()
    for name in ("best", "last"):
        content = torch.load(folder / "checkpoints" / f"{name}.ckpt", weights_only=True)
        content["state_dict"] = {key: torch.full_like(value, len(name)) for key, value in content["state_dict"].items()}
        content["state_dict"]["decoder.head.weight"] += name == "best"
        torch.save(content, tmp_path / "checkpoints" / f"{name}.ckpt")
    assert (zoo.load(tmp_path).decoder.head.weight == 5).all()
    assert (zoo.load(tmp_path / "checkpoints" / "last.ckpt").decoder.head.weight == 4).all()


def test_load_of_a_name_a_folder_below_runs_and_a_result(
    best: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    for run, time in (("old", 1), ("new", 3), ("other", 2)):
        shutil.copytree(best.parent.parent, tmp_path / "runs" / "hypernet-regression" / run)
        os.utime(tmp_path / "runs" / "hypernet-regression" / run, (time, time))
    (tmp_path / "runs/hypernet-regression/new/checkpoints/best.ckpt").write_bytes(b"")
    with pytest.raises(ValueError, match=r"runs/hypernet-regression/new/checkpoints/best\.ckpt"):
        zoo.load("hypernet-regression")  # the latest is meant, not one that can be read
    for given in ("hypernet-regression/old", Path("runs/hypernet-regression/old"), {"checkpoint": str(best)}):
        assert zoo.load(given).config.name == "hypernet"
    for given in ("hypernet-regressio", {"seed": 3}):
        with pytest.raises(ValueError, match="no checkpoint at"):
            zoo.load(given)


@pytest.mark.parametrize("name", MODELS)
def test_a_checkpoint_holds_every_option_as_plain_data(runs: dict[str, tuple[Path, Any]], name: str) -> None:
    content = torch.load(runs[name][0] / "checkpoints" / "last.ckpt", weights_only=True)
    assert content["zoo"]["schema"] == SCHEMA
    assert content["zoo"]["zoo"] == zoo.__version__
    assert content["zoo"]["torch"] == torch.__version__
    config = content["zoo"]["config"]
    assert set(config) == set(training.RunConfig.__dataclass_fields__)
    assert set(config["model"]) == set(MODELS[name].Config.__dataclass_fields__)
    assert set(config["task"]) >= {"name", "points", "queries", "dimension", "function"}
    assert config["optim"] == content["hyper_parameters"]["optim"]
    assert config["model"]["kv_heads"] == 1
    # what is asked of a run is no property of it: a checkpoint must not carry its folder along
    assert (config["out"], config["resume"]) == (None, None)

    def plain(value: Any) -> bool:
        if isinstance(value, dict):
            return all(type(key) is str and plain(item) for key, item in value.items())
        return all(map(plain, value)) if type(value) is list else type(value) in (str, int, float, bool, type(None))

    assert plain(content["hyper_parameters"])
    assert plain(content["zoo"])


@pytest.mark.slow
def test_load_needs_no_run_folder_no_conf_and_no_training(best: Path, tmp_path: Path) -> None:
    (tmp_path / "alone.ckpt").write_bytes(best.read_bytes())
    code = (
        "import sys, zoo\n"
        "model = zoo.load('alone.ckpt')\n"
        "batch = model.task.batch('test', 0, 2)\n"
        "print(tuple(model(batch.tokens, 5).shape))\n"
        "assert not {'hydra', 'omegaconf', 'zoo.training.run', 'wandb'} & set(sys.modules)\n"
    )
    answer = subprocess.run([sys.executable, "-c", code], cwd=tmp_path, capture_output=True, text=True, timeout=120)
    assert (answer.returncode, answer.stdout) == (0, "(2, 8, 1)\n"), answer.stderr


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda c: c["hyper_parameters"]["model"].update(rnak=2), r"model.rnak is not an option .* did you mean rank"),
        (lambda c: c["hyper_parameters"]["model"].update(name="os.system"), r"model 'os.system' does not exist"),
        (lambda c: c["hyper_parameters"]["task"].update(name="os.system"), r"task 'os.system' does not exist"),
        (lambda c: c["hyper_parameters"]["model"].update(_target_="os.system"), r"model._target_ is not an option"),
        (lambda c: c["hyper_parameters"].pop("seed"), r"hyper_parameters lacks 'seed'"),
        (lambda c: c.pop("hyper_parameters"), r"it lacks 'hyper_parameters'"),
        (lambda c: c["zoo"].pop("schema"), r"zoo lacks 'schema'"),
        (lambda c: c["zoo"].update(schema=SCHEMA + 1), rf"has schema {SCHEMA + 1}, this zoo"),
        (lambda c: c["zoo"].update(schema=torch.tensor(SCHEMA)), r"zoo.schema must be a whole .*, got tensor\(5\)"),
        (lambda c: c["state_dict"].pop("decoder.head.weight"), r"state_dict lacks 'decoder.head.weight'"),
        (lambda c: c["state_dict"].update(bogus=torch.zeros(1)), r"state_dict holds {'bogus'}, which the model lacks"),
        (
            lambda c: c["state_dict"].update({"decoder.head.weight": torch.zeros(2, 8)}),
            r"must be a finite Tensor of shape \(1, 8\).*, got Tensor of shape \(2, 8\)",
        ),
        (lambda c: c["state_dict"].update({"decoder.head.weight": 3}), r"decoder.head.weight"),
    ],
)
def test_a_tampered_checkpoint_is_refused(
    best: Path, tmp_path: Path, change: Callable[[dict[str, Any]], Any], message: str
) -> None:
    path = tampered(best, tmp_path, change)
    text = one_line(lambda: zoo.load(path))
    assert str(path) in text
    with pytest.raises(ValueError, match=message):
        zoo.load(path)


def test_a_missing_checkpoint(tmp_path: Path) -> None:
    assert one_line(lambda: zoo.load(tmp_path / "no.ckpt")).startswith(f"no checkpoint at {tmp_path}/no.ckpt")
    assert "checkpoints/best.ckpt" in one_line(lambda: zoo.load(tmp_path))
    assert "checkpoints/last.ckpt" in one_line(lambda: find(tmp_path, "last"))


def test_foreign_files_are_refused(tmp_path: Path) -> None:
    path = tmp_path / "foreign.ckpt"
    for other in ([1, 2], torch.zeros(3), {"state_dict": {}}):
        torch.save(other, path)
        assert "it lacks 'zoo'" in one_line(lambda: zoo.load(path))
    torch.save(torch.nn.Linear(2, 2), path)
    assert "is damaged or no checkpoint" in one_line(lambda: zoo.load(path))


def test_upgrades_are_chained(best: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Two schemas later, a file of today: one step renames an option, the next a weight."""

    def forget(content: dict[str, Any]) -> None:
        content["hyper_parameters"]["model"]["old_rank"] = content["hyper_parameters"]["model"].pop("rank")
        content["state_dict"]["old_head"] = content["state_dict"].pop("decoder.head.weight")

    def option(content: dict[str, Any]) -> dict[str, Any]:
        assert content["zoo"]["schema"] == SCHEMA
        content["hyper_parameters"]["model"]["rank"] = content["hyper_parameters"]["model"].pop("old_rank")
        return {**content, "zoo": {**content["zoo"], "schema": SCHEMA + 1}}

    def weight(content: dict[str, Any]) -> dict[str, Any]:
        content["state_dict"]["decoder.head.weight"] = content["state_dict"].pop("old_head")
        return {**content, "zoo": {**content["zoo"], "schema": SCHEMA + 2}}

    old = tampered(best, tmp_path, forget)
    one_line(lambda: zoo.load(old))
    monkeypatch.setattr(checkpoint, "SCHEMA", SCHEMA + 2)
    monkeypatch.setitem(UPGRADES, SCHEMA, option)
    one_line(lambda: zoo.load(old))
    monkeypatch.setitem(UPGRADES, SCHEMA + 1, weight)
    upgraded = zoo.load(old)
    monkeypatch.undo()
    today = zoo.load(best)
    assert all(
        torch.equal(a, b) for a, b in zip(upgraded.state_dict().values(), today.state_dict().values(), strict=True)
    )
    assert upgraded.config == today.config


def test_a_checkpoint_is_written_whole_or_not_at_all(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "last.ckpt"
    AtomicCheckpointIO().save_checkpoint({"step": 1}, path)

    def die(source: str, target: str) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(Path, "replace", die)
    with pytest.raises(KeyboardInterrupt):
        AtomicCheckpointIO().save_checkpoint({"step": 2}, path)
    assert torch.load(path, weights_only=True) == {"step": 1}
    # the last act is a rename within the folder: from $TMPDIR it would be a copy, which a kill cuts short
    monkeypatch.undo()
    moves = []
    monkeypatch.setattr(Path, "replace", lambda source, target: moves.append((source.parent, target)))
    AtomicCheckpointIO().save_checkpoint({"step": 3}, path)
    assert moves == [(tmp_path, path)]


def test_an_option_that_is_younger_than_a_checkpoint_has_its_default(best: Path, tmp_path: Path) -> None:
    def forget(content: dict[str, Any]) -> None:
        options = content["hyper_parameters"]  # the file holds them once, under two names
        del options["model"]["attend_context"], options["optim"]["clip"], options["task"]["function"]
        del content["zoo"]["config"]["overfit"]

    old = tampered(best, tmp_path, forget)
    assert dict(zoo.load(old).hparams) == dict(zoo.load(best).hparams)
    (tmp_path / "run/checkpoints").mkdir(parents=True)
    old.rename(tmp_path / "run/checkpoints/last.ckpt")
    zoo.train(resume=tmp_path / "run", overfit=False, trainer=QUIET)
    with pytest.raises(ValueError, match="overfit is False in the checkpoint, True asked"):
        zoo.train(resume=tmp_path / "run", overfit=True, trainer=QUIET)


def test_schema_3_had_the_score_of_the_best_in_the_state_of_a_callback(tmp_path: Path) -> None:
    """The run goes on with it: no worse step is written as the best."""
    small(tmp_path / "run", "hypernet", **OPTIONS)
    file = tmp_path / "run/checkpoints/last.ckpt"
    today = torch.load(file, weights_only=True)
    old: dict[str, Any] = copy.deepcopy(today)
    old["zoo"]["schema"] = 3
    score = old["zoo"].pop("best")
    old["callbacks"] = {"ModelCheckpoint{'monitor': 'validation_loss'}": {"best_model_score": torch.tensor(score)}}
    torch.save(old, file)
    assert read(file)["zoo"] == read(file, resume=True)["zoo"] == today["zoo"]
    training.train(resume=tmp_path / "run", trainer=QUIET)
    for schema in (1, 2):
        old["zoo"]["schema"] = schema
        torch.save(old, file)
        assert f"it has schema {schema}, this zoo ({zoo.__version__}) reads 3, 4, 5" in one_line(lambda: zoo.load(file))
