"""Every exact form of the update that stands for a context: zoo.core.exact has the first, here are the others.

A form that leaves gate and up alone takes the choice of blocks of the router that saw the query alone.
Axes: B batch, T kept tokens, D model; `*` leading dims of the update, see zoo.core.delta; o outputs and i inputs.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import singledispatch

import torch
from torch import Tensor

from zoo.config import lookup
from zoo.core.decoder import Decoder
from zoo.core.delta import Delta
from zoo.core.exact import LayerStates, replace_context, shear_and_down
from zoo.core.patch import Patch


def exact(
    decoder: Decoder,
    tokens: Tensor,
    removed: Tensor | int,
    form: str = "shear",
    n_context: int | None = None,
    formed: bool = False,
) -> list[Patch]:
    """The total patch of each layer that stands for the removed tokens, see replace_context.

    form: one of EXACT_FORMS; formed: as whole matrices W + ΔW, whose rounding the layers above then make up for. Raises
    ValueError for an unknown form, and where no patch exists.
    """
    patch_of = lookup(form, EXACT_FORMS, "form")

    def matrices_of(states: LayerStates) -> Patch:
        patch = patch_of(states)
        weights = {name: Replaced(matrix) for name, matrix in states.ffn.dense(patch).items()}
        return Patch(weights=weights, biases=patch.biases, chunk=patch.chunk)

    return replace_context(decoder, tokens, removed, matrices_of if formed else patch_of, n_context)


@dataclass(frozen=True)
class Replaced(Delta):
    """W + ΔW = matrix (*,o,i), formed and stored in the place of W: its rounding is that of real weights."""

    matrix: Tensor

    def linear(self, W: Tensor, x: Tensor, served: Tensor | None = None) -> Tensor:
        assert served is None, "a formed matrix serves all tokens"
        return x @ self.matrix.mT

    def dense(self, W: Tensor) -> Tensor:
        return self.matrix - W


def output(states: LayerStates) -> Patch:
    """`down` alone, rank 1: (out_ctx − v − FFN(z)) hᵀ/|h|² with h the hidden units of the query alone."""
    patch = _alone(states)
    return states.with_down(patch, missing(states, patch))


def bias(states: LayerStates) -> Patch:
    """A bias of `down` alone, out_ctx − v − FFN(z), a steering vector: what the context adds at this token."""
    patch = _alone(states)
    more_BTD = missing(states, patch)
    steered = replace(patch, biases={states.ffn.output_matrix: for_down(states, patch, more_BTD)})
    return rescaled(states, steered, states.ffn(states.z, patch) + more_BTD)


def missing(states: LayerStates, patch: Patch) -> Tensor:
    """What the block's output lacks of the contextual one under `patch`, (B,T,D)."""
    return states.out_ctx - states.v - states.ffn(states.z, patch)


@singledispatch  # a norm behind the FFN, as foreign models have, asks for more of the next two
def for_down(states: LayerStates, patch: Patch, missing_BTD: Tensor) -> Tensor:
    """What the output matrix must give more, (B,T,D), so that the block's output gains what is missing from it."""
    return missing_BTD


@singledispatch
def rescaled(states: LayerStates, patch: Patch, goal_BTD: Tensor) -> Patch:
    """`patch` with what it takes beyond matrices and biases for the FFN to give `goal`."""
    return patch


def _alone(states: LayerStates) -> Patch:
    """The choice of blocks, per token, that the kept tokens alone lead to, and no update."""
    routing = states.emit_without_context().routing
    tokens = torch.arange(states.z.shape[1], device=states.z.device)
    return Patch(routing=routing and routing.per_token(tokens), chunk=1)


EXACT_FORMS: dict[str, Callable[[LayerStates], Patch]] = {"shear": shear_and_down, "output": output, "bias": bias}
