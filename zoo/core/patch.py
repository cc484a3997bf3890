"""The change of one feed-forward network by a context: updates of its matrices and biases, and a choice of blocks.

Axes: B batch, T tokens, D model, E blocks (experts), K chosen blocks; o outputs of one matrix; `*` the leading dims of
an update, see zoo.core.delta.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace

import torch
from torch import Tensor

from zoo.core.delta import Delta, InputShift, LowRank, Masked, picked, rows


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
        index, weight, logits = (picked(t, tokens, chunk) for t in (self.index, self.weight, self.logits))
        return Routing(index.unsqueeze(2), weight.unsqueeze(2), logits.unsqueeze(2))


@dataclass(frozen=True)
class Patch:
    """All changes of one feed-forward network by a context, names as its parameters.

    input: a shift of what every matrix that reads the input sees; weights, biases (*,o): per matrix; routing: the
    blocks used; chunk: how many tokens share one update, None for the whole sequence; served (*,T,1): 0 at tokens that
    input, weights and biases leave alone, None for none. Weight updates add to the stored W before the input shift acts
    on the sum: the dense weight of a matrix that reads the input is (W + ΔW)(I + shift aᵀ/|a|²). counted: which updates
    (*), or choices of blocks (*,T), statistics take in, None for all; not those of empty contexts and places without a
    token.
    """

    input: InputShift | None = None
    weights: Mapping[str, Delta] = field(default_factory=dict)
    biases: Mapping[str, Tensor] = field(default_factory=dict)
    routing: Routing | None = None
    chunk: int | None = None
    served: Tensor | None = None
    counted: Tensor | None = None

    def per_token(self, tokens: Tensor) -> Patch:
        """One patch for each of `tokens` (T,), all of them served: leading dims (B,T), chunk 1."""
        biases = {name: rows(bias, tokens, self.chunk) for name, bias in self.biases.items()}
        if self.served is not None:
            served_BT1 = picked(self.served, tokens, self.chunk)
            biases = {name: bias * served_BT1 for name, bias in biases.items()}
        shift = self.input and self.input.per_token(tokens, self.chunk, self.served)
        return Patch(
            input=shift,  # type: ignore[arg-type]
            weights={name: delta.per_token(tokens, self.chunk, self.served) for name, delta in self.weights.items()},
            biases=biases,
            routing=self.routing and self.routing.per_token(tokens, self.chunk),
            chunk=1,
        )

    def with_delta(self, name: str, delta: LowRank) -> Patch:
        """This patch, which serves all tokens, with `delta` added to the update of the matrix `name`."""
        total = self.weights[name] + delta if name in self.weights else delta
        return replace(self, weights={**self.weights, name: total})

    def merged_with(self, other: Patch) -> Patch:
        """This patch and `other`, which holds low-rank updates and biases alone, for all tokens; leading dims
        broadcast. Raises ValueError for a bias or input shift of this patch that does not serve all tokens."""
        total = self
        if self.served is not None:
            if self.biases or self.input:
                raise ValueError("a patch that does not serve all tokens is added to in its weights alone")
            weights = {name: Masked(delta, self.served) for name, delta in self.weights.items()}
            total = replace(self, weights=weights, served=None)
        for name, delta in other.weights.items():
            total = total.with_delta(name, delta)  # type: ignore[arg-type]
        biases = {name: total.biases[name] + b if name in total.biases else b for name, b in other.biases.items()}
        return replace(total, biases={**total.biases, **biases})
