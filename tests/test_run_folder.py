"""A folder belongs to one run, and to one process at a time."""

import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

import zoo
from runs import QUIET, small
from zoo.training.run_folder import LOCK, taken

HOLD = "import sys; from zoo.training.run_folder import place, taken\n"
HOLD += "folder = place({!r}, 'moe-noise')\n"
HOLD += "with taken(folder, False): print(folder, flush=True); sys.stdin.read()"


@pytest.fixture(autouse=True)
def _here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("ZOO_RUN_ID", raising=False)


def holder(out: str | None) -> subprocess.Popen:
    """A process that holds the run folder `out` until its input ends."""
    command = [sys.executable, "-c", HOLD.format(out)]
    return subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)


def test_two_runs_into_one_folder_are_one(tmp_path: Path) -> None:
    in_use = r"run is in use by a run .*: wait .* choose another out="
    with taken(tmp_path / "run", False):
        with pytest.raises(ValueError, match=in_use):
            small(tmp_path / "run")
        assert (tmp_path / "run" / LOCK).exists()  # which its owner removes, not who was refused
    small(tmp_path / "run", seed=0)
    with taken(tmp_path / "run", True), pytest.raises(ValueError, match=in_use):
        zoo.train(resume=tmp_path / "run", trainer=QUIET)


@pytest.mark.parametrize("result", ["checkpoints/best.ckpt", "metrics.jsonl", "metrics.json", "curve.png"])
def test_results_are_not_overwritten(tmp_path: Path, result: str) -> None:
    path = tmp_path / "run" / result
    path.parent.mkdir(parents=True)
    path.write_text("of another run")
    with pytest.raises(ValueError, match=r"run holds a run already: continue it .* choose another out="):
        small(tmp_path / "run")
    assert path.read_text() == "of another run"


def test_a_folder_is_given_back_however_the_run_ends(tmp_path: Path) -> None:
    (mine := tmp_path / "mine").mkdir()
    for folder in (mine, mine, mine / "made/run"):  # what it made goes with it
        with pytest.raises(KeyError), taken(folder, False):
            raise KeyError
        assert [*tmp_path.rglob("*")] == [mine]


@pytest.mark.slow
def test_processes_exclude_each_other_until_they_end(tmp_path: Path) -> None:
    holders = [holder(None) for _ in range(3)]
    folders = {Path(process.stdout.readline().strip()) for process in holders}  # type: ignore[union-attr]
    assert len(folders) == 3
    for process in holders:
        process.communicate("")
    assert not any(folder.exists() for folder in folders)

    killed = holder(str(tmp_path / "run"))
    assert killed.stdout
    killed.stdout.readline()
    with pytest.raises(ValueError, match="is in use"), taken(tmp_path / "run", False):
        pass
    os.kill(killed.pid, signal.SIGKILL)
    killed.communicate()
    with taken(tmp_path / "run", False):
        assert (tmp_path / "run" / LOCK).exists()


def test_runs_one_after_the_other_have_folders_of_their_own_and_leave_no_lock(tmp_path: Path) -> None:
    checkpoints = {small(None)["checkpoint"] for _ in range(2)}
    written = [
        json.loads(path.read_text())["checkpoint"] for path in tmp_path.glob("runs/transformer-regression/*/*.json")
    ]
    assert sorted(written) == sorted(checkpoints)
    assert len(checkpoints) == 2
    assert not list(tmp_path.rglob(LOCK))


def test_a_link_of_the_user_stays(tmp_path: Path) -> None:
    """It may lead to a disk that is not there at the moment."""
    (tmp_path / "runs").symlink_to(tmp_path / "unmounted")
    with pytest.raises(ValueError, match=r"cannot use .* as run folder"):
        small(tmp_path / "runs" / "a")
    assert (tmp_path / "runs").is_symlink()


def test_no_step_is_no_run(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"^trainer\.max_time=.* was over before the first step"):
        small(tmp_path / "a", trainer={"max_time": {"seconds": 0}})
    assert not (tmp_path / "a").exists()
