"""What the families differ in: who turns a context into a weight update, and from which tokens.

Axes: B batch, S chunks, c tokens of a chunk, T tokens, D model; `*` the leading dims of the update, see zoo.delta.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torchmetrics import Metric

from zoo.delta import Patch
from zoo.layers import fold
from zoo.past import Past

SOURCES = ("segment", "chunk", "running", "token")


class Summary(NamedTuple):
    """The mean state of each context: mean (*,D), and filled (*,1), 0 where the context is empty."""

    mean: Tensor
    filled: Tensor


def summarise(
    z_BTD: Tensor, source: str, n_context: int, chunk: int | None = None, past: Past | None = None
) -> Summary:
    """Mean of the states that make up a context; no state later than the token it serves ever enters.

    segment: the first n_context tokens, for all that follow: (B,D). chunk: for chunk s, all tokens of chunks < s:
    (B,S,D). running: tokens up to and including t: (B,T,D). token: the state of t alone, after attention: (B,T,D).
    past: the states before z, which is then one token; the states of z are added to it.
    """
    B, T = z_BTD.shape[:2]
    past = Past() if past is None else past
    ones = z_BTD.new_ones(B, T, 1)
    if source == "token":
        return Summary(z_BTD, ones)
    if source == "segment":
        if not past.tokens:
            past.total, past.n_context = z_BTD[:, :n_context].sum(1, keepdim=True), n_context
        assert torch.is_tensor(past.total)
        return Summary(past.total[:, 0] / max(past.n_context, 1), ones[:, 0] * float(past.n_context > 0))
    # sums over thousands of tokens lose the small addends in bfloat16
    states = z_BTD.to(torch.promote_types(z_BTD.dtype, torch.float32))
    if source == "running":
        count_T1 = past.tokens + torch.arange(1, T + 1, device=z_BTD.device, dtype=states.dtype)[:, None]
        sums_BTD = past.total + states.cumsum(1)
        past.total = sums_BTD[:, -1:]
        return Summary((sums_BTD / count_T1).to(z_BTD.dtype), ones)
    if source == "chunk" and chunk:
        begun = past.tokens % chunk  # how many tokens of the first chunk are in the past
        sums_BSD = past.partial + fold(states, chunk).sum(2)
        # shifted, not cumsum − sums: (a + b) − b is a only up to a rounding that depends on b, which is later
        before_BSD = past.total + F.pad(sums_BSD.cumsum(1)[:, :-1], (0, 0, 1, 0))
        chunks_S1 = torch.arange(sums_BSD.shape[1], device=z_BTD.device, dtype=states.dtype)[:, None]
        start_S1 = past.tokens - begun + chunks_S1 * chunk
        complete = (begun + T) // chunk
        past.total = past.total + sums_BSD[:, :complete].sum(1, keepdim=True)
        past.partial = sums_BSD[:, complete:].sum(1, keepdim=True)
        mean_BSD = (before_BSD / start_S1.clamp(min=1)).to(z_BTD.dtype)
        return Summary(mean_BSD, (start_S1 > 0).to(z_BTD.dtype).expand(B, -1, 1))
    raise ValueError(f"unknown context source {source!r} with chunk={chunk}; sources: {', '.join(SOURCES)}")


class ContextToDelta(nn.Module, ABC):
    """The seat of a family in the decoder: from the states before each FFN to the patch of that FFN."""

    reads_query: bool = True
    """False where the patch of a query is made from the separate context alone, the same for all queries."""

    @abstractmethod
    def forward(self, z_BTD: Tensor, layer: int, n_context: int, past: Past | None = None) -> Patch:
        """The patch of layer `layer` for states z (B,T,D) whose first n_context tokens are a separate context.

        past: what the layer keeps of the tokens before z, which is then one token, with n_context = 0.
        """

    def aux_loss(self, patches: list[Patch]) -> Tensor | float:
        """What training adds to the task's loss, 0 for most families; called once for each part of a batch."""
        return 0.0

    @abstractmethod
    def flops_per_token(self, tokens: int) -> float:
        """FLOPs per token of making and applying the updates of all layers, for sequences of `tokens`; forward pass."""

    def metrics(self) -> dict[str, Metric]:
        """Fresh metrics of one layer; each has update(patch, ffn), and compute() gives a number or a dict of them."""
        return {}

    def after_step(self) -> None:
        """Called once after each optimiser step, on every process; nothing to do for most families."""
