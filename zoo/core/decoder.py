"""The decoder that all families share, and the total weight update that stands for a context in any of them.

Axes: B batch, T tokens, V vocabulary, D model, F hidden, E blocks.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import partial

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from zoo.core.cache import Past, check_past
from zoo.core.context import ContextToDelta
from zoo.core.delta import LowRank, Patch, Shear
from zoo.core.layers import FILLING, Block, FeedForward, Layout
from zoo.core.norm import RMSNorm


class Decoder(nn.Module):
    """Pre-norm decoder: embed, L blocks of attention and FFN, norm, unembed; optionally a seat that patches the FFNs.

    vocabulary: number of token ids, or None for continuous tokens of `token_dim` numbers. independent_queries: tokens
    after the context all stand at the same position and do not see each other. attend_context: they see the context.
    filled: ids may be FILLING, which is left out of attention, means and statistics.
    activation_checkpointing, an attribute: what a layer needs for its gradient is computed anew in the backward pass of
    training, not kept (Chen et al. 2016, arXiv 1604.06174).
    """

    context_to_delta: ContextToDelta | None
    activation_checkpointing: bool = False

    def __init__(
        self,
        *,
        dim: int,
        layers: int,
        heads: int,
        kv_heads: int,
        hidden: int,
        output_dim: int,
        vocabulary: int | None = None,
        token_dim: int | None = None,
        tied: bool = False,
        independent_queries: bool = False,
        attend_context: bool = True,
        filled: bool = False,
        blocks: int = 1,
        backend: str = "auto",
        theta: float = 10000.0,
        eps: float = 1e-6,
    ):
        super().__init__()
        self.context_to_delta = None
        self.independent_queries, self.attend_context, self.filled = independent_queries, attend_context, filled
        if (vocabulary is None) == (token_dim is None):
            raise ValueError(f"vocabulary={vocabulary}, token_dim={token_dim}: tokens are either ids or continuous")
        self.embedding = nn.Embedding(vocabulary, dim) if vocabulary else nn.Linear(token_dim or 0, dim, bias=False)
        ffns = (FeedForward(dim, hidden, blocks, backend) for _ in range(layers))
        self.blocks: Sequence[Block] = nn.ModuleList(  # type: ignore[assignment]
            Block(dim, heads, kv_heads, theta, eps, ffn) for ffn in ffns
        )
        self.norm = RMSNorm(dim, eps)
        self.head = nn.Linear(dim, output_dim, bias=False)
        if tied:
            self.head.weight = self.embedding.weight
        self.initialise()

    @torch.no_grad()
    def initialise(self) -> None:
        """Normal weights of std 1/√fan_in; matrices that write to the residual stream a further 1/√(2L) smaller."""
        for name, parameter in self.named_parameters():
            if parameter.dim() == 1:
                continue
            fan_in = parameter.shape[1]
            if name.endswith("ffn.down"):
                fan_in = self.blocks[0].ffn.hidden_per_block
            writes = name.endswith(("ffn.down", "attention.o.weight"))
            parameter.normal_(std=(fan_in * (2 * len(self.blocks) if writes else 1)) ** -0.5)

    def real(self, tokens: Tensor) -> Tensor | None:
        """(B,T) which places hold a token, None where all do."""
        return tokens != FILLING if self.filled else None

    def layout(
        self, tokens: int, n_context: int, device: torch.device | None = None, real: Tensor | None = None
    ) -> Layout:
        """Positions and mask of `tokens` tokens, the first n_context of which are a separate context; real (B,T)."""
        index_T = torch.arange(tokens, device=device)
        if real is None and not self.independent_queries and (self.attend_context or not n_context):
            return Layout(index_T, None)
        query, key = index_T[:, None], index_T[None, :]
        mask_TT = key <= query
        if self.independent_queries:
            mask_TT = mask_TT & ((key < n_context) | (key == query))
            index_T = index_T.clamp(max=n_context)
        if not self.attend_context:
            mask_TT = mask_TT & ((query < n_context) | (key >= n_context))
        if real is None:
            return Layout(index_T, mask_TT)
        # a place sees itself: a softmax over nothing is no number
        return Layout(index_T, (mask_TT & real[:, None] | (key == query))[:, None])

    def embed(self, tokens: Tensor) -> Tensor:
        if tokens.is_floating_point():
            return self.embedding(tokens.to(self.head.weight.dtype))
        return self.embedding(tokens.clamp(min=0) if self.filled else tokens)

    def unembed(self, x_BTD: Tensor) -> Tensor:
        return self.head(self.norm(x_BTD))

    def emit(
        self, z_BTD: Tensor, layer: int, n_context: int, past: Past | None = None, real: Tensor | None = None
    ) -> Patch:
        """The patch that the family itself emits; empty for the transformer."""
        if self.context_to_delta is None:
            return Patch()
        more = {name: value for name, value in (("past", past), ("real", real)) if value is not None}
        return self.context_to_delta(z_BTD, layer, n_context, **more)

    def new_past(self) -> list[Past]:
        """What forward fills with the first tokens and extends with each further one."""
        return [Past() for _ in self.blocks]

    def forward(
        self,
        tokens: Tensor,
        n_context: int = 0,
        patches: Sequence[Patch] | None = None,
        positions: Tensor | None = None,
        added: Sequence[Patch] | None = None,
        past: Sequence[Past] | None = None,
    ) -> tuple[Tensor, list[Patch]]:
        """Output (B,T,V) for tokens (B,T) or (B,T,token_dim), and the patch that each layer used.

        n_context: how many leading tokens are a separate context. patches: one per layer, total: nothing else is
        emitted. added: one per layer, weights and biases on top of what the family emits. positions (T,): where the
        tokens stand; default as if nothing but `past` came before. past: from new_past(), changed in place: the first
        call passes all tokens there are, each further one the next token (B,1), and gets its output alone.
        """
        check_tokens(tokens, n_context)
        real = self.real(tokens) if past is None else None
        layout = self.layout(tokens.shape[1], n_context, tokens.device, real)
        if past is not None:
            if self.independent_queries:
                raise ValueError("a past needs tokens in sequence, but the queries of this task are independent")
            check_past(past, len(self.blocks), tokens.shape[1], n_context)
            layout = replace(layout, positions=past[0].tokens + layout.positions)
        if positions is not None:
            layout = replace(layout, positions=positions)
        for given in (patches, added):
            if given is not None and len(given) != len(self.blocks):
                raise ValueError(f"{len(given)} patches for {len(self.blocks)} layers: pass one patch per layer")

        def run(x_BTD: Tensor, layer: int) -> tuple[Tensor, Patch]:
            kept = None if past is None else past[layer]

            def patch_of(v_BTD: Tensor, z_BTD: Tensor) -> Patch:
                patch = self.emit(z_BTD, layer, n_context, kept, real) if patches is None else patches[layer]
                return patch if added is None else patch.plus(added[layer])

            x_BTD, patch = self.blocks[layer](x_BTD, layout, patch_of, kept)
            if kept is not None:
                kept.tokens += tokens.shape[1]
            return x_BTD, patch

        x_BTD, used = self.embed(tokens), []
        # a past is changed in place: a layer with one must run once
        again = self.activation_checkpointing and self.training and past is None
        for layer in range(len(self.blocks)):
            x_BTD, patch = checkpoint(run, x_BTD, layer, use_reentrant=False) if again else run(x_BTD, layer)
            used.append(patch)
        return self.unembed(x_BTD), used

    def deltas(self, tokens: Tensor, removed: Tensor, n_context: int | None = None) -> list[Patch]:
        """The total patch of each layer, per kept token, that stands for the tokens marked in `removed` (T,).

        The law: forward(tokens[:, ~removed], patches=deltas) equals forward(tokens) at the kept tokens, when the kept
        tokens keep their positions. n_context: as in forward, default the number of removed tokens. Each query token
        is patched on the stream that the patched layers below produced (Dherin et al. 2025, arXiv 2507.16003, and
        Goldwaser et al. 2025, arXiv 2511.17864, for gated blocks), so errors do not accumulate with depth.
        Raises ValueError where no patch exists: a zero state or zero hidden units.
        """
        return self.replace_context(tokens, removed, shear_and_down, n_context)

    def replace_context(
        self,
        tokens: Tensor,
        removed: Tensor,
        patch_of: Callable[[Pair], Patch],
        n_context: int | None = None,
        parallel: bool = False,
    ) -> list[Patch]:
        """The patches that `patch_of` makes, layer by layer, from the states with and without `removed` tokens (T,).

        The stream without them runs through the patches of the layers below; parallel: through none, it starts from the
        contextual stream at every layer, which is the same where patches are exact, up to rounding that grows with
        depth. n_context: as in forward, default the number of removed tokens. Raises ValueError if nothing is kept.
        """
        check_tokens(tokens, n_context or 0)
        if removed.shape != tokens.shape[1:2] or removed.dtype != torch.bool or removed.all():
            raise ValueError(
                f"removed must be a boolean mask of {tokens.shape[1]} tokens that keeps at least one; "
                f"got {removed.dtype} of shape {tuple(removed.shape)}, {int(removed.sum())} removed"
            )
        n_context = int(removed.sum()) if n_context is None else n_context
        kept = (~removed).nonzero().squeeze(1)
        n_kept = int((~removed[:n_context]).sum())
        real = self.real(tokens)
        full = self.layout(tokens.shape[1], n_context, tokens.device, real)
        reduced = full.keep(kept)
        xC_BTD = self.embed(tokens)
        x_BTD = xC_BTD[:, kept]
        patches = []
        kept_real = None if real is None else real[:, kept]

        def run(xC_BTD: Tensor, x_BTD: Tensor, layer: int) -> tuple[Tensor, Tensor, Patch]:
            block = self.blocks[layer]
            vC_BTD, zC_BTD, outC_BTD, emitted = block.states(
                xC_BTD, full, lambda z: self.emit(z, layer, n_context, real=real)
            )

            def replaced(v_BTD: Tensor, z_BTD: Tensor) -> Patch:
                pair = Pair(
                    layer=layer,
                    ffn=block.ffn,
                    emitted=emitted.at(kept),
                    alone=partial(self.emit, z_BTD, layer, n_kept, real=kept_real),
                    vC=vC_BTD[:, kept],
                    zC=zC_BTD[:, kept],
                    outC=outC_BTD[:, kept],
                    v=v_BTD,
                    z=z_BTD,
                )
                return patch_of(pair)

            return outC_BTD, *block(x_BTD, reduced, replaced)

        for layer in range(len(self.blocks)):
            xC_BTD, x_BTD, patch = run(xC_BTD, xC_BTD[:, kept] if parallel else x_BTD, layer)
            patches.append(patch)
        return patches


@dataclass(frozen=True)
class Pair:
    """One layer's states at the kept tokens, (B,T,D), with the whole context (C) and without what was removed.

    v enters the second half of the block, z = norm2(v) its FFN, out leaves the block. emitted: the family's patch with
    the whole context, one per token; alone(): what it emits without what was removed, as it comes.
    """

    layer: int
    ffn: FeedForward
    emitted: Patch
    alone: Callable[[], Patch]
    vC: Tensor
    zC: Tensor
    outC: Tensor
    v: Tensor
    z: Tensor

    def along(self, what: str, state: Tensor) -> Tensor:
        """state/|state|² (*,n), the row of a rank-1 update; raises ValueError, naming `what`, where a state is zero."""
        square = state.square().sum(-1, keepdim=True)
        if not square.all():
            raise ValueError(f"layer {self.layer}: the {what} the FFN are zero for a token, no rank-1 patch exists")
        return state / square


def shear_and_down(pair: Pair) -> Patch:
    """The emitted patch, every reader sheared from z to zC, and the missing residual as a rank-1 update of `down`."""
    pair.along("state before", pair.z)
    patch = replace(pair.emitted, input=Shear(pair.z, pair.zC - pair.z))
    h_BTF = pair.ffn.hidden(pair.z, patch)
    residual = LowRank((pair.vC - pair.v).unsqueeze(-1), pair.along("hidden units of", h_BTF).unsqueeze(-1))
    return patch.add("down", residual)


def check_tokens(tokens: Tensor, n_context: int) -> None:
    """Raises ValueError unless tokens (B,T,…) hold a token, and n_context counts some of them or none."""
    if tokens.dim() < 2 or 0 in tokens.shape[:2]:
        raise ValueError(f"tokens of shape {tuple(tokens.shape)}: pass (B,T), at least one sequence of one token")
    if not 0 <= n_context <= tokens.shape[1]:
        raise ValueError(f"n_context={n_context} must lie between 0 and the {tokens.shape[1]} tokens given")
