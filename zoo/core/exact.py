"""The law: the total weight update that stands for a context, layer by layer.

Patches are total: relative to the stored weights, with the family switched off. Routing is no weight update but a
choice, made by the router that saw the context. After Dherin et al. 2025 (arXiv 2507.16003, one layer) and Goldwaser et
al. 2025 (arXiv 2511.17864, gated blocks and experts). Other exact forms are in zoo.lens.exact, one update for all
tokens is fitted in zoo.lens.static.
Axes: B batch, T kept tokens, D model, F hidden units of all blocks; n inputs of one matrix.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial, singledispatch
from typing import Any

import torch
from torch import Tensor

from zoo.core.decoder import check_tokens
from zoo.core.delta import InputShift, LowRank
from zoo.core.layers import FeedForward
from zoo.core.patch import Patch


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

    def along(self, what: str, state: Tensor) -> Tensor:
        """state/|state|² (*,n), the row of a rank-1 update; raises ValueError, naming `what`, where a state is zero."""
        square = state.square().sum(-1, keepdim=True)
        if not square.all():
            raise ValueError(f"layer {self.layer}: the {what} the FFN are zero for a token, no rank-1 patch exists")
        return state / square

    def with_down(self, patch: Patch, missing_BTD: Tensor) -> Patch:
        """`patch` and the rank-1 update of `down`, the smallest, that adds what is missing from the block's output."""
        column_BTF = self.along("hidden units of", self.ffn.hidden(self.z, patch))
        rank_1 = LowRank(missing_BTD.unsqueeze(-1), column_BTF.unsqueeze(-1))
        return patch.merged_with(Patch(weights={self.ffn.output_matrix: rank_1}))


def shear_and_down(states: LayerStates) -> Patch:
    """All matrices: the emitted patch, its input shifted from z to z_ctx, and v_ctx − v, then missing, by `down`."""
    states.along("state before", states.z)
    patch = replace(states.emitted, input=InputShift(states.z, states.z_ctx - states.z))
    return states.with_down(patch, states.v_ctx - states.v)


def kept_places(tokens: Tensor, removed: Tensor | int) -> Tensor:
    """The places (K) of the tokens (B,T,…) that are not marked in `removed`; raises ValueError if there are none."""
    if isinstance(removed, int):
        removed = torch.arange(tokens.shape[1], device=tokens.device) < removed
    if removed.shape != tokens.shape[1:2] or removed.dtype != torch.bool or removed.all():
        got = f"got {removed.dtype} of shape {tuple(removed.shape)}, {int(removed.sum())} removed"
        raise ValueError(f"removed must be a boolean mask of {tokens.shape[1]} tokens that keeps at least one; {got}")
    return (~removed).nonzero().squeeze(1)


@singledispatch  # foreign models have passes of their own
def replace_context(
    decoder: Any,
    tokens: Tensor,
    removed: Tensor | int,
    patch_of: Callable[[LayerStates], Patch] = shear_and_down,
    n_context: int | None = None,
) -> list[Patch]:
    """The patch of each layer that stands for the tokens marked in `removed` (T,), or the first so many: what
    `patch_of` makes of the states with and without them, where the stream without them runs through the patches below.

    The law: forward(tokens[:, ~removed], patches=…) equals forward(tokens) at the kept tokens, at the positions they
    had. n_context: as in forward, default the number of removed tokens. Raises ValueError where no patch exists.
    """
    check_tokens(tokens, n_context or 0)
    kept = kept_places(tokens, removed)
    n_context = tokens.shape[1] - len(kept) if n_context is None else n_context
    n_kept = int((kept < n_context).sum())
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
