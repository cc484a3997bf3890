"""Exact patches: every form of weight update that stands for a context, one per token or one for a whole query.

    form            what it changes                                 one for      no patch where
    shear           gate, up (one shear), down                      each token   a state or the hidden units are zero
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

A change of the norm's scale, zC/z entry by entry, is exact for one block but is no form here: its largest entries
magnify rounding at every layer. After Dherin et al. 2025 (arXiv 2507.16003, one layer) and Goldwaser et al. 2025 (arXiv
2511.17864, gated blocks and experts).
Axes: B batch, T kept tokens, D model, F hidden units of all blocks; o outputs and i inputs of one matrix.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import torch
import torch.nn.functional as F
from torch import Tensor

from zoo.config import lookup
from zoo.core.decoder import Decoder, Pair, shear_and_down
from zoo.core.delta import Formed, LowRank, Patch, Routing


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
    Decoder.replace_context. Raises ValueError, with the layer, where no exact patch of this form exists, and for an
    unknown form.
    """
    patch_of = lookup(form, FORMS, "form")

    def matrices_of(pair: Pair) -> Patch:
        patch = patch_of(pair)
        shared = patch.routing if patch.chunk is None else None  # many tokens, a choice of blocks for each
        W = pair.ffn.dense(replace(patch, routing=None) if shared else patch)
        weights = {name: Formed(matrix) for name, matrix in W.items()}
        return Patch(weights=weights, biases=patch.biases, routing=shared, chunk=patch.chunk)

    return decoder.replace_context(tokens, removed, matrices_of if formed else patch_of, n_context, parallel)


def output(pair: Pair) -> Patch:
    """`down` alone, rank 1: (outC − v − FFN(z)) hᵀ/|h|² with h the hidden units of the query alone."""
    patch = Patch(routing=_routing_alone(pair), chunk=1)
    h_BTF = pair.ffn.hidden(pair.z, patch)
    along_BTF = pair.along("hidden units of", h_BTF)
    return patch.add("down", LowRank(_missing(pair, h_BTF).unsqueeze(-1), along_BTF.unsqueeze(-1)))


def bias(pair: Pair) -> Patch:
    """A bias of `down` alone, outC − v − FFN(z): what the context adds to the stream at this token."""
    patch = Patch(routing=_routing_alone(pair), chunk=1)
    return replace(patch, biases={"down": _missing(pair, pair.ffn.hidden(pair.z, patch))})


def static(pair: Pair) -> Patch:
    """The smallest updates of gate, up and down that serve all T tokens of a sequence: at most D of them."""
    patch = Patch(routing=_shared(pair.emitted.routing))
    inverse_BDT = _inverse(pair, "states before", pair.z)
    for name in pair.ffn.readers:
        W, delta = pair.ffn.weight(name), pair.emitted.weights.get(name)
        zC_BT1D = pair.zC.unsqueeze(2)
        read_BT1o = F.linear(zC_BT1D, W) if delta is None else delta.linear(W, zC_BT1D)
        patch = patch.add(name, LowRank((read_BT1o.squeeze(2) - F.linear(pair.z, W)).mT, inverse_BDT))
    return _static_down(pair, patch)


def static_output(pair: Pair) -> Patch:
    """The smallest update of `down` alone that serves all T tokens: at most F, fewer where few experts run."""
    return _static_down(pair, Patch(routing=_shared(_routing_alone(pair))))


FORMS: dict[str, Callable[[Pair], Patch]] = {
    "shear": shear_and_down,
    "output": output,
    "bias": bias,
    "static": static,
    "static_output": static_output,
}


def _static_down(pair: Pair, patch: Patch) -> Patch:
    h_BTF = pair.ffn.hidden(pair.z, patch)
    return patch.add("down", LowRank(_missing(pair, h_BTF).mT, _inverse(pair, "hidden units of", h_BTF)))


def _missing(pair: Pair, h_BTF: Tensor) -> Tensor:
    """What the stored `down` leaves between hidden units h and the contextual output, (B,T,D)."""
    return pair.outC - pair.v - F.linear(h_BTF, pair.ffn.weight("down"))


def _routing_alone(pair: Pair) -> Routing | None:
    """The choice of blocks, per token, that the kept tokens alone lead to."""
    if pair.emitted.routing is None:
        return None
    return pair.alone().at(torch.arange(pair.z.shape[1], device=pair.z.device)).routing


def _shared(routing: Routing | None) -> Routing | None:
    """A routing (B,T,1,K) of single tokens as that of a sequence, (B,T,K)."""
    return routing and Routing(*(t.squeeze(2) for t in (routing.index, routing.weight, routing.logits)))


def _inverse(pair: Pair, what: str, state_BTn: Tensor) -> Tensor:
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
