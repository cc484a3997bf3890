"""The models that come with the package."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest
import torch

import zoo
from runs import one_line, saved, small
from zoo import ship
from zoo.records import shipped
from zoo.training import checkpoint


@pytest.mark.parametrize("name", shipped.names())
def test_each_has_its_card_and_predicts(name: str) -> None:
    model = zoo.load(name)
    task, _, family = name.partition("/")
    assert (model.task.config.name, model.config.name) == (task, family)
    path = shipped.WEIGHTS / f"{name}.safetensors"
    assert path.stat().st_size < 1.5e6
    assert all(f"**{part}.**" in path.with_suffix(".md").read_text() for part in ("Data", "Command", "Limits"))
    with torch.no_grad():
        if task == "text":
            text = "The people of the United States, in order to form a more perfect union"
            tokens = torch.tensor([model.task.encode(text)])
            loss = model.task.token_losses(model(tokens[:, :-1]), batch_of(tokens)).mean()
            assert float(loss) < 0.5 * torch.log(torch.tensor(257.0))
        else:
            batch = model.task.batch("test", 0, 64)
            assert float(model.task.token_losses(model(batch.tokens, batch.n_context), batch).mean() / 3) < 0.01


def test_a_misspelt_name_has_a_close_one() -> None:
    said = "no checkpoint at text/transfomer; did you mean text/transformer?"
    assert one_line(lambda: zoo.load("text/transfomer")) == said
    assert one_line(lambda: zoo.train(init="text/transfomer")) == said


def batch_of(tokens: torch.Tensor) -> zoo.tasks.Batch:
    return zoo.tasks.Batch(tokens[:, :-1], tokens[:, 1:], 0)


def test_all_that_ship_are_there() -> None:
    assert {*ship.NAMES} == {*zoo.shipped()}


def test_a_folder_of_the_user_wins(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    small(tmp_path / "regression/moe")
    assert zoo.load("regression/moe").config.name == "transformer"


def test_what_is_written_is_read_and_what_was_changed_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    small(tmp_path / "run", "moe")
    content = checkpoint.read(tmp_path / "run/checkpoints/best.ckpt")
    weights = tmp_path / "weights"
    path = shipped.save(content, "regression/small", (tmp_path / "run/card.md").read_text(), weights)
    ours, theirs = zoo.load(tmp_path / "run").state_dict(), zoo.load(path).state_dict()
    assert all(torch.equal(ours[name], theirs[name]) for name in saved(tmp_path / "run", "best")["state_dict"])
    monkeypatch.setattr(shipped, "WEIGHTS", weights)
    assert zoo.shipped() == ["regression/small"]
    assert zoo.load("regression/small").config.name == "moe"
    damaged = bytearray(path.read_bytes())
    damaged[-1] ^= 1
    path.write_bytes(damaged)
    assert "was shipped: install the package again" in one_line(lambda: zoo.load("regression/small"))
    foreign = shutil.copy(path, tmp_path / "foreign.safetensors")
    zoo.load(foreign)  # of nobody: nothing says what it should be
    Path(foreign).write_bytes(damaged[:-100])
    assert "cannot be used" in one_line(lambda: zoo.load(foreign))
