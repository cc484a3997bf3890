"""Batches are pure functions of (seed, split, k), targets obey the stated formulas, and baselines have closed forms."""

from __future__ import annotations

import math
import sys
import types
from typing import Any

import pytest
import torch
from torch import Tensor

from test_readme import ROOT, blocks
from zoo.tasks import TASKS, Batch, Task
from zoo.tasks.regression import Regression
from zoo.tasks.text.prompts import IGNORE

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
        assert batch.targets.shape[:2] == (4, again.tokens - again.n_context)
        assert same(batch, again.batch(split, k, 4))
        one, two = (batch.rows(first, 2)._asdict() for first in (0, 2))
        joined = {key: torch.cat([one[key], two[key]]) for key, value in one.items() if torch.is_tensor(value)}
        assert same(batch, batch._replace(**joined))


def same(batch: Batch, other: Batch) -> bool:
    """Whether all that batches hold is equal."""
    pairs = zip(batch, other, strict=True)
    return all(torch.equal(a, b) if isinstance(a, Tensor) and isinstance(b, Tensor) else a == b for a, b in pairs)


@every_task
def test_seeds_splits_and_batches_differ(name: str) -> None:
    batches = [task(name).batch(split, k, 4) for split in SPLITS for k in range(2)]
    batches.append(task(name, seed=1).batch("train", 0, 4))
    assert len({row.numpy().tobytes() for batch in batches for row in batch.tokens}) == 4 * len(batches)


@every_task
def test_the_loss_is_the_mean_of_the_errors_with_its_gradient(name: str) -> None:
    made = task(name)
    batch = made.batch("train", 0, 4)
    if name == "prompts":
        batch.targets[:, ::3] = IGNORE
    output = torch.randn(4, made.tokens, made.output_dim, requires_grad=True)
    errors, loss, scored = made.token_losses(output, batch), made.loss(output, batch), made.scored(batch)
    assert scored.shape == errors.shape == batch.targets.shape[:2]
    assert scored.all() == (name != "prompts")
    assert not errors[~scored].any()
    torch.testing.assert_close(loss, errors[scored].mean(), rtol=1e-6, atol=0)
    torch.testing.assert_close(
        *(torch.autograd.grad(value, output)[0] for value in (loss, errors[scored].mean())), rtol=1e-5, atol=1e-9
    )


@every_task
def test_every_metric_has_a_label(name: str) -> None:
    made = task(name)
    values = made.evaluate(lambda tokens, n: torch.zeros(*tokens.shape[:2], made.output_dim), made.batch("test", 0, 2))
    assert all(made.explain(metric) != metric for metric in values)
    assert made.main_metric in values


def test_a_part_of_the_data_is_named_after_what_the_metric_says() -> None:
    assert TASKS["prompts"].explain("bits_per_byte_trigram_law") == "  of a byte trigram, law"
    assert TASKS["noise"].explain("bits_per_byte") == "bits_per_byte"


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
    assert made.baselines() == {"predicting zero": made.variance}


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


@pytest.mark.parametrize("points", [2, 4, 8, 12])
def test_ridge_is_the_closed_form(points: int) -> None:
    """Below as many points as dimensions, the expectation is 1 − n/d."""
    made = regression(dimension=8, points=points, queries=16)
    value = nmse(made, made.batch("test", 0, 2000))["nmse_ridge"]
    assert value == pytest.approx(max(0, 1 - points / 8), abs=0.02)


def test_noisy_ridge_stays_above_the_noise() -> None:
    made = regression(function="noisy", dimension=4, noise=1.0, points=40)
    value = nmse(made, made.batch("test", 0, 4000))["nmse_ridge"] * made.variance
    # the noise itself, and about d/(n-d-1) of it from estimating w
    assert 1.05 < value < 1 + 4 / 35 + 0.03


def test_the_wrong_context_is_that_of_another_function() -> None:
    made = regression()
    batch = made.batch("test", 0, 5)
    assert batch.wrong_context is not None
    assert torch.equal(batch.wrong_context, batch.tokens.roll(1, 0)[:, : made.n_context])
    values = made.evaluate(lambda tokens, n: torch.ones(*tokens.shape[:2], 1), batch)
    torch.testing.assert_close(values["nmse"], (1 - batch.targets).square() / 3)


def test_noise_is_uniform_and_independent_with_floor_ln_v() -> None:
    made = task("noise", vocabulary=5, tokens=40)
    batch = made.batch("train", 0, 2000)
    assert torch.equal(batch.tokens[:, 1:], batch.targets[:, :-1])
    pairs = torch.bincount((batch.tokens * 5 + batch.targets).flatten(), minlength=25) / batch.tokens.numel()
    assert pairs.tolist() == pytest.approx([1 / 25] * 25, rel=0.1)
    values = made.evaluate(lambda tokens, n: torch.zeros(*tokens.shape, 5), batch)
    for name in ("nats", "nats_floor"):
        assert values[name].mean().item() == pytest.approx(math.log(5))
    assert list(made.baselines().values()) == [math.log(5)]


def test_a_new_task_of_blind_token_ids(monkeypatch: pytest.MonkeyPatch) -> None:
    """The one of the page: its answers are right, its sample queries keys, and it has no text."""
    module = types.ModuleType("lookup")
    monkeypatch.setitem(sys.modules, "lookup", module)
    exec(blocks((ROOT / "docs/add-a-task.md").read_text(), "python")[0], module.__dict__)
    made = module.Lookup({"keys": 5}, 0)
    batch = made.batch("test", 0, 200)
    calls: list[Tensor] = []

    def predict(tokens: Tensor, n_context: int) -> Tensor:
        calls.append(tokens)
        return torch.nn.functional.one_hot(torch.full_like(tokens, 7), 10).float()

    values = {name: value.mean().item() for name, value in made.evaluate(predict, batch).items()}
    assert values["error_perfect"] == 0
    assert values["error_chance"] == pytest.approx(0.8)
    assert values["error"] == pytest.approx(0.8, abs=0.06)
    assert not any(torch.equal(a, b) for a, b in zip(calls[0], calls[2], strict=True))
    queries = made.sample_queries(batch.tokens[0, :6], 7)
    assert queries.shape == (1, 13)
    assert torch.equal(queries[0, :6], batch.tokens[0, :6])
    assert torch.equal(queries[0, 6:], made.batch("train", 0, 2).tokens[:, 6:].flatten()[:7])
    for ask in (made.encode, made.encode_context):
        with pytest.raises(ValueError, match=r"^task\.name=lookup has no text"):
            ask("a")


def test_sample_queries_are_fresh_inputs_after_the_context() -> None:
    made = regression(queries=2)
    context = made.batch("test", 0, 1).tokens[0, :20]
    tokens = made.sample_queries(context, 50)
    assert tokens.shape == (1, 70, 4)
    assert torch.equal(tokens[0, :20], context)
    assert not tokens[0, 20:, -1].any()
    assert tokens[0, 20:, :-1].std(0).sub(1).abs().max() < 0.4
    for other in (made.sample_queries(context, 50, "test"), made.sample_queries(context, 50, k=1)):
        assert not torch.equal(other[0, 20:], tokens[0, 20:])
    assert torch.equal(made.sample_queries(context, 50), tokens)


def test_sample_queries_of_text_are_windows() -> None:
    made = task("noise", tokens=9)
    context = torch.tensor([3, 1, 2])
    tokens = made.sample_queries(context, 5)
    assert torch.equal(tokens[:, :3], context.expand(5, 3))
    assert torch.equal(tokens[:, 3:], made.batch("train", 0, 5).tokens)
