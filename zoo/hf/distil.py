"""A LoRA trained on from its closed form: the prompted model distilled into it (Askell et al. 2021, arXiv 2112.00861).

Axes: B queries of one length, T tokens of a query, o outputs and i inputs of a matrix, r rank.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from zoo.config import require_positive
from zoo.core.delta import LowRank
from zoo.core.patch import Patch
from zoo.hf.prompt import Prompt, judged, kl_of

ROWS, EVERY, RATE = 32, 10, 2e-4
"""Queries of a step at most; steps between looks at other queries; of Adam."""


def distil(
    prompt: Prompt, samples: Sequence[Tensor], others: Sequence[Tensor], lora: Sequence[Patch], steps: int
) -> list[Patch]:
    """Patches as `truncated` gives them after at most `steps` of Adam on the KL in nats from the prompted model at the
    token after sample queries (B,T): after those that serve other queries best. Raises ValueError for no
    steps or queries."""
    require_positive("", steps=steps)
    if not samples or not others:
        raise ValueError("no queries to train on, or none to choose the step on")
    leaves = [t for patch in lora for delta in patch.weights.values() for t in _balanced(delta)]
    under = _patches(lora, leaves)
    parts = [(tokens, prompt.logits(tokens)) for batch in samples for tokens in batch.split(ROWS)]
    optimizer, generator = torch.optim.Adam(leaves, RATE), torch.Generator().manual_seed(0)
    best, found = float("inf"), leaves
    for step in range(steps + 1):
        if step % EVERY == 0 or step == steps:
            kl = judged(prompt, others, under, "sink-null").kl
            if kl < best:
                best, found = kl, [leaf.detach().clone() for leaf in leaves]
        queries, goal = parts[int(torch.randint(len(parts), (), generator=generator))]
        tokens, positions = prompt.after_kept(queries)  # which meet the weights too
        logits = prompt.model.decoder(tokens, added=under, positions=positions)[0][:, -1]
        gradients = torch.autograd.grad(kl_of(goal, logits).sum() / ROWS, leaves)
        for leaf, gradient in zip(leaves, gradients, strict=True):
            leaf.grad = gradient
        optimizer.param_groups[0]["lr"] = RATE * (1 - step / (steps + 1))
        optimizer.step()
    return _patches(lora, found)


def _balanced(delta: Any) -> tuple[Tensor, Tensor]:
    """u (1,o,r) and v (1,i,r) of the same ΔW with columns of equal norms, so that steps move both alike."""
    size = ((delta.u.norm(dim=-2) + 1e-12) / (delta.v.norm(dim=-2) + 1e-12)).sqrt().unsqueeze(-2)
    return (delta.u / size).requires_grad_(), (delta.v * size).requires_grad_()


def _patches(lora: Sequence[Patch], factors: Sequence[Tensor]) -> list[Patch]:
    rest = iter(factors)
    return [Patch(weights={name: LowRank(next(rest), next(rest)) for name in patch.weights}) for patch in lora]
