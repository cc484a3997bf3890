"""The parts of a pre-norm decoder block: rotary attention, and the one feed-forward network of the zoo.

Axes: B batch, S chunks, c tokens of a chunk, T tokens, D model, H heads, G key/value heads, d head width, F hidden
units of a block, E blocks (experts), K chosen blocks, N rows (token, choice) sorted by block.
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import nullcontext
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel

from zoo.core.cache import LayerCache
from zoo.core.experts import Combine, Dispatch, sort_by_block, swiglu
from zoo.core.low_rank import transformed
from zoo.core.norm import RMSNorm
from zoo.core.patch import Patch, Routing

FILLING = -1
"""The id of a place that holds no token: nobody sees it, and it counts for nothing."""


class Layout(NamedTuple):
    """Positions of tokens (T,) and their attention mask (T,T) or (B,1,T,T), True: may attend; None: causal."""

    positions: Tensor
    mask: Tensor | None

    def keep(self, kept: Tensor) -> Layout:
        """The layout of the tokens marked in `kept` (T,), at the positions they had."""
        return Layout(self.positions[kept], None if self.mask is None else self.mask[..., kept, :][..., kept])


def rotary(positions: Tensor, width: int, theta: float, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """cos and ±sin tables (T,1,d) of rotary positions, in at least float32 (Su et al. 2021, arXiv 2104.09864)."""
    dtype = torch.promote_types(dtype, torch.float32)
    rate = theta ** (-torch.arange(0, width, 2, device=positions.device, dtype=dtype) / width)
    angle = positions.to(dtype)[:, None, None] * rate
    cos, sin = angle.cos(), angle.sin()
    return torch.cat([cos, cos], -1), torch.cat([-sin, sin], -1)


def rotate(x_BTHd: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Entry i and entry i + d/2 as one plane, turned; fewest passes over memory, and before heads are transposed."""
    return torch.addcmul(x_BTHd * cos, x_BTHd.roll(x_BTHd.shape[-1] // 2, -1), sin).to(x_BTHd.dtype)


class Attention(nn.Module):
    """Softmax attention with rotary positions and G key/value heads shared by H query heads; 2D² + 2DGd parameters."""

    def __init__(self, dim: int, heads: int, kv_heads: int, theta: float = 1e4):
        super().__init__()
        self.heads, self.kv_heads, self.width, self.theta = heads, kv_heads, dim // heads, theta
        self.q = nn.Linear(dim, dim, bias=False)
        self.k = nn.Linear(dim, kv_heads * self.width, bias=False)
        self.v = nn.Linear(dim, kv_heads * self.width, bias=False)
        self.o = nn.Linear(dim, dim, bias=False)

    def forward(self, x_BTD: Tensor, layout: Layout, cache: LayerCache | None = None) -> Tensor:
        B, T, D = x_BTD.shape
        cos, sin = rotary(layout.positions, self.width, self.theta, x_BTD.dtype)
        q_BHTd = rotate(self.q(x_BTD).view(B, T, self.heads, self.width), cos, sin).transpose(1, 2)
        k_BGTd = rotate(self.k(x_BTD).view(B, T, self.kv_heads, self.width), cos, sin).transpose(1, 2)
        v_BGTd = self.v(x_BTD).view(B, T, self.kv_heads, self.width).transpose(1, 2)
        if cache is not None:
            k_BGTd, v_BGTd = cache.extend(k_BGTd, v_BGTd, layout.mask)
        # a single token is the last one and sees all others; a compiled graph must decide it, T may be a symbol
        causal = True if layout.mask is None and T > 1 else False  # noqa: SIM210
        options: Any = {"attn_mask": layout.mask, "is_causal": causal, "enable_gqa": self.kv_heads < self.heads}
        # of torch's kernels only the plain one knows every transform
        with sdpa_kernel(SDPBackend.MATH) if transformed() else nullcontext():
            y_BHTd = F.scaled_dot_product_attention(q_BHTd, k_BGTd, v_BGTd, **options)
        return self.o(y_BHTd.transpose(1, 2).reshape(B, T, D))


def split_chunks(x_BTD: Tensor, chunk: int | None) -> Tensor:
    """(B,T,D) as (B,S,c,D), the last chunk filled with zeros, a lone one cut to c = T; unchanged if chunk is None."""
    if chunk is None:
        return x_BTD
    chunk = min(chunk, max(x_BTD.shape[1], 1))
    x_BTD = F.pad(x_BTD, (0, 0, 0, -x_BTD.shape[1] % chunk))
    return x_BTD.unflatten(1, (-1, chunk))


def join_chunks(y_BScn: Tensor, tokens: int, chunk: int | None) -> Tensor:
    """The first `tokens` of what split_chunks made, (B,T,n); raises ValueError where updates made more chunks of it."""
    if chunk is None:
        return y_BScn
    if (S := y_BScn.shape[1]) > max(-(-tokens // chunk), 1):
        raise ValueError(f"a patch of {S} tokens or chunks for a pass of {tokens} tokens: pass those that it is of")
    return y_BScn.flatten(1, 2)[:, :tokens]


class FeedForward(nn.Module):
    """down · (silu(gate z) ∘ up z) with E blocks of F hidden units, 3EFD parameters (Shazeer 2020, arXiv 2002.05202).

    All three matrices are stored as (E·F, D), so that (E,F,D) is a free view; `down` maps by its transpose. Routed, all
    blocks run where the patch updates weights or backend is "reference", else the chosen ones alone.
    """

    input_matrices, output_matrix, matrices = ("gate", "up"), "down", ("gate", "up", "down")

    def __init__(self, dim: int, hidden: int, blocks: int = 1, backend: str = "auto"):
        super().__init__()
        self.dim, self.hidden_per_block, self.blocks, self.backend = dim, hidden, blocks, backend
        self.gate = nn.Parameter(torch.empty(blocks * hidden, dim))
        self.up = nn.Parameter(torch.empty(blocks * hidden, dim))
        self.down = nn.Parameter(torch.empty(blocks * hidden, dim))

    def stored(self, name: str) -> Tensor:
        """The matrix `name` as it is stored, (E·F,D)."""
        return getattr(self, name)

    def weight(self, name: str) -> Tensor:
        """The matrix `name` as a map, (o,i)."""
        return self.stored(name).mT if name == "down" else self.stored(name)

    def by_block(self, x_ND: Tensor, counts_E: Tensor) -> Tensor:
        """What each block gives for its rows, which are sorted by block."""
        return swiglu(x_ND, counts_E, self.backend, *map(self.stored, ("gate", "up", "down")))

    def linear(self, name: str, x: Tensor, patch: Patch) -> Tensor:
        """The map `name` of x (*,T,i) under the patch of its weight and bias: (*,T,o)."""
        W, delta, bias = self.weight(name), patch.weights.get(name), patch.biases.get(name)
        y = F.linear(x, W) if delta is None else delta.linear(W, x, patch.served)
        return y if bias is None else y + bias.unsqueeze(-2) * (1 if patch.served is None else patch.served)

    def _hidden(self, x: Tensor, patch: Patch) -> Tensor:
        x = patch.input.apply(x, patch.served) if patch.input else x
        h = F.silu(self.linear("gate", x, patch)) * self.linear("up", x, patch)
        if patch.routing:
            h = h * patch.routing.scales(self.blocks).repeat_interleave(self.hidden_per_block, -1).to(h.dtype)
        return h

    def hidden(self, z_BTD: Tensor, patch: Patch) -> Tensor:
        """The input of `down` under `patch`, s included: (B,T,E·F)."""
        h = self._hidden(split_chunks(z_BTD, patch.chunk), patch)
        return join_chunks(h, z_BTD.shape[1], patch.chunk)

    def forward(self, z_BTD: Tensor, patch: Patch | None = None) -> Tensor:
        """The network's output for z (B,T,D) with its weights patched."""
        patch = patch or Patch()
        x = split_chunks(z_BTD, patch.chunk)
        sparse = patch.routing and not patch.weights and not patch.biases and self.backend != "reference"
        if patch.routing and sparse and not transformed():  # which rows a block gets depends on data
            y = self._chosen_blocks(patch.input.apply(x, patch.served) if patch.input else x, patch.routing)
        else:
            y = self.linear("down", self._hidden(x, patch), patch)
        return join_chunks(y, z_BTD.shape[1], patch.chunk)

    def _chosen_blocks(self, x: Tensor, routing: Routing) -> Tensor:
        # one choice may be that of many tokens
        index_TK, weight_TK = (t.expand(*x.shape[:-1], -1).flatten(0, -2) for t in (routing.index, routing.weight))
        counts_E = torch.zeros(self.blocks, dtype=torch.int64, device=x.device)
        counts_E = counts_E.scatter_add(0, index_TK.flatten(), torch.ones_like(index_TK.flatten()))
        order = sort_by_block(index_TK)
        y_ND = self.by_block(Dispatch.apply(x.reshape(-1, self.dim), *order), counts_E)
        return Combine.apply(y_ND, weight_TK.to(y_ND.dtype), *order).view(x.shape)

    def dense(self, patch: Patch) -> dict[str, Tensor]:
        """The patched weights, {name: (*,o,i)}, for tests and analysis; a routing scales columns of `down`."""
        if patch.served is not None or (patch.routing and patch.routing.index.shape[-2] != 1):
            raise ValueError("this patch differs from token to token: take patch.per_token(tokens) first")
        weights = {}
        for name in ("gate", "up", "down"):
            W = self.weight(name)
            total = W + patch.weights[name].dense(W) if name in patch.weights else W
            if patch.input and name in self.input_matrices:
                total = total + patch.input.dense(total)
            weights[name] = total
        if patch.routing:
            scale = patch.routing.scales(self.blocks).repeat_interleave(self.hidden_per_block, -1)
            weights["down"] = weights["down"] * scale
        return weights


class Block(nn.Module):
    """One decoder block: `attend` gives the state v that enters the second half, v + ffn(norm2(v)); sizes: Sizes."""

    def __init__(self, sizes: Any):
        super().__init__()
        self.norm1 = RMSNorm(sizes.dim, sizes.eps)
        self.attention = Attention(sizes.dim, sizes.heads, sizes.kv_heads or sizes.heads, sizes.theta)
        self.norm2 = RMSNorm(sizes.dim, sizes.eps)
        self.ffn = FeedForward(sizes.dim, sizes.hidden, sizes.blocks, sizes.backend)

    def attend(self, x_BTD: Tensor, layout: Layout, cache: LayerCache | None = None) -> Tensor:
        return x_BTD + self.attention(self.norm1(x_BTD), layout, cache)

    def forward(
        self,
        x_BTD: Tensor,
        layout: Layout,
        patch_of: Callable[[Tensor, Tensor], Patch],
        cache: LayerCache | None = None,
    ) -> tuple[Tensor, Patch]:
        """The block's output, (B,T,D), and the patch of its FFN, which patch_of(v, z) makes of z = norm2(v)."""
        if cache and cache.joined and cache.tokens and not torch.is_grad_enabled():
            return cache.joined.step(x_BTD, cache, patch_of)
        v_BTD = self.attend(x_BTD, layout, cache)
        z_BTD = self.norm2(v_BTD)
        patch = patch_of(v_BTD, z_BTD)
        return v_BTD + self.ffn(z_BTD, patch), patch
