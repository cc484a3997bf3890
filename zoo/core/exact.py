"""The law: the total weight update that stands for a context, layer by layer, in every form that is exact.

Patches are total: relative to the stored weights, with the family switched off. Routing is no weight update but a
choice: made by the router that saw the context where gate and up are patched, else by the router that saw the query
alone. After Dherin et al. 2025 (arXiv 2507.16003, one layer) and Goldwaser et al. 2025 (arXiv 2511.17864, gated blocks
and experts). One update for all tokens is fitted in zoo.lens.static.
Axes: B batch, T kept tokens, D model, F hidden units of all blocks; n inputs of one matrix.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import torch
from torch import Tensor

from zoo.config import lookup
from zoo.core.decoder import Decoder, check_tokens
from zoo.core.delta import InputShift, LowRank, Replaced
from zoo.core.layers import FeedForward
from zoo.core.patch import Patch


def exact(
    decoder: Decoder,
    tokens: Tensor,
    removed: Tensor | int,
    form: str = "shear",
    n_context: int | None = None,
    formed: bool = False,
) -> list[Patch]:
    """The total patch of each layer that stands for the tokens marked in `removed` (T,), or the first so many.

    The law: forward(tokens[:, ~removed], patches=exact) equals forward(tokens) at the kept tokens, at the positions
    they had. form: one of EXACT_FORMS; n_context: as in forward, default the number of removed tokens; formed: as
    whole matrices W + ΔW, whose rounding the layers above then make up for. Raises ValueError where no patch exists.
    """
    patch_of = lookup(form, EXACT_FORMS, "form")

    def matrices_of(states: LayerStates) -> Patch:
        patch = patch_of(states)
        weights = {name: Replaced(matrix) for name, matrix in states.ffn.dense(patch).items()}
        return Patch(weights=weights, biases=patch.biases, chunk=patch.chunk)

    return replace_context(decoder, tokens, removed, matrices_of if formed else patch_of, n_context)


def replace_context(
    decoder: Decoder,
    tokens: Tensor,
    removed: Tensor | int,
    patch_of: Callable[[LayerStates], Patch],
    n_context: int | None = None,
) -> list[Patch]:
    """The patches that `patch_of` makes of each layer's states with and without the removed tokens, where the stream
    without them runs through the patches of the layers below. See exact."""
    check_tokens(tokens, n_context or 0)
    if isinstance(removed, int):
        removed = torch.arange(tokens.shape[1], device=tokens.device) < removed
    if removed.shape != tokens.shape[1:2] or removed.dtype != torch.bool or removed.all():
        raise ValueError(
            f"removed must be a boolean mask of {tokens.shape[1]} tokens that keeps at least one; "
            f"got {removed.dtype} of shape {tuple(removed.shape)}, {int(removed.sum())} removed"
        )
    n_context = int(removed.sum()) if n_context is None else n_context
    kept = (~removed).nonzero().squeeze(1)
    n_kept = int((~removed[:n_context]).sum())
    real = decoder.real(tokens)
    kept_real = None if real is None else real[:, kept]
    full = decoder.layout(tokens.shape[1], n_context, tokens.device, real)
    reduced = full.keep(kept)

    def run(layer: int, x_ctx_BTD: Tensor, x_BTD: Tensor) -> tuple[Tensor, Tensor, Patch]:
        block = decoder.blocks[layer]
        seen: dict[str, Any] = {}

        def contextual(v_BTD: Tensor, z_BTD: Tensor) -> Patch:
            seen.update(v_ctx=v_BTD[:, kept], z_ctx=z_BTD[:, kept])
            return decoder.emit(z_BTD, layer, n_context, real=real)

        out_ctx_BTD, emitted = block(x_ctx_BTD, full, contextual)
        seen.update(out_ctx=out_ctx_BTD[:, kept], emitted=emitted.per_token(kept))

        def replaced(v_BTD: Tensor, z_BTD: Tensor) -> Patch:
            emit = partial(decoder.emit, z_BTD, layer, n_kept, real=kept_real)
            return patch_of(LayerStates(layer, block.ffn, v=v_BTD, z=z_BTD, emit_without_context=emit, **seen))

        return out_ctx_BTD, *block(x_BTD, reduced, replaced)

    x_ctx_BTD = decoder.embed(tokens)
    x_BTD, patches = x_ctx_BTD[:, kept], []
    for layer in range(len(decoder.blocks)):
        x_ctx_BTD, x_BTD, patch = run(layer, x_ctx_BTD, x_BTD)
        patches.append(patch)
    return patches


@dataclass(frozen=True)
class LayerStates:
    """One layer's states at the kept tokens, (B,T,D), with the whole context (_ctx) and without what was removed: v
    enters the second half of the block, z = norm2(v) its FFN, out leaves the block. What the family emits with it, one
    patch per token, and what it would emit for the kept tokens alone."""

    layer: int
    ffn: FeedForward
    emitted: Patch
    emit_without_context: Callable[[], Patch]
    v_ctx: Tensor
    z_ctx: Tensor
    out_ctx: Tensor
    v: Tensor
    z: Tensor

    @property
    def alone(self) -> Patch:
        """The choice of blocks, per token, that the kept tokens alone lead to, and no update."""
        routing = self.emit_without_context().routing
        tokens = torch.arange(self.z.shape[1], device=self.z.device)
        return Patch(routing=routing and routing.per_token(tokens), chunk=1)

    def missing(self, patch: Patch) -> Tensor:
        """What the stored `down`, under a patch that leaves it alone, lacks of the contextual output, (B,T,D)."""
        return self.out_ctx - self.v - self.ffn.linear("down", self.ffn.hidden(self.z, patch), Patch())

    def along(self, what: str, state: Tensor) -> Tensor:
        """state/|state|² (*,n), the row of a rank-1 update; raises ValueError, naming `what`, where a state is zero."""
        square = state.square().sum(-1, keepdim=True)
        if not square.all():
            raise ValueError(f"layer {self.layer}: the {what} the FFN are zero for a token, no rank-1 patch exists")
        return state / square


def shear_and_down(states: LayerStates) -> Patch:
    """All matrices: the emitted patch, its input shifted from z to z_ctx, and v_ctx − v, then missing, by `down`."""
    states.along("state before", states.z)
    patch = replace(states.emitted, input=InputShift(states.z, states.z_ctx - states.z))
    return _with_down(states, patch, states.v_ctx - states.v)


def output(states: LayerStates) -> Patch:
    """`down` alone, rank 1: (out_ctx − v − FFN(z)) hᵀ/|h|² with h the hidden units of the query alone."""
    patch = states.alone
    return _with_down(states, patch, states.missing(patch))


def bias(states: LayerStates) -> Patch:
    """A bias of `down` alone, out_ctx − v − FFN(z), a steering vector: what the context adds at this token."""
    patch = states.alone
    return replace(patch, biases={"down": states.missing(patch)})


def _with_down(states: LayerStates, patch: Patch, missing_BTD: Tensor) -> Patch:
    """`patch` and the rank-1 update of `down`, the smallest, that adds what is missing from the block's output."""
    column_BTF = states.along("hidden units of", states.ffn.hidden(states.z, patch))
    return patch.with_delta("down", LowRank(missing_BTD.unsqueeze(-1), column_BTF.unsqueeze(-1)))


EXACT_FORMS: dict[str, Callable[[LayerStates], Patch]] = {"shear": shear_and_down, "output": output, "bias": bias}
