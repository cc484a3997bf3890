"""Thought vectors and matrices: one weight update that stands for a context on every query (Mazzawi et al. 2025).

Fitted in closed form on sample queries, layer by layer on the stream of the layers already patched. Source: arXiv
2510.08734; the output side, and vector and matrix at once, are ours. Where a family makes its update from the separate
context alone, a static patch contains it and is total; else it is added to what the query's own tokens give: `answer`.

Axes: N samples (query tokens), B rows, n tokens of the context, T tokens, i inputs and o outputs of a linear map,
r rank, D model, F hidden.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import NamedTuple

import torch
from torch import Tensor

from zoo.config import lookup
from zoo.core.decoder import Decoder
from zoo.core.delta import LowRank
from zoo.core.exact import LayerStates, replace_context
from zoo.core.layers import FeedForward
from zoo.core.patch import Patch, Routing
from zoo.lens.exact import for_down, missing


class Form(NamedTuple):
    """input: gate and up are patched before down is; matrix, bias: what each of them gains."""

    input: bool
    matrix: bool
    bias: bool


STATIC_FORMS = {
    "vector": Form(input=True, matrix=False, bias=True),
    "matrix": Form(input=True, matrix=True, bias=False),
    "affine": Form(input=True, matrix=True, bias=True),
    "output": Form(input=False, matrix=True, bias=False),
}


def solve(a: Tensor, y: Tensor, form: Form, ridge: float) -> tuple[LowRank, Tensor]:
    """M = u vᵀ (1,o,i) and b (1,o) with the least Σ|y − M a − b|² + λ|M|² over samples a (...,i) and y (...,o).

    In float64; zero where `form` lacks one. λ = ridge · trace(G)/size of the smaller of the Gram matrices G = AAᵀ (i,i)
    and AᵀA (N,N) of the samples A (centred, if there is a bias); both give the same M. ridge = 0: of all best M the
    smallest. Singular values of A that are within the rounding of the samples are left out, so r ≤ min(N, i).
    """
    a_Ni, y_No = a.flatten(0, -2).double(), y.flatten(0, -2).double()
    N, i = a_Ni.shape
    mean_i, mean_o = a_Ni.mean(0) * form.bias, y_No.mean(0) * form.bias
    left, s, right = torch.linalg.svd(a_Ni - mean_i, full_matrices=False)
    # the largest singular value of independent errors eps·rms(A); a state is the outcome of several roundings
    noise = torch.finfo(a.dtype).eps * s.norm() * (N**-0.5 + i**-0.5)
    keep = (s > 10 * noise) & form.matrix
    penalty = ridge * s.square().sum() / max(min(N - form.bias, i), 1)
    left, s, v_ir = left[:, keep], s[keep], right[keep].mT
    u_or = (y_No - mean_o).mT @ (left * (s / (s.square() + penalty)))
    bias_o = mean_o - u_or @ (v_ir.mT @ mean_i)
    return LowRank(u_or[None], v_ir[None]), bias_o[None]


class Moments:
    """The sums over a stream of samples a (...,i) and y (...,o) from which `solve` has all it needs, in float64."""

    def __init__(self) -> None:
        self.count, self.sums = 0, [torch.zeros(())] * 4

    def add(self, a: Tensor, y: Tensor) -> None:
        a_Ni, y_No = a.flatten(0, -2).double(), y.flatten(0, -2).double()
        self.count += len(a_Ni)
        new = a_Ni.sum(0), y_No.sum(0), a_Ni.mT @ a_Ni, y_No.mT @ a_Ni
        self.sums = [total.to(part.device) + part for total, part in zip(self.sums, new, strict=True)]

    def solve(self, form: Form, ridge: float, null: Tensor | None = None) -> tuple[LowRank, Tensor]:
        """As the function `solve`, for ridge > 0; null (k,i): inputs that M must map to zero."""
        mean_i, mean_o = (total / self.count * form.bias for total in self.sums[:2])
        gram_ii = self.sums[2] - self.count * mean_i.outer(mean_i)
        cross_oi = self.sums[3] - self.count * mean_o.outer(mean_i)
        i = len(gram_ii)
        rounding = (1e-12 / i * self.sums[2].trace()).clamp(min=1e-300)  # all that is left where all samples are equal
        penalty = max(ridge * gram_ii.trace() / max(min(self.count - form.bias, i), 1), rounding)
        if null is not None:
            basis_ki = torch.linalg.svd(null.double(), full_matrices=False).Vh
            gram_ii = gram_ii - basis_ki.mT @ (basis_ki @ gram_ii)
            gram_ii, cross_oi = (t - (t @ basis_ki.mT) @ basis_ki for t in (gram_ii, cross_oi))
        factor_ii = torch.linalg.cholesky(gram_ii + penalty * torch.eye(i).to(gram_ii))
        M_oi = torch.cholesky_solve(cross_oi.mT, factor_ii).mT * form.matrix
        one = torch.eye(min(M_oi.shape)).to(M_oi)
        u_or, v_ir = (M_oi, one) if len(M_oi) >= i else (one, M_oi.mT)
        return LowRank(u_or[None], v_ir[None]), (mean_o - M_oi @ mean_i)[None]


@torch.no_grad()
def fit(decoder: Decoder, tokens: Tensor, n_context: int, form: str = "affine", ridge: float = 1e-3) -> list[Patch]:
    """One static patch per layer that stands for the first n_context tokens, which all rows of `tokens` share.

    tokens: (B,T) or (B,T,token_dim), each query token a sample, so let queries of text start differently; form: vector,
    matrix, affine (both) or output (down alone); ridge: see solve. Patches have leading dims (1). Raises ValueError for
    an unknown form, a negative ridge, no queries, or different contexts.
    """
    what = lookup(form, STATIC_FORMS, "form of a static patch")
    if ridge < 0:
        raise ValueError(f"ridge={ridge} must not be negative")
    T = tokens.shape[1]
    if not 0 < n_context < T:
        raise ValueError(f"n_context={n_context} must lie between 1 and {T - 1}: there are {T} tokens")
    if not (tokens[:, :n_context] == tokens[:1, :n_context]).all():
        raise ValueError(f"a static patch stands for one context: the first {n_context} tokens differ between rows")
    patches = _start(decoder, tokens[:1], n_context)

    def patch_of(states: LayerStates) -> Patch:
        ffn = states.ffn
        patch = states.emit_without_context() if reads_query(decoder) else patches[states.layer]
        output = (ffn.output_matrix,)
        for matrices in (ffn.input_matrices, output) if what.input else (output,):
            a, y = states.z, states.z_ctx - states.z
            if matrices == output:
                a, y = ffn.hidden(states.z, patch), for_down(states, patch, missing(states, patch))
            update = update_of(ffn, matrices, what, *solve(a, y, what, ridge))
            patches[states.layer] = patches[states.layer].merged_with(update)
            patch = patch.merged_with(update)
        return patch

    replace_context(decoder, tokens, n_context, patch_of)
    return patches


def answer(decoder: Decoder, queries: Tensor, patches: Sequence[Patch]) -> Tensor:
    """The output (B,T,V) for queries (B,T) or (B,T,token_dim) alone, under static patches of this decoder."""
    return decoder(queries, **{"added" if reads_query(decoder) else "patches": patches})[0]


def reads_query(decoder: Decoder) -> bool:
    """Whether the family makes the update of a query from the query's own tokens too."""
    return decoder.context_to_delta is not None and decoder.context_to_delta.reads_query


@torch.no_grad()
def relative_error(decoder: Decoder, tokens: Tensor, n_context: int, patches: Sequence[Patch]) -> float:
    """Σ|y − y_C|² / Σ|y_C − ȳ_C|² over all query tokens of tokens (B,T): y under the patches, y_C with the context, ȳ_C
    its mean over queries. 0: as good as the context; 1: as good as the best constant answer."""
    contextual = decoder(tokens, n_context)[0][:, n_context:].flatten(0, 1).double()
    patched = answer(decoder, tokens[:, n_context:], patches).flatten(0, 1).double()
    return float((patched - contextual).square().sum() / (contextual - contextual.mean(0)).square().sum())


def _start(decoder: Decoder, tokens: Tensor, n_context: int) -> list[Patch]:
    """The patches before any fit: those that the family emits for the context alone, empty where it reads the query."""
    if reads_query(decoder):
        return [Patch()] * len(decoder.blocks)
    patches = []
    for emitted in decoder(tokens, n_context)[1]:
        if any(isinstance(delta, LowRank) and delta.gate is not None for delta in emitted.weights.values()):
            raise ValueError("this family weighs its factors token by token: its reads_query must be True")
        # what all queries get, without the mask that keeps it off the context's own tokens
        routing = emitted.routing
        if routing:
            routing = Routing(routing.index[:, -1:], routing.weight[:, -1:], routing.logits[:, -1:])
        patches.append(replace(emitted, routing=routing, served=None, counted=None))
    return patches


def update_of(ffn: FeedForward, matrices: Sequence[str], form: Form, low_rank: LowRank, bias: Tensor) -> Patch:
    """The patch of `matrices` from the map of z to what `z_ctx − z` adds (gate, up), or to the output (down)."""
    weights, biases, stored = {}, {}, ffn.dense(Patch())  # in the type of patches
    for name in matrices:
        W = stored[name]
        u, b = (low_rank.u, bias) if name == ffn.output_matrix else (W.double() @ low_rank.u, bias @ W.double().mT)
        if form.matrix:
            weights[name] = LowRank(u.to(W.dtype).contiguous(), low_rank.v.to(W.dtype).contiguous())
        if form.bias:
            biases[name] = b.to(W.dtype).contiguous()
    return Patch(weights=weights, biases=biases)
