"""What the weight updates of a model look like: size, rank, alignment, and how much the query matters.

Axes: B contexts, Q queries, L layers, M matrices, N updates or codes, C code, P numbers of a latent, V outputs; o
outputs and i inputs of a matrix W (o,i). Updates are those of zoo.lens.updates: factors with leading dims, here (B,Q).
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from zoo.lens.updates import MATRICES, PARTS, Matrix, changes, record
from zoo.models import Model
from zoo.models.hypernet import HypernetDelta
from zoo.tasks import Batch


class Norms(NamedTuple):
    """Frobenius norms: total and emitted (L,M,B,Q) of the update that the context makes, weights (L,M) of stored W."""

    total: Tensor
    emitted: Tensor
    weights: Tensor

    def relative(self) -> Norms:
        """Updates in units of |W|."""
        weights = self.weights[:, :, None, None]
        return Norms(self.total / weights, self.emitted / weights, self.weights)


@torch.no_grad()
def norms(model: Model, tokens: Tensor, n_context: int) -> Norms:
    """The size of ΔW(context, query) − ΔW(no context, query), by layer, matrix (gate, up, down), sequence and query."""
    layers, alone = record(model, tokens, n_context), record(model, tokens[:, n_context:], 0)
    total, emitted = (
        torch.stack(
            [torch.stack([change[name].norm() for name in MATRICES]) for change in changes(layers, alone, part)]
        )
        for part in PARTS
    )
    ffns = [block.ffn for block in model.decoder.blocks]
    weights = [torch.stack([torch.linalg.matrix_norm(ffn.weight(name)) for name in MATRICES]) for ffn in ffns]
    return Norms(total, emitted, torch.stack(weights))


def participation_ratio(singular: Tensor) -> Tensor:
    """Effective rank (Σσ²)²/Σσ⁴ (*) of matrices with singular values (*,n): n equal ones give n; of zero, nan.

    The participation ratio of the squared singular values (Gao et al. 2017, bioRxiv 214262).
    """
    square = singular.square()
    return square.sum(-1).square() / square.square().sum(-1)


def gram(x: Matrix, y: Matrix) -> Tensor:
    """Frobenius inner products of N updates with N' others, (N,N'); leading dims (N) and (N')."""
    return torch.stack([x[n : n + 1].inner(y) for n in range(x.u.shape[0])])


def cosines(x: Matrix, y: Matrix) -> Tensor:
    """Cosines of N updates with N' others, (N,N'); nan for an update that is zero.

    x[b] against itself aligns the queries of a context, x[:, q] the contexts of a query. Updates of two models have to
    have equal shapes, and mean something only where hidden units correspond, as in models from the same start:
    otherwise compare their effects.
    """
    return gram(x, y) / (x.norm()[:, None] * y.norm())


def shared_queries(tokens: Tensor, n_context: int) -> Tensor:
    """Every context with the queries of the first sequence: a grid of contexts × queries, shaped as `tokens`."""
    queries = tokens[:1, n_context:].expand_as(tokens[:, n_context:])
    return torch.cat([tokens[:, :n_context], queries], 1)


def context_share(update: Matrix) -> Tensor:
    """Share of the variance of updates (B,Q) that lies between contexts, (): 1 if the query does not matter.

    Σ_b Q |mean_q ΔW − mean ΔW|² over Σ_bq |ΔW − mean ΔW|², for a grid as of shared_queries; nan if all are equal up
    to rounding.
    """
    B, Q = update.u.shape[:2]
    flat = update.each(lambda t: t.flatten(0, 1))
    products = gram(flat, flat).view(B, Q, B, Q)
    squares = torch.einsum("bqbq->", products)
    of_means = products.mean((1, 3))
    of_mean = of_means.mean()
    total = squares - B * Q * of_mean
    between = Q * of_means.diagonal().sum() - B * Q * of_mean
    return _unless_rounding(between, total, B * Q * update.W.square().sum())


def _unless_rounding(part: Tensor, whole: Tensor, scale: Tensor) -> Tensor:
    """part/whole of sums of squares; nan where the whole is rounding beside `scale`, and the ratio would be noise."""
    return (part / whole).where(whole > (100 * torch.finfo(scale.dtype).eps) ** 2 * scale, torch.nan)


@torch.no_grad()
def effect(model: Model, tokens: Tensor, n_context: int) -> Tensor:
    """What the context does to the output at the queries, (B,Q,V): outputs, or log-probabilities of token ids."""
    kept = torch.arange(tokens.shape[1], device=tokens.device) >= n_context
    positions = model.decoder.layout(tokens.shape[1], n_context, tokens.device).positions[kept]
    outputs = model(tokens, n_context)[:, kept], model(tokens[:, kept], positions=positions)
    if model.task.vocabulary:
        outputs = outputs[0].log_softmax(-1), outputs[1].log_softmax(-1)
    return outputs[0] - outputs[1]


@torch.no_grad()
def codes(model: Model, tokens: Tensor, n_context: int) -> Tensor:
    """The hypernetwork's code in each layer, (L,*,C), * as of its context source: (B) for a separate context.

    Raises ValueError for a model without a code.
    """
    context_to_delta = model.decoder.context_to_delta
    if not isinstance(context_to_delta, HypernetDelta):
        raise ValueError(f"model.name={model.config.name} has no code: only a hypernetwork makes one of its context")
    read: list[Tensor] = []
    hook = context_to_delta.generator.code_norm.register_forward_hook(
        lambda module, inputs, output: read.append(output)
    )
    try:
        model(tokens, n_context)
    finally:
        hook.remove()
    return torch.stack(read)


def linear_weights(batch: Batch) -> Tensor:
    """w (B,d) of y = w·x by least squares from the context pairs of a regression batch: the latent of linear tasks.

    Raises ValueError for a batch of token ids and for fewer pairs than dimensions.
    """
    pairs = batch.tokens[:, : batch.n_context]
    if not pairs.is_floating_point() or batch.n_context < pairs.shape[-1] - 1:
        raise ValueError(f"no weights follow from {batch.n_context} context tokens of shape {tuple(pairs.shape[2:])}")
    return torch.linalg.lstsq(pairs[..., :-1], pairs[..., -1:]).solution.squeeze(-1)


class Decoding(NamedTuple):
    """Held-out R² of a linear map, and of one fitted to latents that were shuffled among contexts: at most about 0."""

    r2: float
    shuffled: float


def linear_decoding(code: Tensor, latent: Tensor, ridge: float = 1e-3, seed: int = 0) -> Decoding:
    """How well an affine map reads the latent (N,P) off the code (N,C): ridge on the first half, R² on the second.

    R² is over all P numbers together, against their mean in the first half. The penalty is ridge · trace/C of the
    covariance. Random layers mix enough for a code to tell something: compare with an untrained model. Raises
    ValueError for fewer than 4 contexts.
    """
    if len(code) != len(latent) or len(code) < 4:
        raise ValueError(f"{len(code)} codes and {len(latent)} latents: as many of both are needed, at least 4")
    half = len(code) // 2
    order = torch.randperm(len(latent), generator=torch.Generator().manual_seed(seed)).to(latent.device)

    def r2(y: Tensor) -> float:
        x, y = code - code[:half].mean(0), y - y[:half].mean(0)
        covariance = x[:half].mT @ x[:half]
        penalty = ridge * covariance.diagonal().mean() * torch.eye(len(covariance), dtype=x.dtype, device=x.device)
        missed = y - x @ torch.linalg.pinv(covariance + penalty, hermitian=True) @ (x[:half].mT @ y[:half])
        return 1 - (missed[half:].square().sum() / y[half:].square().sum()).item()

    return Decoding(r2(latent), r2(latent[order]))


@torch.no_grad()
def context_gap(model: Model, batch: Batch) -> Tensor:
    """Error with another sequence's context minus error with the right one, per prediction, in its units.

    Raises ValueError for a task that reports no error with a wrong context.
    """
    main_metric = model.task.main_metric
    values = model.task.evaluate(lambda tokens, n: model(tokens, n), batch)
    if f"{main_metric}_wrong_context" not in values:
        raise ValueError(
            f"task.name={model.task.config.name} reports no {main_metric}_wrong_context: {', '.join(values)}"
        )
    return values[f"{main_metric}_wrong_context"] - values[main_metric]
