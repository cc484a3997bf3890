"""Every scored token weighs the same, in whatever part, process or batch it comes, and filling weighs nothing."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

import zoo
from cases import BY_NAME, Case, build
from runs import FAMILIES, QUIET
from zoo.core.layers import FILLING
from zoo.models import Model
from zoo.tasks import Task
from zoo.tasks.regression import Regression
from zoo.tasks.text.corpus import START
from zoo.tasks.text.prompts import Prompts
from zoo.training.data import Stream


def prompts_file(folder: Path) -> str:
    """Targets of 1 and of 30 bytes."""
    rows = [{"context": f"c{k}" * (1 + k % 4), "query": "q", "target": "ab" * 15 if k % 8 else "z"} for k in range(80)]
    path = folder / "a.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(path)


def on_file(case: Case, folder: Path) -> Model:
    model = build(case, random=False)
    task = {"context": 7, "query": 2, "target": 30, "files": [prompts_file(folder)]}
    model.task, model.decoder.filled = Prompts(task, 0), True
    return model


def gradient(model: Model, parts: int, world: int) -> Tensor:
    """What a step descends: the mean over processes of the mean over parts, as the trainer takes it."""
    model.zero_grad()
    streams = [iter(Stream(model.task, "train", 16, 1, parts, rank, world)) for rank in range(world)]
    for _ in range(parts):
        for stream in streams:
            (model.training_step(next(stream), 0) / (parts * world)).backward()
    return torch.cat([p.grad.flatten() for p in model.parameters() if p.grad is not None])


@pytest.mark.parametrize(
    ("name", "parts", "world"),
    [
        ("transformer-prompts", 8, 1),
        ("hypernet-prompts", 1, 2),
        ("fast-weights-prompts", 2, 1),
        ("moe-prompts-context", 2, 2),
        ("moe-prompts-context", 16, 1),
    ],
)
def test_parts_and_processes_have_the_gradient_of_the_whole(name: str, parts: int, world: int, tmp_path: Path) -> None:
    model = on_file(BY_NAME[name], tmp_path)
    if name.startswith("moe"):
        context_to_delta: Any = model.decoder.context_to_delta
        context_to_delta.state["shares"] = [torch.tensor([0.1, 0.2, 0.3, 0.4])] * 2
    whole, cut = gradient(model, 1, 1), gradient(model, parts, world)
    assert float((cut - whole).norm() / whole.norm()) < 1e-6


def run(folder: Path, accumulate: int = 1, model: Any = "transformer", **options: Any) -> tuple[Model, list[dict]]:
    sizes = {**FAMILIES[model], "dim": 16, "layers": 1, "heads": 2, "hidden": 16}
    task = {"name": "prompts", "context": 7, "query": 2, "target": 30, "files": [prompts_file(folder.parent)]}
    optim = {"steps": 20, "warmup": 2, "batch_size": 16, "accumulate": accumulate}
    test = {"validate_every": 20, "validation_batches": 1, "test_batches": 1, "log_every": 1}
    zoo.train(sizes, task, optim, {**QUIET, **options}, out=str(folder), **test)
    rows = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    return zoo.load(folder), rows


def test_accumulation_trains_the_same(tmp_path: Path) -> None:
    (whole, rows), (cut, rows_of_parts) = (run(tmp_path / str(parts), parts, "moe") for parts in (1, 8))
    pairs = zip(whole.state_dict().values(), cut.state_dict().values(), strict=True)
    assert max(float((a - b).abs().max()) for a, b in pairs) <= 1e-5
    losses = [[row["loss"] + row["aux_loss"] for row in r if "loss" in row] for r in (rows, rows_of_parts)]
    assert len(losses[0]) == 20
    assert losses[0] == pytest.approx(losses[1], abs=1e-4)  # of the whole step, not of its last part
    assert any(key.endswith("bias") and value.any() for key, value in whole.state_dict().items())
    used = [whole.optim.lr * whole.optim.lr_at(step) for step in range(20)]
    assert [row["lr"] for row in rows if "lr" in row] == pytest.approx(used)


def test_the_validation_loss_is_the_mean_over_what_is_scored(tmp_path: Path) -> None:
    model, rows = run(tmp_path / "run")
    batches = list(Stream(model.task, "validation", 16, 1))
    model.task.prepare()
    total = sum(float(model.task.token_losses(model(b.tokens, b.n_context), b).sum().detach()) for b in batches)
    scored = sum(int(model.task.scored(b).sum()) for b in batches)
    assert 0 < scored < sum(b.targets.numel() for b in batches)
    assert rows[-1]["validation_loss"] == pytest.approx(total / scored, rel=1e-5)


def test_a_part_without_targets_is_zero(tmp_path: Path) -> None:
    model = on_file(BY_NAME["moe-prompts-context"], tmp_path)
    batch = next(iter(Stream(model.task, "train", 4, 1)))
    batch.targets.fill_(-100)
    batch.tokens.fill_(FILLING)
    loss = model.training_step(batch, 0)
    loss.backward()
    assert loss == 0
    assert all(p.grad is None or not p.grad.any() for p in model.parameters())


# held-out data


class Few(Prompts):
    """5 and 3 sequences."""

    def sizes(self, split: str) -> list[int]:
        return [5, 3]

    def sequence(self, split: str, source: int, order: np.ndarray, place: int) -> tuple[np.ndarray, ...]:
        number = np.array([10 * source + int(order[place])])
        return number, number


@pytest.mark.parametrize("world", [1, 2, 3, 8, 9])
@pytest.mark.parametrize("size", [4, 6, 16])
def test_a_small_held_out_set_is_passed_over_once(size: int, world: int) -> None:
    task = Few({"domains": ["code"]}, 0)
    streams = [Stream(task, "test", size, 20, 1, rank, world) for rank in range(world)]
    batches = [[batch.tokens.flatten().tolist() for batch in stream] for stream in streams]
    assert len({len(stream) for stream in streams} | {len(part) for part in batches}) == 1  # nobody waits for others
    assert all(all(part) for part in batches)
    read = sorted(number for part in batches for numbers in part for number in numbers)
    expected = [0, 1, 2, 3, 4, 10, 11, 12]
    assert read == (expected if world <= 8 else sorted(expected * world))
    large = Stream(task, "test", 4, 1)
    assert [len(batch.tokens) for batch in large] == [4]
    assert len(list(Stream(task, "train", size, 20))) == 20  # training goes on in a new order


def test_the_wrong_context_of_a_lone_function_is_another_one() -> None:
    task = Regression({"points": 4, "queries": 2}, 0)
    batch = task.batch("test", 3, 1)
    assert batch.wrong_context is not None
    assert not torch.equal(batch.wrong_context, batch.tokens[:, :4])
    assert torch.equal(batch.wrong_context, task.batch("test", 4, 1).tokens[:, :4])


@pytest.mark.parametrize("model", ["hypernet", "moe"])
def test_half_precision_weights_leave_data_and_metrics_alone(model: str, tmp_path: Path) -> None:
    sizes = {"name": model, "dim": 16, "layers": 1, "heads": 2, "hidden": 16}
    task = {"name": "regression", "points": 7, "queries": 5}
    test = {"validation_batches": 1, "test_batches": 4, "validate_every": 2}
    found = {}
    for precision in ("32-true", "bf16-true"):
        options = {**QUIET, "precision": precision}
        optim = {"steps": 2, "batch_size": 64, "warmup": 0}
        found[precision] = zoo.train(sizes, task, optim, options, out=str(tmp_path / precision), **test)["test"]
    assert found["bf16-true"]["nmse_zero"] == found["32-true"]["nmse_zero"]
    assert found["bf16-true"]["nmse_ridge"] == found["32-true"]["nmse_ridge"]
    assert found["bf16-true"]["nmse"] == pytest.approx(found["32-true"]["nmse"], rel=0.05)
    saved = torch.load(tmp_path / "bf16-true" / "checkpoints" / "last.ckpt", weights_only=True)["state_dict"]
    assert {weight.dtype for weight in saved.values()} == {torch.bfloat16}


# filling


@pytest.mark.parametrize("name", ["moe-prompts", "moe-prompts-context"])
@torch.no_grad()
def test_statistics_of_experts_leave_filling_out(name: str, tmp_path: Path) -> None:
    model, found = on_file(BY_NAME[name], tmp_path), []
    for context, target in ((12, 30), (50, 30), (12, 90)):
        options = {"context": context, "query": 2, "target": target, "files": [str(tmp_path / "a.jsonl")]}
        task: Task = Prompts(options, 0)
        batch = task.batch("test", 0, 6)
        patches = model.decoder(batch.tokens, context)[1]
        context_to_delta: Any = model.decoder.context_to_delta
        values = context_to_delta.metrics(patches[0], model.decoder.blocks[0].ffn)
        load, entropy = values["dead_fraction"][0], float(values["entropy"].mean())
        assert int(load.sum()) == int((batch.tokens != FILLING).sum()) * 2
        found.append([*load.tolist(), entropy, float(context_to_delta.aux_loss(patches, 0))])
    assert found[0] == pytest.approx(found[1], rel=1e-6)
    assert found[0] == pytest.approx(found[2], rel=1e-6)


FILLED = ["transformer-prompts", "hypernet-prompts", "moe-prompts-context", "hyper-moe-prompts", "fast-weights-prompts"]


@pytest.mark.parametrize("name", FILLED)
@torch.no_grad()
def test_the_law_holds_with_filling(name: str, tmp_path: Path) -> None:
    model = build(BY_NAME[name])
    model.decoder.filled = True
    model.task = Prompts({"context": 12, "query": 2, "target": 5, "files": [prompts_file(tmp_path)]}, 0)
    tokens = model.task.batch("train", 0, 8).tokens
    removed = torch.arange(tokens.shape[1]) < 12
    assert (tokens[:, :12] == FILLING).any()
    contextual = model(tokens, 12)[:, 12:]
    positions = torch.arange(12, tokens.shape[1])
    patched = model(tokens[:, 12:], patches=model.deltas(tokens, removed), positions=positions)
    real = tokens[:, 12:] != FILLING
    assert float((patched - contextual)[real].abs().max()) < 1e-10
    assert float((model(tokens[:, 12:], positions=positions) - contextual)[real].abs().max()) > 1e-2


def test_generation_ends_where_documents_do(tmp_path: Path) -> None:
    for k in range(40):
        (tmp_path / f"{k}.txt").write_text(f"{k:02} hello world")
    options = {"validation_batches": 1, "test_batches": 1, "validate_every": 60}
    zoo.train(
        {"name": "transformer", "dim": 32, "layers": 1, "heads": 2, "hidden": 32},
        {"name": "text", "tokens": 12, "files": [str(tmp_path / "*.txt")]},
        {"steps": 60, "warmup": 5, "batch_size": 16, "lr": 0.02},
        QUIET,
        out=str(tmp_path / "run"),
        **options,
    )
    model: Any = zoo.load(tmp_path / "run")
    prompt = torch.tensor([model.task.encode("07 hello ")])
    ids = [int(token) for token in model.generate(prompt, 12)]
    assert bytes(ids[:5]) == b"world"
    assert ids[5] == START
