"""The decoder that all families share.

Axes: B batch, T tokens, V vocabulary, D model, F hidden, E blocks.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from zoo.core.cache import LayerCache
from zoo.core.context import ContextToDelta
from zoo.core.layers import FILLING, Block, Layout
from zoo.core.norm import RMSNorm
from zoo.core.patch import Patch


@dataclass(frozen=True)
class Sizes:
    """Of a decoder; kv_heads: None for as many as heads; tied: one matrix embeds and unembeds tokens; theta: of rotary
    positions; eps: of norms. What families decide besides: blocks, backend: of each FeedForward; attend_context: tokens
    after a separate context see it, if it is not False."""

    dim: int = 64
    layers: int = 3
    heads: int = 4
    kv_heads: int | None = None
    hidden: int = 128
    tied: bool = False
    theta: float = 1e4
    eps: float = 1e-6
    blocks, backend, attend_context = 1, "auto", True


class Decoder(nn.Module):
    """Pre-norm decoder: embed, L blocks of attention and FFN, norm, unembed; a ContextToDelta may patch the FFNs.

    tokens: a task, or what has its vocabulary, token_dim, output_dim, n_context, independent_queries and filled;
    activation_checkpointing: in training, layers run anew for their gradient (Chen et al. 2016, arXiv 1604.06174);
    token_alone: from a block and the room of a cache, what runs the block for one token there, where that is faster.
    """

    activation_checkpointing: bool = False
    token_alone: Callable[[Block, int], Any] | None = None

    def __init__(self, sizes: Sizes, tokens: Any):
        super().__init__()
        dim, vocabulary, token_dim = sizes.dim, tokens.vocabulary, tokens.token_dim
        self.context_to_delta: ContextToDelta | None = None
        self.attend_context, self.separate_context = sizes.attend_context is not False, tokens.n_context > 0
        self.independent_queries, self.filled = tokens.independent_queries, tokens.filled
        self.embedding = nn.Embedding(vocabulary, dim) if vocabulary else nn.Linear(token_dim or 0, dim, bias=False)
        self.blocks: Sequence[Block] = nn.ModuleList(Block(sizes) for _ in range(sizes.layers))  # type: ignore[assignment]
        self.norm = RMSNorm(dim, sizes.eps)
        self.head = nn.Linear(dim, tokens.output_dim, bias=False)
        if sizes.tied:
            self.head.weight = self.embedding.weight
        # normal weights of std 1/√fan_in; matrices that write to the residual stream a further 1/√(2L) smaller
        for name, parameter in [(name, p) for name, p in self.named_parameters() if p.dim() > 1]:
            fan_in = self.blocks[0].ffn.hidden_per_block if name.endswith("ffn.down") else parameter.shape[1]
            writes = name.endswith(("ffn.down", "attention.o.weight"))
            nn.init.normal_(parameter, std=(fan_in * (2 * len(self.blocks) if writes else 1)) ** -0.5)

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
        self, z_BTD: Tensor, layer: int, n_context: int, cache: LayerCache | None = None, real: Tensor | None = None
    ) -> Patch:
        """The patch that the family itself emits; empty for the transformer."""
        if self.context_to_delta is None:
            return Patch()
        return self.context_to_delta(z_BTD, layer, n_context if self.separate_context else 0, cache, real)

    def new_cache(self, room: int = 16) -> list[LayerCache]:
        """Empty caches, one per layer, for forward to fill with the first tokens and extend with each further one; they
        take space for `room` of these at once, and more when it is used up."""
        alone = self.token_alone or (lambda *_: None)
        return [LayerCache(max(room, 1), joined=alone(block, room)) for block in self.blocks]

    def forward(
        self,
        tokens: Tensor,
        n_context: int = 0,
        patches: Sequence[Patch] | None = None,
        positions: Tensor | None = None,
        added: Sequence[Patch] | None = None,
        cache: Sequence[LayerCache] | None = None,
    ) -> tuple[Tensor, list[Patch]]:
        """Output (B,T,V) for tokens (B,T) or (B,T,token_dim), and the patch that each layer used.

        n_context: how many leading tokens are a separate context. patches: one per layer, total: nothing else is
        emitted. added: one per layer, weights and biases on top of what the family emits for all tokens. positions
        (T,): where the tokens stand; default as if nothing but `cache` came before. cache: from new_cache(), changed in
        place: the first call passes all tokens there are, each further one the next token (B,1), and gets its output.
        """
        check_tokens(tokens, n_context, cache[0] if cache else None)
        for given in (patches, added):
            if given is not None and len(given) != len(self.blocks):
                raise ValueError(f"{len(given)} patches for {len(self.blocks)} layers: pass one patch per layer")
        real = self.real(tokens) if cache is None else None
        layout = self.layout(tokens.shape[1], n_context, tokens.device, real)
        if cache is not None:
            if self.independent_queries:
                raise ValueError("a cache needs tokens in sequence, but the queries of this task are independent")
            layout = layout._replace(positions=cache[0].tokens + layout.positions)
        if positions is not None:
            layout = layout._replace(positions=positions)
            for kept in cache or ():
                kept.joined = None  # which stands where the cache ends

        def run(x_BTD: Tensor, layer: int) -> tuple[Tensor, Patch]:
            kept = None if cache is None else cache[layer]

            def patch_of(v_BTD: Tensor, z_BTD: Tensor) -> Patch:
                patch = self.emit(z_BTD, layer, n_context, kept, real) if patches is None else patches[layer]
                return patch if added is None else patch.merged_with(added[layer])

            x_BTD, patch = self.blocks[layer](x_BTD, layout, patch_of, kept)
            if kept is not None:
                kept.tokens += tokens.shape[1]
            return x_BTD, patch

        x_BTD, used = self.embed(tokens), []
        # a cache is changed in place: a layer with one must run once
        again = self.activation_checkpointing and self.training and cache is None
        for layer in range(len(self.blocks)):
            x_BTD, patch = checkpoint(run, x_BTD, layer, use_reentrant=False) if again else run(x_BTD, layer)
            used.append(patch)
        return self.unembed(x_BTD), used


def check_tokens(tokens: Tensor, n_context: int, cache: LayerCache | None = None) -> None:
    """Raises ValueError unless tokens (B,T,…) hold a token, n_context counts some of them or none, and they can follow
    those in the cache."""
    if tokens.dim() < 2 or 0 in tokens.shape[:2]:
        raise ValueError(f"tokens of shape {tuple(tokens.shape)}: pass (B,T), at least one sequence of one token")
    count, before = tokens.shape[1], cache.tokens if cache else 0
    if not 0 <= n_context <= count:
        raise ValueError(f"n_context={n_context} must lie between 0 and the {count} tokens given")
    if before and (count != 1 or n_context):
        raise ValueError(f"{count} tokens with n_context={n_context} after {before} others: pass the next token alone")
    if cache and not before and n_context == count:
        raise ValueError(f"all {count} tokens are context: the first call with a cache needs one token after it")
