"""The part in which families differ: who turns a context into a weight update, and from which tokens.

Axes: B batch, S chunks, c tokens of a chunk, T tokens, D model; `*` the leading dims of the update, see zoo.core.delta.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import ClassVar, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torchmetrics import Metric

from zoo.core.cache import LayerCache
from zoo.core.delta import Delta
from zoo.core.layers import FeedForward, split_chunks
from zoo.core.patch import Patch


class ContextMean(NamedTuple):
    """The mean state of each context: mean (*,D), and nonempty (*,1), 0 where the context is empty."""

    mean: Tensor
    nonempty: Tensor


@dataclass(frozen=True)
class Source:
    """Where the context of a token's update comes from; no state later than the token ever enters.

    segment: the first n_context tokens, for all that follow them: one update (B). chunk: for the tokens of a chunk of
    `chunk` tokens, all chunks before it: (B,S). running: the tokens up to and including t: (B,T). token: the state of t
    alone, after attention: (B,T).
    """

    kind: str
    chunk: int | None = None

    @property
    def shared_by(self) -> int | None:
        """How many tokens share an update, None for all of a sequence: Patch.chunk."""
        return {"segment": None, "chunk": self.chunk}.get(self.kind, 1)

    def served(self, z_BTD: Tensor, n_context: int) -> Tensor | None:
        """(B,T,1): 0 for the tokens of a separate context, which no update serves, None if there are none."""
        if self.kind != "segment" or not n_context:
            return None
        B, T, _ = z_BTD.shape
        # not the rows alone that it serves: one product over all rows keeps the baseline's rounding
        return (torch.arange(T, device=z_BTD.device) >= n_context).to(z_BTD.dtype)[None, :, None].expand(B, T, 1)

    def mean(
        self, z_BTD: Tensor, n_context: int, cache: LayerCache | None = None, real: Tensor | None = None
    ) -> ContextMean:
        """Mean of the states that make up each context; arguments as of ContextToDelta.forward."""
        if cache is not None and cache.tokens and self.kind != "token":
            return self._of_next(z_BTD, cache)
        counted_BT1 = torch.ones_like(z_BTD[..., :1]) if real is None else real.unsqueeze(-1).to(z_BTD)
        if self.kind == "token":
            return ContextMean(z_BTD, counted_BT1)
        # sums over thousands of tokens lose the small addends in bfloat16
        dtype = torch.promote_types(z_BTD.dtype, torch.float32)
        count_BT1 = counted_BT1.to(dtype)
        total = self._sums(z_BTD.to(dtype) if real is None else z_BTD * count_BT1, n_context)
        count = self._sums(count_BT1, n_context)
        mean = ContextMean((total / count.clamp(min=1)).to(z_BTD.dtype), (count > 0).to(z_BTD.dtype))
        if cache is not None:  # all of a segment is known then
            cache.context = mean if self.kind == "segment" else ContextMean(*(t[:, -1:] for t in mean))
            cache.total = z_BTD.sum(1, keepdim=True, dtype=dtype)
        return mean

    def _sums(self, t_BTn: Tensor, n_context: int) -> Tensor:
        """Sums of t over each context, (*,n)."""
        if self.kind == "segment":
            return t_BTn[:, :n_context].sum(1)
        if self.kind == "running":
            return t_BTn.cumsum(1)
        sums_BSn = split_chunks(t_BTn, self.chunk).sum(2)
        # shifted, not cumsum − sums: (a + b) − b is a only up to a rounding that depends on b, which is later
        return F.pad(sums_BSn.cumsum(1)[:, :-1], (0, 0, 1, 0))

    def _of_next(self, z_B1D: Tensor, cache: LayerCache) -> ContextMean:
        """The mean of the next token's context: that of the token before, unless a chunk has become complete."""
        if self.kind == "segment":
            return cache.context
        running, before = self.kind == "running", cache.total
        cache.total = before + z_B1D
        if running or not cache.tokens % (self.chunk or 1):
            mean = ((cache.total if running else before) / (cache.tokens + running)).to(z_B1D.dtype)
            cache.context = ContextMean(mean, torch.ones_like(mean[..., :1]))
        return cache.context


class ContextToDelta(nn.Module):
    """A family within the decoder: from the states before each FFN to the patch of that FFN.

    A family that makes an update of the mean of its context defines `update` and `flops`, and is done; one that reads
    something else defines `forward`. active_share: of the FFN's parameters, for one token; lr_factor: its own weights'
    part of the learning rate, beside Muon; state: what checkpoints keep beside the weights; summaries: what the values
    of `metrics` come to over a validation, by name, for those whose mean it is not.
    """

    active_share = lr_factor = 1.0
    summaries: ClassVar[Mapping[str, Callable[[], Metric]]] = {}

    def __init__(self, source: Source, layers: int):
        super().__init__()
        self.source, self.layers = source, layers
        self.state: dict[str, Tensor] = {}

    @property
    def reads_query(self) -> bool:
        """False where the patch of a query is made from the separate context alone, the same for all queries."""
        return self.source.kind != "segment"

    def update(self, context: ContextMean, layer: int) -> Mapping[str, Delta]:
        """The updates, by matrix, of layer `layer` from its context; zero where `nonempty` is."""
        raise NotImplementedError

    def forward(
        self, z_BTD: Tensor, layer: int, n_context: int, cache: LayerCache | None = None, real: Tensor | None = None
    ) -> Patch:
        """The patch of layer `layer` for states z (B,T,D) whose first n_context tokens are a separate context.

        n_context: 0 on running text. cache: what the layer keeps of the tokens before z, which is then one token, with
        n_context = 0. real (B,T): False for places that hold no token and must change nothing; None where all do.
        """
        shared_by = self.source.shared_by
        context = self.source.mean(z_BTD, n_context, cache, real)
        if cache and cache.patch and (shared_by is None or cache.tokens % shared_by):
            return cache.patch  # the next token shares the update of the one before it
        patch = Patch(
            weights=self.update(context, layer),
            chunk=shared_by,
            served=self.source.served(z_BTD, n_context),
            counted=context.nonempty.squeeze(-1).bool(),
        )
        if cache is not None and shared_by != 1:
            cache.patch = patch.per_token(torch.tensor([z_BTD.shape[1] - 1], device=z_BTD.device))
        return patch

    def flops(self) -> tuple[float, float]:
        """FLOPs of making the update of one layer, and of applying it to one token; forward pass."""
        raise NotImplementedError

    def flops_per_token(self, tokens: int, n_context: int) -> float:
        """FLOPs per token of making and applying the updates of all layers; forward pass."""
        made, applied = self.flops()
        return self.layers * (made / (self.source.shared_by or tokens) + applied)

    def aux_loss(self, patches: list[Patch], part: int) -> Tensor | float:
        """The auxiliary loss of training, a mean over the real tokens of a part of the step's batch, counted from 0."""
        return 0.0

    def metrics(self, patch: Patch, ffn: FeedForward) -> dict[str, Tensor]:
        """Values of one layer by name, which are summed up and logged at validation: here ‖ΔW‖/‖W‖ (Frobenius) of each
        update, without those of empty contexts."""
        sizes = {}
        for name, delta in patch.weights.items():
            W = ffn.weight(name)
            size = delta.norm(W) / torch.linalg.matrix_norm(W, dtype=torch.promote_types(W.dtype, torch.float32))
            sizes[f"delta_norm_{name}"] = size if patch.counted is None else size[patch.counted]
        return sizes

    def after_step(self) -> None:
        """Called once after each optimiser step, on every process; nothing to do for most families."""
