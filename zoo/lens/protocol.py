"""What the lens asks of a model: ours have it, and so does a foreign one that zoo.hf wraps.

Beside the two calls, decoder.blocks[layer].ffn names and shows the matrices (input_matrices, output_matrix, matrices,
weight, dense) and runs under a patch (hidden and the call itself), as zoo.core.layers.FeedForward does.
"""

from __future__ import annotations

from typing import Any, Protocol

import torch
from torch import Tensor

from zoo.core.patch import Patch


class Subject(Protocol):
    """A model as the lens reads it."""

    decoder: Any

    @property
    def device(self) -> torch.device: ...

    def state_dict(self) -> Any: ...

    def __call__(self, tokens: Tensor, *args: Any, **options: Any) -> Tensor:
        """Output for tokens; patches: one per layer; positions: where the tokens stand."""

    def deltas(self, tokens: Tensor, removed: Tensor | int, n_context: int | None = None) -> list[Patch]:
        """The patches that stand for the removed tokens."""
