"""How a weight update grows as its context is read token by token.

Two constructions are exact at the query and differ as matrices: `growing` reads the context from its start and keeps
one key, so its rank is 1; `shrinking` takes tokens away from the start, changes the key and reaches rank min(n, i)
(both in Dherin et al. 2025, arXiv 2507.16003). Axes: B batch, n context tokens, Q query tokens, L layers, M matrices,
D model; o outputs and i inputs of a matrix W (o,i).
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from itertools import pairwise
from typing import NamedTuple

import torch
from torch import Tensor

from zoo.core.delta import LowRank, Shear
from zoo.core.layers import Layout
from zoo.lens.updates import MATRICES, Matrix, Part, record
from zoo.models import Model


class Growth(NamedTuple):
    """Frobenius norms of a growing update: increments (n,L,M,B,Q), |W_{i+1} − W_i| at index i; distance (n+1,L,M,B,Q),
    |W_i − W_0|; weights (L,M), |W| of the stored matrices."""

    increments: Tensor
    distance: Tensor
    weights: Tensor

    def relative(self) -> Growth:
        """The same in units of |W|."""
        weights = self.weights[:, :, None, None]
        return Growth(self.increments / weights, self.distance / weights, self.weights)

    def together(self) -> Growth:
        """All matrices as one long vector, M = 1: norms summed in squares."""
        increments, distance = (norms.norm(dim=2, keepdim=True) for norms in (self.increments, self.distance))
        return Growth(increments, distance, self.weights.norm(dim=1, keepdim=True))


@torch.no_grad()
def growth(
    model: Model, tokens: Tensor, n_context: int, matrices: Sequence[str] = MATRICES, part: Part = "total"
) -> Growth:
    """The patched weights of each query after each prefix of the context, compared with each other.

    W_i is the weight that stands for c_1 … c_i at query x: the model reads (c_1 … c_i, x), the query right after the
    prefix. All W_i share the stored W, so differences need no reference; W_0 is the query alone. In layer 0 the readers
    keep one key, the query's reduced state, and the increments have rank 1. Deeper layers run on the patched stream of
    the layers below, so their key moves with i and increments reach rank 2: each W_i is exact for its own stream, and
    the sequence is no delta rule there. A falling curve is no sign of learning: an average over i tokens
    falls like 1/i without any training. Raises ValueError without a context or for an unknown matrix.
    """
    unknown = set(matrices) - set(MATRICES)
    if unknown or not matrices or not 0 < n_context < tokens.shape[1]:
        raise ValueError(
            f"matrices={list(matrices)} must be names out of {list(MATRICES)}, "
            f"and n_context={n_context} must leave context and queries of {tokens.shape[1]} tokens"
        )
    prefixes = _prefixes(model, tokens, n_context, matrices, part)
    first = before = next(prefixes)
    increments, distance = [], [_distances(first, first)]
    for now in prefixes:
        increments.append(_distances(now, before))
        distance.append(_distances(now, first))
        before = now
    weights = [[torch.linalg.matrix_norm(b.ffn.weight(name)) for name in matrices] for b in model.decoder.blocks]
    return Growth(torch.stack(increments), torch.stack(distance), torch.stack([torch.stack(row) for row in weights]))


def _prefixes(
    model: Model, tokens: Tensor, n_context: int, matrices: Sequence[str], part: Part
) -> Iterator[list[list[Matrix]]]:
    """The patched matrices, by layer and name, for each length of the context."""
    for length in range(n_context + 1):
        prefix = torch.cat([tokens[:, :length], tokens[:, n_context:]], 1)
        yield [[layer.matrix(name, part) for name in matrices] for layer in record(model, prefix, length)]


def _distances(one: list[list[Matrix]], other: list[list[Matrix]]) -> Tensor:
    """(L,M,B,Q)."""
    pairs = ([(a - b).norm() for a, b in zip(*layers, strict=True)] for layers in zip(one, other, strict=True))
    return torch.stack([torch.stack(row) for row in pairs])


class Slope(NamedTuple):
    """Slopes on log-log axes: of_mean (), of the mean of all curves; each (*), of every curve, for the spread."""

    of_mean: Tensor
    each: Tensor


def log_log_slope(curves: Tensor, start: int = 1) -> Slope:
    """Least-squares slopes of log curves (n,*) against log index, from index `start` on: −1 for 1/i.

    Raises ValueError for fewer than two points and for values that are not positive, which have no logarithm.
    """
    if not 1 <= start <= len(curves) - 2:
        raise ValueError(
            f"start={start} must lie between 1 and {len(curves) - 2}: two points of {len(curves)} at least"
        )
    values = curves[start:]
    if not (values > 0).all():
        raise ValueError(
            f"{int((values <= 0).sum())} of {values.numel()} values are not positive: no slope of their log"
        )
    x = torch.arange(start, len(curves), dtype=curves.dtype, device=curves.device).log()
    x = x - x.mean()

    def slope(y: Tensor) -> Tensor:
        return torch.tensordot(x, y.log(), dims=1) / x.square().sum()

    return Slope(slope(values.reshape(len(values), -1).mean(1)), slope(values))


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


def growing(a: Tensor) -> Shear:
    """ΔW_i of every prefix, leading dims (n+1,B), from a_0 … a_n (n+1,B,i): ΔW_i a_0 = W (a_i − a_0), rank 1.

    Token by token it is the delta rule with one key, W ← W + (u − W k) kᵀ, k = a_0/|a_0|, u = W_0 a_{i+1}/|a_0|: one
    step of least mean squares on ½|W a_0 − W_0 a_{i+1}|² with the rate 1/|a_0|². Raises ValueError where a_0 is zero.
    """
    _refuse_zero(a[:1])
    return Shear(a[:1].expand_as(a), a - a[:1])


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
