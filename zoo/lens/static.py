"""Thought vectors and matrices: one weight update that stands for a context on every query (Mazzawi et al. 2025).

Fitted in closed form on sample queries, layer by layer: the states come from the layers below as they are already
patched, the targets from a pass with the context, so that a layer repairs what the layers below left over.
Source: arXiv 2510.08734; the output side as ridge regression of the remaining residual, and vector and matrix at once,
are ours.

A static patch has leading dims (1). What it is relative to depends on the family: where the update of a query is made
from the separate context alone (hypernetwork on segments, router on the context), the patch contains that update as it
was emitted, and is total: decoder(queries, patches=patch). Else the family goes on emitting what it makes of the
query's own tokens, and the patch comes on top: decoder(queries, added=patch). `answer` knows which.

Axes: N samples (query tokens), B rows, n tokens of the context, T tokens, i inputs and o outputs of a linear map,
r rank, D model, F hidden.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
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


class Moments:
    """The sufficient statistics of samples (a, y) for every form, in a stream: count, Σa, Σy, Σaaᵀ, Σyaᵀ.

    Held as the triangle R of the QR decomposition of the rows [1, a, y], at most 1+i+o of them: RᵀR are the sums, and
    R has the condition number of the samples instead of its square.
    """

    def __init__(self) -> None:
        self.count, self.inputs, self.eps = 0, 0, 0.0
        self.triangle: Tensor | None = None

    def add(self, a: Tensor, y: Tensor) -> None:
        """Takes in the samples a (...,i) and y (...,o)."""
        a_Ni, y_No = a.flatten(0, -2), y.flatten(0, -2)
        rows = torch.cat([torch.ones_like(a_Ni[:, :1]), a_Ni, y_No], -1).double()
        if self.triangle is not None:
            rows = torch.cat([self.triangle, rows])
        self.triangle = torch.linalg.qr(rows, mode="r").R
        self.count, self.inputs, self.eps = self.count + len(a_Ni), a_Ni.shape[1], torch.finfo(a.dtype).eps

    def solve(self, form: Form, ridge: float) -> tuple[LowRank, Tensor]:
        """M = u vᵀ (1,o,i) and b (1,o) with the least Σ|y − M a − b|² + λ|M|², in float64; zero where `form` lacks one.

        λ = ridge · trace(G)/size of the smaller of the Gram matrices G = AAᵀ (i,i) and AᵀA (N,N) of the samples A
        (centred, if there is a bias); both give the same M. ridge = 0: of all best M the smallest. Singular values of
        A that are within the rounding of the samples are left out, so r ≤ min(N, i).
        """
        assert self.triangle is not None
        i = self.inputs
        # the first row holds the means, the others the same samples without them
        rows = self.triangle[1:] if form.bias else self.triangle
        a_Ri, y_Ro = rows[:, 1 : 1 + i], rows[:, 1 + i :]
        left, s, right = torch.linalg.svd(a_Ri, full_matrices=False)
        # the largest singular value of independent errors eps·rms(A); a state is the outcome of several roundings
        noise = self.eps * a_Ri.norm() * (self.count**-0.5 + i**-0.5)
        keep = (s > 10 * noise) & form.matrix
        penalty = ridge * s.square().sum() / max(min(self.count - form.bias, i), 1)
        left, s, v_ir = left[:, keep], s[keep], right[keep].mT
        u_or = y_Ro.mT @ (left * (s / (s.square() + penalty)))
        mean = self.triangle[0, 1:] / self.triangle[0, 0]
        bias_o = (mean[i:] - u_or @ (v_ir.mT @ mean[:i])) * form.bias
        return LowRank(u_or[None], v_ir[None]), bias_o[None]


@torch.no_grad()
def fit(
    decoder: Decoder, batches: Iterable[Tensor], n_context: int, form: str = "affine", ridge: float = 1e-3
) -> list[Patch]:
    """One static patch per layer that stands for the first n_context tokens, which all rows of all batches share.

    batches: tokens (B,T) or (B,T,token_dim), each query token a sample; passed over twice per layer, so that only the
    states of one batch are in memory. form: vector, matrix, affine (both) or output (down alone); ridge: see Moments.
    Equal first tokens of running text have equal states but different targets: let queries start differently.
    Raises ValueError for an unknown form, a negative ridge, no samples, or different contexts.
    """
    what = lookup(form, STATIC_FORMS, "form of a static patch")
    if ridge < 0:
        raise ValueError(f"ridge={ridge} must not be negative")
    patches: list[Patch] = []
    for layer, block in enumerate(decoder.blocks):
        for matrices in (FeedForward.input_matrices, ("down",)) if what.input else (("down",),):
            moments = Moments()
            for tokens in _same_context(batches, n_context):
                patches = patches or _start(decoder, tokens[:1], n_context)
                seen, patch = _states(decoder, tokens, n_context, patches, layer)
                if matrices == ("down",):
                    h_BTF = block.ffn.hidden(seen.z, patch)
                    moments.add(h_BTF, seen.out_ctx - seen.v - block.ffn(seen.z, patch))
                else:
                    moments.add(seen.z, seen.z_ctx - seen.z)
            low_rank, bias = moments.solve(what, ridge)
            patches[layer] = patches[layer].merged_with(_update(block.ffn, matrices, what, low_rank, bias))
    return patches


def answer(decoder: Decoder, queries: Tensor, patches: Sequence[Patch]) -> Tensor:
    """The output (B,T,V) for queries (B,T) or (B,T,token_dim) alone, under static patches of this decoder."""
    return decoder(queries, **{"added" if reads_query(decoder) else "patches": patches})[0]


def reads_query(decoder: Decoder) -> bool:
    """Whether the family makes the update of a query from the query's own tokens too."""
    return decoder.context_to_delta is not None and decoder.context_to_delta.reads_query


@torch.no_grad()
def relative_error(decoder: Decoder, tokens: Tensor, n_context: int, patches: Sequence[Patch]) -> float:
    """Σ|y − y_C|² / Σ|y_C − ȳ_C|² over all query tokens of tokens (B,T): how far the patches are from the context.

    y_C: output with the context, ȳ_C: its mean over queries, y: output on the queries alone under the patches.
    0: as good as the context; 1: as good as the best constant answer, so what moves all queries alike stays near 1.
    """
    contextual = decoder(tokens, n_context)[0][:, n_context:].flatten(0, 1).double()
    patched = answer(decoder, tokens[:, n_context:], patches).flatten(0, 1).double()
    return float((patched - contextual).square().sum() / (contextual - contextual.mean(0)).square().sum())


def first(decoder: Decoder, tokens: Tensor, n_context: int, count: int) -> Tensor:
    """The first `count` samples: query tokens where they are blind to each other, else rows."""
    one_row = decoder.independent_queries and len(tokens) == 1
    available = tokens.shape[1] - n_context if one_row else len(tokens)
    if not 0 < count <= available:
        raise ValueError(f"{count} samples asked for, must lie between 1 and the {available} given")
    return tokens[:, : n_context + count] if one_row else tokens[:count]


def _states(
    decoder: Decoder, tokens: Tensor, n_context: int, patches: Sequence[Patch], layer: int
) -> tuple[LayerStates, Patch]:
    """One layer's states at the queries, where the layers below run under their patches, and what applies in it."""
    seen: list[tuple[LayerStates, Patch]] = []

    def patch_of(states: LayerStates) -> Patch:
        own = patches[states.layer]
        patch = states.emit_without_context().merged_with(own) if reads_query(decoder) else own
        seen.append((states, patch))
        return patch

    replace_context(decoder, tokens, n_context, patch_of, layers=layer + 1)
    return seen[-1]


def _start(decoder: Decoder, tokens: Tensor, n_context: int) -> list[Patch]:
    """The patches before any fit: those that the family emits for the context alone, empty where it reads the query."""
    if reads_query(decoder):
        return [Patch()] * len(decoder.blocks)
    patches = [_whole(patch) for patch in decoder(tokens, n_context)[1]]
    if any(isinstance(delta, LowRank) and delta.gate is not None for p in patches for delta in p.weights.values()):
        raise ValueError("this family weighs its factors token by token: its reads_query must be True")
    return patches


def _whole(emitted: Patch) -> Patch:
    """The update that all queries of one sequence get, without the mask that keeps it off the context's own tokens."""
    routing = emitted.routing
    if routing:
        routing = Routing(routing.index[:, -1:], routing.weight[:, -1:], routing.logits[:, -1:])
    return replace(emitted, routing=routing, served=None, counted=None)


def _update(ffn: FeedForward, matrices: Sequence[str], form: Form, low_rank: LowRank, bias: Tensor) -> Patch:
    """The patch of `matrices` from the map of z to what `z_ctx − z` adds (gate, up), or to the output (down)."""
    weights, biases = {}, {}
    for name in matrices:
        W = ffn.weight(name)
        u, b = (low_rank.u, bias) if name == "down" else (W.double() @ low_rank.u, bias @ W.double().mT)
        if form.matrix:
            weights[name] = LowRank(u.to(W.dtype).contiguous(), low_rank.v.to(W.dtype).contiguous())
        if form.bias:
            biases[name] = b.to(W.dtype).contiguous()
    return Patch(weights=weights, biases=biases)


def _same_context(batches: Iterable[Tensor], n_context: int) -> Iterator[Tensor]:
    """The batches, checked; raises ValueError if they are none, have no queries, or differ in the context."""
    if iter(batches) is batches:
        raise ValueError("batches are passed over several times: give a list, or what starts anew in every loop")
    context = None
    for tokens in batches:
        T = tokens.shape[1]
        if not 0 < n_context < T:
            raise ValueError(f"n_context={n_context} must lie between 1 and {T - 1}: there are {T} tokens")
        context = tokens[:1, :n_context] if context is None else context
        if not (tokens[:, :n_context] == context).all():
            raise ValueError(f"a static patch stands for one context: the first {n_context} tokens differ between rows")
        yield tokens
    if context is None:
        raise ValueError("no batches: a static patch is fitted on at least one sample query")
