"""Merged experts: one FFN per context, a mixture of learned updates in the space of weights."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from cases import Case, build

pytestmark = pytest.mark.numeric


@pytest.mark.parametrize("score", ["linear", "softmax"])
@torch.no_grad()
def test_the_update_is_the_weighted_sum_of_matrices(score: str) -> None:
    model: Any = build(Case("", "merged_experts", "regression", {"score": score, "experts": 3}))
    family, ffn, n = model.decoder.context_to_delta, model.decoder.blocks[1].ffn, model.task.n_context
    z_BTD = torch.randn(2, 12, 16).double()
    patch = family(z_BTD, 1, n)
    for row, mean_D in enumerate(z_BTD[:, :n].mean(1)):
        logits = [float(w @ (mean_D / (mean_D.square().mean() + 1e-6).sqrt())) for w in family.routers[1].weight]
        by_score = {"linear": torch.tensor(logits) / 3**0.5, "softmax": torch.tensor(logits).softmax(0)}
        weights = by_score.pop(score).double()
        (other,) = by_score.values()
        for name, delta in patch.weights.items():
            W = ffn.weight(name)
            experts = [M.view(W.shape) for M in family.experts[1][name].weight.unbind(1)]
            expected, wrong = (sum(float(g) * M for g, M in zip(by, experts, strict=True)) for by in (weights, other))
            torch.testing.assert_close(delta.dense(W)[row], expected, rtol=1e-6, atol=1e-6)
            assert (delta.dense(W)[row] - wrong).abs().max() > 1e-2


@torch.no_grad()
def test_merging_weights_is_not_mixing_outputs() -> None:
    """What the family computes is one FFN of the mean weights; the mean of the FFNs' outputs is something else."""
    model: Any = build(Case("", "merged_experts", "regression", {"score": "softmax", "experts": 2}))
    family, ffn, n = model.decoder.context_to_delta, model.decoder.blocks[0].ffn, model.task.n_context
    z_BTD = torch.randn(1, 12, 16).double()
    patch, weight_E = family(z_BTD, 0, n), family.routers[0](family.norm(z_BTD[:, :n].mean(1)))[0].softmax(-1)

    def run(W: dict[str, torch.Tensor]) -> torch.Tensor:
        hidden = torch.nn.functional.silu(z_BTD @ W["gate"].mT) * (z_BTD @ W["up"].mT)
        return hidden @ W["down"].mT

    experts = [
        {
            name: ffn.weight(name) + family.experts[0][name].weight[:, e].view(shape)
            for name, shape in family.shapes.items()
        }
        for e in range(2)
    ]
    merged = {name: sum(float(g) * W[name] for g, W in zip(weight_E, experts, strict=True)) for name in family.shapes}
    mixed = sum(float(g) * run(W) for g, W in zip(weight_E, experts, strict=True))
    found = ffn(z_BTD, patch)[:, n:]
    torch.testing.assert_close(found, run(merged)[:, n:], rtol=1e-10, atol=1e-10)
    assert (found - mixed[:, n:]).abs().max() > 1e-2


def test_experts_part_from_each_other_though_they_start_equal() -> None:
    """All start at zero; contexts weigh them differently, so that their gradients differ."""
    model: Any = build(Case("", "merged_experts", "regression", {}), random=False).train()
    batch = model.task.batch("train", 0, 8)
    output = model(batch.tokens.double(), batch.n_context)
    model.task.token_losses(output, batch._replace(targets=batch.targets.double())).mean().backward()
    gradient = model.decoder.context_to_delta.experts[0]["up"].weight.grad
    assert torch.linalg.matrix_rank(gradient) == 4
