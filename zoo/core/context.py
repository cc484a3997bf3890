"""What the families differ in: who turns a context into a weight update, and from which tokens.

Axes: B batch, S chunks, c tokens of a chunk, T tokens, D model; `*` the leading dims of the update, see zoo.core.delta.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torchmetrics import Metric

from zoo.config import show
from zoo.core.cache import LayerCache
from zoo.core.delta import Patch
from zoo.core.layers import split_chunks

SOURCES = ("segment", "chunk", "running", "token")


class ContextMean(NamedTuple):
    """The mean state of each context: mean (*,D), and filled (*,1), 0 where the context is empty."""

    mean: Tensor
    nonempty: Tensor


def context_mean(
    z_BTD: Tensor,
    source: str,
    n_context: int,
    chunk: int | None = None,
    cache: LayerCache | None = None,
    real: Tensor | None = None,
) -> ContextMean:
    """Mean of the states that make up a context; no state later than the token it serves ever enters.

    segment: the first n_context tokens, for all that follow: (B,D). chunk: for chunk s, all tokens of chunks < s:
    (B,S,D). running: tokens up to and including t: (B,T,D). token: the state of t alone, after attention: (B,T,D).
    cache: the states before z, which is then one token; the states of z are added to it. real (B,T): False for places
    that hold no token, which no mean takes in.
    """
    cache = LayerCache() if cache is None else cache
    counted_BT1 = torch.ones_like(z_BTD[..., :1]) if real is None else real.unsqueeze(-1).to(z_BTD)
    if source == "token":
        return ContextMean(z_BTD, counted_BT1)
    # sums over thousands of tokens lose the small addends in bfloat16
    dtype = torch.promote_types(z_BTD.dtype, torch.float32)
    count_BT1 = counted_BT1.to(dtype)
    states_BTD = z_BTD.to(dtype) if real is None else z_BTD * count_BT1
    if source == "segment":
        if not cache.tokens:
            cache.total, cache.count = (t[:, :n_context].sum(1, keepdim=True) for t in (states_BTD, count_BT1))
        total, count = cache.total[:, 0], cache.count[:, 0]
    elif source == "running":
        total, count = (before + t.cumsum(1) for before, t in ((cache.total, states_BTD), (cache.count, count_BT1)))
        cache.total, cache.count = total[:, -1:], count[:, -1:]
    elif source == "chunk" and chunk:
        begun = cache.tokens % chunk  # how many tokens of the first chunk came before
        complete = (begun + z_BTD.shape[1]) // chunk
        total, cache.total, cache.partial = _before(states_BTD, chunk, complete, cache.total, cache.partial)
        count, cache.count, cache.begun = _before(count_BT1, chunk, complete, cache.count, cache.begun)
    else:
        raise ValueError(f"unknown context source {source!r} with chunk={chunk}; sources: {', '.join(SOURCES)}")
    return ContextMean((total / count.clamp(min=1)).to(z_BTD.dtype), (count > 0).to(z_BTD.dtype))


def _before(
    t_BTn: Tensor, chunk: int, complete: int, total: Tensor | float, partial: Tensor | float
) -> tuple[Tensor, Tensor, Tensor]:
    """Sums before each chunk (B,S,n); those of all complete chunks, and of the one that is not, (B,1,n)."""
    sums_BSn = partial + split_chunks(t_BTn, chunk).sum(2)
    # shifted, not cumsum − sums: (a + b) − b is a only up to a rounding that depends on b, which is later
    before_BSn = total + F.pad(sums_BSn.cumsum(1)[:, :-1], (0, 0, 1, 0))
    whole = total + sums_BSn[:, :complete].sum(1, keepdim=True)
    return before_BSn, whole, sums_BSn[:, complete:].sum(1, keepdim=True)


class ContextToDelta(nn.Module, ABC):
    """A family within the decoder: from the states before each FFN to the patch of that FFN."""

    reads_query: bool = True
    """False where the patch of a query is made from the separate context alone, the same for all queries."""
    code: nn.Module | None = None
    """The module whose output is the code of the context, where a family makes one."""

    @abstractmethod
    def forward(
        self, z_BTD: Tensor, layer: int, n_context: int, cache: LayerCache | None = None, real: Tensor | None = None
    ) -> Patch:
        """The patch of layer `layer` for states z (B,T,D) whose first n_context tokens are a separate context.

        cache: what the layer keeps of the tokens before z, which is then one token, with n_context = 0. real (B,T):
        False for places that hold no token and must change nothing; None where all do.
        """

    def aux_loss(self, patches: list[Patch], part: int) -> Tensor | float:
        """What training adds to the task's loss, 0 for most families: a mean over the real tokens of a part.

        Called once for each part of a step's batch; part counts them from 0.
        """
        return 0.0

    @abstractmethod
    def flops_per_token(self, tokens: int) -> float:
        """FLOPs per token of making and applying the updates of all layers, for sequences of `tokens`; forward pass."""

    def metrics(self) -> dict[str, Metric]:
        """Fresh metrics of one layer; each has update(patch, ffn), and compute() gives a number or a dict of them."""
        return {}

    def after_step(self) -> None:
        """Called once after each optimiser step, on every process; nothing to do for most families."""

    def training_state(self) -> dict[str, Any]:
        """What a checkpoint must hold beside the weights to go on as if nothing had happened, as plain values."""
        return {}

    def load_training_state(self, state: dict[str, Any]) -> None:
        """Takes over what state() gave, or nothing; raises ValueError for what it cannot have given."""
        if state:
            raise ValueError(f"{type(self).__name__} has no state, got {show(state)}")
