"""Generated experts: K of E emitted updates, weighed token by token."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from cases import Case, batch_of, build
from zoo.core.layers import split_chunks

pytestmark = pytest.mark.numeric

SOURCES = [("regression", {}, None), ("noise", {"chunk": 4}, 4), ("noise", {"context": "token"}, 1)]


@pytest.mark.parametrize(("task", "options", "chunk"), SOURCES)
@pytest.mark.parametrize("top_k", [1, 3])
@torch.no_grad()
def test_each_token_gets_the_weighted_sum_of_the_updates_it_chose(
    task: str, options: dict[str, Any], chunk: int | None, top_k: int
) -> None:
    model: Any = build(Case("", "hyper_moe", task, {"top_k": top_k, **options}))
    family, ffn, n = model.decoder.context_to_delta, model.decoder.blocks[1].ffn, model.task.n_context
    z_BTD = torch.randn(2, 12, 16).double()
    emitted = family.update(family.source.mean(z_BTD, n), 1)
    patch = family(z_BTD, 1, n)
    probability_BTE = (z_BTD @ family.routing.routers[1].weight.mT).softmax(-1)
    for name, delta in emitted.items():
        x_BTi = torch.randn(2, 12, ffn.weight(name).shape[1]).double()
        found = ffn.linear(name, split_chunks(x_BTi, chunk), patch).reshape(2, 12, -1)
        for b, t in ((b, t) for b in range(2) for t in range(12)):
            at = (b,) if chunk is None else (b, t // chunk)
            u_oER, v_iER = (factor[at].unflatten(-1, (4, 2)) for factor in (delta.u, delta.v))
            chosen = probability_BTE[b, t].topk(top_k).indices.tolist()
            total = probability_BTE[b, t, chosen].sum() if top_k > 1 else 1.0
            dW = sum(probability_BTE[b, t, e] / total * u_oER[:, e] @ v_iER[:, e].T for e in chosen)
            served = t >= n
            expected = x_BTi[b, t] @ (ffn.weight(name) + (dW if served else 0)).T
            torch.testing.assert_close(found[b, t], expected, rtol=1e-10, atol=1e-10)


@torch.no_grad()
def test_tokens_of_one_context_differ_by_the_router_alone() -> None:
    """The control of the family: with a router that gives all tokens the same, ΔW is that of a hypernetwork."""
    model: Any = build(Case("", "hyper_moe", "regression", {}))
    family, ffn, n = model.decoder.context_to_delta, model.decoder.blocks[0].ffn, model.task.n_context
    z_BTD, later = torch.randn(2, 12, 16).double(), torch.arange(n, 12)
    dense = family(z_BTD, 0, n).per_token(later).weights["up"].dense(ffn.up)
    assert (dense - dense[:, :1]).abs().amax((0, 2, 3))[1:].min() > 1e-3
    family.routing.routers[0].weight.zero_()
    dense = family(z_BTD, 0, n).per_token(later).weights["up"].dense(ffn.up)
    assert not (dense - dense[:, :1]).any()
    assert (dense[0] - dense[1]).abs().max() > 1e-3  # contexts still differ


def test_the_router_learns_from_the_first_update_on() -> None:
    """At step 0 all updates are zero, and so is what their weights are worth."""
    model: Any = build(Case("", "hyper_moe", "regression", {}), random=False)
    batch = batch_of(model, 8)
    for moved in (False, True):
        model.zero_grad()
        model.task.token_losses(model(batch.tokens, batch.n_context), batch).mean().backward()
        for router in model.decoder.context_to_delta.routing.routers:
            assert bool(router.weight.grad.any()) == moved
        with torch.no_grad():
            for parameter in model.parameters():
                parameter -= 0.1 * parameter.grad
