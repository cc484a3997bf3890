"""Training from Python: what a run writes, what it refuses, and that a run cut short ends like one that was not."""

import json
import math
import re
import signal
import sys
from copy import deepcopy
from pathlib import Path
from typing import Any

import pytest
import torch

import zoo
from runs import FAMILIES, QUIET, one_line, rows, same_weights, saved, signalled, small
from zoo.console import Interrupted, command_line
from zoo.core.layers import Attention
from zoo.models.optim import Combined, OptimConfig
from zoo.tasks.regression import Regression


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """One finished run of each family."""
    folders = {name: tmp_path_factory.mktemp(name) / "run" for name in FAMILIES}
    torch.set_num_threads(1)
    for name, folder in folders.items():
        small(folder, name)
    return folders


def test_the_command_is_what_was_typed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "orig_argv", ["/somewhere/python3", "train.py", "model=moe", "out=a b"])
    monkeypatch.setattr(sys, "executable", "/elsewhere/python3")
    assert command_line() == "python3 train.py model=moe 'out=a b'"


@pytest.mark.parametrize("model", FAMILIES)
def test_metrics_json(runs: dict[str, Path], model: str) -> None:
    metrics = json.loads((runs[model] / "metrics.json").read_text())
    assert (metrics["task"], metrics["model"], metrics["seed"], metrics["steps"]) == ("regression", model, 0, 6)
    assert metrics["tokens"] == 6 * 8 * 8
    # rounding of seconds to milliseconds is all that may differ
    assert metrics["tokens_per_second"] == pytest.approx(metrics["tokens"] / metrics["seconds"], rel=0.02)
    loaded = zoo.load(metrics["checkpoint"])
    assert metrics["params_total"] == sum(p.numel() for p in loaded.parameters())
    assert 0 < metrics["params_active"] <= metrics["params_total"]
    assert (metrics["params_active"] < metrics["params_total"]) == (model == "moe")
    assert metrics["flops_per_token"] > 2 * (metrics["params_active"] - metrics["params"]["context_to_delta"]) * 0.9
    assert metrics["command"] == command_line()
    assert {"python", "zoo", "torch", "lightning", "commit"} == set(metrics["versions"])
    baselines = ["nmse", "nmse_without_context", "nmse_wrong_context", "nmse_first_1", "nmse_first_2", "nmse_ridge"]
    baselines += ["nmse_ridge_first_1", "nmse_ridge_first_2", "nmse_nearest", "nmse_zero"]
    assert list(metrics["test"]) == baselines
    assert metrics["main_metric"] == "nmse"
    assert all(math.isfinite(value) for value in metrics["test"].values())
    assert metrics["test"]["nmse_ridge"] < 1e-6 < metrics["test"]["nmse"]


def test_a_run_folder_holds_these_files_and_no_others(runs: dict[str, Path]) -> None:
    folder = runs["transformer"]
    files = sorted(str(path.relative_to(folder)) for path in folder.rglob("*") if path.is_file())
    assert files == [
        "card.md",
        "checkpoints/best.ckpt",
        "checkpoints/last.ckpt",
        "curve.png",
        "metrics.json",
        "metrics.jsonl",
        "test.npz",
    ]


def test_the_tested_model_is_the_best_validated_one(tmp_path: Path) -> None:
    # a learning rate that ruins the model after its first steps: the last checkpoint is worse than the best
    metrics = small(tmp_path / "run", optim={"lr": 3.0, "warmup": 5, "clip": 0.0}, validate_every=1)
    validated = {row["step"]: row["validation_loss"] for row in rows(tmp_path / "run") if "validation_loss" in row}
    best = min(validated, key=lambda step: validated[step])
    assert best < 6
    assert torch.load(metrics["checkpoint"], weights_only=True)["global_step"] == best
    # Lightning's own save_last would stop at the best one, and a run killed here would lose all after it
    assert saved(tmp_path / "run")["global_step"] == 6
    model = zoo.load(tmp_path / "run").requires_grad_(False)
    batches = [model.task.batch("test", k, 8) for k in range(2)]
    nmse = torch.stack([model.task.token_losses(model(b.tokens, b.n_context), b) for b in batches]).mean() / 3
    assert metrics["test"]["nmse"] == pytest.approx(float(nmse), rel=1e-5)


def test_rows_and_validations(tmp_path: Path) -> None:
    small(tmp_path / "run", optim={"steps": 5})
    training_rows = [row["step"] for row in rows(tmp_path / "run") if "loss" in row]
    validated = [row["step"] for row in rows(tmp_path / "run") if "validation_loss" in row]
    assert training_rows == [1, 2, 3, 4, 5]
    # the last step is always validated, and once
    assert validated == [2, 4, 5]


def test_the_learning_rate_moves(runs: dict[str, Path]) -> None:
    optim = OptimConfig(steps=6, batch_size=8, warmup=2, lr=Regression.lr)
    recorded = {row["step"]: row["lr"] for row in rows(runs["transformer"]) if "lr" in row}
    # the rate that the step before the row was taken with
    assert recorded == pytest.approx({step: Regression.lr * optim.lr_at(step - 1) for step in range(1, 7)})
    assert 0 < recorded[6] < recorded[1] < recorded[2]


@pytest.mark.parametrize(
    ("model", "accumulate", "step", "precision"),
    # steps 2 and 4 are validated; 3 is not; 1 comes before the first checkpoint
    [
        ("hypernet", 1, 4, "64-true"),
        ("moe", 2, 3, "64-true"),
        ("moe", 2, 1, "bf16-true"),
        ("transformer", 1, 6, "32-true"),
    ],
)
def test_a_signal_then_resume_is_as_if_nothing_happened(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, model: str, accumulate: int, step: int, precision: str
) -> None:
    options: Any = {"optim": {"accumulate": accumulate}, "trainer": {"precision": precision}}
    whole = small(tmp_path / "whole", model, **deepcopy(options))
    before = [signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)]
    signalled(monkeypatch, step)
    with pytest.raises(Interrupted, match=rf"SIGTERM at step {step}; .*resume=.*/cut") as stop:
        small(tmp_path / "cut", model, **options)
    assert stop.value.code == 128 + signal.SIGTERM
    assert [signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)] == before
    assert saved(tmp_path / "cut")["global_step"] == step
    resumed = zoo.train(resume=tmp_path / "cut", trainer=QUIET)
    same_weights(tmp_path / "whole", tmp_path / "cut")
    assert rows(tmp_path / "cut") == rows(tmp_path / "whole")
    assert resumed["test"] == whole["test"]
    assert (resumed["steps"], resumed["tokens"]) == (whole["steps"], whole["tokens"])


def test_a_crash_between_checkpoints_is_made_up_for(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Steps after the last checkpoint are lost with their rows, a cut row too, and done again exactly."""
    small(tmp_path / "whole", "moe")
    original = OptimConfig.lr_at

    def lr_at(self: OptimConfig, step: int) -> float:
        if step == 5:
            raise MemoryError
        return original(self, step)

    with monkeypatch.context() as patch:
        patch.setattr(OptimConfig, "lr_at", lr_at)
        with pytest.raises(MemoryError):
            small(tmp_path / "cut", "moe", validate_every=2, log_every=1)
    assert saved(tmp_path / "cut")["global_step"] == 4
    with (tmp_path / "cut/metrics.jsonl").open("a") as file:
        file.write('{"step": 5, "loss": 1.0}\n{"step": "a"}\n' + "[" * 10**5 + '\n{"step": 6, "lo')
    zoo.train(resume=str(tmp_path / "cut"), trainer=QUIET)
    same_weights(tmp_path / "whole", tmp_path / "cut")
    assert rows(tmp_path / "cut") == rows(tmp_path / "whole")


@pytest.mark.parametrize("model", ["transformer", "moe"])
def test_matrices_of_several_shapes_resume(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, model: str) -> None:
    """Muon takes matrices by shape; with fewer key heads k and v have another than q and o."""
    options = {"model": {"name": model, "dim": 16, "layers": 2, "heads": 2, "kv_heads": 1, "hidden": 24}}
    options |= {"task": {"name": "noise", "tokens": 12}, "optim": {"steps": 6, "batch_size": 8, "warmup": 2}}
    few: dict[str, Any] = {"validate_every": 2, "validation_batches": 1, "test_batches": 1, "trainer": QUIET}
    zoo.train(**options, **few, out=str(tmp_path / "whole"))
    signalled(monkeypatch, 3)
    with pytest.raises(Interrupted):
        zoo.train(**options, **few, out=str(tmp_path / "cut"))
    zoo.train(resume=str(tmp_path / "cut"), trainer=QUIET)
    same_weights(tmp_path / "whole", tmp_path / "cut")


def test_a_run_folder_may_move(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The best checkpoint so far stays the best: it is at step 2 here, and the rest of the run is worse."""
    small(tmp_path / "whole", "hypernet", optim={"name": "adamw"})
    assert saved(tmp_path / "whole", "best")["global_step"] == 2
    signalled(monkeypatch, 3)
    with pytest.raises(Interrupted):
        small(tmp_path / "cut", "hypernet", optim={"name": "adamw"})
    (tmp_path / "cut").rename(tmp_path / "elsewhere")
    zoo.train(resume=tmp_path / "elsewhere", trainer=QUIET)
    same_weights(tmp_path / "whole", tmp_path / "elsewhere")
    assert not (tmp_path / "cut").exists()


def test_resume_of_nothing(tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    with pytest.raises(ValueError, match=r"no checkpoint at .*/empty/checkpoints/last\.ckpt"):
        zoo.train(resume=tmp_path / "empty")
    (tmp_path / "stray.ckpt").touch()
    with pytest.raises(ValueError, match=r"stray\.ckpt lies in no RUN_DIR/checkpoints"):
        zoo.train(resume=tmp_path / "stray.ckpt")


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"optim": {"lrr": 1.0}}, r"optim\.lrr is not an option of OptimConfig; did you mean lr\?"),
        ({"seed": "x"}, r"seed='x' must be of type int, got str"),
        ({"optim": {"batch_size": 6}, "trainer": {"devices": 4}}, r"optim\.batch_size=6 .* multiple .* 4 processes"),
        ({"validate_every": 0}, r"validate_every=0 must be above 0"),
        ({"test_batches": -1}, r"test_batches=-1 must be above 0"),
        ({"trainer": {"gradient_clip_val": 3}}, r"trainer\.gradient_clip_val is decided by the option optim\.clip"),
        ({"trainer": {"val_check_interval": 3}}, r"trainer\.val_check_interval .* option validate_every"),
        ({"trainer": {"num_sanity_val_steps": 1}}, r"trainer\.num_sanity_val_steps is fixed"),
        ({"budget_of": "runs/x"}, "budget_of=RUN needs budget=params"),
        ({"trainer": {"bogus": 3}}, r"^trainer: .*'bogus'"),
        ({"trainer": {"precision": "8-maybe"}}, r"8-maybe"),
        ({"trainer": {"precision": "16-true"}}, r"16-true trains nothing: take 16-mixed or bf16-true"),
        ({"trainer": {"callbacks": 3}}, r"^trainer\.callbacks must be callbacks of Lightning, got 3"),
        ({"trainer": {"profiler": 3}}, r"^trainer\.profiler must be the name of a profiler, .* got 3"),
        ({"trainer": {"plugins": 3}}, r"^trainer: .*invalid type for plugin 3"),
        ({"trainer": {"devices": 10**9}}, r"^trainer\.devices=1000000000 is more than optim\.batch_size=64"),
        ({"trainer": {"timeout": 1e-9}}, r"^trainer\.timeout=1e-09 must be minutes, \.01 or more"),
        ({"trainer": "ddp"}, r"trainer must be a group of options, got 'ddp'"),
    ],
)
def test_wrong_options_leave_no_trace(tmp_path: Path, options: dict[str, Any], message: str) -> None:
    few = {"trainer": QUIET, "out": str(tmp_path / "run")}
    assert re.search(message, one_line(lambda: zoo.train(**{**few, **options})))
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(("model", "clip"), [("transformer", 0.0), ("hypernet", 1.0), ("moe", 1.0)])
def test_bf16_with_clipping_on_the_cpu(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, model: str, clip: float
) -> None:
    """Huge gradients reach the optimiser at norm 1, or as they are. AdamW(fused=True) would refuse to be clipped."""
    norms: list[float] = []
    step, loss = Combined.step, Regression.loss

    def recorded(self: Combined, closure: Any = None) -> Any:
        def with_norm() -> Any:  # Lightning clips at the end of the closure
            value = closure()
            gradients = [p.grad.flatten() for group in self.param_groups for p in group["params"]]
            norms.append(float(torch.cat(gradients).norm()))
            return value

        return step(self, with_norm)

    monkeypatch.setattr(Combined, "step", recorded)
    monkeypatch.setattr(Regression, "loss", lambda *args: 1e6 * loss(*args))
    metrics = small(tmp_path / "run", model, trainer={"precision": "bf16-mixed"}, optim={"clip": clip})
    assert all(math.isfinite(value) for value in metrics["test"].values())
    assert len(norms) == metrics["steps"]
    assert norms == pytest.approx([1.0] * 6, rel=1e-4) if clip else min(norms) > 1000


def test_activation_checkpointing_leaves_the_results_alone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Of the family with most to recompute; test_memory has the gradients of every case."""
    options = {"trainer": {"precision": "bf16-mixed"}, "optim": {"accumulate": 2}}
    passes: list[None] = []
    forward = Attention.forward
    monkeypatch.setattr(Attention, "forward", lambda *args: passes.append(None) or forward(*args))
    small(tmp_path / "plain", "moe", **options)
    plain = len(passes)
    small(tmp_path / "again", "moe", **options, activation_checkpointing=True)
    steps, parts, layers = 6, 2, 2
    assert len(passes) - 2 * plain == steps * parts * layers
    same_weights(tmp_path / "plain", tmp_path / "again")


def test_overfit_sees_the_first_batch_alone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    seen, batch = set(), Regression.batch
    monkeypatch.setattr(Regression, "batch", lambda self, *asked: seen.add(asked[:2]) or batch(self, *asked))
    small(tmp_path / "run", overfit=True)
    assert {k for split, k in seen if split == "train"} == {0}


def test_the_run_is_reproducible_and_the_seed_matters(runs: dict[str, Path], tmp_path: Path) -> None:
    small(tmp_path / "again", "moe")
    same_weights(runs["moe"], tmp_path / "again")
    small(tmp_path / "other", "moe", seed=1)
    assert rows(tmp_path / "other")[0]["loss"] != rows(tmp_path / "again")[0]["loss"]


def test_the_id_of_a_run_names_its_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("ZOO_RUN_ID", "job7")
    folder = tmp_path / "runs" / "transformer-noise" / "job7"
    assert Path(small(None, task="noise")["checkpoint"]) == folder / "checkpoints" / "best.ckpt"
