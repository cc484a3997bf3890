"""No model sees the future: by gradient, by edit, and by what it learns on tokens that nobody can predict."""

from __future__ import annotations

import math

import pytest
import torch
from cases import AUTOREGRESSIVE, Case, batch_of, build
from torch import Tensor

import zoo.models.hypernet
import zoo.models.moe
from zoo.context import Summary, summarise
from zoo.models import Model
from zoo.past import Past

every_case = pytest.mark.parametrize("case", AUTOREGRESSIVE, ids=lambda case: case.name)
BY_NAME = {case.name: case for case in AUTOREGRESSIVE}
FLOOR = math.log(8)


def gradients(model: Model) -> Tensor:
    """[t, s]: the largest gradient of output t with respect to the embedding of token s."""
    states: list[Tensor] = []
    hook = model.decoder.embedding.register_forward_hook(lambda module, args, output: states.append(output))
    output = model(batch_of(model).tokens)
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
    tokens = batch_of(model, 8).tokens
    output, columns = model(tokens), []
    for s in range(tokens.shape[1] - 1):
        edited = torch.where(torch.arange(tokens.shape[1]) > s, (tokens + 1) % model.task.config.vocabulary, tokens)
        columns.append((model(edited) - output).abs().amax((0, 2)))
    return torch.stack(columns, 1)


def loss_on_noise(case: Case) -> float:
    """Held-out loss after a short training on independent tokens."""
    model = build(case, random=False).float().train()
    optimizer = torch.optim.Adam(model.parameters(), lr=1e-2)
    for step in range(100):
        batch = model.task.batch("train", step, 64)
        optimizer.zero_grad()
        model.task.errors(model(batch.tokens), batch).mean().backward()
        optimizer.step()
    batch = model.task.batch("test", 0, 512)
    with torch.no_grad():
        return model.eval().task.errors(model(batch.tokens), batch).mean().item()


def leaky(z: Tensor, source: str, n_context: int, chunk: int | None = None, past: Past | None = None) -> Summary:
    """The mean of the whole sequence, future included."""
    shape = summarise(z, source, n_context, chunk)
    return Summary(z.mean(1, keepdim=True).expand_as(shape.mean), torch.ones_like(shape.filled))


@pytest.fixture(params=["hypernet-chunk", "moe-context-chunk"])
def leak(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Case:
    """A case that the tests below must catch."""
    for module in (zoo.models.hypernet, zoo.models.moe):
        monkeypatch.setattr(module, "summarise", leaky)
    return BY_NAME[request.param]


@every_case
def test_gradient(case: Case) -> None:
    seen = gradients(build(case))
    assert not seen.triu(1).any()
    assert (seen.tril() > 0).sum() == 12 * 13 / 2


def test_gradient_catches_a_leak(leak: Case) -> None:
    assert (gradients(build(leak)) > 0).all()


@every_case
def test_edit(case: Case) -> None:
    changed = changes(build(case))
    assert changed.triu().max() <= 1e-12
    assert changed.tril(-1)[1:].amax(1).min() > 1e-2


def test_a_large_state_leaves_the_summaries_before_it_alone() -> None:
    z = torch.randn(1, 12, 4)
    edited = z.clone()
    edited[:, 9:] *= 1e8  # in chunk 2, whose summary is made of chunks 0 and 1
    assert torch.equal(*(summarise(t, "chunk", 0, 4).mean for t in (z, edited)))
    assert torch.equal(*(summarise(t, "running", 0).mean[:, :9] for t in (z, edited)))


def test_edit_catches_a_leak(leak: Case) -> None:
    assert changes(build(leak)).triu().max() > 1e-3


@every_case
def test_entropy(case: Case) -> None:
    assert loss_on_noise(case) >= FLOOR - 0.01


def test_entropy_catches_a_leak(leak: Case) -> None:
    assert loss_on_noise(leak) < FLOOR - 0.02
