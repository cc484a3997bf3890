"""What a new context costs: error against seconds of hypernetwork, attention, static patch and fine-tuning.

    python docs/adaptation.py      # about ten minutes on one core; draws docs/figures/adaptation.png, prints its tables

The models are those that come with the package, regression/transformer and regression/hypernet. Fine-tuning starts
from the transformer, which answers queries alone, and takes Adam on the pairs of the context, each of them a query with
its answer; rates are chosen for each number of steps on other contexts. Axes: B contexts, n pairs, Q queries, T tokens.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

import zoo
from zoo.core.delta import Full, LowRank
from zoo.core.patch import Patch
from zoo.lens import static
from zoo.lens.draw import save
from zoo.lens.figure import Figure, Lines, Series
from zoo.memory import keep_freed_memory
from zoo.models import Model
from zoo.training import validate

CONTEXTS, STEPS = 64, (1, 3, 10, 30, 100, 300, 1000)
RATES = (3e-4, 1e-3, 3e-3, 1e-2, 3e-2)
SAMPLES = 256  # of a static patch
HERE = Path(__file__).parent


def nmse(model: Model, output_BT1: Tensor, targets_BQ: Tensor) -> float:
    """The mean squared error over the variance of y."""
    error = output_BT1[:, -targets_BQ.shape[1] :, 0] - targets_BQ
    return float(error.square().mean() / model.task.variance)


def updates(model: Model, rank: int | None, B: int) -> tuple[list[Tensor], list[Patch]]:
    """Weights to be trained, for each of B contexts its own, and the patches that they are: ΔW of every matrix of every
    FFN, whole or of a rank, zero at first."""
    weights, patches = [], []
    for block in model.decoder.blocks:
        deltas: dict[str, Any] = {}
        for name in ("gate", "up", "down"):
            o, i = block.ffn.weight(name).shape
            if rank is None:
                own = [torch.zeros(B, o, i)]
                deltas[name] = Full(own[0])
            else:
                own = [torch.zeros(B, o, rank), torch.randn(1, i, rank).repeat(B, 1, 1) * i**-0.5]
                deltas[name] = LowRank(*own)
            weights += [w.requires_grad_() for w in own]
        patches.append(Patch(weights=deltas))
    return weights, patches


def fine_tuned(model: Model, batch: zoo.tasks.Batch, rank: int | None, lr: float, steps: int) -> dict[int, float]:
    """The error on queries after some numbers of steps of Adam on the pairs of each context."""
    n, queries_BTd = batch.n_context, batch.tokens[:, batch.n_context :]
    pairs_BTd, y_BT = batch.tokens[:, :n].clone(), batch.tokens[:, :n, -1]
    pairs_BTd[..., -1] = 0  # a query
    torch.manual_seed(0)
    weights, patches = updates(model, rank, len(pairs_BTd))
    optimizer, found = torch.optim.Adam(weights, lr=lr), {}
    for step in range(1, steps + 1):
        loss = (model(pairs_BTd, patches=patches)[..., 0] - y_BT).square().mean(1).sum()  # contexts do not meet
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        if step in STEPS:
            with torch.no_grad():
                found[step] = nmse(model, model(queries_BTd, patches=patches), batch.targets)
    return found


def best_of_rates(model: Model, rank: int | None) -> list[tuple[float, float]]:
    """The rate and the error of each number of steps: chosen on contexts of the validation split, tested on others."""
    validation, test = (model.task.batch(split, 0, CONTEXTS) for split in ("validation", "test"))
    chosen = {lr: fine_tuned(model, validation, rank, lr, STEPS[-1]) for lr in RATES}
    rates = [min(RATES, key=lambda lr: chosen[lr][step]) for step in STEPS]
    tested = {lr: fine_tuned(model, test, rank, lr, STEPS[-1]) for lr in {*rates}}
    return [(lr, tested[lr][step]) for lr, step in zip(rates, STEPS, strict=True)]


def seconds(work: Callable[[], Any], repeats: int = 30) -> float:
    """The median CPU time of one call."""
    taken = []
    for _ in range(repeats):
        start = time.thread_time()
        work()
        taken.append(time.thread_time() - start)
    return float(np.median(taken[repeats // 4 :]))


def static_error(model: Model, batch: zoo.tasks.Batch) -> float:
    """The error of one static patch per context, fitted on sample queries."""
    errors = []
    for tokens_Td, targets_Q in zip(batch.tokens, batch.targets, strict=True):
        context, queries = tokens_Td[: batch.n_context], tokens_Td[batch.n_context :]
        patches = static.fit(model.decoder, model.task.sample_queries(context, SAMPLES), batch.n_context)
        errors.append(nmse(model, static.answer(model.decoder, queries[None], patches), targets_Q[None]))
    return float(np.mean(errors))


def break_even(n: int) -> list[str]:
    """A row of the table: what a hypernetwork's context and query cost beside the transformer's, for n pairs."""
    options = {"task": {"name": "regression", "points": n, "queries": 1}, "optim": {}, "seed": 0}
    hyper, plain = (validate.build({**options, "model": {"name": name}}).eval() for name in ("hypernet", "transformer"))
    tokens = hyper.task.batch("test", 0, 1).tokens
    context, query = tokens[:, :n], tokens[:, n:]
    with torch.no_grad():
        patches = static._start(hyper.decoder, tokens, n)
        emission = seconds(lambda: hyper.decoder(context, n))
        served = seconds(lambda: hyper(query, patches=patches))
        again = seconds(lambda: plain(tokens, n))
        alone = seconds(lambda: plain(query))  # cached keys add the attention over n of them to this
    queries = emission / (again - served) if again > served else float("inf")
    return [str(n), *(f"{1e3 * s:.2f}" for s in (emission, served, again, alone)), f"{queries:.1f}"]


def main() -> None:
    torch.set_num_threads(1)
    keep_freed_memory()
    plain, hyper = (zoo.load(f"regression/{name}").requires_grad_(False) for name in ("transformer", "hypernet"))
    test = plain.task.batch("test", 0, CONTEXTS)
    n, one = test.n_context, test.rows(0, 1)
    samples = plain.task.sample_queries(one.tokens[0, :n], SAMPLES)
    with torch.no_grad():
        emitted = nmse(hyper, hyper(test.tokens, n), test.targets), seconds(lambda: hyper.decoder(one.tokens[:, :n], n))
        attended = nmse(plain, plain(test.tokens, n), test.targets), seconds(lambda: plain(one.tokens, n))
        fitted = static_error(plain, test), seconds(lambda: static.fit(plain.decoder, samples, n), 8)
    rows = [("hypernet, one emission", "–", *emitted), ("attention, with every query", "–", *attended)]
    rows.append(("static patch of the transformer", "–", *fitted))
    series = [Series(name, [cost], [error], points=True) for name, _, error, cost in rows]
    for name, rank in (("all of the FFNs", None), ("LoRA, rank 4", 4)):
        step = seconds(lambda rank=rank: fine_tuned(plain, one, rank, 1e-3, 1))
        tuned = best_of_rates(plain, rank)
        pairs = zip(STEPS, tuned, strict=True)
        rows += [(f"Adam, {name}, {steps} steps", f"{lr:g}", error, steps * step) for steps, (lr, error) in pairs]
        series.append(Series(f"Adam, {name}", [steps * step for steps in STEPS], [error for _, error in tuned]))
    print("| way | rate | error | ms of a context |\n|---|---|---|---|")
    for name, rate, error, cost in rows:
        print(f"| {name} | {rate} | {error:.4f} | {1e3 * cost:.1f} |")
    print("\n| pairs | emission, ms | query, ms | encoded anew, ms | query alone, ms | break-even, queries |")
    print("|---|---|---|---|---|---|")
    for count in (20, 200, 1000):
        print(f"| {' | '.join(break_even(count))} |")
    panel = Lines(
        f"{CONTEXTS} new functions, {n} pairs each",
        "CPU seconds for one context",
        "squared error over the variance of y",
        tuple(series),
        log_x=True,
        log_y=True,
    )
    figure = Figure(
        "adaptation",
        "What a new context costs, and what it buys",
        (panel,),
        f"Rates of Adam from {', '.join(f'{rate:g}' for rate in RATES)}, chosen for each number of steps on other "
        "contexts. One thread. Attention pays its cost with every query, the others once.",
        "that this holds for other tasks or sizes: one pair of models of one seed, trained on this task.",
        {"command": "python docs/adaptation.py"},
    )
    print(save(figure, HERE / "figures"))


if __name__ == "__main__":
    main()
