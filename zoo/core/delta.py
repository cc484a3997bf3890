"""Updates of one linear map: what a context adds to a matrix, described by factors and applied without being formed.

Axes: B batch, S chunks, c tokens of a chunk, T tokens, R rank; o outputs and i inputs of one linear map with weight
W (o,i). `*` stands for the leading dims of the input x without its token axis: (B) for x (B,T,i), (B,S) for x
(B,S,c,i), (B,T) for x (B,T,1,i). One code path serves an update per sequence, per chunk and per token, and no update is
ever repeated or formed in a forward pass. served (*,T,1), where given, is 0 at tokens that keep W, else 1.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass, fields

import torch
import torch.nn.functional as F
from torch import Tensor

from zoo.core.low_rank import low_rank_linear
from zoo.core.transforms import transformed


def rows(t: Tensor, tokens: Tensor, chunk: int | None) -> Tensor:
    """Values shared by the tokens of a sequence or chunk, (*,...), as one value per token, (B,T,...)."""
    return t.unsqueeze(1).expand(-1, len(tokens), *t.shape[1:]) if chunk is None else t[:, tokens // chunk]


def picked(t: Tensor, tokens: Tensor, chunk: int | None) -> Tensor:
    """Values of each token, (*,T,...), picked at `tokens`: (B,T,...)."""
    return t[:, tokens] if chunk is None else t[:, tokens // chunk, tokens % chunk]


class Delta(ABC):
    """An update ΔW (o×i) of one linear map; the fields of its kinds have the leading dims *."""

    @abstractmethod
    def linear(self, W: Tensor, x: Tensor, served: Tensor | None = None) -> Tensor:
        """(W + ΔW) x for x (*,T,i): (*,T,o)."""

    @abstractmethod
    def dense(self, W: Tensor) -> Tensor:
        """ΔW itself, (*,o,i), for tests and analysis; raises ValueError where it differs from token to token."""

    def masked(self, served: Tensor) -> Delta:
        """This update times 1 or 0, served (*)."""
        raise ValueError(f"{type(self).__name__} serves all tokens or none")

    def per_token(self, tokens: Tensor, chunk: int | None = None, served: Tensor | None = None) -> Delta:
        """The same update with one matrix for each of `tokens` (T,), leading dims (B,T)."""
        values = {field.name: getattr(self, field.name) for field in fields(self)}  # type: ignore[arg-type]
        each = type(self)(**{name: rows(t, tokens, chunk) for name, t in values.items() if t is not None})
        return each if served is None else each.masked(picked(served, tokens, chunk)[..., 0])

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
        gate, lead = self.gate, x.shape[:-2]
        if served is not None:
            gate = served.expand(*served.shape[:-1], self.u.shape[-1]) if gate is None else gate * served
        if not lead or self.u.shape[:-2] != lead or transformed():  # one update for many inputs is not repeated
            return F.linear(x, W) + LowRank(self.u, self.v, gate).extra(x)
        return low_rank_linear(W, x, self.u, self.v, gate)

    def extra(self, x: Tensor) -> Tensor:
        """ΔW x alone, (*,T,o)."""
        code_TR = x @ self.v
        return (code_TR if self.gate is None else code_TR * self.gate) @ self.u.mT

    def dense(self, W: Tensor) -> Tensor:
        u, v = self.factors(W)
        return u @ v.mT

    def masked(self, served: Tensor) -> LowRank:
        return LowRank(self.u * served[..., None, None], self.v, self.gate)

    def per_token(self, tokens: Tensor, chunk: int | None = None, served: Tensor | None = None) -> Delta:
        if self.gate is None:
            return super().per_token(tokens, chunk, served)
        gate_BTR = picked(self.gate if served is None else self.gate * served, tokens, chunk)
        return LowRank(rows(self.u, tokens, chunk) * gate_BTR.unsqueeze(-2), rows(self.v, tokens, chunk))

    def factors(self, W: Tensor) -> tuple[Tensor, Tensor]:
        if self.gate is not None:
            raise ValueError("this LowRank differs from token to token: take delta.per_token(tokens) first")
        return self.u, self.v

    def norm(self, W: Tensor) -> Tensor:
        if self.gate is None:
            return super().norm(W)
        wide = torch.promote_types(W.dtype, torch.float32)
        u, v, gate_TR = (t.to(wide) for t in (self.u, self.v, self.gate))
        return (((gate_TR @ ((u.mT @ u) * (v.mT @ v))) * gate_TR).sum(-1)).clamp(min=0).sqrt()

    def __add__(self, other: LowRank) -> Delta:
        if self.u.shape[:-2] != other.u.shape[:-2]:
            return Sum(self, other)  # one update for many others: its factors are not repeated
        gates = [delta.gate for delta in (self, other) if delta.gate is not None]
        gate = None
        if gates:
            ones = [gates[0].new_ones(*gates[0].shape[:-1], delta.u.shape[-1]) for delta in (self, other)]
            gate = torch.cat(
                [one if d.gate is None else d.gate for d, one in zip((self, other), ones, strict=True)], -1
            )
        return LowRank(torch.cat([self.u, other.u], -1), torch.cat([self.v, other.v], -1), gate)


@dataclass(frozen=True)
class Scale(Delta):
    """W + ΔW = diag(rows) W diag(columns) with rows (*,o), columns (*,i)."""

    rows: Tensor
    columns: Tensor

    def linear(self, W: Tensor, x: Tensor, served: Tensor | None = None) -> Tensor:
        rows, columns = (t.unsqueeze(-2) for t in (self.rows, self.columns))
        if served is not None:
            rows, columns = 1 + served * (rows - 1), 1 + served * (columns - 1)
        return F.linear(x * columns, W) * rows

    def dense(self, W: Tensor) -> Tensor:
        return W * (self.rows.unsqueeze(-1) * self.columns.unsqueeze(-2)) - W

    def masked(self, served: Tensor) -> Scale:
        served = served.unsqueeze(-1)
        return Scale(1 + served * (self.rows - 1), 1 + served * (self.columns - 1))

    def norm(self, W: Tensor) -> Tensor:
        # Σ W²(rc−1)² with rc−1 = a + b + ab: exactly 0 for no scaling, and nothing of size (*,o,i) is formed
        wide = torch.promote_types(W.dtype, torch.float32)
        a, b, square = (t.to(wide) for t in (self.rows - 1, self.columns - 1, W.square()))
        total = (a.square() * square.sum(1)).sum(-1) + (b.square() * square.sum(0)).sum(-1)
        cross = ((a @ square) * (2 * b)).sum(-1) + ((a.square() @ square) * (b.square() + 2 * b)).sum(-1)
        return (total + cross + ((a @ square) * (2 * b.square())).sum(-1)).clamp(min=0).sqrt()


@dataclass(frozen=True)
class Full(Delta):
    """ΔW = matrix (*,o,i)."""

    matrix: Tensor

    def linear(self, W: Tensor, x: Tensor, served: Tensor | None = None) -> Tensor:
        extra = x @ self.matrix.mT
        return F.linear(x, W) + (extra if served is None else extra * served)

    def dense(self, W: Tensor) -> Tensor:
        return self.matrix

    def masked(self, served: Tensor) -> Full:
        return Full(self.matrix * served[..., None, None])


@dataclass(frozen=True)
class Replaced(Delta):
    """W + ΔW = matrix (*,o,i), formed and stored in the place of W: its rounding is that of real weights."""

    matrix: Tensor

    def linear(self, W: Tensor, x: Tensor, served: Tensor | None = None) -> Tensor:
        y = x @ self.matrix.mT
        return y if served is None else torch.where(served > 0, y, F.linear(x, W))

    def dense(self, W: Tensor) -> Tensor:
        return self.matrix - W


@dataclass(frozen=True)
class InputShift(Delta):
    """ΔV = (V shift) aᵀ/|a|² for every matrix V that reads x: a (*,i) is read as a + shift (*,i).

    The implicit weight update of a context (Dherin et al. 2025, arXiv 2507.16003), stored once for all of them.
    """

    a: Tensor
    shift: Tensor

    def apply(self, x: Tensor, served: Tensor | None = None) -> Tensor:
        """x + shift·(a·x)/|a|² for x (*,T,i): what the patched matrices read."""
        a = self.a.unsqueeze(-1)
        share = (x @ a) / (self.a.square().sum(-1)[..., None, None])
        return x + (share if served is None else share * served) * self.shift.unsqueeze(-2)

    def linear(self, W: Tensor, x: Tensor, served: Tensor | None = None) -> Tensor:
        return F.linear(self.apply(x, served), W)

    def factors(self, W: Tensor) -> tuple[Tensor, Tensor]:
        v = self.a / self.a.square().sum(-1, keepdim=True)
        return W @ self.shift.unsqueeze(-1), v.unsqueeze(-1)

    def dense(self, W: Tensor) -> Tensor:
        u, v = self.factors(W)
        return u @ v.mT

    def masked(self, served: Tensor) -> InputShift:
        return InputShift(self.a, self.shift * served.unsqueeze(-1))


@dataclass(frozen=True)
class Sum(Delta):
    """The sum of an update and a low-rank one whose factors do not join with its own, both relative to the same W."""

    first: Delta
    second: LowRank

    def linear(self, W: Tensor, x: Tensor, served: Tensor | None = None) -> Tensor:
        extra = self.second.extra(x)
        return self.first.linear(W, x, served) + (extra if served is None else extra * served)

    def dense(self, W: Tensor) -> Tensor:
        return self.first.dense(W) + self.second.dense(W)

    def per_token(self, tokens: Tensor, chunk: int | None = None, served: Tensor | None = None) -> Delta:
        first, second = (delta.per_token(tokens, chunk, served) for delta in (self.first, self.second))
        return Sum(first, second)  # type: ignore[arg-type]


@dataclass(frozen=True)
class Masked(Delta):
    """`delta` at the tokens marked in tokens_served (*,T,1), no update at the others."""

    delta: Delta
    tokens_served: Tensor

    def linear(self, W: Tensor, x: Tensor, served: Tensor | None = None) -> Tensor:
        return self.delta.linear(W, x, self.tokens_served if served is None else self.tokens_served * served)

    def dense(self, W: Tensor) -> Tensor:
        raise ValueError("this update does not serve all tokens: take delta.per_token(tokens) first")

    def per_token(self, tokens: Tensor, chunk: int | None = None, served: Tensor | None = None) -> Delta:
        own = self.tokens_served if served is None else self.tokens_served * served
        return self.delta.per_token(tokens, chunk, own)
