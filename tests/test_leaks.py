"""No model sees the future: by gradient, by edit, and by what it learns on tokens that nobody can predict."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from torch import Tensor

from cases import AUTOREGRESSIVE, CASES, Case, batch_of, build
from zoo.core.context import ContextMean, Source
from zoo.models import Model

pytestmark = pytest.mark.numeric

TEXT = [
    Case("transformer-text", "transformer", "text", {}),
    Case("hypernet-text-chunk", "hypernet", "text", {"chunk": 4}),
    Case("hypernet-text-running", "hypernet", "text", {"context": "running"}),
    Case("hypernet-text-token", "hypernet", "text", {"context": "token"}),
    Case("moe-text-token", "moe", "text", {}),
    Case("moe-text-context", "moe", "text", {"route_on": "context", "chunk": 4}),
    Case("fast-weights-text", "fast_weights", "text", {"chunk": 4}),
]
PROMPTS = [case for case in CASES if case.task == "prompts"]
every_case = pytest.mark.parametrize("case", [*AUTOREGRESSIVE, *TEXT, *PROMPTS], ids=lambda case: case.name)
# one of each way to make and to share an update: edits and gradients see every case
WAYS = [
    *("transformer-noise-tied", "moe-token-top1-shared", "moe-context-chunk"),
    *("hypernet-chunk", "hypernet-running", "hypernet-token", "fast-weights-chunk"),
]
LEAKS_ON_NOISE = ["hypernet-chunk", "moe-context-chunk"]
on_noise = pytest.mark.parametrize(
    "case",
    [
        pytest.param(case, id=case.name, marks=[] if case.name in LEAKS_ON_NOISE else pytest.mark.slow)
        for case in AUTOREGRESSIVE
        if case.name in WAYS
    ],
)
on_prompts = pytest.mark.parametrize("case", PROMPTS, ids=lambda case: case.name)
BY_NAME = {case.name: case for case in (*AUTOREGRESSIVE, *TEXT, *PROMPTS)}
FLOOR = math.log(8)


def gradients(model: Model) -> Tensor:
    """[t, s]: the largest gradient of output t with respect to the embedding of token s."""
    states: list[Tensor] = []
    hook = model.decoder.embedding.register_forward_hook(lambda module, args, output: states.append(output))
    batch = batch_of(model)
    output = model(batch.tokens, batch.n_context)
    hook.remove()
    directions = torch.randn_like(output)  # the sum of all logits may not depend on what single ones do
    rows = [
        torch.autograd.grad((output * directions)[:, t].sum(), states, retain_graph=True)[0].abs().amax((0, 2))
        for t in range(output.shape[1])
    ]
    return torch.stack(rows)


@torch.no_grad()
def changes(model: Model) -> Tensor:
    """[t, s]: how much output t changes when all tokens after s do, by one id each."""
    tokens, _, n_context = batch_of(model, 8)[:3]
    output, columns = model(tokens, n_context), []
    for s in range(tokens.shape[1] - 1):
        edited = torch.where(torch.arange(tokens.shape[1]) > s, (tokens + 1) % model.task.output_dim, tokens)
        columns.append((model(edited, n_context) - output).abs().amax((0, 2)))
    return torch.stack(columns, 1)


def loss_on_noise(case: Case) -> float:
    """Held-out loss after a short training on independent tokens."""
    model = build(case, random=False).float().train()
    optimizer = torch.optim.Adam(model.parameters(), lr=1e-2)
    for step in range(100):
        batch = model.task.batch("train", step, 64)
        optimizer.zero_grad()
        model.task.token_losses(model(batch.tokens), batch).mean().backward()
        optimizer.step()
    batch = model.task.batch("test", 0, 512)
    with torch.no_grad():
        return model.eval().task.token_losses(model(batch.tokens), batch).mean().item()


def leaky(source: Source, z: Tensor, *args: Any, **options: Any) -> ContextMean:
    """The mean of the whole sequence, future included."""
    shape = mean_of(source, z, *args, **options)
    mean = z.mean(1) if source.kind == "segment" else z.mean(1, keepdim=True)
    return ContextMean(mean.expand_as(shape.mean), torch.ones_like(shape.nonempty))


mean_of = Source.mean
LEAKS = [
    *(*LEAKS_ON_NOISE, "hypernet-text-chunk", "hypernet-text-running", "moe-text-context"),
    *("hypernet-prompts", "hypernet-prompts-attend", "moe-prompts-context"),
    *("hyper-moe-chunk", "merged-experts-chunk"),
]


@pytest.fixture(params=LEAKS)
def leak(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Case:
    """A case that the tests below must catch."""
    monkeypatch.setattr(Source, "mean", leaky)
    return BY_NAME[request.param]


@every_case
def test_gradient(case: Case) -> None:
    seen = gradients(build(case))
    assert not seen.triu(1).any()
    assert (seen.tril() > 0).sum() == 12 * 13 / 2


def test_gradient_catches_a_leak(leak: Case) -> None:
    model = build(leak)
    assert (gradients(model)[model.task.n_context :] > 0).all()


@every_case
def test_edit(case: Case) -> None:
    changed = changes(build(case))
    assert changed.triu().max() <= 1e-12
    assert changed.tril(-1)[1:].amax(1).min() > 1e-2


def test_a_large_state_leaves_the_summaries_before_it_alone() -> None:
    z = torch.randn(1, 12, 4)
    edited = z.clone()
    edited[:, 9:] *= 1e8  # in chunk 2, whose summary is made of chunks 0 and 1
    assert torch.equal(*(Source("chunk", 4).mean(t, 0).mean for t in (z, edited)))
    assert torch.equal(*(Source("running").mean(t, 0).mean[:, :9] for t in (z, edited)))


def test_edit_catches_a_leak(leak: Case) -> None:
    assert changes(build(leak)).triu().max() > 1e-3


@on_prompts
@torch.no_grad()
def test_a_separate_context_reaches_every_later_token_by_the_ways_that_are_open(case: Case) -> None:
    model = build(case)
    batch = batch_of(model, 8)
    assert batch.wrong_context is not None
    own, n = batch.tokens, batch.n_context
    other = torch.cat([batch.wrong_context, own[:, n:]], 1)
    output, patches = model.decoder(own, n)
    assert (model(other, n) - output)[:, n:].abs().amax((0, 2)).min() > 1e-2
    # with the weights that the own context gave, only attention can tell the other one
    by_attention = (model(other, n, patches) - output)[:, n:].abs().amax((0, 2))
    assert by_attention.min() > 1e-2 if model.decoder.attend_context else not by_attention.any()


@on_noise
def test_entropy(case: Case) -> None:
    assert loss_on_noise(case) >= FLOOR - 0.01


@pytest.mark.parametrize("leak", LEAKS_ON_NOISE, indirect=True)
def test_entropy_catches_a_leak(leak: Case) -> None:
    assert loss_on_noise(leak) < FLOOR - 0.02
