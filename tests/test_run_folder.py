"""A folder belongs to one run, and to one process at a time."""

import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

import zoo
from runs import QUIET, small, weights
from zoo.training import run_folder
from zoo.training.run_folder import LOCK, fresh, taken

HOLD = "import pathlib, sys, time; from zoo.training.run_folder import taken\n"
HOLD += "with taken({}, 'moe-noise', False) as folder:\n"
HOLD += "    print(folder, flush=True); sys.stdin.read()"


@pytest.fixture(autouse=True)
def _here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("ZOO_RUN_ID", raising=False)
    monkeypatch.setattr(run_folder.time, "strftime", lambda *_: "now")  # all start in one second


def holder(out: str) -> subprocess.Popen:
    """A process that holds the run folder `out` until its input ends."""
    command = [sys.executable, "-c", HOLD.format(out)]
    return subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)


def test_runs_of_one_second_get_folders_of_their_own() -> None:
    with taken(None, "moe-noise", False) as a, taken(None, "moe-noise", False) as b:
        assert (a.name, b.name) == ("now", "now-2")


def test_a_new_folder_is_made_in_one_step_or_another_is_taken(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Another process makes the folder between our look and our making of it."""
    (tmp_path / "a").mkdir()
    monkeypatch.setattr(Path, "exists", lambda self: False)
    assert fresh(tmp_path / "a").name == "a-2"


def test_a_folder_in_use_is_refused(tmp_path: Path) -> None:
    with taken(tmp_path / "run", "", False):
        for resumed in (False, True):  # a second resume too
            with (
                pytest.raises(ValueError, match=r"run is in use by a run .*: wait .* choose another out="),
                taken(tmp_path / "run", "", resumed),
            ):
                pass
        assert (tmp_path / "run" / LOCK).exists()


def test_two_runs_into_one_folder_are_one(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with taken(tmp_path / "run", "", False), pytest.raises(ValueError, match="is in use"):
        small(tmp_path / "run")
    small(tmp_path / "run", seed=0)
    with taken(tmp_path / "run", "", True), pytest.raises(ValueError, match="is in use"):
        zoo.train(resume=tmp_path / "run", trainer=QUIET)


@pytest.mark.parametrize("result", ["checkpoints/best.ckpt", "metrics.jsonl", "metrics.json", "curve.png"])
def test_results_are_not_overwritten(tmp_path: Path, result: str) -> None:
    path = tmp_path / "run" / result
    path.parent.mkdir(parents=True)
    path.write_text("of another run")
    with pytest.raises(ValueError, match=r"run holds a run already: one that stopped before .* choose another out="):
        small(tmp_path / "run")
    assert path.read_text() == "of another run"


def test_a_folder_is_given_back_however_the_run_ends(tmp_path: Path) -> None:
    (tmp_path / "used").mkdir()
    for name in ("used", "new"):
        with pytest.raises(KeyError), taken(tmp_path / name / "below", "", False):
            raise KeyError
        with taken(tmp_path / name / "below", "", False) as folder:
            pass
        assert not folder.exists()
    assert [path.name for path in tmp_path.iterdir()] == ["used"]  # what was there, and not what was made


def test_a_lock_whose_owner_has_removed_it_meanwhile_holds_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    opened = []

    def lock(file: int, how: int) -> None:
        opened.append(file)
        if len(opened) == 1:
            (tmp_path / LOCK).unlink()

    monkeypatch.setattr(run_folder.fcntl, "flock", lock)
    with taken(tmp_path, "", False):
        assert len(opened) == 2


def test_the_id_of_a_run_is_one_name(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    for name in ("..", "a/b", "/tmp", "a\n"):
        monkeypatch.setenv("ZOO_RUN_ID", name)
        with pytest.raises(ValueError, match=r"ZOO_RUN_ID=.* must be the name of one folder"):
            small(None)
    assert not list(tmp_path.iterdir())


@pytest.mark.slow
def test_processes_exclude_each_other_until_they_end(tmp_path: Path) -> None:
    holders = [holder("None") for _ in range(3)]
    folders = {Path(process.stdout.readline().strip()) for process in holders}  # type: ignore[union-attr]
    assert len(folders) == 3
    for process in holders:
        process.communicate("")
    assert not any(folder.exists() for folder in folders)

    killed = holder(f"pathlib.Path({str(tmp_path / 'run')!r})")
    assert killed.stdout
    killed.stdout.readline()
    with pytest.raises(ValueError, match="is in use"), taken(tmp_path / "run", "", False):
        pass
    os.kill(killed.pid, signal.SIGKILL)
    killed.communicate()
    with taken(tmp_path / "run", "", False) as folder:
        assert (folder / LOCK).exists()


def test_a_run_leaves_no_lock(tmp_path: Path) -> None:
    metrics = small(None)
    small(None)
    runs = tmp_path / "runs/transformer-regression"
    assert sorted(path.name for path in runs.iterdir()) == ["now", "now-2"]
    assert not list(runs.rglob(LOCK))
    assert json.loads((runs / "now/metrics.json").read_text())["checkpoint"] == metrics["checkpoint"]
    assert weights(runs / "now", "last").keys() == weights(runs / "now-2", "last").keys()
