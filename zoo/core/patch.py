"""The change of one feed-forward network by a context: updates of its matrices and biases, and a choice of blocks.

Axes: B batch, T tokens, D model, E blocks (experts), K chosen blocks; o outputs of one matrix; `*` the leading dims of
an update, see zoo.core.delta.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace

from torch import Tensor

from zoo.core.delta import Delta, InputShift, picked, rows


@dataclass(frozen=True)
class Routing:
    """A choice among E blocks of hidden units, h ↦ s ∘ h: index and weight (*,T,K), the router's logits (*,T,E)."""

    index: Tensor
    weight: Tensor
    logits: Tensor

    def scales(self, blocks: int) -> Tensor:
        """s by block, (*,T,E): the weight of each chosen block, zero elsewhere."""
        return self.weight.new_zeros(*self.index.shape[:-1], blocks).scatter_add(-1, self.index, self.weight)

    def per_token(self, tokens: Tensor, chunk: int | None = None) -> Routing:
        return Routing(*(picked(t, tokens, chunk).unsqueeze(2) for t in (self.index, self.weight, self.logits)))


@dataclass(frozen=True)
class Patch:
    """All changes of one feed-forward network by a context, names as its parameters.

    input: a shift of what gate and up read, whose dense weight is then (W + ΔW)(I + shift aᵀ/|a|²); weights, biases
    (*,o): per matrix; routing: the blocks used; chunk: how many tokens share one update, None for the whole sequence;
    served (*,T,1): 0 at tokens that input, weights and biases leave alone, None for none. counted: which updates (*),
    or choices of blocks (*,T), statistics take in, None for all: not empty contexts and places without a token.
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
        where = tokens, self.chunk, self.served
        served_BT1 = 1 if self.served is None else picked(self.served, tokens, self.chunk)
        return Patch(
            input=self.input and self.input.per_token(*where),  # type: ignore[arg-type]
            weights={name: delta.per_token(*where) for name, delta in self.weights.items()},
            biases={name: rows(bias, tokens, self.chunk) * served_BT1 for name, bias in self.biases.items()},
            routing=self.routing and self.routing.per_token(tokens, self.chunk),
            chunk=1,
        )

    def merged_with(self, other: Patch) -> Patch:
        """This patch and `other`, which holds low-rank updates and biases alone; leading dims broadcast. Raises
        ValueError unless this one serves all tokens."""
        if self.served is not None:
            raise ValueError("this patch does not serve the tokens of the context: pass the queries alone to add to it")
        weights, biases = dict(self.weights), dict(self.biases)
        for name, delta in other.weights.items():
            weights[name] = weights[name] + delta if name in weights else delta  # type: ignore[operator]
        for name, bias in other.biases.items():
            biases[name] = biases[name] + bias if name in biases else bias
        return replace(self, weights=weights, biases=biases)
