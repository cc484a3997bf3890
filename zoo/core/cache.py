"""The cache of one layer: all that is kept of the tokens so far, so that the next one comes alone.

Axes: B batch, T tokens, D model, G key/value heads, d head width.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from zoo.core.decoding import Joined
from zoo.core.patch import Patch


@dataclass
class LayerCache:
    """Empty before the first pass. room: for how many further tokens space is taken at once. tokens: how many there
    were. keys, values (B,G,≥seen,d): the first `seen` are those that the next token attends to, keys rotated. total
    (B,1,D), pending, context: what a Source keeps of the states. patch: the update in force. memory: what else a family
    keeps. joined: the block's matrices for a token alone, where they pay."""

    room: int = 16
    tokens: int = 0
    seen: int = 0
    keys: Tensor | None = None
    values: Tensor | None = None
    total: Any = None
    pending: list[Tensor] = field(default_factory=list)
    context: Any = None
    patch: Patch | None = None
    memory: Any = None
    joined: Joined | None = None

    def extend(self, k_BGTd: Tensor, v_BGTd: Tensor, mask: Tensor | None) -> tuple[Tensor, Tensor]:
        """Keys and values with the new ones in the end; keeps those that the last token sees by its mask (T,T)."""
        new, before = (k_BGTd, v_BGTd), self.seen
        if mask is not None:
            new = k_BGTd[:, :, mask[-1]], v_BGTd[:, :, mask[-1]]
        self.seen += new[0].shape[2]
        if self.keys is None or self.values is None:
            self.keys, self.values = (F.pad(t, (0, 0, 0, self.room)) for t in new)
            return k_BGTd, v_BGTd
        kept = self.keys, self.values
        # a gradient needs what was there before, and what inference mode made is never written outside of it
        used = torch.is_grad_enabled() or any(t.requires_grad for t in kept)
        used = used or (self.keys.is_inference() and not torch.is_inference_mode_enabled())
        if self.seen > self.keys.shape[2] or used:
            room = max(self.room, before)
            self.keys, self.values = (F.pad(t[:, :, :before], (0, 0, 0, room)) for t in kept)
        for buffer, t in zip((self.keys, self.values), new, strict=True):
            buffer.narrow(2, before, t.shape[2]).copy_(t)
        return self.keys.narrow(2, 0, self.seen), self.values.narrow(2, 0, self.seen)

    def check(self, tokens: int, n_context: int) -> None:
        """Raises ValueError unless `tokens` new tokens, the first n_context of them a context, can follow."""
        if self.tokens and (tokens != 1 or n_context):
            raise ValueError(
                f"{tokens} tokens with n_context={n_context} after {self.tokens} others: pass the next token alone"
            )
        if not self.tokens and n_context == tokens:
            raise ValueError(f"all {tokens} tokens are context: the first call with a cache needs one token after it")
