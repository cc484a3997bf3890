"""One token alone: a block with its matrices joined, and laid out as a single row multiplies them fastest on a CPU.

Axes: B batch, D model, F hidden units of a block, E blocks (experts), G key/value heads, N all heads of queries, keys
and values, d their width.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from zoo.core.delta import LowRank
from zoo.core.layers import Attention, Block, FeedForward, rotary, rotate
from zoo.core.norm import RMSNorm, inverse_rms
from zoo.core.patch import Patch

JOIN_FOR = 32
"""Tokens from which on copies are joined: they take 1.1 of the time for 8, .82 for 16, .70 for 32 (d=256, 4 layers)."""
FORM_AFTER = 3
"""Tokens of one update after which W + ΔW is formed: 1 to 6 take the same time, never 1.14 of it."""


def joined(block: Block, room: int) -> Joined | None:
    """Copies for `room` tokens alone, where they pay; None too where a part of the block is not the zoo's own, or
    somebody looks into it."""
    W = block.ffn.gate  # measured on a CPU alone; copies pass no gradient on
    pays = room >= JOIN_FOR and W.device.type == "cpu" and W.dtype in (torch.float32, torch.float64)
    pays = pays and not torch.is_grad_enabled() and not torch.is_autocast_enabled("cpu")
    known = all(type(part) in (Block, Attention, FeedForward, RMSNorm, nn.Linear) for part in block.modules())
    hooked = any(part._forward_hooks or part._forward_pre_hooks for part in [*block.modules()][1:])
    biased = any(name.endswith("bias") for name, _ in block.named_parameters())
    return Joined(block) if pays and known and not hooked and not biased else None


class Joined:
    """Copies of one block's matrices: qkv (D,N·d), with the weight of norm1 in it, and gate_up (D,2F) and down (F,D) of
    each expert.

    Rows of many numbers are read from memory at up to twice the rate of short ones, and a token takes a quarter of the
    calls that the modules make.
    """

    def __init__(self, block: Block):
        attention = block.attention
        self.block, self.heads, self.kv_heads, self.width = block, attention.heads, attention.kv_heads, attention.width
        qkv = torch.cat([attention.q.weight, attention.k.weight, attention.v.weight])
        self.qkv, self.out = (qkv * block.norm1.weight).mT.contiguous(), attention.o.weight.mT
        self.tables = lambda length: rotary(torch.arange(length), self.width, attention.theta, qkv.dtype)
        self.turns: list[tuple[Tensor, Tensor]] = []
        self.stored = self._join(Patch())
        self.patch, self.uses, self.formed = Patch(), 0, self.stored

    def __deepcopy__(self, memo: Any) -> Joined:
        return self  # whoever copies a cache, to go on in two ways, need not copy the weights

    def _join(self, patch: Patch) -> list[tuple[Tensor, Tensor]]:
        """gate_up and down of each expert under a patch that is the same for all tokens."""
        ffn = self.block.ffn
        gate, up, down = (w.reshape(w.shape[-2:]) for w in ffn.dense(patch).values())
        gate_EFD, up_EFD = (w.unflatten(0, (ffn.blocks, -1)) for w in (gate, up))
        down_EDF = down.unflatten(1, (ffn.blocks, -1)).transpose(0, 1).contiguous()
        return list(zip(torch.cat([gate_EFD, up_EFD], 1).mT.contiguous(), down_EDF.mT, strict=True))

    def step(self, x_B1D: Tensor, cache: Any, patch_of: Callable[[Tensor, Tensor], Patch]) -> tuple[Tensor, Patch]:
        """What the block gives for the token after those in the cache; see Block.forward."""
        block, x_BD = self.block, x_B1D[:, 0]
        if cache.tokens >= len(self.turns):
            self.turns = list(zip(*self.tables(1 << max(cache.tokens, 255).bit_length()), strict=True))
        qkv_BN1d = (x_BD * inverse_rms(x_BD, block.norm1.eps) @ self.qkv).view(len(x_BD), -1, 1, self.width)
        qk_BN1d, v_BG1d = qkv_BN1d.split([self.heads + self.kv_heads, self.kv_heads], 1)
        qk_BN1d = rotate(qk_BN1d, *self.turns[cache.tokens])
        q_BH1d, k_BG1d = qk_BN1d.split([self.heads, self.kv_heads], 1)
        k_BGTd, v_BGTd = cache.extend(k_BG1d, v_BG1d, None)
        y_BH1d = F.scaled_dot_product_attention(q_BH1d, k_BGTd, v_BGTd, enable_gqa=self.kv_heads < self.heads)
        v_BD = torch.addmm(x_BD, y_BH1d.flatten(1), self.out)
        z_BD = (v_BD * inverse_rms(v_BD, block.norm2.eps)).mul_(block.norm2.weight)
        patch = patch_of(v_BD[:, None], z_BD[:, None])
        out_BD = self._ffn(v_BD, z_BD, patch, own=patch is cache.patch)
        return (v_BD + block.ffn(z_BD[:, None], patch)[:, 0] if out_BD is None else out_BD)[:, None], patch

    def _ffn(self, v_BD: Tensor, z_BD: Tensor, patch: Patch, own: bool) -> Tensor | None:
        """v + FFN(z) under the patch; None for one that needs the general way. own: it is that of the family."""
        (gate_up_DF, down_FD), deltas = self.stored[0], patch.weights
        if patch.biases or patch.input or patch.served is not None:
            return None
        if patch.routing:
            index_BK, weight_BK = patch.routing.index.flatten(0, -2), patch.routing.weight.flatten(0, -2)
            if deltas or len(index_BK) < len(z_BD) or self.block.ffn.backend == "reference":
                return None
            return self._experts(v_BD, z_BD, index_BK, weight_BK)
        if deltas and len(z_BD) == 1 and own and self._serves_long(patch):
            (gate_up_DF, down_FD), deltas = self.formed[0], {}
        low_rank = {name: delta for name, delta in deltas.items() if isinstance(delta, LowRank) and delta.gate is None}
        each = all(d.u.dim() > 2 and len(d.u) == len(z_BD) for d in low_rank.values())  # an update for each row
        if len(self.stored) > 1 or len(low_rank) < len(deltas) or not each:
            return None

        def plus(y_Bo: Tensor, name: str, x_Bi: Tensor) -> Tensor:
            """y + ΔW x, by one product within the other."""
            if name not in low_rank:
                return y_Bo
            u_BoR, v_BiR = (factor.flatten(0, -3) for factor in (low_rank[name].u, low_rank[name].v))
            return torch.baddbmm(y_Bo[:, None], torch.bmm(x_Bi[:, None], v_BiR), u_BoR.mT)[:, 0]

        gate_BF, up_BF = (z_BD @ gate_up_DF).chunk(2, -1)
        h_BF = F.silu(plus(gate_BF, "gate", z_BD)) * plus(up_BF, "up", z_BD)
        return plus(torch.addmm(v_BD, h_BF, down_FD), "down", h_BF)

    def _experts(self, v_BD: Tensor, z_BD: Tensor, index_BK: Tensor, weight_BK: Tensor) -> Tensor:
        """v + the weighted sum of the chosen blocks; few rows are sorted faster on the host."""
        chosen = index_BK.flatten().tolist()
        if len(z_BD) == 1:
            for e, weight in zip(chosen, weight_BK.flatten().tolist(), strict=True):
                gate_up_DF, down_FD = self.stored[e]
                gate_BF, up_BF = (z_BD @ gate_up_DF).chunk(2, -1)
                v_BD = torch.addmm(v_BD, F.silu(gate_BF) * up_BF, down_FD, alpha=weight)
            return v_BD
        choice_N = torch.tensor(sorted(range(len(chosen)), key=chosen.__getitem__))
        row_N, experts = choice_N // index_BK.shape[1], sorted({*chosen})
        counts = [chosen.count(e) for e in experts]
        parts = zip(z_BD[row_N].split(counts), experts, strict=True)
        gate_NF, up_NF = torch.cat([x @ self.stored[e][0] for x, e in parts]).chunk(2, -1)
        parts = zip((F.silu(gate_NF) * up_NF * weight_BK.view(-1, 1)[choice_N]).split(counts), experts, strict=True)
        return v_BD.index_add(0, row_N, torch.cat([h @ self.stored[e][1] for h, e in parts]))

    def _serves_long(self, patch: Patch) -> bool:
        """Whether this patch has served so many tokens that its matrices are formed."""
        if patch is not self.patch:
            self.patch, self.uses = patch, 0
        self.uses += 1
        if self.uses == FORM_AFTER:
            self.formed = self._join(patch)
        return self.uses >= FORM_AFTER
