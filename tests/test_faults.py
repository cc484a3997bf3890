"""Real processes of one run that are killed, stopped or cannot write: all end, one line says why, the run goes on."""

from __future__ import annotations

import os
import resource
import runpy
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from unittest.mock import Mock

import pytest
import torch.distributed as dist
from hydra.core.plugins import Plugins

import test_cli
from runs import same_weights, saved
from test_cli import FEW, LONG, SHORT, TINY, TRAIN, Answer, command, finish, wait_for  # noqa: F401
from zoo.devices.faults import OTHER, STARTER, Lost, explained

pytestmark = pytest.mark.processes
chain = pytest.mark.xdist_group("faults")  # who share the runs that nobody disturbed
SLOW = [*LONG, "optim.steps=20", "validate_every=5", "validation_batches=20", "trainer.timeout=0.2"]


def start(*words: str, cwd: Path, limit: Callable[[], None] | None = None, **more: str) -> subprocess.Popen:
    """Python with train.py and these words, or with -m and a module."""
    return subprocess.Popen(
        [sys.executable, *([] if words[0] == "-m" else [str(TRAIN)]), *words],
        cwd=cwd,
        env={**os.environ, "OMP_NUM_THREADS": "1", "WANDB_MODE": "offline", **more},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        preexec_fn=limit,
    )


def port() -> str:
    """One that nobody uses now."""
    with socket.socket() as free:
        free.bind(("localhost", 0))
        return str(free.getsockname()[1])


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
FAULTS = {  # which rank of two gets which signal
    "ddp": (1, KILL, "rank 1 of 2 was killed by SIGKILL"),
    "fsdp": (0, HANG, "a process of this run does not answer"),
    "experts": (0, KILL, "another process of this run ended"),
}
SLOW_WRITES = """import pathlib, time
replace = pathlib.Path.replace
def slow(self, target):
    time.sleep(str(target).endswith("last.ckpt"))
    return replace(self, target)
pathlib.Path.replace = slow
"""
ALL = f"""import runpy, sys
words = sys.argv[1:]
for how in {[*FAULTS]}:
    sys.argv = [{str(TRAIN)!r}, *words, f"trainer={{how}}", f"out={{how}}"]
    try:
        runpy.run_path(sys.argv[0], run_name="__main__")
    except SystemExit as stop:
        assert not stop.code
"""


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Runs that nobody disturbed, by each strategy, one after the other by one pair of processes."""
    folder = tmp_path_factory.mktemp("whole")
    (folder / "all.py").write_text(ALL)
    finish(start("-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", "all.py", *SLOW, cwd=folder))
    return folder


@chain
@pytest.mark.parametrize("how", FAULTS)
def test_a_run_goes_on_after_faults_as_if_nothing_had_been(how: str, whole: Path, tmp_path: Path) -> None:
    (tmp_path / "sitecustomize.py").write_text(SLOW_WRITES)  # all are killed while the second checkpoint is written
    path = f"{tmp_path}:{os.environ.get('PYTHONPATH', '')}"
    process, pids = running(tmp_path, 7, *SLOW, f"trainer={how}", "out=run", PYTHONPATH=path)
    folder, until = tmp_path / "run/checkpoints", time.monotonic() + 60
    while not (half := [*folder.glob(".last.*")]):
        assert time.monotonic() < until
        time.sleep(0.01)
    for pid in pids:
        os.kill(pid, KILL)
    process.communicate()
    assert half[0].exists()
    assert saved(tmp_path / "run")["global_step"] == 5

    rank, number, said = FAULTS[how]
    process, pids = running(tmp_path, 12, "resume=run")
    os.kill(pids[rank], number)
    answer = ended(process, pids)
    assert answer.code == (-KILL if rank == 0 else 1)
    assert f"error: {said}; continue with: python train.py resume={tmp_path}/run\n" in answer.err
    assert answer.err.count("continue with") == 1
    assert not half[0].exists()
    finish(start("resume=run", cwd=tmp_path))
    same_weights(whole / how, tmp_path / "run")


def test_a_full_disk_a_damaged_checkpoint_and_a_second_start(tmp_path: Path) -> None:
    words = ["model=moe", *TINY, *SHORT, *FEW, "optim.steps=4000", "trainer=ddp", "trainer.timeout=1"]

    def full() -> None:  # what a file may hold, for want of a small disk
        resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, 20_000))

    process = start(*words, "out=full", cwd=tmp_path, limit=full)
    answer = ended(process, [process.pid])
    assert answer.code == 2
    assert "error: [Errno 27] File too large" in answer.err

    process, pids = running(tmp_path, 4, *words, "out=run")
    half = tmp_path / "run/checkpoints/.last.1.ckpt"  # which the run might be writing
    half.touch()
    second = start(*words, "out=run", cwd=tmp_path)
    assert "is in use by a run that has not ended" in ended(second, [second.pid]).err
    assert half.exists()
    os.kill(pids[1], TERM)  # one that others do not see
    assert "stopped by SIGTERM at step" in ended(process, pids).err
    last = tmp_path / "run/checkpoints/last.ckpt"
    last.write_bytes(last.read_bytes()[:5000])
    process = start("resume=run", cwd=tmp_path)
    answer = ended(process, [process.pid])
    assert answer.code == 2
    assert "what can still be loaded:" in answer.err


def test_processes_that_torchrun_starts_as_two_nodes(tmp_path: Path) -> None:
    words = [*TINY, *SHORT, *FEW, "model=moe", "optim.steps=6", "trainer=fsdp", "trainer.devices=1"]
    torchrun = ["-m", "torch.distributed.run", "--nnodes", "2", "--nproc-per-node", "1", "--rdzv-id", "zoo"]
    torchrun += ["--rdzv-backend", "c10d", "--rdzv-endpoint", f"localhost:{port()}", str(TRAIN), "trainer.num_nodes=2"]
    nodes = [start(*torchrun, *words, cwd=tmp_path, ZOO_RUN_ID="both") for _ in range(2)]
    for node in nodes:
        finish(node)
    assert [path.name for path in (tmp_path / "runs/moe-regression").iterdir()] == ["both"]
    assert test_cli.metrics_of(tmp_path / "runs/moe-regression/both")["devices"] == 2


@pytest.mark.parametrize(("rank", "raised"), [(1, Lost), (2, SystemExit)])
def test_of_those_that_lost_their_parent_one_says_so(
    rank: int, raised: type[BaseException], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv(STARTER, "1")  # no parent of this process
    child: Any = SimpleNamespace(launcher=None, local_rank=rank)
    with pytest.raises(raised, match=OTHER if raised is Lost else "1"), explained(child, lambda: "go on"):
        raise dist.DistError("Connection closed by peer")


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


@chain
def test_processes_that_slurm_starts(whole: Path, tmp_path: Path) -> None:
    """Faked: the variables that srun sets for each of two tasks."""
    slurm: dict[str, Any] = {"SLURM_JOB_ID": "7", "SLURM_JOB_NAME": "zoo", "SLURM_NTASKS": "2", "SLURM_STEP_ID": "0"}
    slurm |= {"SLURM_NODEID": "0", "SLURM_NODELIST": "localhost", "MASTER_PORT": port(), "ZOO_RUN_ID": "7"}
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
    same_weights(whole / "experts", tmp_path / "run")
