"""The structure of a model's weight updates: size, growth, rank, alignment, and how much the query matters.

Axes: B contexts, n context tokens, Q queries, L layers, M matrices, N updates or codes, C code, P numbers of a latent;
o outputs and i inputs of a matrix W (o,i). Updates are those of zoo.lens.updates, leading dims (B,Q).
"""

from __future__ import annotations

from itertools import pairwise

import torch
from torch import Tensor

from zoo.lens.updates import MATRICES, FactoredMatrix, Part, differences, norms, record, updates
from zoo.models import Model


@torch.no_grad()
def relative_norms(model: Model, tokens: Tensor, n_context: int, part: Part = "total") -> Tensor:
    """|ΔW(context, query) − ΔW(no context, query)| / |W| by layer, matrix (gate, up, down) and query, (L,M,B,Q)."""
    return norms(updates(model, tokens, n_context, part)) / stored_norms(model)[..., None, None]


def stored_norms(model: Model) -> Tensor:
    """|W| of every FFN matrix, (L,M)."""
    ffns = [block.ffn for block in model.decoder.blocks]
    return torch.stack([torch.stack([ffn.weight(name).norm() for name in MATRICES]) for ffn in ffns])


@torch.no_grad()
def increments(model: Model, tokens: Tensor, n_context: int) -> Tensor:
    """|W_{i+1} − W_i| / |W| of all matrices of a layer as one long vector, for i = 0 … n−1: (n,L,B,Q).

    W_i stands for c_1 … c_i at query x, on the stream of its own patched layers: increments have rank 1 in layer 0,
    where the query's reduced state is the one key, and rank 2 in deeper layers, where it moves with i.
    """
    prefixes = [torch.cat([tokens[:, :length], tokens[:, n_context:]], 1) for length in range(n_context + 1)]
    recorded = (record(model, prefix, length) for length, prefix in enumerate(prefixes))
    W = ([layer["total"] for layer in layers] for layers in recorded)
    steps = [norms(differences(new, old)).norm(dim=1) for old, new in pairwise(W)]
    return torch.stack(steps) / stored_norms(model).norm(dim=1)[:, None, None]


def participation_ratio(singular: Tensor) -> Tensor:
    """Effective rank (Σσ²)²/Σσ⁴ (*) of matrices with singular values (*,n), as in Gao et al. 2017 (bioRxiv 214262): n
    equal ones give n; of zero, nan."""
    square = singular.square()
    return square.sum(-1).square() / square.square().sum(-1)


def gram(x: FactoredMatrix, y: FactoredMatrix) -> Tensor:
    """Frobenius inner products of N updates with N' others, (N,N'); leading dims (N) and (N')."""
    return torch.stack([x[n : n + 1].inner(y) for n in range(len(x.u))])


def cosines(x: FactoredMatrix, y: FactoredMatrix) -> Tensor:
    """Cosines of N updates with N' others, (N,N'); nan for an update that is zero."""
    return gram(x, y) / (x.norm()[:, None] * y.norm())


def shared_queries(tokens: Tensor, n_context: int) -> Tensor:
    """Every context with the queries of the first sequence: a grid of contexts × queries, shaped as `tokens`."""
    queries = tokens[:1, n_context:].expand_as(tokens[:, n_context:])
    return torch.cat([tokens[:, :n_context], queries], 1)


def context_share(update: FactoredMatrix) -> Tensor:
    """Share of the variance of updates (B,Q) that lies between contexts, (): 1 if the query does not matter.

    Σ_b Q |mean_q ΔW − mean ΔW|² over Σ_bq |ΔW − mean ΔW|², for a grid as of shared_queries; nan if all are equal up
    to rounding, where the ratio would be noise.
    """
    B, Q = update.u.shape[:2]
    flat = update.each(lambda t: t.flatten(0, 1))
    products = gram(flat, flat).view(B, Q, B, Q)
    of_means = products.mean((1, 3))
    of_mean = B * Q * of_means.mean()
    total, between = torch.einsum("bqbq->", products) - of_mean, Q * of_means.diagonal().sum() - of_mean
    rounding = (100 * torch.finfo(total.dtype).eps) ** 2 * B * Q * update.W.square().sum()
    return (between / total).where(total > rounding, torch.nan)


@torch.no_grad()
def codes(model: Model, tokens: Tensor, n_context: int) -> Tensor:
    """The code of the context in each layer, (L,*,C), * as of its source: (B) for a separate context.

    Raises ValueError for a model without a code.
    """
    context_to_delta = model.decoder.context_to_delta
    if context_to_delta is None or context_to_delta.code is None:
        raise ValueError(f"model.name={model.config.name} has no code: it makes none of its context")
    read: list[Tensor] = []
    with context_to_delta.code.register_forward_hook(lambda module, inputs, output: read.append(output)):
        model(tokens, n_context)
    return torch.stack(read)


def linear_r2(code: Tensor, latent: Tensor, ridge: float = 1e-3) -> float:
    """How well the latent (N,P) is an affine map of the code (N,C): R² on the second half, over all P numbers together,
    after ridge regression on the first, with a penalty of ridge · trace/C of the covariance."""
    half = len(code) // 2
    x, y = code - code[:half].mean(0), latent - latent[:half].mean(0)
    covariance = x[:half].mT @ x[:half]
    penalty = ridge * covariance.diagonal().mean() * torch.eye(len(covariance), dtype=x.dtype, device=x.device)
    missed = y - x @ torch.linalg.pinv(covariance + penalty, hermitian=True) @ (x[:half].mT @ y[:half])
    return 1 - (missed[half:].square().sum() / y[half:].square().sum()).item()
