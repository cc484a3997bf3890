"""The command line: messages and exit codes, kills, signals, processes and sweeps, with train.py itself."""

import json
import os
import re
import runpy
import signal
import subprocess
import sys
import time
from argparse import ArgumentParser
from importlib import metadata
from pathlib import Path
from typing import Any, NamedTuple

import lightning  # noqa: F401 (imported within a test, its log handler would keep that test's stderr)
import pytest

import zoo
from runs import rows, same_weights, saved, weights

ROOT = Path(__file__).parents[1]
TRAIN = ROOT / "train.py"
TINY = [f"model.{key}={value}" for key, value in {"dim": 16, "layers": 2, "heads": 2, "hidden": 16}.items()]
SHORT = ["optim.batch_size=8", "task.points=5", "task.queries=3", "trainer.accelerator=cpu"]
FEW = ["validate_every=2", "log_every=1", "validation_batches=1", "test_batches=1", "optim.warmup=1"]
# slow enough, thanks to its many validation batches, to be killed in the middle
LONG = ["model=moe", "model.bias_rate=0.01", *TINY, *SHORT, "optim.steps=60", "validate_every=10", "log_every=1"]
LONG += ["validation_batches=80", "test_batches=2", "trainer.enable_progress_bar=false"]
TEXT = ["model=hypernet", "task=text", "model.chunk=8", "task.tokens=48", *TINY, "optim.batch_size=8", *LONG[-6:]]


class Answer(NamedTuple):
    code: int
    out: str
    err: str


@pytest.fixture
def command(capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Any:
    """Runs train.py in this process: ten times faster than a process of its own."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(ArgumentParser, "error", ArgumentParser.error)  # put back afterwards

    def run(*arguments: str) -> Answer:
        monkeypatch.setattr(sys, "argv", [str(TRAIN), *arguments])
        capfd.readouterr()
        with pytest.raises(SystemExit) as stop:
            runpy.run_path(str(TRAIN), run_name="__main__")
        return Answer(int(stop.value.code or 0), *capfd.readouterr())

    return run


def start(*arguments: str, cwd: Path) -> subprocess.Popen:
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "WANDB_MODE": "offline", "COLUMNS": "200"}
    environment.pop("WANDB_API_KEY", None)
    return subprocess.Popen(
        [sys.executable, str(TRAIN), *arguments],
        cwd=cwd,
        env=environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


def finish(process: subprocess.Popen, code: int = 0) -> Answer:
    out, err = process.communicate(timeout=240)
    assert process.returncode == code, out + err
    return Answer(process.returncode, out, err)


def wait_for(process: subprocess.Popen, folder: Path, step: int) -> None:
    """Until metrics.jsonl holds a row of training step `step` or later."""
    path, limit = folder / "metrics.jsonl", time.monotonic() + 120
    while time.monotonic() < limit and process.poll() is None:
        lines = path.read_text().splitlines() if path.exists() else []
        if any(f'"step": {number},' in line for line in lines for number in range(step, step + 8)):
            return
        time.sleep(0.005)
    raise AssertionError(f"no step {step}: {process.communicate()}")


def metrics_of(folder: Path) -> dict[str, Any]:
    return json.loads((folder / "metrics.json").read_text())


def assert_same(a: Path, b: Path) -> None:
    """Weights, rows and test numbers are equal, bit for bit."""
    same_weights(a, b)
    assert rows(a) == rows(b)
    assert metrics_of(a)["test"] == metrics_of(b)["test"]


WRONG = [
    ("model=hypernet model.rnak=2", "model.rnak is not an option of HypernetConfig; did you mean rank?"),
    ("sed=1", "sed is not an option of RunConfig; did you mean seed?"),
    ("mdel=moe", "mdel is not an option of RunConfig; did you mean model?"),
    ("+bogus=1", "bogus is not an option of RunConfig; known: model, task"),
    ("lr=10", "lr is not an option of RunConfig; known: model, task, optim, seed"),
    ("hello", "'hello' is no option: options are written name=value; python train.py --help shows them"),
    ("--frobnicate", "unrecognized arguments: --frobnicate; train.py --help shows all options"),
    ("seed=1,2", "several values of one option are runs of a sweep: python train.py -m"),
    ("model=moe,moe", "several values of one option are runs of a sweep: python train.py -m"),
    ("model.dim=[1", "model.dim=[1 cannot be read: "),
    ("model=hypernett", "model 'hypernett' does not exist; did you mean hypernet?"),
    ("debug=fats", "debug 'fats' does not exist; did you mean fast?"),
    ("logger=cvs", "logger 'cvs' does not exist"),
    ("logger=csv logger.project=mine", "logger.project, offline and id need logger=wandb, not csv"),
    ("model=moe model.top_k=5", "model.top_k=5 exceeds model.experts=4"),
    ("trainer.min_steps=abc", "trainer.min_steps is decided by the option optim.steps"),
    (f"log_every={10**20}", f"log_every={10**20} must be a number of 64 bits"),
    ("model.dim=1000000000000", "can't allocate memory"),
    ("resume=", "resume= names no run"),
    ("out=train.py", "train.py as run folder: File exists; choose another out="),
    ("out=train.py/below", "train.py/below as run folder: Not a directory"),
    (f"out={'x' * 300}", "as run folder: File name too long"),
]


@pytest.mark.parametrize(("arguments", "message"), WRONG)
def test_wrong_options(command: Any, tmp_path: Path, arguments: str, message: str) -> None:
    (tmp_path / "train.py").touch()
    answer = command("out=made/here", "debug=fast", *arguments.split())
    assert answer.code == 2
    assert answer.err.splitlines()[-1].startswith("error: ")
    assert message in answer.err
    assert "Traceback" not in answer.err
    assert [path.name for path in tmp_path.iterdir()] == ["train.py"]


def test_a_run_then_all_that_can_be_asked_of_it_again(command: Any, tmp_path: Path) -> None:
    asked = ["model=hypernet", *TINY, *SHORT, "debug=fast"]
    answer = command(*asked, "out=run")
    assert answer.code == 0, answer.err
    assert "load it with" in answer.out
    assert sorted(path.name for path in tmp_path.iterdir()) == ["run"]
    first, logged = metrics_of(tmp_path / "run"), rows(tmp_path / "run")

    answer = command(*asked, "out=run")
    assert answer.code == 2
    assert f"{tmp_path}/run holds a run already: continue it with resume={tmp_path}/run" in answer.err

    # nothing asked; the same asked, with other options of the trainer: accepted
    for more in ([], [*asked, "trainer.enable_progress_bar=false", "trainer.precision=32-true"]):
        answer = command("resume=run", *more)
        assert answer.code == 0, answer.err
        assert metrics_of(tmp_path / "run")["test"] == first["test"]
    assert command("resume=run/checkpoints/best.ckpt").code == 0
    assert rows(tmp_path / "run") == logged

    for more, message in (
        (
            ["optim.lr=1", "seed=5"],
            "optim.lr is 0.006 in the checkpoint, 1 asked; seed is 0 in the checkpoint, 5 asked",
        ),
        (["model=moe"], "model.name is 'hypernet' in the checkpoint, 'moe' asked"),
        (["model=hypernet", "model.rnak=2"], "model.rnak is not in the checkpoint, 2 asked"),
        (
            ["debug=overfit"],
            "optim.steps is 4 in the checkpoint, 200 asked; overfit is False in the checkpoint, True asked",
        ),
    ):
        answer = command("resume=run", *more)
        assert answer.code == 2
        assert answer.err.splitlines()[-1].startswith("error: resume=run continues a run as it was begun, but ")
        assert message in answer.err
    assert sorted(path.name for path in tmp_path.iterdir()) == ["run"]
    assert zoo.load("run").config.rank == 4


def test_ctrl_c_before_the_training_is_one_line(command: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    before = signal.signal(signal.SIGINT, signal.default_int_handler)  # a suite in the background ignores Ctrl-C
    monkeypatch.setattr("zoo.training.run.of_run", lambda *args: signal.raise_signal(signal.SIGINT))
    answer = command("out=run")
    signal.signal(signal.SIGINT, before)
    assert (answer.code, answer.err) == (130, "\nstopped by SIGINT\n")


def test_a_full_disk_is_one_line_and_leaves_no_part(
    command: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(self: Path, *args: Any) -> None:
        self.touch()
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(Path, "write_bytes", full)
    answer = command(*TINY, *SHORT, "debug=fast", "out=run", "trainer.enable_progress_bar=false")
    assert answer.code == 2
    best = tmp_path / "run/checkpoints/best.ckpt"
    assert answer.err == f"error: [Errno 28] No space left on device: '{best}'\n"
    assert not list(best.parent.iterdir())


def test_a_job_of_a_sweep_that_fails_is_one_line(command: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from zoo.models import Model

    original = Model.test_step

    def step(self: Model, *args: Any) -> None:
        if self.optim.lr == 0.5:
            raise TypeError("a symbol")
        original(self, *args)

    monkeypatch.setattr(Model, "test_step", step)
    few = [*TINY, *SHORT, "debug=fast", "trainer.enable_progress_bar=false"]
    answer = command("-m", *few, "optim.lr=-1,0.5,0.1", "hydra.sweep.dir=sweep")
    assert answer.code == 1
    errors = [line for line in answer.err.splitlines() if line.lower().startswith("error")]
    assert errors[0] == "error: optim.lr=-1.0 must be above 0"
    assert errors[1].startswith("error: the test failed, TypeError: a symbol; training is complete and saved in ")
    assert len(errors) == 2
    assert "Traceback" not in answer.err
    assert [path.parent.name for path in tmp_path.rglob("metrics.json")] == ["optim.lr=0.1"]
    assert re.findall(r"^optim.lr=(\S+) +failed$", answer.out, re.M) == ["-1", "0.5"]
    assert re.search(r"^optim.lr=0.1 +4 .* nmse \d", answer.out, re.M)


@pytest.mark.parametrize(
    "choices",
    [
        ["experiment=incontext", "debug=fast"],
        ["task=noise", "model=moe", "debug=fast"],
        pytest.param(["model=hypernet", "debug=overfit"], marks=pytest.mark.slow),
    ],
)
def test_presets(command: Any, tmp_path: Path, choices: list[str]) -> None:
    answer = command(*choices, *TINY, "trainer.accelerator=cpu", "optim.batch_size=8", "out=run")
    assert answer.code == 0, answer.err
    losses = [row["loss"] for row in rows(tmp_path / "run") if "loss" in row]
    overfit = "debug=overfit" in choices
    assert metrics_of(tmp_path / "run")["steps"] == (200 if overfit else 4)
    assert not overfit or losses[-1] < 0.2 * losses[0]


def test_a_missing_package_is_named(command: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    def missing(name: str) -> Any:
        raise metadata.PackageNotFoundError(name)

    monkeypatch.setattr(metadata, "distribution", missing)
    answer = command("task=text", *TINY, "debug=fast", "optim.batch_size=8", "trainer.accelerator=cpu")
    advice = "python -m pip install -c constraints.txt -e '.[text]', or choose task.domains=[code]"
    needs = f"the domain medicine of task=text needs the package simple-icd-10-cm: {advice}"
    assert (answer.code, answer.err.splitlines()[-1]) == (2, f"error: {needs}")


def test_folders_of_any_name_are_those_asked_for(command: Any, tmp_path: Path) -> None:
    few = [*TINY, *SHORT, "debug=fast"]
    assert command(*few, "out=runs/lr=0.1 ü").code == 0
    assert command("resume=runs/lr=0.1 ü", "out=runs/lr=0.1 ü").code == 0
    answer = command("resume=runs/lr=0.1 ü", "out=other")
    assert answer.code == 2
    assert answer.err.startswith("error: resume=runs/lr=0.1 ü continues in its own folder, ")
    assert command(*few, "hydra.run.dir=own").code == 0
    assert command("-m", *few, "seed=0,1", "out=run${seed}", "hydra.sweep.dir=sweep").code == 0
    folders = sorted(str(path.parent.relative_to(tmp_path)) for path in tmp_path.rglob("metrics.json"))
    assert folders == ["own", "run0", "run1", "runs/lr=0.1 ü"]


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The run that nobody interrupts, in a process of its own."""
    folder = tmp_path_factory.mktemp("whole")
    finish(start(*LONG, "out=run", cwd=folder))
    return folder / "run"


@pytest.mark.slow
def test_metrics_of_a_real_command(whole: Path) -> None:
    metrics = metrics_of(whole)
    assert metrics["command"] == f"python {TRAIN} {' '.join(LONG)} out=run"
    assert metrics["tokens"] == 60 * 8 * 8
    assert metrics["tokens_per_second"] == pytest.approx(metrics["tokens"] / metrics["seconds"], rel=0.01)


@pytest.mark.slow
def test_killed_and_resumed(whole: Path, tmp_path: Path) -> None:
    kill_and_resume(LONG, whole, tmp_path)


@pytest.mark.slow
def test_killed_and_resumed_on_text(tmp_path: Path) -> None:
    (tmp_path / "whole").mkdir()
    finish(start(*TEXT, "out=run", cwd=tmp_path / "whole"))
    kill_and_resume(TEXT, tmp_path / "whole" / "run", tmp_path)


def kill_and_resume(options: list[str], whole: Path, folder: Path) -> None:
    """Ends like `whole`, which nobody interrupted, bit for bit."""
    process = start(*options, "out=run", cwd=folder)
    wait_for(process, folder / "run", 22)
    process.send_signal(signal.SIGKILL)
    finish(process, -signal.SIGKILL)
    assert 10 <= saved(folder / "run")["global_step"] < 60
    assert not (folder / "run/metrics.json").exists()
    with (folder / "run/metrics.jsonl").open("a") as file:
        file.write('{"step": 99, "lo')  # what a kill in the middle of a row leaves
    finish(start("resume=run", *options, cwd=folder))
    assert_same(whole, folder / "run")


@pytest.mark.slow
@pytest.mark.parametrize(("number", "step"), [(signal.SIGTERM, 2), (signal.SIGINT, 24)])
def test_stopped_and_resumed(whole: Path, tmp_path: Path, number: signal.Signals, step: int) -> None:
    """Step 2 is before the first validation."""
    process = start(*LONG, "out=run", cwd=tmp_path)
    wait_for(process, tmp_path / "run", step)
    process.send_signal(number)
    answer = finish(process, 128 + number)
    stopped = saved(tmp_path / "run")["global_step"]
    assert step <= stopped < 60
    message = f"stopped by {number.name} at step {stopped}; continue with: python train.py resume={tmp_path}/run"
    assert message in answer.err
    assert "Traceback" not in answer.err
    finish(start(f"resume={tmp_path}/run", cwd=tmp_path))
    assert_same(whole, tmp_path / "run")


@pytest.mark.slow
def test_profile(tmp_path: Path) -> None:
    answer = finish(start("model=hypernet", "debug=profile", *TINY, *SHORT, "out=run", cwd=tmp_path))
    assert metrics_of(tmp_path / "run")["steps"] == 50
    assert "run_training_batch" in answer.out + answer.err


PAIR = ["model=moe", "model.bias_rate=0.01", *TINY, *SHORT, *FEW, "optim.steps=6", "optim.accumulate=2", "trainer=ddp"]


@pytest.fixture(scope="module")
def sweep(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Answer]:
    """A sweep whose second job needs two processes."""
    folder = tmp_path_factory.mktemp("sweep")
    return folder, finish(start("-m", *PAIR, "seed=3", "trainer.devices=1,2", cwd=folder))


UNEVEN = [  # targets of different lengths, held-out sets smaller than a batch
    *("model=transformer", "task=prompts", f"task.files=[{Path(__file__).parent}/prompts.jsonl]", "trainer=ddp"),
    *(option for option in (*PAIR, *TINY) if option.startswith(("optim.", "val", "test", "log", "model.di"))),
]


@pytest.mark.slow
@pytest.mark.parametrize("pair", [PAIR, UNEVEN], ids=["moe", "uneven"])
def test_two_processes_train_like_one(pair: list[str], tmp_path: Path, command: Any) -> None:
    finish(start(*pair, "seed=3", "out=pair", cwd=tmp_path))
    one = [option for option in pair if option != "trainer=ddp"]
    assert command(*one, "seed=3", "out=one").code == 0
    a, b = weights(tmp_path / "one", "last"), weights(tmp_path / "pair", "last")
    assert a.keys() == b.keys()
    assert max(float((a[key] - b[key]).abs().max()) for key in a) < 1e-5
    assert any("bias" in key and a[key].any() for key in a) == (pair == PAIR)
    pair_test, one_test = (metrics_of(tmp_path / name)["test"] for name in ("pair", "one"))
    assert pair_test == pytest.approx(one_test, abs=1e-5)
    # every row once, and no folder of the second process
    assert [row["step"] for row in rows(tmp_path / "pair")] == [1, 2, 2, 3, 4, 4, 5, 6, 6]
    assert sorted(path.name for path in tmp_path.iterdir()) == ["one", "pair"]
    files = {path.name for path in (tmp_path / "pair").rglob("*") if path.is_file()}
    assert files == {"best.ckpt", "last.ckpt", "metrics.jsonl", "metrics.json", "test.npz", "card.md", "curve.png"}


@pytest.mark.slow
def test_a_job_of_a_sweep_over_two_processes(sweep: tuple[Path, Answer]) -> None:
    folder, answer = sweep
    found = sorted(folder.rglob("metrics.json"))
    assert [metrics_of(path.parent)["devices"] for path in found] == [1, 2]
    assert [path.name for path in folder.iterdir()] == ["multirun"]
    metrics = metrics_of(found[1].parent)
    assert (metrics["seed"], metrics["steps"]) == (3, 6)
    # its ranks know the run folder from their own command line and do not sweep again
    assert 'out="' in metrics["command"]
    assert " -m " not in metrics["command"]
    assert answer.out.count("load it with") == 2


@pytest.mark.slow
def test_a_sweep_with_wandb_without_account(tmp_path: Path) -> None:
    finish(start("-m", "model=transformer,moe", "debug=fast", *TINY, *SHORT, "logger=wandb", cwd=tmp_path))
    folders = sorted(path.parent for path in tmp_path.rglob("metrics.json"))
    assert [metrics_of(folder)["model"] for folder in folders] == ["moe", "transformer"]  # by name
    # a wandb run of its own in each run folder, and nowhere else
    runs = [path.parent.parent for path in tmp_path.rglob("offline-run-*")]
    assert sorted(runs) == folders
    assert all(any(folder.rglob("*.wandb")) for folder in folders)
    assert [path.name for path in tmp_path.iterdir()] == ["multirun"]
