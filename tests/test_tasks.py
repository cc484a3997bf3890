"""Batches are pure functions of (seed, split, k), targets obey the stated formulas, and baselines have closed forms."""

from __future__ import annotations

import math
import sys
import sysconfig
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from zoo.tasks import TASKS, Batch, Task
from zoo.tasks.regression import Regression
from zoo.tasks.text import START, Text, corpus

SPLITS = ("train", "validation", "test")
every_task = pytest.mark.parametrize("name", TASKS)


def task(name: str, seed: int = 0, **options: Any) -> Task:
    return TASKS[name]({"name": name, **options}, seed)


def regression(**options: Any) -> Regression:
    made = task("regression", **options)
    assert isinstance(made, Regression)
    return made


@every_task
def test_batches_are_pure_functions_of_seed_split_and_k(name: str) -> None:
    first = task(name)
    expected = {(split, k): first.batch(split, k, 4) for split in SPLITS for k in range(2)}
    torch.manual_seed(99)  # neither the global state nor the order of calls matters
    again = task(name)
    for (split, k), batch in reversed(expected.items()):
        assert batch.tokens.shape[:2] == (4, again.tokens)
        assert batch.targets.shape == (4, again.tokens - again.n_context)
        assert all(map(torch.equal, batch[:2], again.batch(split, k, 4)[:2]))


@every_task
def test_seeds_splits_and_batches_differ(name: str) -> None:
    batches = [task(name).batch(split, k, 4) for split in SPLITS for k in range(2)]
    batches.append(task(name, seed=1).batch("train", 0, 4))
    assert len({row.numpy().tobytes() for batch in batches for row in batch.tokens}) == 4 * len(batches)


FUNCTIONS = [
    {"function": "linear", "dimension": 4},
    {"function": "sparse", "dimension": 6, "nonzero": 2},
    {"function": "noisy", "dimension": 3, "noise": 1.5},
    {"function": "network", "dimension": 3, "units": 20},
]


def nmse(made: Regression, batch: Batch) -> dict[str, float]:
    values = made.evaluate(lambda tokens, n: torch.zeros(*tokens.shape[:2], 1), batch)
    return {name: value.mean().item() for name, value in values.items()}


@pytest.mark.parametrize("options", FUNCTIONS, ids=lambda options: options["function"])
def test_variance_of_y_is_the_stated_one(options: dict[str, Any]) -> None:
    # the network's y has heavy tails, so it takes more functions
    made = regression(points=1, queries=4, **options)
    batch = made.batch("train", 0, 50_000)
    assert batch.targets.mean().item() == pytest.approx(0, abs=0.05)
    assert batch.targets.var().item() == pytest.approx(made.variance, rel=0.04)
    assert nmse(made, batch)["nmse_zero"] == pytest.approx(1, rel=0.04)
    assert made.references() == {"predicting zero": made.variance}


def solve(batch: Batch) -> tuple[Tensor, Tensor]:
    """w by least squares over the context, (B,d), and the residuals of the queries, (B,Q)."""
    x, y = batch.tokens[..., :-1].double(), batch.tokens[..., -1:].double()
    n = batch.n_context
    w = torch.linalg.lstsq(x[:, :n], y[:, :n]).solution
    return w.squeeze(-1), (x[:, n:] @ w).squeeze(-1) - batch.targets


@pytest.mark.parametrize(("function", "nonzero"), [("linear", 5), ("sparse", 1), ("sparse", 2), ("sparse", 4)])
def test_one_w_with_so_many_entries_explains_context_and_queries(function: str, nonzero: int) -> None:
    own = {"nonzero": nonzero} if function == "sparse" else {}
    w, residual = solve(regression(function=function, dimension=5, **own).batch("train", 0, 500))
    assert residual.abs().max() < 1e-4
    assert ((w.abs() > 1e-6).sum(-1) == nonzero).all()
    assert (w.abs() > 1e-6).float().mean(0).tolist() == pytest.approx([nonzero / 5] * 5, abs=0.08)
    assert w.square().sum(-1).mean().item() == pytest.approx(nonzero, rel=0.1)


def test_noise_and_bends_are_in_y_alone() -> None:
    clean, noisy = (regression(function=f, points=400, queries=400) for f in ("linear", "noisy"))
    assert solve(noisy.batch("train", 0, 20))[1].std().item() == pytest.approx(0.5, rel=0.05)
    bent = regression(function="network").batch("train", 0, 300)
    assert 0.1 < solve(bent)[1].var().item() / 3 < 0.9  # relu is half linear
    assert torch.equal(clean.batch("train", 0, 20).tokens[..., :-1], noisy.batch("train", 0, 20).tokens[..., :-1])


@pytest.mark.parametrize("options", FUNCTIONS, ids=lambda options: options["function"])
def test_queries_do_not_show_y(options: dict[str, Any]) -> None:
    tokens, targets, n = regression(**options).batch("train", 0, 50)[:3]
    assert not tokens[:, n:, -1].any()
    assert tokens[:, :n, -1].any()
    assert targets.any()


@pytest.mark.parametrize(("points", "error"), [(2, 0.750), (4, 0.479), (8, 0.0), (12, 0.0)])
def test_ridge_is_the_closed_form(points: int, error: float) -> None:
    # below as many points as dimensions, the expectation is 1 - n/d; 0.479 is a sample of data.md, 0.5 the mean
    made = regression(dimension=8, points=points, queries=16)
    value = nmse(made, made.batch("test", 0, 2000))["nmse_ridge"]
    assert value == pytest.approx(max(0, 1 - points / 8), abs=0.02)
    assert value == pytest.approx(error, abs=0.04)


def test_noisy_ridge_stays_above_the_noise() -> None:
    made = regression(function="noisy", dimension=4, noise=1.0, points=40)
    value = nmse(made, made.batch("test", 0, 4000))["nmse_ridge"] * made.variance
    # the noise itself, and about d/(n-d-1) of it from estimating w
    assert 1.05 < value < 1 + 4 / 35 + 0.03


def test_evaluation_shows_each_context_once_each_query_alone_and_a_wrong_context() -> None:
    made, calls = regression(), []

    def predict(tokens: Tensor, n_context: int) -> Tensor:
        calls.append((tokens, n_context))
        return torch.ones(*tokens.shape[:2], 1)

    batch = made.batch("test", 0, 5)
    tokens, targets, n = batch[:3]
    values = made.evaluate(predict, batch)
    (own, a), (bare, b), (wrong, c) = calls
    assert (a, b, c) == (n, 0, n)
    assert torch.equal(own, tokens)
    assert torch.equal(bare, tokens[:, n:])
    assert torch.equal(wrong[:, n:], tokens[:, n:])
    assert all(torch.equal(wrong[row, :n], tokens[row - 1, :n]) for row in range(5))
    torch.testing.assert_close(values["nmse"], (1 - targets).square() / 3)


@pytest.fixture
def small(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder of 60 documents, each of one letter, that stands for the standard library."""
    for k in range(60):
        (tmp_path / f"part{k % 3}").mkdir(exist_ok=True)
        (tmp_path / f"part{k % 3}" / f"m{k}.py").write_bytes(bytes([65 + k]) * (40 + k))
    (tmp_path / "test").mkdir()
    for skipped in ("test/skipped.py", "notes.txt"):
        (tmp_path / skipped).write_bytes(b"~" * 500)
    monkeypatch.setattr(sysconfig, "get_path", lambda name: str(tmp_path))
    return tmp_path


def test_splits_are_disjoint_documents(small: Path) -> None:
    splits = corpus(str(small))
    letters = {split: set(ids.tolist()) - {START} for split, ids in splits.items()}
    assert set.union(*letters.values()) == set(range(65, 125))
    assert sum(map(len, letters.values())) == 60
    size = {split: int((ids != START).sum()) for split, ids in splits.items()}
    total = sum(40 + k for k in range(60))
    assert sum(size.values()) == total
    for split in ("validation", "test"):
        assert 0.05 <= size[split] / total < 0.05 + 100 / total  # one document more at most
    assert all(int((splits[split] == START).sum()) == len(letters[split]) for split in splits)


def test_real_held_out_splits_are_five_per_cent_of_many_documents() -> None:
    splits = corpus(sysconfig.get_path("stdlib"))
    assert len(splits["train"]) > 1_000_000
    for split in ("validation", "test"):
        ids = splits[split]
        assert len(ids) / sum(map(len, splits.values())) == pytest.approx(0.05, abs=0.02)
        documents = np.diff(np.append(np.flatnonzero(ids == START), len(ids)))
        assert documents.max() < len(ids) / 2


@pytest.mark.parametrize("split", SPLITS)
def test_an_epoch_reads_every_block_once_and_blocks_overlap_by_one(small: Path, split: str) -> None:
    made, ids = task("text", tokens=16), corpus(str(small))[split].astype(np.int64)
    size = 3
    per_epoch = (len(ids) - 1) // 16 // size
    blocks = [tuple(ids[start : start + 17]) for start in range(0, len(ids) - 16, 16)]

    def epoch(number: int, made: Task = made) -> list[tuple[int, ...]]:
        rows = []
        for k in range(number * per_epoch, (number + 1) * per_epoch):
            tokens, targets = made.batch(split, k, size)[:2]
            assert torch.equal(tokens[:, 1:], targets[:, :-1])
            rows += [tuple(row) for row in torch.cat([tokens, targets[:, -1:]], 1).tolist()]
        return rows

    first, second = epoch(0), epoch(1)
    # long runs of one letter make equal blocks: count them
    assert not Counter(first) - Counter(blocks)
    assert not Counter(second) - Counter(blocks)
    assert (first == second) == (split != "train")
    assert (first == epoch(0, task("text", seed=1, tokens=16))) == (split != "train")


def test_starts_of_documents_are_given_not_predicted(small: Path) -> None:
    batch = (made := task("text", tokens=16)).batch("train", 0, 40)
    starts = int((batch.targets == START).sum())
    assert starts > 0
    assert made.errors(torch.zeros(40, 16, 257), batch).tolist() == pytest.approx([math.log(257)] * (640 - starts))


def test_unigram_baseline_by_hand(small: Path) -> None:
    made = task("text", tokens=16)
    assert isinstance(made, Text)
    train = corpus(str(small))["train"]
    batch = made.batch("test", 0, 3)
    scored = batch.targets[batch.targets != START].tolist()
    total = int((train != START).sum()) + 256  # one is added to the count of each byte
    expected = [-math.log2((int((train == byte).sum()) + 1) / total) for byte in scored]
    values = made.evaluate(lambda tokens, n: torch.zeros(*tokens.shape, 257), batch)
    assert values["bits_per_byte_unigram"].tolist() == pytest.approx(expected)
    assert values["bits_per_byte"].tolist() == pytest.approx([math.log2(257)] * len(scored))
    p = [(int((train == byte).sum()) + 1) / total for byte in range(256)]
    assert made.references()["best fixed byte distribution"] == pytest.approx(-sum(x * math.log(x) for x in p))


def test_text_is_read_not_imported(small: Path) -> None:
    (small / "part0" / "harmful.py").write_text("raise SystemExit('imported')\n")
    assert sum(map(len, corpus(str(small)).values())) > 1000
    assert not any("harmful" in name for name in sys.modules)


def test_too_little_text_says_so(small: Path) -> None:
    with pytest.raises(ValueError, match=r"a batch of 500 needs more than the \d+ blocks of 16 bytes in test"):
        task("text", tokens=16).batch("test", 0, 500)
    with pytest.raises(ValueError, match=r"needs at least 3 Python files, .*test has 1"):
        corpus(str(small / "test"))


def test_noise_is_uniform_and_independent_with_floor_ln_v() -> None:
    made = task("noise", vocabulary=5, tokens=40)
    batch = made.batch("train", 0, 2000)
    assert torch.equal(batch.tokens[:, 1:], batch.targets[:, :-1])
    pairs = torch.bincount((batch.tokens * 5 + batch.targets).flatten(), minlength=25) / batch.tokens.numel()
    assert pairs.tolist() == pytest.approx([1 / 25] * 25, rel=0.1)
    values = made.evaluate(lambda tokens, n: torch.zeros(*tokens.shape, 5), batch)
    for name in ("nats", "nats_floor"):
        assert values[name].mean().item() == pytest.approx(math.log(5))
    assert list(made.references().values()) == [math.log(5)]
