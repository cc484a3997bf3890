"""How a weight update grows as its context is read token by token.

Axes: B batch, n context tokens, Q query tokens, L layers, M matrices; o outputs and i inputs of a matrix W (o,i).
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

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
