"""Benchmarks of whole training steps: families against the transformer, a peer, the limit, and Lightning's loop.

Axes: B sequences, T tokens, D model, L layers.
"""

from __future__ import annotations

import copy
import io
import tempfile
from collections.abc import Callable, Iterator
from contextlib import redirect_stderr, redirect_stdout
from functools import partial
from typing import Any
from unittest import mock

import torch
import torch.nn.functional as F
from lightning.fabric.utilities import move_data_to_device
from torch import Tensor, nn

from zoo.bench import peers
from zoo.bench.timing import Case, Row, Setting, clock, kernels, measure
from zoo.models import MODELS, Model
from zoo.training.data import Stream
from zoo.training.run import train

SIZE = {"dim": 256, "layers": 4, "heads": 8, "hidden": 704}
B, T, V = 8, 256, 257

OURS, COMPILED, LIMIT = "transformer", "transformer, compiled", "matrix products"
FRACTIONS = {OURS: 0.70, COMPILED: 0.80}
"""Wanted share of the rate of plain matrix products."""


def steps(setting: Setting) -> Iterator[Row]:
    """Whole training steps: the transformer against a peer and its matrix products, the families against it."""
    yield from measure(step_of_transformer(setting.device, setting.compiled), setting)
    variants = {}
    for name in MODELS:
        model = build(name, {}, {"name": "noise", "vocabulary": V, "tokens": 128}).to(setting.device)
        batch = move_data_to_device(model.task.batch("train", 0, 32), setting.device)
        variants[name] = partial(bare_step(model), batch)
    yield from measure(Case("families, default sizes, 128 tokens", OURS, variants), setting)


def loops(setting: Setting) -> Iterator[Row]:
    """The trainer with all its logging against a bare loop, the extraction of an update against a forward pass."""
    yield from measure(trainer(setting.device, 10 if setting.quick else 60), setting)
    for name in MODELS:
        yield from measure(extraction(name, setting.device), setting)


def step_of_transformer(device: torch.device, compiled: bool) -> Case:
    ids = torch.randint(V, (B, T + 1), generator=torch.Generator().manual_seed(0)).to(device)
    ours = build("transformer", SIZE, {"name": "noise", "vocabulary": V, "tokens": T}).to(device)
    variants = {OURS: step(ours, ids)}
    if compiled:
        fast = copy.deepcopy(ours)
        torch.compiler.reset()
        fast.decoder.compile(fullgraph=True)
        variants[COMPILED] = step(fast, ids)
    bars = {(name, LIMIT): 1 / FRACTIONS[name] for name in variants}
    if peers.installed():
        variants["transformers Llama"] = step(peers.llama(ours).to(device), ids)
        bars[OURS, "transformers Llama"] = 1.0
    variants |= {f"{OURS}, kernels alone": kernels(variants[OURS]), LIMIT: limit(ours)}
    return Case(f"d={SIZE['dim']}, {SIZE['layers']} layers, B={B}, T={T}", LIMIT, variants, bars)


def build(family: str, size: dict[str, Any], task: dict[str, Any]) -> Model:
    torch.manual_seed(0)
    model = MODELS[family](model={"name": family, **size}, task=task, optim={})
    model.task.prepare()
    return model


def step(model: nn.Module, ids: Tensor) -> Callable[[], Any]:
    """Forward, cross-entropy, backward, AdamW, of a model of ours or of `transformers`."""
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-4)

    def work() -> None:
        out = model(ids[:, :-1])
        logits = out if torch.is_tensor(out) else out.logits
        loss = F.cross_entropy(logits.flatten(0, 1), ids[:, 1:].flatten())
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()

    return work


def limit(model: Model) -> Callable[[], Any]:
    """The step's matrix products alone, 6·P·B·T + 12·L·D·T²·B FLOPs with P parameters of matrices, all of one size."""
    P = sum(p.numel() for name, p in model.decoder.named_parameters() if p.dim() > 1 and "embedding" not in name)
    flops = 6 * P * B * T + 12 * SIZE["layers"] * SIZE["dim"] * T**2 * B
    x, out = (torch.randn(B * T, SIZE[name], device=model.device) for name in ("dim", "hidden"))
    W = torch.randn(SIZE["dim"], SIZE["hidden"], device=model.device)
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


def trainer(device: torch.device, count: int) -> Case:
    """The steps of the default run: by the trainer with all its logging, and by a bare loop."""
    now = clock(device)

    def by_trainer() -> float:
        with (
            tempfile.TemporaryDirectory() as folder,
            redirect_stdout(io.StringIO()),
            redirect_stderr(io.StringIO()),
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
            work(move_data_to_device(batch, device))
        return now() - start

    variants = {"bare loop": bare, "trainer": by_trainer}
    return Case(f"default run, {count} steps", "bare loop", variants, {("trainer", "bare loop"): 1.05})


def extraction(family: str, device: torch.device) -> Case:
    model = build(family, {}, {"name": "regression", "queries": 1}).to(device).eval().requires_grad_(False)
    batch = move_data_to_device(model.task.batch("test", 0, 32), device)
    variants: dict[str, Callable[[], Any]] = {
        "contextual forward": lambda: model(batch.tokens, batch.n_context),
        "deltas": lambda: model.deltas(batch.tokens, batch.n_context),
    }
    bars = {("deltas", "contextual forward"): 2.5}
    return Case(f"model.deltas of one query, {family}", "contextual forward", variants, bars)
