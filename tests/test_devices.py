"""Several processes give what one gives: gradients and the law of every case in float64, and whole runs.

docs/devices.py makes the whole tables; here is a choice of their rows.
"""

from __future__ import annotations

import json
import os
import runpy
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch.distributed as dist
from lightning.pytorch.utilities import rank_zero_only

from cases import CASES
from runs import small
from zoo import analyze

pytestmark = [pytest.mark.processes, pytest.mark.xdist_group("devices")]  # which shares its processes
ROOT = Path(__file__).parents[1]
TABLES: dict[str, Any] = runpy.run_path(str(ROOT / "docs/devices.py"), run_name="devices")
Job = TABLES["Job"]
EXACT = 1e-12
EVERY = [f"{case.name}:fsdp" for case in CASES]
EVERY += [f"{case.name}:ddp" for case in CASES[::5]]
EVERY += [f"{case.name}:experts" for case in CASES if case.family == "moe" and case.options.get("shared", 0) % 2 == 0]
EVERY = [job for job in EVERY if job != "moe-uniform:experts"]
OF_THREE = ["moe-uniform:experts", "moe-token-top1-shared:fsdp", "hypernet-chunk-scale-tied:fsdp"]
"""One expert on each process, and sizes that three do not divide."""


@pytest.fixture(scope="module")
def errors(tmp_path_factory: pytest.TempPathFactory) -> dict[str, dict[str, float]]:
    """What a pair of processes found of all cases, and three of some."""
    out, found = tmp_path_factory.mktemp("pair") / "errors.json", {}
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node"]
    env = {**os.environ, "PYTHONPATH": f"{ROOT}:{ROOT / 'tests'}"}
    for count, jobs in ((2, [*EVERY, "moe-token:wrong"]), (3, OF_THREE)):
        command = [*torchrun, str(count), str(ROOT / "tests/processes.py"), str(out), *jobs]
        done = subprocess.run(command, env=env, capture_output=True, text=True)
        assert not done.returncode, done.stderr[-3000:]
        found[count] = json.loads(out.read_text())
    return found[2] | {f"{job}, three": told for job, told in found[3].items()}


@pytest.mark.parametrize("job", [*EVERY, *(f"{job}, three" for job in OF_THREE)])
def test_gradients_a_step_and_the_law_are_those_of_one_process(job: str, errors: dict[str, dict[str, float]]) -> None:
    found = errors[job]
    assert max(found[name] for name in ("gradients", "weights", "law")) <= EXACT
    assert found["context"] <= 1e-10
    assert found["share"] <= (1 if job.endswith("ddp") else 0.36 if job.endswith("three") else 0.5)


def test_a_sum_in_place_of_the_mean_is_seen(errors: dict[str, dict[str, float]]) -> None:
    assert errors["moe-token:wrong"]["gradients"] > 0.5
    assert errors["moe-token:wrong"]["weights"] < 0.1  # Adam hides it


CHOICE = [  # each strategy with each task, family and option, but not with each pair of them
    *(Job("transformer", "prompts", "fsdp"), Job("hyper_moe", "text", "ddp"), Job("fast_weights", "text", "fsdp")),
    *(Job("merged_experts", "prompts", "ddp"), Job("moe", "prompts", "experts"), Job("moe", "regression", "experts")),
    *(Job("moe", "text", "experts", more) for more in ("accumulate", "shared", "clipped", "checkpointing", "bf16")),
    *(Job("moe", "regression", "ddp", "", "fsdp"), Job("moe", "text", "one", "", "experts")),
    *(Job("moe", "text", "experts", "", "ddp"), Job("hypernet", "regression", "fsdp", "adamw", "one")),
]


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("runs")
    TABLES["everything"](folder, CHOICE)
    return folder


@pytest.mark.parametrize("job", CHOICE, ids=lambda job: job.name)
def test_a_run_of_two_processes_is_that_of_one(job: Any, runs: Path) -> None:
    found = TABLES["compared"](runs, job)
    if job.more == "bf16":  # where DDP is as far from one process: products round by how many rows they have
        assert found["test"] <= 0.02
    else:
        assert max(found.values()) <= (1e-4 if job.family == "hypernet" else TABLES["LIMITS"][job.task]), found
        assert found["moments"] <= 1e-6 or job.more != "clipped"  # weights hide another norm


def test_of_processes_that_look_into_a_model_the_first_does_it_all(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(rank_zero_only, "rank", 1)
    assert (analyze.main(["figures"]), capsys.readouterr().out) == (0, "")
    monkeypatch.setattr(rank_zero_only, "rank", 0)
    assert (analyze.main(["figures"]), capsys.readouterr().out != "") == (0, True)


def test_an_error_within_a_pass_is_said(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("os.environ", {**os.environ})  # Lightning leaves there where processes meet
    monkeypatch.setattr("zoo.core.layers.FeedForward.forward", lambda *args: 1 / 0)  # where weights are whole
    with pytest.raises(ZeroDivisionError):
        small(tmp_path / "run", trainer={"strategy": "fsdp"})
    with pytest.raises(ValueError, match=r"^1 processes were started"):
        small(tmp_path / "run", trainer={"strategy": "ddp", "devices": 2})  # further on in the same script
    dist.destroy_process_group()


def test_what_does_not_fit_is_refused_by_name(tmp_path: Path) -> None:
    for options, words in REFUSED:
        with pytest.raises(ValueError, match=words):
            small(tmp_path / "run", **options)
        assert not (tmp_path / "run").exists()


REFUSED: list[tuple[dict[str, Any], str]] = [
    ({"trainer": {"strategy": "fsdp"}, "compile": True}, r"compile=true does not fit trainer\.strategy=fsdp"),
    ({"trainer": {"strategy": "experts"}}, "strategy=experts: model=transformer has no experts to part, take fsdp"),
    ({"model": "moe", "model_options": {"shared": 1}, "trainer": {"strategy": "experts", "devices": 2}}, "=5 .* 2"),
    ({"trainer": {"num_nodes": 2}}, "num_nodes=2 wants torchrun or srun"),
    ({"trainer": {"strategy": "fdsp"}}, "'fdsp' does not exist here; did you mean fsdp"),
    *(({"trainer": {"strategy": name}}, "here; known: auto") for name in ("", "DDP", "single_device", "ddp_spawn")),
]
