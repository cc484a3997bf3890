"""Benchmarks of whole training steps: families against the transformer, a peer, the limit, and Lightning's loop.

Axes: B sequences, T tokens, D model, L layers.
"""

from __future__ import annotations

import contextlib
import copy
import io
import tempfile
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


def steps(device: torch.device, compiled: bool) -> Iterator[Case]:
    """The transformer against a peer and against its own matrix products; the families against the transformer."""
    ids = torch.randint(V, (B, T + 1), generator=torch.Generator().manual_seed(0)).to(device)
    ours = build("transformer", SIZE, {"name": "noise", "vocabulary": V, "tokens": T}).to(device)
    variants: dict[str, Callable[[], Any]] = {OURS: step(ours.decoder, lambda x: ours(x), ids)}
    if compiled:
        fast = copy.deepcopy(ours)
        torch.compiler.reset()
        fast.decoder.compile(fullgraph=True)
        variants[COMPILED] = step(fast.decoder, lambda x: fast(x), ids)
    bars = {(name, LIMIT): 1 / FRACTIONS[name] for name in variants}
    if peers.installed():
        llama = peers.llama(ours).to(device)
        variants["transformers Llama"] = step(llama, lambda x: llama(x).logits, ids)
        bars[OURS, "transformers Llama"] = 1.0
    variants[f"{OURS}, kernels alone"] = kernels(variants[OURS])
    variants[LIMIT] = limit(ours)
    yield Case(f"d={SIZE['dim']}, {SIZE['layers']} layers, B={B}, T={T}", LIMIT, variants, bars, (COMPILED,))

    def default_step(family: str) -> Callable[[], Any]:
        model = build(family, {}, {"name": "noise", "vocabulary": V, "tokens": 128}).to(device)
        return partial(bare_step(model), moved(model.task.batch("train", 0, 32), device))

    yield Case("families, default sizes, 128 tokens", OURS, {name: default_step(name) for name in MODELS})


def loops(device: torch.device, quick: bool) -> Iterator[Case]:
    """The surroundings of the steps: Lightning's loop with our logging, the extraction of a patch."""
    yield trainer(device, 10 if quick else 60)
    for name in MODELS:
        yield extraction(name, device)


def build(family: str, size: dict[str, Any], task: dict[str, Any]) -> Model:
    torch.manual_seed(0)
    model = MODELS[family](model={"name": family, **size}, task=task, optim={})
    model.task.prepare()
    return model


def step(module: nn.Module, logits_of: Callable[[Tensor], Tensor], ids: Tensor) -> Callable[[], Any]:
    """Forward, cross-entropy, backward, AdamW."""
    optimizer = torch.optim.AdamW(module.parameters(), lr=1e-4)

    def work() -> None:
        loss = F.cross_entropy(logits_of(ids[:, :-1]).flatten(0, 1), ids[:, 1:].flatten())
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()

    return work


def limit(model: Model) -> Callable[[], Any]:
    """The step's matrix products alone, 6·P·B·T + 12·L·D·T²·B FLOPs with P parameters of matrices, all of one size."""
    P = sum(p.numel() for name, p in model.decoder.named_parameters() if p.dim() > 1 and "embedding" not in name)
    flops = 6 * P * B * T + 12 * SIZE["layers"] * SIZE["dim"] * T**2 * B
    x = torch.randn(B * T, SIZE["dim"], device=model.device)
    W = torch.randn(SIZE["dim"], SIZE["hidden"], device=model.device)
    out = x @ W
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


def trainer(device: torch.device, count: int) -> Case:
    """The steps of the default run: by the trainer with all its logging, and by a bare loop."""
    from zoo.training.run import train

    now = clock(device)

    def by_trainer() -> float:
        silence = io.StringIO()
        with (
            tempfile.TemporaryDirectory() as folder,
            contextlib.redirect_stdout(silence),
            contextlib.redirect_stderr(silence),
            mock.patch("zoo.training.callbacks.monotonic", now),
        ):
            few: Any = {"validate_every": count, "validation_batches": 1, "test_batches": 1, "out": f"{folder}/run"}
            optim, at = {"steps": count, "warmup": 0}, {"accelerator": device.type}
            metrics = train(optim=optim, trainer=at, **few)
        return metrics["seconds"]

    def bare() -> float:
        model = build("transformer", {}, {"name": "regression"}).to(device)
        work = bare_step(model)
        start = now()
        for batch in Stream(model.task, "train", model.optim.batch_size, count):
            work(moved(batch, device))
        return now() - start

    bars = {("trainer", "bare loop"): 1.05}
    return Case(f"default run, {count} steps", "bare loop", {"bare loop": bare, "trainer": by_trainer}, bars)


def extraction(family: str, device: torch.device) -> Case:
    model = build(family, {}, {"name": "regression", "queries": 1}).to(device).eval().requires_grad_(False)
    batch = moved(model.task.batch("test", 0, 32), device)
    variants: dict[str, Callable[[], Any]] = {
        "contextual forward": lambda: model(batch.tokens, batch.n_context),
        "deltas": lambda: model.deltas(batch.tokens, batch.n_context),
    }
    bars = {("deltas", "contextual forward"): 2.5}
    return Case(f"model.deltas of one query, {family}", "contextual forward", variants, bars)
