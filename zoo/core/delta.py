"""The language of weight updates: what a context does to the matrices of one feed-forward network.

Axes: B batch, S chunks, c tokens of a chunk, T tokens, R rank, E blocks (experts), K chosen blocks; o outputs and
i inputs of one linear map with weight W (o,i). `*` stands for the leading dims of the input x without its token axis:
(B) for x (B,T,i), (B,S) for x (B,S,c,i), (B,T) for x (B,T,1,i). One code path serves a weight update per sequence,
per chunk and per token, and no update is ever repeated or formed in a forward pass.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass, field, replace

import torch
import torch.nn.functional as F
from torch import Tensor

from zoo.core.low_rank import low_rank_linear
from zoo.core.transforms import transformed


def _rows(t: Tensor, tokens: Tensor, chunk: int | None) -> Tensor:
    """Values shared by the tokens of a sequence or chunk, (*,...), as one value per token, (B,T,...)."""
    return t.unsqueeze(1).expand(-1, len(tokens), *t.shape[1:]) if chunk is None else t[:, tokens // chunk]


def _tokens(t: Tensor, tokens: Tensor, chunk: int | None) -> Tensor:
    """Values of each token, (*,T,...), picked at `tokens`: (B,T,...)."""
    return t[:, tokens] if chunk is None else t[:, tokens // chunk, tokens % chunk]


def _outer(u: Tensor, v: Tensor) -> Tensor:
    return u.unsqueeze(-1) * v.unsqueeze(-2)


class Delta(ABC):
    """An update ΔW (o×i) of one linear map, described by factors, applied without being formed."""

    @abstractmethod
    def linear(self, W: Tensor, x: Tensor) -> Tensor:
        """(W + ΔW) x for x (*,T,i): (*,T,o)."""

    @abstractmethod
    def dense(self, W: Tensor) -> Tensor:
        """ΔW itself, (*,o,i), for tests and analysis; raises ValueError where it differs from token to token."""

    @abstractmethod
    def per_token(self, tokens: Tensor, chunk: int | None = None) -> Delta:
        """The same update with one matrix for each of `tokens` (T,), leading dims (B,T)."""

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
        """Frobenius norm of ΔW, (*)."""
        return torch.linalg.matrix_norm(self._small(W))

    def svdvals(self, W: Tensor) -> Tensor:
        """Singular values of ΔW in descending order, (*,min(R,o,i)); all others are zero."""
        return torch.linalg.svdvals(self._small(W))

    def __add__(self, other: LowRank) -> Delta:
        return Sum(self, other)


@dataclass(frozen=True)
class LowRank(Delta):
    """ΔW = u vᵀ with u (*,o,R), v (*,i,R); core (*,T,R) masks or gates it token by token."""

    u: Tensor
    v: Tensor
    gate: Tensor | None = None

    def _code(self, x: Tensor) -> Tensor:
        code_TR = x @ self.v
        return code_TR if self.gate is None else code_TR * self.gate

    def extra(self, x: Tensor) -> Tensor:
        """ΔW x alone, (*,T,o)."""
        return self._code(x) @ self.u.mT

    def linear(self, W: Tensor, x: Tensor) -> Tensor:
        lead = x.shape[:-2]
        if not lead or self.u.shape[:-2] != lead or transformed():  # one update for many inputs is not repeated
            return F.linear(x, W) + self.extra(x)
        return low_rank_linear(W, x, self.u, self.v, self.gate)

    def dense(self, W: Tensor) -> Tensor:
        u, v = self.factors(W)
        return u @ v.mT

    def per_token(self, tokens: Tensor, chunk: int | None = None) -> LowRank:
        u, v = _rows(self.u, tokens, chunk), _rows(self.v, tokens, chunk)
        return LowRank(u if self.gate is None else u * _tokens(self.gate, tokens, chunk).unsqueeze(-2), v)

    def factors(self, W: Tensor) -> tuple[Tensor, Tensor]:
        _refuse_gate(self)
        return self.u, self.v

    def __add__(self, other: LowRank) -> Delta:
        _refuse_gate(self)
        _refuse_gate(other)
        if self.u.shape[:-2] != other.u.shape[:-2]:
            return Sum(self, other)  # one update for many others: its factors are not repeated
        return LowRank(torch.cat([self.u, other.u], -1), torch.cat([self.v, other.v], -1))


@dataclass(frozen=True)
class Scale(Delta):
    """W + ΔW = diag(rows) W diag(columns) with rows (*,o), columns (*,i); core (*,T,1): 0 leaves a token out."""

    rows: Tensor
    columns: Tensor
    gate: Tensor | None = None

    def _factor(self, scale: Tensor) -> Tensor:
        scale = scale.unsqueeze(-2)
        return scale if self.gate is None else 1 + self.gate * (scale - 1)

    def linear(self, W: Tensor, x: Tensor) -> Tensor:
        return F.linear(x * self._factor(self.columns), W) * self._factor(self.rows)

    def dense(self, W: Tensor) -> Tensor:
        _refuse_gate(self)
        return W * _outer(self.rows, self.columns) - W

    def norm(self, W: Tensor) -> Tensor:
        # Σ W²(rc−1)² with rc−1 = a + b + ab: exactly 0 for no scaling, and nothing of size (*,o,i) is formed
        _refuse_gate(self)
        wide = torch.promote_types(W.dtype, torch.float32)
        a, b, square = (t.to(wide) for t in (self.rows - 1, self.columns - 1, W.square()))
        rows = (a.square() * square.sum(1)).sum(-1) + (b.square() * square.sum(0)).sum(-1)
        cross = ((a @ square) * (2 * b)).sum(-1) + ((a.square() @ square) * (b.square() + 2 * b)).sum(-1)
        return (rows + cross + ((a @ square) * (2 * b.square())).sum(-1)).clamp(min=0).sqrt()

    def per_token(self, tokens: Tensor, chunk: int | None = None) -> Scale:
        rows, columns = _rows(self.rows, tokens, chunk), _rows(self.columns, tokens, chunk)
        if self.gate is None:
            return Scale(rows, columns)
        gate = _tokens(self.gate, tokens, chunk)
        return Scale(1 + gate * (rows - 1), 1 + gate * (columns - 1))


@dataclass(frozen=True)
class Full(Delta):
    """ΔW = matrix (*,o,i); core (*,T,1) masks or gates it token by token."""

    matrix: Tensor
    gate: Tensor | None = None

    def linear(self, W: Tensor, x: Tensor) -> Tensor:
        extra = x @ self.matrix.mT
        return F.linear(x, W) + (extra if self.gate is None else extra * self.gate)

    def dense(self, W: Tensor) -> Tensor:
        _refuse_gate(self)
        return self.matrix

    def per_token(self, tokens: Tensor, chunk: int | None = None) -> Full:
        matrix = _rows(self.matrix, tokens, chunk)
        return Full(matrix if self.gate is None else matrix * _tokens(self.gate, tokens, chunk).unsqueeze(-1))


@dataclass(frozen=True)
class Replaced(Delta):
    """W + ΔW = matrix (*,o,i), formed and stored in the place of W: its rounding is that of real weights."""

    matrix: Tensor

    def linear(self, W: Tensor, x: Tensor) -> Tensor:
        return x @ self.matrix.mT

    def dense(self, W: Tensor) -> Tensor:
        return self.matrix - W

    def per_token(self, tokens: Tensor, chunk: int | None = None) -> Replaced:
        return Replaced(_rows(self.matrix, tokens, chunk))


@dataclass(frozen=True)
class InputShift(Delta):
    """ΔV = (V shift) aᵀ/|a|² for every matrix V that reads x: a (*,i) is read as a + shift (*,i).

    The implicit weight update of a context (Dherin et al. 2025, arXiv 2507.16003), stored once for all readers.
    """

    a: Tensor
    shift: Tensor

    def apply(self, x: Tensor) -> Tensor:
        """x + shift·(a·x)/|a|² for x (*,T,i): what the patched readers see."""
        a = self.a.unsqueeze(-1)
        return x + (x @ a) / (self.a.square().sum(-1)[..., None, None]) * self.shift.unsqueeze(-2)

    def linear(self, W: Tensor, x: Tensor) -> Tensor:
        return F.linear(self.apply(x), W)

    def factors(self, W: Tensor) -> tuple[Tensor, Tensor]:
        v = self.a / self.a.square().sum(-1, keepdim=True)
        return W @ self.shift.unsqueeze(-1), v.unsqueeze(-1)

    def dense(self, W: Tensor) -> Tensor:
        u, v = self.factors(W)
        return u @ v.mT

    def per_token(self, tokens: Tensor, chunk: int | None = None) -> InputShift:
        return InputShift(_rows(self.a, tokens, chunk), _rows(self.shift, tokens, chunk))


@dataclass(frozen=True)
class Sum(Delta):
    """The sum of an update and a low-rank one whose factors do not join with its own, both relative to the same W."""

    first: Delta
    second: LowRank

    def linear(self, W: Tensor, x: Tensor) -> Tensor:
        return self.first.linear(W, x) + self.second.extra(x)

    def dense(self, W: Tensor) -> Tensor:
        return self.first.dense(W) + self.second.dense(W)

    def per_token(self, tokens: Tensor, chunk: int | None = None) -> Sum:
        return Sum(self.first.per_token(tokens, chunk), self.second.per_token(tokens, chunk))


def _refuse_gate(delta: LowRank | Scale | Full) -> None:
    if delta.gate is not None:
        raise ValueError(f"this {type(delta).__name__} differs from token to token: take delta.at(tokens) first")


@dataclass(frozen=True)
class Routing:
    """A choice among E blocks of hidden units, h ↦ s ∘ h: index and weight (*,T,K), the router's logits (*,T,E)."""

    index: Tensor
    weight: Tensor
    logits: Tensor

    def scales(self, blocks: int) -> Tensor:
        """s by block, (*,T,E): the weight of each chosen block, zero elsewhere."""
        zeros = self.weight.new_zeros(*self.index.shape[:-1], blocks)
        return zeros.scatter_add(-1, self.index, self.weight)

    def expand_to(self, dims: torch.Size) -> Routing:
        """One choice for many tokens as one for each, (*,T) = dims."""
        return Routing(*(t.expand(*dims, -1) for t in (self.index, self.weight, self.logits)))

    def per_token(self, tokens: Tensor, chunk: int | None = None) -> Routing:
        index, weight, logits = (_tokens(t, tokens, chunk) for t in (self.index, self.weight, self.logits))
        return Routing(index.unsqueeze(2), weight.unsqueeze(2), logits.unsqueeze(2))


@dataclass(frozen=True)
class Patch:
    """All that a context does to one feed-forward network, names as its parameters.

    input: a shear of what every reader of the input sees; weights, biases (*,o): per matrix; routing: the blocks used;
    chunk: how many tokens share one update, None for the whole sequence. Weight updates add to the stored W before the
    shear acts on the sum: the dense weight of a reader is (W + ΔW)(I + shift aᵀ/|a|²). counted: which updates (*), or
    choices of blocks (*,T), statistics take in, None for all; not those of empty contexts and places without a token.
    """

    input: InputShift | None = None
    weights: Mapping[str, Delta] = field(default_factory=dict)
    biases: Mapping[str, Tensor] = field(default_factory=dict)
    routing: Routing | None = None
    chunk: int | None = None
    counted: Tensor | None = None

    def per_token(self, tokens: Tensor) -> Patch:
        """One patch for each of `tokens` (T,): leading dims (B,T), chunk 1."""
        return Patch(
            input=self.input and self.input.per_token(tokens, self.chunk),
            weights={name: delta.per_token(tokens, self.chunk) for name, delta in self.weights.items()},
            biases={name: _rows(bias, tokens, self.chunk) for name, bias in self.biases.items()},
            routing=self.routing and self.routing.per_token(tokens, self.chunk),
            chunk=1,
        )

    def with_delta(self, name: str, delta: LowRank) -> Patch:
        """This patch with `delta` added to the update of the matrix `name`."""
        total = self.weights[name] + delta if name in self.weights else delta
        return replace(self, weights={**self.weights, name: total})

    def merged_with(self, other: Patch) -> Patch:
        """This patch and `other`, which holds low-rank updates and biases alone; leading dims broadcast."""
        total = self
        for name, delta in other.weights.items():
            total = total.with_delta(name, delta)  # type: ignore[arg-type]
        biases = {name: total.biases[name] + b if name in total.biases else b for name, b in other.biases.items()}
        return replace(total, biases={**total.biases, **biases})
