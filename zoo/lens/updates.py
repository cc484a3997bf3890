"""The patched matrices of a model as vectors: differences, inner products and norms, from factors alone.

Axes: B batch, T tokens, Q query tokens, R rank, P pairs of scalings; o outputs and i inputs of a matrix W (o,i); `*`
any leading dims, (B,Q) for what `record` gives. Nothing of size (*,o,i) is formed, except where a family emits ΔW in
full, a matrix per token from the start: that is a product of rank i.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor

from zoo.core.delta import Delta, Full, LowRank, Scale, Sum
from zoo.core.exact import LayerStates, replace_context, shear_and_down
from zoo.core.layers import FeedForward
from zoo.core.patch import Patch
from zoo.models import Model

MATRICES = (*FeedForward.input_matrices, "down")
Part = Literal["total", "emitted"]
PARTS: tuple[Part, ...] = ("total", "emitted")
"""total: what stands for the whole context; emitted: what the family itself emits, without the part of attention."""


@dataclass(frozen=True)
class FactoredMatrix:
    """W∘(rows columnsᵀ) + u vᵀ: rows (*,o,P), columns (*,i,P), u (*,o,R), v (*,i,R).

    rows columnsᵀ scales W entry by entry, a routing scales the hidden units that `down` reads.
    """

    W: Tensor
    rows: Tensor
    columns: Tensor
    u: Tensor
    v: Tensor

    def each(self, f: Callable[[Tensor], Tensor]) -> FactoredMatrix:
        """f, which acts on leading dims alone, applied to every tensor but W."""
        return FactoredMatrix(self.W, f(self.rows), f(self.columns), f(self.u), f(self.v))

    def __getitem__(self, index: object) -> FactoredMatrix:
        return self.each(lambda t: t[index])  # type: ignore[index]

    def __sub__(self, other: FactoredMatrix) -> FactoredMatrix:
        """The difference of two matrices, as differences of factors: exactly 0 between equals."""
        if not torch.equal(self.W, other.W):
            raise ValueError("the patched matrices have different stored W: only those of one model have a difference")
        rows, columns = _difference(self.rows, self.columns, other.rows, other.columns)
        return FactoredMatrix(self.W, rows, columns, *_difference(self.u, self.v, other.u, other.v))

    def apply(self, x: Tensor) -> Tensor:
        """The products with the rows of x (*,n,i): (*,n,o)."""
        return (x @ self.v) @ self.u.mT + self._scaled(x)

    def dense(self) -> Tensor:
        """The matrix itself, (*,o,i)."""
        return self.W * (self.rows @ self.columns.mT) + self.u @ self.v.mT

    def inner(self, other: FactoredMatrix) -> Tensor:
        """Frobenius inner product (*), leading dims broadcast."""
        total = (self.apply(other.v.mT) * other.u.mT).sum((-2, -1))
        total = total + (other._scaled(self.v.mT) * self.u.mT).sum((-2, -1))
        rows, columns = _products(self.rows, other.rows), _products(self.columns, other.columns)
        return total + (torch.einsum("...op,oi->...ip", rows, self.W * other.W) * columns).sum((-2, -1))

    def norm(self) -> Tensor:
        """Frobenius norm (*)."""
        return self.inner(self).clamp(min=0).sqrt()

    def svdvals(self) -> Tensor:
        """Singular values, descending, (*,n); without scalings n is at most R and all others are zero.

        A scaling of W has no small factors: there one matrix after the other is formed and decomposed.
        """
        if not self.rows.shape[-1]:
            return LowRank(self.u, self.v).svdvals(self.W)
        lead = self.u.shape[:-2]
        flat = self.each(lambda t: t.flatten(0, len(lead) - 1))
        return torch.stack([torch.linalg.svdvals(flat[n].dense()) for n in range(lead.numel())]).unflatten(0, lead)

    def _scaled(self, x: Tensor) -> Tensor:
        """The part of W alone, applied to x."""
        y = x.new_zeros(())
        for row, column in zip(self.rows.unbind(-1), self.columns.unbind(-1), strict=True):
            y = y + F.linear(x * column.unsqueeze(-2), self.W) * row.unsqueeze(-2)
        return y


Matrices = dict[str, FactoredMatrix]
"""By name, those of one layer."""


def _difference(a: Tensor, b: Tensor, c: Tensor, d: Tensor) -> tuple[Tensor, Tensor]:
    """a bᵀ − c dᵀ as (a − c) bᵀ + c (b − d)ᵀ: small where both are close, and empty where they are equal."""
    width = max(a.shape[-1], c.shape[-1])
    a, b, c, d = (F.pad(t, (0, width - t.shape[-1])) for t in (a, b, c, d))
    left, right = torch.cat([a - c, c], -1), torch.cat([b, b - d], -1)
    used = left.flatten(0, -2).any(0) & right.flatten(0, -2).any(0)
    return left[..., used], right[..., used]


def _products(a: Tensor, b: Tensor) -> Tensor:
    """Every column of a (*,n,P) times every column of b (*,n,P'), entry by entry: (*,n,P·P')."""
    return (a.unsqueeze(-1) * b.unsqueeze(-2)).flatten(-2)


def patched(ffn: FeedForward, patch: Patch, name: str, lead: torch.Size) -> FactoredMatrix:
    """The matrix `name` under `patch`, W + ΔW, with leading dims `lead`; patch: one matrix per token.

    The shear acts on the sum of W and the emitted update; a routing scales the columns of `down`.
    """
    W = ffn.weight(name)
    o, i = W.shape
    rows, columns = W.new_ones(*lead, o, 1), W.new_ones(*lead, i, 1)
    u, v = W.new_zeros(*lead, o, 0), W.new_zeros(*lead, i, 0)
    for delta in terms(patch.weights.get(name)):
        if isinstance(delta, Scale):
            rows, columns = delta.rows.expand(*lead, o).unsqueeze(-1), delta.columns.expand(*lead, i).unsqueeze(-1)
            continue
        # a matrix is its own product with the unit matrix
        new = (delta.matrix, torch.eye(i).to(W)) if isinstance(delta, Full) else delta.factors(W)
        assert new is not None
        u, v = (torch.cat([t, f.expand(*lead, -1, -1)], -1) for t, f in zip((u, v), new, strict=True))
    matrix = FactoredMatrix(W, rows, columns, u, v)
    if patch.input and name in ffn.input_matrices:  # A (I + shift aᵀ/|a|²) for the matrix A so far
        u = matrix.apply(patch.input.shift.unsqueeze(-2)).mT
        _, v = patch.input.factors(W)
        matrix = replace(matrix, u=torch.cat([matrix.u, u], -1), v=torch.cat([matrix.v, v], -1))
    if patch.routing and name == "down":
        s = patch.routing.scales(ffn.blocks).squeeze(-2).repeat_interleave(ffn.hidden_per_block, -1).unsqueeze(-1)
        matrix = replace(matrix, columns=matrix.columns * s, v=matrix.v * s)
    return matrix


def terms(delta: Delta | None) -> list[Delta]:
    """The terms of a sum from the first to the last, an update that is none alone, nothing for None."""
    if isinstance(delta, Sum):
        return [*terms(delta.first), delta.second]
    return [] if delta is None else [delta]


@torch.no_grad()
def record(model: Model, tokens: Tensor, n_context: int) -> list[dict[Part, Matrices]]:
    """By layer, what the first n_context tokens make of the matrices for each of the others, the queries: W + ΔW with
    leading dims (B,Q). Raises ValueError as zoo.core.exact.exact does."""
    layers: list[dict[Part, Matrices]] = []

    def patch_of(states: LayerStates) -> Patch:
        def matrices(patch: Patch) -> Matrices:
            return {name: patched(states.ffn, patch, name, states.z.shape[:-1]) for name in MATRICES}

        total = shear_and_down(states)
        layers.append({"total": matrices(total), "emitted": matrices(states.emitted)})
        return total

    replace_context(model.decoder, tokens, n_context, patch_of, n_context)
    return layers


@torch.no_grad()
def updates(model: Model, tokens: Tensor, n_context: int, part: Part = "total") -> list[Matrices]:
    """By layer and matrix, ΔW(context, query) − ΔW(no context, query), leading dims (B,Q): what the context does."""
    layers, alone = record(model, tokens, n_context), record(model, tokens[:, n_context:], 0)
    return differences([layer[part] for layer in layers], [layer["emitted"] for layer in alone])


def differences(new: Sequence[Matrices], old: Sequence[Matrices]) -> list[Matrices]:
    """new − old, layer by layer and matrix by matrix."""
    return [{name: a[name] - b[name] for name in MATRICES} for a, b in zip(new, old, strict=True)]


def norms(layers: Sequence[Matrices]) -> Tensor:
    """Frobenius norms by layer and matrix, (L,M,*)."""
    return torch.stack([torch.stack([matrices[name].norm() for name in MATRICES]) for matrices in layers])
