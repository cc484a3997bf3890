"""The law: the total weight update that stands for a context, layer by layer, in every form that is exact.

    form            what it changes                                 one for      no patch where
    shear           gate, up (one input shift), down                each token   a state or the hidden units are zero
    output          down                                            each token   the hidden units are zero
    bias            a bias of down: a steering vector               each token   never
    static          gate, up, down                                  all tokens   states or hidden units are dependent
    static_output   down                                            all tokens   hidden units are dependent

Patches are total: relative to the stored weights, with the family switched off. shear contains the weight updates that
the family emitted with the context; the other forms absorb them: they are what the stored weights lack. Routing is no
weight update but a choice, made per token in every form: by the router that saw the context where gate and up are
patched, by the router that did not (the query alone) where only the output is.

A patch fits the arithmetic it is made in: where its factors act beside W, or, if `formed`, where W + ΔW is multiplied.
Each layer then makes up for the rounding of those below, so that the error does not grow with depth; patches used in
another arithmetic, or made in parallel, drift as any two float computations of a deep network do.

A change of the norm's scale, z_ctx/z entry by entry, is exact for one block but is no form here: its largest entries
magnify rounding at every layer. After Dherin et al. 2025 (arXiv 2507.16003, one layer) and Goldwaser et al. 2025 (arXiv
2511.17864, gated blocks and experts).
Axes: B batch, T kept tokens, D model, F hidden units of all blocks; o outputs and i inputs of one matrix.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from dataclasses import dataclass, replace

import torch
import torch.nn.functional as F
from torch import Tensor

from zoo.config import lookup
from zoo.core.decoder import Decoder, check_tokens
from zoo.core.delta import InputShift, LowRank, Replaced
from zoo.core.layers import FeedForward
from zoo.core.patch import Patch, Routing


def deltas(decoder: Decoder, tokens: Tensor, removed: Tensor | int, n_context: int | None = None) -> list[Patch]:
    """The total patch of each layer, per kept token, that stands for the tokens marked in `removed` (T,), or the first.

    The law: forward(tokens[:, ~removed], patches=deltas) equals forward(tokens) at the kept tokens, when the kept
    tokens keep their positions. n_context: as in forward, default the number of removed tokens. Each query token
    is patched on the stream that the patched layers below produced (Dherin et al. 2025, arXiv 2507.16003, and
    Goldwaser et al. 2025, arXiv 2511.17864, for gated blocks), so errors do not accumulate with depth.
    Raises ValueError where no patch exists: a zero state or zero hidden units.
    """
    return replace_context(decoder, tokens, removed, shear_and_down, n_context)


def replace_context(
    decoder: Decoder,
    tokens: Tensor,
    removed: Tensor | int,
    patch_of: Callable[[LayerStates], Patch],
    n_context: int | None = None,
    parallel: bool = False,
    layers: int | None = None,
) -> list[Patch]:
    """The patches that `patch_of` makes, layer by layer, from the states with and without `removed` tokens, marked
    (T,) or so many at the start; of the first `layers` layers, None for all.

    The stream without them runs through the patches of the layers below; parallel: through none, it starts from the
    contextual stream at every layer, which is the same where patches are exact, up to rounding that grows with
    depth. n_context: as in forward, default the number of removed tokens. Raises ValueError if nothing is kept.
    """
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
    full = decoder.layout(tokens.shape[1], n_context, tokens.device, real)
    reduced = full.keep(kept)
    x_ctx_BTD = decoder.embed(tokens)
    x_BTD = x_ctx_BTD[:, kept]
    patches = []
    kept_real = None if real is None else real[:, kept]

    def run(x_ctx_BTD: Tensor, x_BTD: Tensor, layer: int) -> tuple[Tensor, Tensor, Patch]:
        block = decoder.blocks[layer]
        v_ctx_BTD, z_ctx_BTD, out_ctx_BTD, emitted = block.states(
            x_ctx_BTD, full, lambda z: decoder.emit(z, layer, n_context, real=real)
        )

        def replaced(v_BTD: Tensor, z_BTD: Tensor) -> Patch:
            pair = LayerStates(
                layer=layer,
                ffn=block.ffn,
                emit_with_context=functools.partial(emitted.per_token, kept),
                emit_without_context=functools.partial(decoder.emit, z_BTD, layer, n_kept, real=kept_real),
                v_ctx=v_ctx_BTD[:, kept],
                z_ctx=z_ctx_BTD[:, kept],
                out_ctx=out_ctx_BTD[:, kept],
                v=v_BTD,
                z=z_BTD,
            )
            return patch_of(pair)

        return out_ctx_BTD, *block(x_BTD, reduced, replaced)

    for layer in range(len(decoder.blocks) if layers is None else layers):
        x_ctx_BTD, x_BTD, patch = run(x_ctx_BTD, x_ctx_BTD[:, kept] if parallel else x_BTD, layer)
        patches.append(patch)
    return patches


@dataclass(frozen=True)
class LayerStates:
    """One layer's states at the kept tokens, (B,T,D), with the whole context (_ctx) and without what was removed.

    v enters the second half of the block, z = norm2(v) its FFN, out leaves the block.
    emit_without_context(): what the family emits without what was removed, as it comes.
    """

    layer: int
    ffn: FeedForward
    emit_with_context: Callable[[], Patch]
    emit_without_context: Callable[[], Patch]
    v_ctx: Tensor
    z_ctx: Tensor
    out_ctx: Tensor
    v: Tensor
    z: Tensor

    @functools.cached_property
    def emitted(self) -> Patch:
        """The family's patch with the whole context, one per token."""
        return self.emit_with_context()

    def along(self, what: str, state: Tensor) -> Tensor:
        """state/|state|² (*,n), the row of a rank-1 update; raises ValueError, naming `what`, where a state is zero."""
        square = state.square().sum(-1, keepdim=True)
        if not square.all():
            raise ValueError(f"layer {self.layer}: the {what} the FFN are zero for a token, no rank-1 patch exists")
        return state / square


def shear_and_down(pair: LayerStates) -> Patch:
    """The emitted patch, its input shifted from z to z_ctx, and the missing residual as a rank-1 update of `down`."""
    pair.along("state before", pair.z)
    patch = replace(pair.emitted, input=InputShift(pair.z, pair.z_ctx - pair.z))
    h_BTF = pair.ffn.hidden(pair.z, patch)
    residual = LowRank((pair.v_ctx - pair.v).unsqueeze(-1), pair.along("hidden units of", h_BTF).unsqueeze(-1))
    return patch.with_delta("down", residual)


def exact(
    decoder: Decoder,
    tokens: Tensor,
    removed: Tensor,
    form: str = "shear",
    parallel: bool = False,
    n_context: int | None = None,
    formed: bool = False,
) -> list[Patch]:
    """One patch per layer under which the kept tokens (B,T) alone give the decoder's output with `removed` ones (T,).

    form: see the table above; formed: as whole matrices W + ΔW, one per token or sequence; other arguments as in
    replace_context. Raises ValueError, with the layer, where no exact patch of this form exists, and for an
    unknown form.
    """
    patch_of = lookup(form, EXACT_FORMS, "form")

    def matrices_of(pair: LayerStates) -> Patch:
        patch = patch_of(pair)
        shared = patch.routing if patch.chunk is None else None  # many tokens, a choice of blocks for each
        W = pair.ffn.dense(replace(patch, routing=None) if shared else patch)
        weights = {name: Replaced(matrix) for name, matrix in W.items()}
        return Patch(weights=weights, biases=patch.biases, routing=shared, chunk=patch.chunk)

    return replace_context(decoder, tokens, removed, matrices_of if formed else patch_of, n_context, parallel)


def output(pair: LayerStates) -> Patch:
    """`down` alone, rank 1: (out_ctx − v − FFN(z)) hᵀ/|h|² with h the hidden units of the query alone."""
    patch = Patch(routing=_routing_alone(pair), chunk=1)
    h_BTF = pair.ffn.hidden(pair.z, patch)
    along_BTF = pair.along("hidden units of", h_BTF)
    return patch.with_delta("down", LowRank(_missing(pair, h_BTF).unsqueeze(-1), along_BTF.unsqueeze(-1)))


def bias(pair: LayerStates) -> Patch:
    """A bias of `down` alone, out_ctx − v − FFN(z): what the context adds to the stream at this token."""
    patch = Patch(routing=_routing_alone(pair), chunk=1)
    return replace(patch, biases={"down": _missing(pair, pair.ffn.hidden(pair.z, patch))})


def static(pair: LayerStates) -> Patch:
    """The smallest updates of gate, up and down that serve all T tokens of a sequence: at most D of them."""
    patch = Patch(routing=_shared(pair.emitted.routing))
    inverse_BDT = _inverse(pair, "states before", pair.z)
    for name in pair.ffn.input_matrices:
        W, delta = pair.ffn.weight(name), pair.emitted.weights.get(name)
        z_ctx_BT1D = pair.z_ctx.unsqueeze(2)
        read_BT1o = F.linear(z_ctx_BT1D, W) if delta is None else delta.linear(W, z_ctx_BT1D)
        patch = patch.with_delta(name, LowRank((read_BT1o.squeeze(2) - F.linear(pair.z, W)).mT, inverse_BDT))
    return _static_down(pair, patch)


def static_output(pair: LayerStates) -> Patch:
    """The smallest update of `down` alone that serves all T tokens: at most F, fewer where few experts run."""
    return _static_down(pair, Patch(routing=_shared(_routing_alone(pair))))


EXACT_FORMS: dict[str, Callable[[LayerStates], Patch]] = {
    "shear": shear_and_down,
    "output": output,
    "bias": bias,
    "static": static,
    "static_output": static_output,
}


def _static_down(pair: LayerStates, patch: Patch) -> Patch:
    h_BTF = pair.ffn.hidden(pair.z, patch)
    return patch.with_delta("down", LowRank(_missing(pair, h_BTF).mT, _inverse(pair, "hidden units of", h_BTF)))


def _missing(pair: LayerStates, h_BTF: Tensor) -> Tensor:
    """The residual that the stored `down` leaves between hidden units h and the contextual output, (B,T,D)."""
    return pair.out_ctx - pair.v - F.linear(h_BTF, pair.ffn.weight("down"))


def _routing_alone(pair: LayerStates) -> Routing | None:
    """The choice of blocks, per token, that the kept tokens alone lead to."""
    if pair.emitted.routing is None:
        return None
    return pair.emit_without_context().per_token(torch.arange(pair.z.shape[1], device=pair.z.device)).routing


def _shared(routing: Routing | None) -> Routing | None:
    """A routing (B,T,1,K) of single tokens as that of a sequence, (B,T,K)."""
    return routing and Routing(*(t.squeeze(2) for t in (routing.index, routing.weight, routing.logits)))


def _inverse(pair: LayerStates, what: str, state_BTn: Tensor) -> Tensor:
    """X⁺ (B,n,T) for states as rows of X: R ↦ RᵀX⁺ᵀ is the smallest matrix that maps each row of X to that of R.

    Raises ValueError where no matrix maps them independently: more than n tokens, or dependent ones. States are taken
    as dependent below a ratio √ε of their singular values, where less than half of the digits would be exact.
    """
    _, tokens, size = state_BTn.shape
    if tokens > size:
        raise ValueError(
            f"layer {pair.layer}: {tokens} tokens are more than the {size} {what} the FFN can tell apart: one static "
            f"patch serves at most {size} here; {INSTEAD}"
        )
    pair.along(what, state_BTn)
    states = state_BTn.to(torch.promote_types(state_BTn.dtype, torch.float32))
    u_BTT, s_BT, vh_BTn = torch.linalg.svd(states, full_matrices=False)
    rank_B = (s_BT > torch.finfo(state_BTn.dtype).eps ** 0.5 * s_BT[:, :1]).sum(-1)
    if (rank_B < tokens).any():
        raise ValueError(
            f"layer {pair.layer}: the {what} the FFN of {tokens} tokens have rank {int(rank_B.min())} in "
            f"{state_BTn.dtype} (row {int(rank_B.argmin())}): one static patch cannot tell them apart; equal tokens at "
            f"the start of a query have equal states: keep one token of the context; else {INSTEAD}"
        )
    return ((u_BTT / s_BT.unsqueeze(1)) @ vh_BTn).mT.to(state_BTn.dtype)


INSTEAD = "use a form with one patch per token (shear, output, bias), or a fit by ridge regression (zoo.lens.static)"
