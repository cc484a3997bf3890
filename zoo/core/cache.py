"""The cache of one layer: all that is kept of the tokens so far, so that the next one comes alone.

Axes: B batch, T tokens, D model, G key/value heads, d head width.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from zoo.core.patch import Patch


@dataclass
class LayerCache:
    """Empty before the first pass. room: for how many further tokens space is taken at once. tokens: how many there
    were. attended (2,B,G,≥seen,d): keys, rotated, and values; the first `seen` are those that the next token attends
    to. total (B,1,D), context: what a Source keeps of the states. patch: the update in force. pending, memory: what
    else a family keeps. joined: the block's matrices for a token alone, see zoo.models.decoding, where they pay."""

    room: int = 16
    tokens: int = 0
    seen: int = 0
    attended: Tensor | None = None
    total: Any = None
    pending: list[Tensor] = field(default_factory=list)
    context: Any = None
    patch: Patch | None = None
    memory: Any = None
    joined: Any = None

    def extend(self, k_BGTd: Tensor, v_BGTd: Tensor, mask: Tensor | None) -> tuple[Tensor, Tensor]:
        """Keys and values with the new ones in the end; keeps those that the last token sees by its mask (T,T)."""
        new_2BGTd = torch.stack([k_BGTd, v_BGTd])
        if mask is not None:
            new_2BGTd = new_2BGTd[..., mask[-1], :]
        before, self.seen = self.seen, self.seen + new_2BGTd.shape[3]
        if self.attended is None:
            self.attended = F.pad(new_2BGTd, (0, 0, 0, self.room))
            return k_BGTd, v_BGTd
        # a gradient needs what was there before, and what inference mode made is never written outside of it
        used = torch.is_grad_enabled() or self.attended.requires_grad
        used = used or (self.attended.is_inference() and not torch.is_inference_mode_enabled())
        if self.seen > self.attended.shape[3] or used:
            self.attended = F.pad(self.attended[..., :before, :], (0, 0, 0, max(self.room, before)))
        self.attended[..., before : self.seen, :] = new_2BGTd
        keys_BGTd, values_BGTd = self.attended[..., : self.seen, :]
        return keys_BGTd, values_BGTd
