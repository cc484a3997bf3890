"""docs/results.md is what docs/results.py makes of the numbers that are committed beside it."""

from __future__ import annotations

import json
import re
import runpy
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).parents[1]
MADE: dict[str, Any] = runpy.run_path(str(ROOT / "docs/results.py"))
KEPT = sorted((ROOT / "docs/results").glob("*/*/metrics.json"))


def test_the_page_is_made_of_the_numbers() -> None:
    text = (ROOT / "docs/results.md").read_text()
    assert MADE["page"](text) == text
    assert "<!-- results: " in text
    changed = text.replace("| dense-total | 0", "| dense-total | 1", 1)
    assert changed != text == MADE["page"](changed)


@pytest.mark.parametrize("path", KEPT, ids=lambda path: f"{path.parts[-3]}/{path.parts[-2]}")
def test_a_run_is_that_of_its_command_and_names_no_machine(path: Path) -> None:
    experiment, folder = path.parts[-3:-1]
    metrics = json.loads(path.read_text())
    ((_, _, words),) = [job for job in MADE["jobs"]([experiment]) if job[1] == folder]
    assert metrics["command"] == f"python train.py {' '.join(words)}"
    assert "checkpoint" not in metrics
    assert not re.findall(r'"~?/\w+', path.read_text())
    assert metrics["steps"] == metrics["config"]["optim"]["steps"]
    assert path.with_name("test.npz").stat().st_size < 100_000


def test_words_that_are_none() -> None:
    for words in (["incontext"], ["run", "incontext", "nonsense"]):
        with pytest.raises(SystemExit, match="write run, and some of incontext, "):
            MADE["main"](words)


def test_every_system_of_a_kept_experiment_has_its_seeds() -> None:
    kept = {path.parts[-3:-1] for path in KEPT}
    for experiment in {experiment for experiment, _ in kept}:
        wanted = {(experiment, folder) for _, folder, _ in MADE["jobs"]([experiment])}
        assert wanted == {place for place in kept if place[0] == experiment}
