"""Runs of a second that tests share, and what is read off them."""

from __future__ import annotations

import json
import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

import cases
import zoo
from zoo.models.optim import OptimConfig

SIZES = {"dim": 16, "layers": 2, "heads": 2, "hidden": 16}
OPTIM = {"steps": 6, "batch_size": 8, "warmup": 2}
QUIET = {"accelerator": "cpu", "enable_progress_bar": False}
OFTEN = {"validate_every": 2, "log_every": 1, "validation_batches": 1, "test_batches": 2}
FAMILIES = {name: {"name": name, **family.tiny, **family.busy} for name, family in cases.FAMILIES.items()}
TASKS = {
    "regression": {"name": "regression", "points": 5, "queries": 3},
    "noise": {"name": "noise", "tokens": 12},
    "text": {"name": "text", "tokens": 40, "domains": ["law"]},
}


def small(out: Path | None, model: str = "transformer", task: str = "regression", **options: Any) -> dict[str, Any]:
    """Trains; options go to zoo.train, those of optim, trainer and model_options on top of the defaults."""
    chosen = {**FAMILIES[model], **SIZES, **options.pop("model_options", {})}
    return zoo.train(
        model={key: x for key, x in chosen.items() if key != "hidden" or "budget" not in options},
        task=TASKS[task],
        optim={**OPTIM, **options.pop("optim", {})},
        trainer={**QUIET, **options.pop("trainer", {})},
        **{**OFTEN, **options, "out": str(out) if out else None},
    )


def saved(folder: Path, name: str = "last") -> dict[str, Any]:
    """The contents of a checkpoint of a run."""
    return torch.load(folder / "checkpoints" / f"{name}.ckpt", weights_only=True)


def weights(folder: Path, name: str) -> dict[str, torch.Tensor]:
    return saved(folder, name)["state_dict"]


def same_weights(a: Path, b: Path) -> None:
    for name in ("last", "best"):
        left, right = weights(a, name), weights(b, name)
        assert left.keys() == right.keys()
        assert [key for key in left if not torch.equal(left[key], right[key])] == [], name


def rows(folder: Path) -> list[dict[str, Any]]:
    """The rows of a run but for their seconds, which differ between runs that are the same."""
    found = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    return [{key: value for key, value in row.items() if key != "seconds"} for row in found]


def signalled(monkeypatch: pytest.MonkeyPatch, step: int, number: int = signal.SIGTERM) -> None:
    """Sends this process a signal in the middle of optimiser step `step`, once."""
    original = OptimConfig.lr_at

    def lr_at(self: OptimConfig, at: int) -> float:
        if at == step:
            monkeypatch.setattr(OptimConfig, "lr_at", original)
            signal.raise_signal(number)
        return original(self, at)

    monkeypatch.setattr(OptimConfig, "lr_at", lr_at)


def one_line(call: Callable[[], Any]) -> str:
    """The message of the ValueError that `call` raises."""
    with pytest.raises(ValueError) as error:  # noqa: PT011 (messages are compared by the callers)
        call()
    assert type(error.value) is ValueError
    assert len(str(error.value).splitlines()) == 1
    assert len(str(error.value)) < 700
    return str(error.value)
