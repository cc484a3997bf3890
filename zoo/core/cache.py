"""The cache of one layer: all that is kept of the tokens so far, so that the next one comes alone.

Axes: B batch, T tokens, D model, G key/value heads, d head width.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from zoo.core.patch import Patch


@dataclass
class LayerCache:
    """Empty before the first pass. tokens: how many there were. keys, values (B,G,T,d): those that the next token
    attends to, keys rotated. sums (B,1,D): of the states that make up the context, and of those in a chunk not yet
    complete; counts (B,1,1): of how many. patch: the update in force. memory: what else a family keeps."""

    tokens: int = 0
    keys: Tensor | None = None
    values: Tensor | None = None
    sums: tuple[Any, Any] = (0.0, 0.0)
    counts: tuple[Any, Any] = (0.0, 0.0)
    patch: Patch | None = None
    memory: Any = None

    def extend(self, k_BGTd: Tensor, v_BGTd: Tensor, mask: Tensor | None) -> tuple[Tensor, Tensor]:
        """Keys and values with the new ones in the end; keeps those that the last token sees by its mask (T,T)."""
        if self.keys is not None and self.values is not None:
            k_BGTd, v_BGTd = torch.cat([self.keys, k_BGTd], 2), torch.cat([self.values, v_BGTd], 2)
        seen = slice(None) if mask is None else mask[-1]
        self.keys, self.values = k_BGTd[:, :, seen], v_BGTd[:, :, seen]
        return k_BGTd, v_BGTd

    def check(self, tokens: int, n_context: int) -> None:
        """Raises ValueError unless `tokens` new tokens, the first n_context of them a context, can follow."""
        if self.tokens and (tokens != 1 or n_context):
            raise ValueError(
                f"{tokens} tokens with n_context={n_context} after {self.tokens} others: pass the next token alone"
            )
        if not self.tokens and n_context == tokens:
            raise ValueError(f"all {tokens} tokens are context: the first call with a cache needs one token after it")
