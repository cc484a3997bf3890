"""Real processes of one run that are killed, stopped or cannot write: all end, one line says why, the run goes on."""

from __future__ import annotations

import os
import resource
import runpy
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any
from unittest.mock import Mock

import pytest
from hydra.core.plugins import Plugins

import test_cli
from runs import same_weights, saved
from test_cli import FEW, LONG, SHORT, TINY, TRAIN, Answer, command, finish, wait_for  # noqa: F401

pytestmark = pytest.mark.processes
SLOW = [*LONG, "optim.steps=30", "validate_every=5", "validation_batches=20", "trainer.timeout=0.25"]


def start(*words: str, cwd: Path, limit: Callable[[], None] | None = None, **more: str) -> subprocess.Popen:
    return subprocess.Popen(
        [sys.executable, str(TRAIN), *words],
        cwd=cwd,
        env={**os.environ, "OMP_NUM_THREADS": "1", "WANDB_MODE": "offline", **more},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        preexec_fn=limit,
    )


def children(pid: int) -> list[int]:
    return [int(word) for word in Path(f"/proc/{pid}/task/{pid}/children").read_text().split()]


def running(folder: Path, step: int, *words: str, **more: str) -> tuple[subprocess.Popen, list[int]]:
    """A run of two processes that has come to `step`, with the ids of both."""
    process = start(*words, cwd=folder, **more)
    wait_for(process, folder / "run", step)
    return process, [process.pid, *children(process.pid)]


def ended(process: subprocess.Popen, pids: list[int]) -> Answer:
    """What the run says in the end; no process is left after ten seconds, and nobody shows a traceback."""
    out, err = process.communicate(timeout=120)
    until = time.monotonic() + 10
    while (left := [pid for pid in pids if Path(f"/proc/{pid}").exists()]) and time.monotonic() < until:
        time.sleep(0.1)
    assert not left, (out, err)
    assert "Traceback" not in err
    return Answer(process.returncode, out, err)


KILL, HANG, TERM = signal.SIGKILL, signal.SIGSTOP, signal.SIGTERM
FAULTS = {  # which rank of two gets which signal, one run after the other
    "ddp": [(1, KILL, "rank 1 of 2 was killed by SIGKILL")],
    "fsdp": [(0, HANG, "a process of this run does not answer")],
    "experts": [(0, KILL, "another process of this run ended"), (1, TERM, "stopped by SIGTERM at step")],
}
SLOW_WRITES = """import pathlib, time
replace = pathlib.Path.replace
def slow(self, target):
    time.sleep(2 * str(target).endswith("last.ckpt"))
    return replace(self, target)
pathlib.Path.replace = slow
"""


@pytest.mark.parametrize("how", FAULTS)
def test_a_run_goes_on_after_faults_as_if_nothing_had_been(how: str, tmp_path: Path) -> None:
    words = [*SLOW, f"trainer={how}"]
    (tmp_path / "whole").mkdir()
    finish(start(*words, "out=run", cwd=tmp_path / "whole"))

    (tmp_path / "sitecustomize.py").write_text(SLOW_WRITES)  # all are killed while the second checkpoint is written
    path = f"{tmp_path}:{os.environ.get('PYTHONPATH', '')}"
    process, pids = running(tmp_path, 7, *words, "out=run", PYTHONPATH=path)
    until = time.monotonic() + 60
    while not [*(tmp_path / "run/checkpoints").glob(".last.*")]:
        assert time.monotonic() < until
    for pid in pids:
        os.kill(pid, KILL)
    process.communicate()
    assert saved(tmp_path / "run")["global_step"] == 5

    for step, (rank, number, said) in zip((12, 17), FAULTS[how], strict=False):
        process, pids = running(tmp_path, step, "resume=run")
        os.kill(pids[rank], number)
        answer = ended(process, pids)
        assert answer.code == (128 + TERM if number == TERM else -KILL if rank == 0 else 1)
        assert said in answer.err
        assert f"continue with: python train.py resume={tmp_path}/run" in answer.err
    finish(start("resume=run", cwd=tmp_path))
    same_weights(tmp_path / "whole/run", tmp_path / "run")


def test_a_full_disk_a_damaged_checkpoint_and_a_second_start(tmp_path: Path) -> None:
    words = ["model=moe", *TINY, *SHORT, *FEW, "optim.steps=4000", "trainer=ddp", "trainer.timeout=1"]

    def full() -> None:  # what a file may hold, for want of a small disk
        resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, 20_000))

    process = start(*words, "out=full", cwd=tmp_path, limit=full)
    answer = ended(process, [process.pid])
    assert answer.code == 2
    assert "error: [Errno 27] File too large" in answer.err

    process, pids = running(tmp_path, 4, *words, "out=run")
    second = start(*words, "out=run", cwd=tmp_path)
    assert "is in use by a run that has not ended" in ended(second, [second.pid]).err
    process.send_signal(signal.SIGTERM)
    ended(process, pids)
    last = tmp_path / "run/checkpoints/last.ckpt"
    last.write_bytes(last.read_bytes()[:5000])
    process = start("resume=run", cwd=tmp_path)
    answer = ended(process, [process.pid])
    assert answer.code == 2
    assert "what can still be loaded:" in answer.err


def test_processes_that_torchrun_starts_as_two_nodes(tmp_path: Path) -> None:
    words = [*TINY, *SHORT, *FEW, "model=moe", "optim.steps=6", "trainer=fsdp", "trainer.devices=1"]
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--nnodes", "2", "--nproc-per-node", "1"]
    torchrun += ["--rdzv-backend", "c10d", "--rdzv-endpoint", "localhost:29517", "--rdzv-id", "zoo"]
    nodes = [
        subprocess.Popen(
            [*torchrun, str(TRAIN), *words, "trainer.num_nodes=2"],
            cwd=tmp_path,
            env={**os.environ, "OMP_NUM_THREADS": "1", "ZOO_RUN_ID": "both"},
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        for _ in range(2)
    ]
    for node in nodes:
        finish(node)
    assert [path.name for path in (tmp_path / "runs/moe-regression").iterdir()] == ["both"]
    assert test_cli.metrics_of(tmp_path / "runs/moe-regression/both")["devices"] == 2


def test_what_stops_a_sweep_waits_for_its_job(command: Any, monkeypatch: pytest.MonkeyPatch) -> None:  # noqa: F811
    launcher = Plugins.instance().class_name_to_class["hydra._internal.core_plugins.basic_launcher.BasicLauncher"]
    told = lambda *arguments, **options: signal.getsignal(signal.SIGTERM)(signal.SIGTERM, None)  # type: ignore  # noqa: E731
    monkeypatch.setattr(launcher, "launch", told)
    assert command("-m", "seed=0,1").code == 128 + signal.SIGTERM
    assert signal.getsignal(signal.SIGTERM) == signal.SIG_DFL
    train = runpy.run_path(str(TRAIN))
    for stop, ended in ((KeyboardInterrupt(), 0), (train["console"].Interrupted("", 15), 1)):  # a terminal tells both
        job = Mock(**{"wait.side_effect": [stop, 0]})
        monkeypatch.setattr(subprocess, "Popen", lambda words, job=job: job)
        with pytest.raises(type(stop)):
            train["elsewhere"]([])
        assert (job.wait.call_count, job.terminate.call_count) == (2, ended)


def test_processes_that_slurm_starts(tmp_path: Path) -> None:
    """Faked: the variables that srun sets for each of two tasks."""
    slurm: dict[str, Any] = {"SLURM_JOB_ID": "7", "SLURM_JOB_NAME": "zoo", "SLURM_NTASKS": "2", "SLURM_STEP_ID": "0"}
    slurm |= {"SLURM_NODEID": "0", "SLURM_NODELIST": "localhost", "MASTER_PORT": "29518", "ZOO_RUN_ID": "7"}
    slurm |= {"SLURM_JOB_NUM_NODES": "1", "SLURM_NTASKS_PER_NODE": "2"}

    def srun(*words: str) -> list[subprocess.Popen]:
        ranks = [{"SLURM_PROCID": str(rank), "SLURM_LOCALID": str(rank)} for rank in range(2)]
        return [start(*words, cwd=tmp_path, **slurm, **rank) for rank in ranks]

    tasks = srun(*SLOW, "trainer=experts", "out=run")
    wait_for(tasks[0], tmp_path / "run", 2)
    tasks[1].send_signal(signal.SIGUSR1)
    assert "stopped by SIGUSR1 at step" in finish(tasks[1], 128 + signal.SIGUSR1).err
    finish(tasks[0], 128 + signal.SIGTERM)  # which has been told that some signal came
    for task in srun("resume=run"):
        finish(task)
    assert test_cli.metrics_of(tmp_path / "run")["strategy"] == "experts"
