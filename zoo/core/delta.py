"""Updates of one linear map: what a context adds to a matrix, described by factors and applied without being formed.

Axes: B batch, S chunks, c tokens of a chunk, T tokens, R rank; o outputs and i inputs of one linear map with weight
W (o,i). `*` stands for the leading dims of the input x without its token axis: (B) for x (B,T,i), (B,S) for x
(B,S,c,i), (B,T) for x (B,T,1,i). served (*,T,1), where given, is 0 at tokens that keep W, else 1.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor

from zoo.core.low_rank import low_rank_linear, transformed


def rows(t: Tensor, tokens: Tensor, chunk: int | None) -> Tensor:
    """Values shared by the tokens of a sequence or chunk, (*,...), as one value per token, (B,T,...)."""
    return t.unsqueeze(1).expand(-1, len(tokens), *t.shape[1:]) if chunk is None else t[:, tokens // chunk]


def picked(t: Tensor, tokens: Tensor, chunk: int | None) -> Tensor:
    """Values of each token, (*,T,...), picked at `tokens`: (B,T,...)."""
    return t[:, tokens] if chunk is None else t[:, tokens // chunk, tokens % chunk]


class Delta:
    """An update ΔW (o×i) of one linear map; the fields of its kinds have the leading dims *.

    nothing: the fields whose value, where they hold it everywhere, makes ΔW = 0.
    """

    nothing: ClassVar[dict[str, float]]

    def linear(self, W: Tensor, x: Tensor, served: Tensor | None = None) -> Tensor:
        """(W + ΔW) x for x (*,T,i): (*,T,o)."""
        extra = x @ self.dense(W).mT
        return F.linear(x, W) + (extra if served is None else extra * served)

    def dense(self, W: Tensor) -> Tensor:
        """ΔW itself, (*,o,i), for tests and analysis; raises ValueError where it differs from token to token."""
        factors = self.factors(W)
        assert factors is not None, "a kind without factors says what its matrix is"
        return factors[0] @ factors[1].mT

    def per_token(self, tokens: Tensor, chunk: int | None = None, served: Tensor | None = None) -> Delta:
        """The same update with one matrix for each of `tokens` (T,), leading dims (B,T): ΔW = 0 where not served."""
        values = {name: rows(t, tokens, chunk) for name, t in vars(self).items()}
        if served is not None:
            served_BT1 = picked(served, tokens, chunk)
            for name, nothing in self.nothing.items():
                t = values[name]
                wide = served_BT1.view(*served_BT1.shape[:2], *[1] * (t.dim() - 2))
                values[name] = torch.where(wide > 0, t, nothing)
        return type(self)(**values)

    def factors(self, W: Tensor) -> tuple[Tensor, Tensor] | None:
        """u (*,o,R) and v (*,i,R) with ΔW = u vᵀ, or None where no factors smaller than ΔW exist."""
        return None

    def _small(self, W: Tensor) -> Tensor:
        """A matrix with the singular values of ΔW: R×R where there are factors, else ΔW."""
        factors = self.factors(W)
        wide = torch.promote_types(W.dtype, torch.float32)  # no decomposition of bfloat16 exists
        if factors is None:
            return self.dense(W).to(wide)
        u, v = (torch.linalg.qr(factor.to(wide), mode="r").R for factor in factors)
        return u @ v.mT

    def norm(self, W: Tensor) -> Tensor:
        """Frobenius norm of ΔW, (*), or (*,T) where it differs from token to token."""
        return torch.linalg.matrix_norm(self._small(W))

    def svdvals(self, W: Tensor) -> Tensor:
        """Singular values of ΔW in descending order, (*,min(R,o,i)); all others are zero."""
        return torch.linalg.svdvals(self._small(W))

    def __add__(self, other: LowRank) -> Delta:
        return Sum(self, other)


@dataclass(frozen=True)
class LowRank(Delta):
    """ΔW = u diag(g) vᵀ with u (*,o,R), v (*,i,R); gate g (*,T,R): weights of the factors, token by token; None: 1."""

    u: Tensor
    v: Tensor
    gate: Tensor | None = None

    def linear(self, W: Tensor, x: Tensor, served: Tensor | None = None) -> Tensor:
        delta, lead = self.gated(served), x.shape[:-2]
        if not lead or self.u.shape[:-2] != lead or transformed():  # one update for many inputs is not repeated
            return F.linear(x, W) + delta.extra(x)
        return low_rank_linear(W, x, delta.u, delta.v, delta.gate)

    def gated(self, served: Tensor | None) -> LowRank:
        """This update at the tokens that are served, by its gate."""
        if served is None:
            return self
        gate = served.expand(*served.shape[:-1], self.u.shape[-1]) if self.gate is None else self.gate * served
        return LowRank(self.u, self.v, gate)

    def extra(self, x: Tensor) -> Tensor:
        """ΔW x alone, (*,T,o)."""
        code_TR = x @ self.v
        return (code_TR if self.gate is None else code_TR * self.gate) @ self.u.mT

    def factors(self, W: Tensor) -> tuple[Tensor, Tensor]:
        if self.gate is not None:
            raise ValueError("this LowRank differs from token to token: take delta.per_token(tokens) first")
        return self.u, self.v

    def per_token(self, tokens: Tensor, chunk: int | None = None, served: Tensor | None = None) -> LowRank:
        u, v = (rows(factor, tokens, chunk) for factor in (self.u, self.v))
        gate = self.gated(served).gate
        return LowRank(u if gate is None else u * picked(gate, tokens, chunk).unsqueeze(-2), v)

    def norm(self, W: Tensor) -> Tensor:
        if self.gate is None:
            return super().norm(W)
        u, v, gate_TR = (t.to(torch.promote_types(W.dtype, torch.float32)) for t in (self.u, self.v, self.gate))
        return (gate_TR @ ((u.mT @ u) * (v.mT @ v)) * gate_TR).sum(-1).clamp(min=0).sqrt()

    def __add__(self, other: LowRank) -> Delta:
        if self.gate is not None or other.gate is not None or self.u.shape[:-2] != other.u.shape[:-2]:
            return Sum(self, other)  # a gate is of its own factors, and one update for many others is not repeated
        return LowRank(torch.cat([self.u, other.u], -1), torch.cat([self.v, other.v], -1))


@dataclass(frozen=True)
class Scale(Delta):
    """W + ΔW = diag(rows) W diag(columns) with rows (*,o), columns (*,i)."""

    rows: Tensor
    columns: Tensor
    nothing: ClassVar = {"rows": 1.0, "columns": 1.0}

    def linear(self, W: Tensor, x: Tensor, served: Tensor | None = None) -> Tensor:
        rows, columns = (t.unsqueeze(-2) for t in (self.rows, self.columns))
        if served is not None:
            rows, columns = 1 + served * (rows - 1), 1 + served * (columns - 1)
        return F.linear(x * columns, W) * rows

    def dense(self, W: Tensor) -> Tensor:
        return W * (self.rows.unsqueeze(-1) * self.columns.unsqueeze(-2)) - W

    def norm(self, W: Tensor) -> Tensor:
        # Σ W²(rc−1)² with rc−1 = b + ac: exactly 0 for no scaling, and nothing of size (*,o,i) is formed
        wide = torch.promote_types(W.dtype, torch.float32)
        a, b, c, square = (t.to(wide) for t in (self.rows - 1, self.columns - 1, self.columns, W.square()))
        by_column = (a.square() @ square) * c.square() + 2 * (a @ square) * b * c + square.sum(0) * b.square()
        return by_column.sum(-1).clamp(min=0).sqrt()


@dataclass(frozen=True)
class Full(Delta):
    """ΔW = matrix (*,o,i)."""

    matrix: Tensor
    nothing: ClassVar = {"matrix": 0.0}

    def dense(self, W: Tensor) -> Tensor:
        return self.matrix


@dataclass(frozen=True)
class InputShift(Delta):
    """ΔV = (V shift) aᵀ/|a|² for every matrix V that reads x: a (*,i) is read as a + shift (*,i).

    The implicit weight update of a context (Dherin et al. 2025, arXiv 2507.16003), stored once for all of them.
    """

    a: Tensor
    shift: Tensor
    nothing: ClassVar = {"shift": 0.0}

    def apply(self, x: Tensor, served: Tensor | None = None) -> Tensor:
        """x + shift·(a·x)/|a|² for x (*,T,i): what the patched matrices read."""
        share = (x @ self.a.unsqueeze(-1)) / (self.a.square().sum(-1)[..., None, None])
        return x + (share if served is None else share * served) * self.shift.unsqueeze(-2)

    def factors(self, W: Tensor) -> tuple[Tensor, Tensor]:
        v = self.a / self.a.square().sum(-1, keepdim=True)
        return W @ self.shift.unsqueeze(-1), v.unsqueeze(-1)


@dataclass(frozen=True)
class Sum(Delta):
    """The sum of an update and a low-rank one whose factors do not join with its own, both relative to the same W."""

    first: Delta
    second: LowRank

    def linear(self, W: Tensor, x: Tensor, served: Tensor | None = None) -> Tensor:
        return self.first.linear(W, x, served) + self.second.gated(served).extra(x)

    def dense(self, W: Tensor) -> Tensor:
        return self.first.dense(W) + self.second.dense(W)

    def per_token(self, tokens: Tensor, chunk: int | None = None, served: Tensor | None = None) -> Sum:
        return Sum(self.first.per_token(tokens, chunk, served), self.second.per_token(tokens, chunk, served))
