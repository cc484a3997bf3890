"""Two updates that stand for a context at one query and differ as matrices.

`growing` reads the context from its start and keeps one key, so its rank is 1; `shrinking` takes tokens away from the
start, changes the key and reaches rank min(n, i) (both in Dherin et al. 2025, arXiv 2507.16003). Axes: B batch, n
context tokens, D model; o outputs and i inputs of a matrix W (o,i).
"""

from __future__ import annotations

from collections.abc import Callable
from itertools import pairwise

import torch
from torch import Tensor

from zoo.core.delta import InputShift, LowRank
from zoo.core.layers import Layout

ContextualLayer = Callable[[Tensor, Layout], Tensor]
"""Anything that maps (B,T,D) to (B,T,D) in a layout, such as zoo.core.layers.Attention: one block without skip."""


@torch.no_grad()
def growing_states(layer: ContextualLayer, context: Tensor, query: Tensor) -> Tensor:
    """What `layer` gives at the query (B,1,D) after each prefix of the context (B,n,D): a_0 … a_n, (n+1,B,D)."""
    n = context.shape[1]
    return _states(layer, context, query, [torch.arange(n + 1) < length for length in range(n + 1)])


@torch.no_grad()
def shrinking_states(layer: ContextualLayer, context: Tensor, query: Tensor) -> Tensor:
    """The same after each suffix: s_0 with all of the context, s_n with none, (n+1,B,D)."""
    n = context.shape[1]
    return _states(layer, context, query, [torch.arange(n + 1) >= gone for gone in range(n + 1)])


def _states(layer: ContextualLayer, context: Tensor, query: Tensor, kept: list[Tensor]) -> Tensor:
    tokens, n = torch.cat([context, query], 1), context.shape[1]
    layout, last = Layout(torch.arange(n + 1, device=tokens.device), None), torch.arange(n + 1) == n
    kept = [(mask | last).to(tokens.device) for mask in kept]
    return torch.stack([layer(tokens[:, mask], layout.keep(mask))[:, -1] for mask in kept])


def growing(a: Tensor) -> InputShift:
    """ΔW_i of every prefix, leading dims (n+1,B), from a_0 … a_n (n+1,B,i): ΔW_i a_0 = W (a_i − a_0), rank 1.

    Token by token it is the delta rule with one key, W ← W + (u − W k) kᵀ, k = a_0/|a_0|, u = W_0 a_{i+1}/|a_0|: one
    step of least mean squares on ½|W a_0 − W_0 a_{i+1}|² with the rate 1/|a_0|². Raises ValueError where a_0 is zero.
    """
    _refuse_zero(a[:1])
    return InputShift(a[:1].expand_as(a), a - a[:1])


def shrinking(W: Tensor, s: Tensor) -> list[LowRank]:
    """ΔW_0 … ΔW_n as tokens go, leading dims (B), from s_0 … s_n (n+1,B,i): (W + ΔW_k) s_k = W s_0, rank up to k.

    W + ΔW_k = W (I + A_1) … (I + A_k) with A_j = (s_{j−1} − s_j) s_jᵀ/|s_j|². Raises ValueError where a state is zero.
    """
    _refuse_zero(s[1:])
    total = LowRank(*(s.new_zeros(*s.shape[1:-1], size, 0) for size in W.shape))
    steps = [total]
    for before, now in pairwise(s):
        u = total.linear(W, (before - now).unsqueeze(-2)).mT
        v = (now / now.square().sum(-1, keepdim=True)).unsqueeze(-1)
        total = LowRank(torch.cat([total.u, u], -1), torch.cat([total.v, v], -1))
        steps.append(total)
    return steps


def _refuse_zero(states: Tensor) -> None:
    if not states.any(-1).all():
        raise ValueError("a state without its context is zero: no update of the weights can move it")
