"""The trainer is part of a run: stored as plain options, and used when it is resumed."""

import json
from pathlib import Path
from typing import Any

import pytest
from lightning.pytorch.strategies import DDPStrategy, SingleDeviceStrategy

import zoo
from runs import QUIET, saved, small
from zoo.training.options import of_trainer

SLURM = {"SLURM_NTASKS": "1", "SLURM_JOB_ID": "7", "SLURM_PROCID": "0", "SLURM_LOCALID": "0", "SLURM_NODEID": "0"}
STEP = {**SLURM, "SLURM_STEP_ID": "0", "SLURM_NTASKS": "2", "SLURM_NTASKS_PER_NODE": "2", "SLURM_JOB_NAME": "train"}
RANKS = {"WORLD_SIZE": "2", "RANK": "0", "LOCAL_RANK": "0", "GROUP_RANK": "0", "LOCAL_WORLD_SIZE": "2"}


class Started(Exception):
    """The trainer is made; nothing has run yet."""


@pytest.fixture
def processes(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Any:
    """How many processes a run with `devices` would have under the environment of a cluster."""
    for name in (*STEP, "SLURM_STEP_ID"):
        monkeypatch.delenv(name, raising=False)

    def placed(engine: Any) -> dict[str, Any]:
        raise Started(engine.world_size)

    monkeypatch.setattr("zoo.training.run.placement", placed)

    def run(environment: dict[str, str], **options: Any) -> int:
        for name, value in environment.items():
            monkeypatch.setenv(name, value)
        with pytest.raises(Started) as started:
            small(tmp_path / "run", trainer=options)
        return started.value.args[0]

    return run


def test_a_resumed_run_keeps_its_trainer(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """The accelerator and the silence too; not objects, as a strategy is."""
    small(tmp_path / "run", trainer={"precision": "bf16-mixed", "strategy": SingleDeviceStrategy("cpu")})
    capsys.readouterr()
    again = zoo.train(resume=tmp_path / "run")
    assert again["precision"] == "bf16-mixed"
    assert "goes on with" not in capsys.readouterr().out
    assert saved(tmp_path / "run")["zoo"]["trainer"] == {**QUIET, "precision": "bf16-mixed"}


def test_what_changes_is_said_and_written(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    first = small(tmp_path / "run", trainer={"precision": "bf16-mixed"})
    assert (first["precision"], first["devices"], first["strategy"]) == ("bf16-mixed", 1, "single_device")
    zoo.train(resume=tmp_path / "run", trainer={"precision": "32-true"})
    assert "this run goes on with precision 32-true (was 'bf16-mixed')\n" in capsys.readouterr().out
    written = json.loads((tmp_path / "run/metrics.json").read_text())
    assert (written["precision"], written["devices"], written["accelerator"]) == ("32-true", 1, "cpu")


@pytest.mark.parametrize(
    "entry",
    [
        *({"default_root_dir": "elsewhere"}, {"callbacks": []}, {"plugins": None}, {"logger": True}, {"max_steps": 9}),
        *({"strategy": {"_target_": "os.system"}}, {"precision": ["x"]}, {"devices": 1e9}, {3: 1}, {"num_nodes": 2}),
    ],
    ids=str,
)
def test_the_trainer_of_a_file_is_names_and_numbers(entry: Any) -> None:
    assert of_trainer({}, entry) == {}


def test_a_file_starts_no_more_processes_than_there_are_devices() -> None:
    with pytest.raises(ValueError, match=r"the run had 100000 devices, here are at most \d+: give trainer.devices="):
        of_trainer({}, {"devices": 100_000})
    for devices in ([0] * 1024, "9" * 9):
        with pytest.raises(ValueError, match=r"the run had .* devices, here are"):
            of_trainer({}, {"devices": devices})
    assert of_trainer({"devices": 1}, {"devices": 100_000}) == {"devices": 1}
    assert of_trainer({}, {"devices": "1"}) == {"devices": "1"}


@pytest.mark.parametrize("devices", [2, "auto", -1, [0, 1], None])
def test_what_runs_were_begun_with_is_taken_up_again(devices: Any) -> None:
    entry = {"devices": devices, "limit_val_batches": 0.5, "timeout": None}
    assert of_trainer({}, entry) == entry
    assert of_trainer({"num_nodes": 2}, {"num_nodes": 1}) == {"num_nodes": 2}


def test_processes_are_those_asked_for(processes: Any) -> None:
    assert processes({**SLURM, "SLURM_NTASKS": "3"}, devices=2) == 2  # a shell of Slurm has started none
    assert processes({**SLURM, "SLURM_STEP_ID": "0"}, devices=2) == 2  # nor a step of one task, a job of submitit
    assert processes(STEP, devices=2) == 2
    with pytest.raises(ValueError, match=r"^2 processes were started, trainer\.devices × num_nodes is 1$"):
        processes(STEP, devices=1)
    for more, words in (({}, "^2 processes were started"), ({"strategy": DDPStrategy(start_method="spawn")}, "loses")):
        with pytest.raises(ValueError, match=words):
            processes({**RANKS, "TORCHELASTIC_RUN_ID": "a"}, devices=1, **more)
