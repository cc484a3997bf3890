"""A model's weight updates as matrices: size, growth, rank, alignment, and how much the query matters.

A matrix is formed for every query, those of one layer, and mostly of one context, at a time.
Axes: B contexts, n context tokens, Q queries, L layers, M matrices; o outputs and i inputs of a matrix W (o,i).
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterator, Sequence
from itertools import pairwise

import torch
from torch import Tensor

from zoo.core.patch import Patch
from zoo.lens.protocol import Subject

Matrices = dict[str, Tensor]
"""By name, those of one layer."""


@torch.no_grad()
def updates(model: Subject, tokens: Tensor, n_context: int) -> Iterator[Matrices]:
    """Layer by layer, ΔW(context, query) − ΔW(no context, query) of each matrix, (B,Q,o,i): what the first n_context
    tokens do for each of the others. Raises ValueError as zoo.core.exact.replace_context does."""
    query = tokens[:, n_context:]
    return _differences(model, query, model.deltas(tokens, n_context), model.deltas(query, 0))


@torch.no_grad()
def _differences(model: Subject, query: Tensor, new: Sequence[Patch], old: Sequence[Patch]) -> Iterator[Matrices]:
    """Layer by layer, the matrices under the patches `new` of each query minus those under `old`."""
    for block, *patches in zip(model.decoder.blocks, new, old, strict=True):
        after, before = (block.ffn.dense(patch) for patch in patches)
        yield {name: (after[name] - before[name]).expand(*query.shape[:2], -1, -1) for name in after}


@torch.no_grad()
def relative_norms(model: Subject, tokens: Tensor, n_context: int) -> Tensor:
    """|ΔW(context, query) − ΔW(no context, query)| / |W| by layer, matrix as `names` and query, (L,M,B,Q); nan where a
    layer has no such matrix."""
    rows = [torch.stack([_norms(model, layer) for layer in updates(model, row, n_context)]) for row in tokens.split(1)]
    return torch.cat(rows, 2) / _stored_norms(model)[..., None, None]


def names(model: Subject) -> list[str]:
    """The matrices of all layers, which may have different ones."""
    return list(dict.fromkeys(name for block in model.decoder.blocks for name in block.ffn.matrices))


def _norms(model: Subject, matrices: Matrices) -> Tensor:
    """By `names`, 0 for one that the layer does not have."""
    norms = {name: torch.linalg.matrix_norm(matrix) for name, matrix in matrices.items()}
    none = torch.zeros_like(next(iter(norms.values())))
    return torch.stack([norms.get(name, none) for name in names(model)])


def _stored_norms(model: Subject) -> Tensor:
    """|W| of every FFN matrix, (L,M)."""
    return torch.stack([_norms(model, block.ffn.dense(Patch())) for block in model.decoder.blocks])


@torch.no_grad()
def increments(model: Subject, tokens: Tensor, n_context: int) -> Tensor:
    """|W_{i+1} − W_i| / |W| of all matrices of a layer as one long vector, for i = 0 … n−1: (n,L,B,Q).

    W_i stands for c_1 … c_i at query x, on the stream of its own patched layers: increments have rank 1 in layer 0,
    where the query's reduced state is the one key, and rank 2 in deeper layers, where it moves with i.
    """
    rows = []
    for row in tokens.split(1):
        query = row[:, n_context:]
        patches = [model.deltas(torch.cat([row[:, :i], query], 1), i) for i in range(n_context + 1)]
        steps = [_differences(model, query, new, old) for old, new in pairwise(patches)]
        rows.append(torch.stack([torch.stack([_norms(model, layer).norm(dim=0) for layer in step]) for step in steps]))
    return torch.cat(rows, 2) / _stored_norms(model).norm(dim=1)[:, None, None]


def participation_ratio(singular: Tensor) -> Tensor:
    """Effective rank (Σσ²)²/Σσ⁴ (*) of matrices with singular values (*,n), as in Gao et al. 2017 (bioRxiv 214262): n
    equal ones give n; of zero, nan."""
    square = singular.square()
    return square.sum(-1).square() / square.square().sum(-1)


def grid(model: Subject, tokens: Tensor, n_context: int) -> Matrices:
    """The updates of the last layer, (B,Q,o,i), by every context for the queries of the first sequence."""
    queries = tokens[:1, n_context:].expand_as(tokens[:, n_context:])
    shared = torch.cat([tokens[:, :n_context], queries], 1)
    return deque(updates(model, shared, n_context), maxlen=1).pop()


def cosines(update: Tensor) -> Tensor:
    """Cosines of updates (B,Q,o,i) with each other, (B·Q,B·Q); nan for one that is zero."""
    flat = update.flatten(0, 1).flatten(1)
    unit = flat / flat.norm(dim=1, keepdim=True)
    return unit @ unit.mT


def context_share(update: Tensor, W: Tensor) -> Tensor:
    """Share of the variance of updates (B,Q,o,i) of W that lies between contexts, (): 1 if the query does not matter.

    Σ_b Q |mean_q ΔW − mean ΔW|² over Σ_bq |ΔW − mean ΔW|², for a grid; nan if all are equal up to rounding, where the
    ratio would be noise.
    """
    B, Q = update.shape[:2]
    apart = update - update.mean((0, 1))
    total, between = apart.square().sum(), Q * apart.mean(1).square().sum()
    rounding = (100 * torch.finfo(W.dtype).eps) ** 2 * B * Q * W.square().sum()
    return (between / total).where(total > rounding, torch.nan)
