"""One token alone: the matrices of a block joined, and laid out as a single row multiplies them fastest on a CPU.

Axes: B batch, D model, F hidden units of a block, E blocks (experts), K chosen ones, n tokens that chose a block; N all
heads of queries, keys and values, d their width.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import TypeAlias

import torch
import torch.nn.functional as F
from torch import Tensor

from zoo.core.delta import LowRank
from zoo.core.patch import Patch, Routing

JOIN_FOR = 32
"""The number of tokens from which on joined copies pay."""
FORM_AFTER = 3
"""Tokens of one update after which W + ΔW is formed: that costs as much as it saves with so many."""
Matrices: TypeAlias = Callable[[Patch], Mapping[str, Tensor]]


class Joined:
    """Copies of one block's matrices: qkv (D,N·d), gate_up (E,D,2F) and down (E,D,F).

    Rows of many numbers are read from memory at up to twice the rate of short ones. matrices: gate, up and down under a
    patch that is the same for all tokens, (*,o,i).
    """

    def __init__(self, q: Tensor, k: Tensor, v: Tensor, matrices: Matrices, blocks: int):
        self.qkv, self.matrices, self.blocks = torch.cat([q, k, v]).mT.contiguous(), matrices, blocks
        self.stored = self._join(Patch())
        self.patch, self.uses, self.formed = Patch(), 0, self.stored

    def _join(self, patch: Patch) -> tuple[Tensor, Tensor]:
        gate, up, down = (w.reshape(w.shape[-2:]) for w in self.matrices(patch).values())
        gate_EFD, up_EFD = (w.unflatten(0, (self.blocks, -1)) for w in (gate, up))
        down_DEF = down.unflatten(1, (self.blocks, -1))
        return torch.cat([gate_EFD, up_EFD], 1).mT.contiguous(), down_DEF.transpose(0, 1).contiguous()

    def ffn(self, z_B1D: Tensor, patch: Patch) -> Tensor | None:
        """The output of the FFN for one token under its patch; None for a patch that needs the general way."""
        (gate_up_EDF, down_EDF), deltas = self.stored, patch.weights
        if (
            patch.biases
            or patch.input
            or patch.served is not None
            or (self.blocks > 1 and (deltas or not patch.routing))
        ):
            return None
        if patch.routing:
            return self._experts(z_B1D[:, 0], patch.routing)[:, None]
        if deltas and len(z_B1D) == 1 and self._serves_long(patch):
            (gate_up_EDF, down_EDF), deltas = self.formed, {}
        if not all(isinstance(delta, LowRank) and delta.gate is None for delta in deltas.values()):
            return None

        def plus(y: Tensor, name: str, x: Tensor) -> Tensor:
            delta = deltas.get(name)
            return y + delta.extra(x) if isinstance(delta, LowRank) else y

        x = z_B1D if patch.chunk is None else z_B1D[:, None]
        gate, up = (x @ gate_up_EDF[0]).chunk(2, -1)
        h = F.silu(plus(gate, "gate", x)) * plus(up, "up", x)
        return plus(F.linear(h, down_EDF[0]), "down", h).view(z_B1D.shape)

    def _serves_long(self, patch: Patch) -> bool:
        """Whether this patch has served so many tokens that its matrices are formed."""
        if patch is not self.patch:
            self.patch, self.uses = patch, 0
        self.uses += 1
        if self.uses == FORM_AFTER:
            self.formed = self._join(patch)
        return self.uses >= FORM_AFTER

    def _experts(self, z_BD: Tensor, routing: Routing) -> Tensor:
        gate_up_EDF, down_EDF = self.stored
        chosen = routing.index.flatten().tolist()
        if len(z_BD) == 1:
            y_BD = torch.zeros_like(z_BD)
            for e, weight in zip(chosen, routing.weight.flatten().tolist(), strict=True):
                gate_BF, up_BF = (z_BD @ gate_up_EDF[e]).chunk(2, -1)
                y_BD.add_(F.linear(F.silu(gate_BF) * up_BF, down_EDF[e]), alpha=weight)
            return y_BD
        choice_N = torch.tensor(sorted(range(len(chosen)), key=chosen.__getitem__))  # sorted on the host: few rows
        token_N = choice_N // routing.index.shape[-1]
        used, sizes = sorted({*chosen}), [*map(chosen.count, sorted({*chosen}))]
        parts = z_BD[token_N].split(sizes)
        gate_NF, up_NF = torch.cat([x @ gate_up_EDF[e] for e, x in zip(used, parts, strict=True)]).chunk(2, -1)
        parts = (F.silu(gate_NF) * up_NF).split(sizes)
        y_ND = torch.cat([F.linear(h, down_EDF[e]) for e, h in zip(used, parts, strict=True)])
        weight_N1 = routing.weight.flatten()[choice_N, None].to(y_ND.dtype)
        return torch.zeros_like(z_BD).index_add_(0, token_N, y_ND * weight_N1)
