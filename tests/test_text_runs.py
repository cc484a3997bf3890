"""Runs on text of one's own: the checkpoint carries its tokenizer, and what is wrong with one is said."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch

import zoo
from runs import one_line
from zoo.models import Model

SIZES = {"dim": 16, "layers": 1, "heads": 2, "hidden": 16}


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, Any]]:
    """A run folder and its metrics; its text and its cache are gone."""
    folder = tmp_path_factory.mktemp("run")
    path = folder / "a.jsonl"
    path.write_text(
        "".join(json.dumps({"text": f"The sum of {k} and {k + 1} is {2 * k + 1}.\n"}) + "\n" for k in range(200))
    )
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("ZOO_CACHE", str(folder / "cache"))
        metrics = zoo.train(
            {"name": "transformer", **SIZES},
            {"name": "text", "tokens": 16, "files": [str(path)], "tokenizer": "bpe", "vocabulary": 290},
            {"steps": 4, "batch_size": 8, "warmup": 1},
            {"accelerator": "cpu", "enable_progress_bar": False},
            out=str(folder / "run"),
            validate_every=2,
            validation_batches=1,
            test_batches=1,
        )
    for gone in (path, *(folder / "cache").rglob("*.*")):
        gone.unlink()
    return folder / "run", metrics


@pytest.fixture
def loaded(run: tuple[Path, dict[str, Any]], cache: Path) -> Model:
    return zoo.load(run[0])


def test_a_loaded_model_encodes_and_decodes_without_text_and_cache(loaded: Model, cache: Path) -> None:
    text = "The sum of 3 and 4 is 7. Ünseen ☂ text"
    ids = loaded.task.encode(text)
    assert loaded.task.decode(ids).decode() == text
    assert len(ids) < 0.9 * len(text.encode())
    assert loaded(torch.tensor([ids])).shape == (1, len(ids), 290)
    assert not cache.exists()


def test_the_loss_is_per_token_and_the_metric_per_byte(run: tuple[Path, dict[str, Any]]) -> None:
    assert list(run[1]["test"]) == ["bits_per_byte", "bits_per_byte_trigram"]
    rows = [json.loads(line) for line in (run[0] / "metrics.jsonl").read_text().splitlines()]
    nats = [row["validation_loss"] for row in rows if "validation_loss" in row][-1]
    assert 3 < nats < 6.5  # ln 290 = 5.67
    assert run[1]["test"]["bits_per_byte"] < 0.7 * nats / 0.6931


@pytest.mark.parametrize(
    ("state", "message"),
    [
        ({"merges": [[97, 300]]}, "merge 0 of a tokenizer must be two earlier ids, got [97, 300]"),
        ("merges", "task must be a dict, got 'merges'"),
    ],
)
def test_foreign_states_are_refused(run: tuple[Path, Any], tmp_path: Path, state: Any, message: str) -> None:
    content = torch.load(run[0] / "checkpoints" / "best.ckpt", weights_only=True)
    content["task"] = state
    torch.save(content, tmp_path / "tampered.ckpt")
    error = one_line(lambda: zoo.load(tmp_path / "tampered.ckpt"))
    assert "tampered.ckpt" in error
    assert message in error
