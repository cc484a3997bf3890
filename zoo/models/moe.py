"""The mixture of experts: a router chooses, for each token, which blocks of one wide FFN are used.

Axes: B batch, T tokens, D model, F hidden units of an expert, E experts, K chosen (shared ones included).
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any, ClassVar, Literal, Self

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn
from torchmetrics import CatMetric

from zoo.config import require_positive
from zoo.core.cache import LayerCache
from zoo.core.context import ContextToDelta, Source
from zoo.core.layers import FeedForward
from zoo.core.norm import RMSNorm
from zoo.core.patch import Patch, Routing
from zoo.models.base import Model, ModelConfig, open_chunk
from zoo.tasks import Task

SCORES: dict[str, Callable[[Tensor], Tensor]] = {
    "softmax": lambda logits_EN: logits_EN.softmax(0),
    "sigmoid": torch.sigmoid,
    "linear": lambda logits_EN: logits_EN,
}


@dataclass(frozen=True)
class MoEConfig(ModelConfig):
    """hidden: units of one expert; top_k: routed experts that a token uses; shared: experts used always; renormalise:
    chosen weights sum to 1 (null: yes, except at top_k=1); route_on: the token's state, or the context's mean (on text
    all earlier chunks of `chunk` tokens); bias_rate: step of the selection bias that balances without a loss; router:
    null models are frozen, a hash of states by random projections (Roller et al. 2021, arXiv 2106.04426), and uniform,
    which goes round all experts by the place of the token, whatever it is."""

    name: str = "moe"
    hidden: int = 64
    experts: int = 4
    top_k: int = 2
    shared: int = 0
    score: Literal["softmax", "sigmoid", "linear"] = "softmax"
    renormalise: bool | None = None
    route_on: Literal["token", "context"] = "token"
    router: Literal["learned", "frozen", "uniform"] = "learned"
    chunk: int | None = None
    balance_weight: float = 0.01
    z_weight: float = 0.001
    bias_rate: float = 0.0
    backend: Literal["auto", "reference", "loop", "grouped", "grouped_op"] = "auto"

    def resolve(self, task: Task) -> Self:
        require_positive("model", experts=self.experts, top_k=self.top_k)
        if self.top_k > self.experts:
            raise ValueError(f"model.top_k={self.top_k} exceeds model.experts={self.experts}")
        for name in ("shared", "balance_weight", "z_weight", "bias_rate"):
            if getattr(self, name) < 0:
                raise ValueError(f"model.{name}={getattr(self, name)} must not be negative")
        sensible = self.top_k > 1 and self.score != "linear"  # else weights are all 1, or a sum may be 0
        if self.renormalise and not sensible:
            raise ValueError(f"model.renormalise=true does not fit model.top_k={self.top_k}, model.score={self.score}")
        by_chunk = self.route_on == "context" and not task.n_context
        chunk = open_chunk(self.chunk, task, None if by_chunk else "model.route_on=context and running text")
        renormalise = sensible if self.renormalise is None else self.renormalise
        if self.router == "uniform" and self.route_on == "context":
            raise ValueError("model.router=uniform routes on no state: leave model.route_on=context away")
        # with nothing to learn, states must not be balanced in its place
        off: dict[str, Any] = {} if self.router == "learned" else {"balance_weight": 0.0, "z_weight": 0.0}
        return replace(super().resolve(task), renormalise=renormalise, chunk=chunk, **off)

    @property
    def blocks(self) -> int:  # type: ignore[override]
        return self.experts + self.shared

    @property
    def source(self) -> Source:
        """Where the state that routes a token comes from, once resolved."""
        return Source("token" if self.route_on == "token" else "chunk" if self.chunk else "segment", self.chunk)


class Router(nn.Module):
    """Scores of E experts from a state, the best K of them; at least float32 throughout. D·E parameters; `bias` moves
    the choice but not the weights (Wang et al. 2024, arXiv 2408.15664)."""

    def __init__(self, config: MoEConfig):
        super().__init__()
        self.config = config
        weight = torch.randn(config.experts, config.dim) * config.dim**-0.5
        self.weight = nn.Parameter(weight) if config.router == "learned" else nn.Buffer(weight)
        self.bias = nn.Buffer(torch.zeros(config.experts))

    def forward(self, z_BTD: Tensor, first: int = 0) -> Routing:
        """The routing of states of which the first stands at place `first`."""
        config, dtype = self.config, torch.promote_types(z_BTD.dtype, torch.float32)
        with torch.autocast(z_BTD.device.type, enabled=False):
            # experts first: a softmax over fewer than 16 numbers of each token takes a CPU ten times as long
            logits_EN = self.weight.to(dtype) @ z_BTD.flatten(0, 1).to(dtype).mT
        score_EN = SCORES[config.score](logits_EN)
        logits_BTE, score_BTE = (t.mT.unflatten(0, z_BTD.shape[:2]) for t in (logits_EN, score_EN))
        index_BTK = (score_BTE.detach() + self.bias).topk(config.top_k, -1).indices
        weight_BTK = score_BTE.gather(-1, index_BTK)
        if config.router == "uniform":
            T, K = index_BTK.shape[1:]
            place_TK = torch.arange(first * K, (first + T) * K, device=z_BTD.device).view(T, K)
            index_BTK, weight_BTK = (place_TK % config.experts).expand_as(index_BTK), torch.ones_like(weight_BTK)
        if config.renormalise:
            weight_BTK = weight_BTK / weight_BTK.sum(-1, keepdim=True)
        if config.shared:
            always = torch.arange(config.experts, config.experts + config.shared, device=index_BTK.device)
            index_BTK = torch.cat([index_BTK, always.expand(*index_BTK.shape[:-1], -1)], -1)
            weight_BTK = F.pad(weight_BTK, (0, config.shared), value=1.0)
        return Routing(index_BTK, weight_BTK, logits_BTE)


class ExpertRouting(ContextToDelta):
    """One router per layer. counts: choices in this step, which is no buffer: DDP would overwrite it; state: the share
    of each expert in the step before, even ones in the first."""

    summaries: ClassVar = {
        "load_max_over_mean": lambda: ExpertLoad(lambda count_E: count_E.max() / count_E.mean()),
        "dead_fraction": lambda: ExpertLoad(lambda count_E: (count_E == 0).float().mean()),
    }

    def __init__(self, config: MoEConfig):
        super().__init__(config.source, config.layers)
        self.config = config
        self.active_share = (config.top_k + config.shared) / (config.experts + config.shared)
        self.routers: Any = nn.ModuleList(Router(config) for _ in range(config.layers))
        if config.route_on == "context":
            self.norms = nn.ModuleList(RMSNorm(config.dim) for _ in range(config.layers))
            # what routes where there is no context yet: zero logits would send everyone to the same experts
            self.empty = nn.Parameter(torch.randn(config.layers, config.dim))
        self.counts = torch.zeros(config.layers, config.experts)
        self.state["shares"] = torch.full((config.layers, config.experts), 1 / config.experts, dtype=torch.float64)

    def forward(
        self, z_BTD: Tensor, layer: int, n_context: int, cache: LayerCache | None = None, real: Tensor | None = None
    ) -> Patch:
        state_BTD, T = z_BTD, z_BTD.shape[1]
        if self.config.route_on == "context":
            context = self.source.mean(z_BTD, n_context, cache, real)
            if self.source.chunk:
                mean, nonempty = (t.repeat_interleave(self.source.chunk, 1)[:, :T] for t in context)
            else:  # the context's own tokens route on what they have seen so far, queries on all of it
                own_real = None if real is None else real[:, :n_context]
                seen = Source("running").mean(z_BTD[:, :n_context], 0, real=own_real)
                mean, nonempty = (
                    torch.cat([so_far, of_all[:, None].expand(-1, T - n_context, -1)], 1)
                    for so_far, of_all in zip(seen, context, strict=True)
                )
            state_BTD = torch.where(nonempty > 0, self.norms[layer](mean), self.empty[layer])
        return Patch(routing=self.routers[layer](state_BTD, cache.tokens if cache else 0), counted=real)

    def aux_loss(self, patches: list[Any], part: int) -> Tensor | float:
        """The losses on balance and size of logits; counts the choices, as forward may run twice a batch."""
        config = self.config
        counts_LE = torch.stack([expert_counts(patch.routing, patch.counted) for patch in patches])
        self.counts = self.counts + counts_LE if part else counts_LE
        loss: Tensor | float = 0.0
        for patch, share_E in zip(patches, self.state["shares"], strict=True):
            if config.balance_weight:
                balance = balance_loss(patch.routing, patch.counted, share_E, config.score)
                loss = loss + config.balance_weight * balance / config.layers
            if config.z_weight:
                square = patch.routing.logits.logsumexp(-1).square()
                loss = loss + config.z_weight * mean_of(square, patch.counted) / config.layers
        return loss

    def after_step(self) -> None:
        """Adds up the choices of all parts and processes; moves each router's bias towards idle experts, by bias_rate,
        keeping its mean at zero."""
        if dist.is_available() and dist.is_initialized():
            dist.all_reduce(self.counts)
        self.state["shares"] = self.counts / self.counts.sum(1, keepdim=True).clamp(min=1)
        if self.config.bias_rate:
            for router, count_E in zip(self.routers, self.counts, strict=True):
                router.bias += self.config.bias_rate * (count_E.mean() - count_E).sign()
                router.bias -= router.bias.mean()

    def flops(self) -> tuple[float, float]:
        return 0.0, 2.0 * self.config.dim * self.config.experts

    def metrics(self, patch: Patch, ffn: FeedForward) -> dict[str, Tensor]:
        """Choices by expert, (1,E), and the entropy in nats of the softmax of the router's logits, ln E at most."""
        assert patch.routing is not None
        logp = patch.routing.logits.log_softmax(-1)
        entropy = -(logp.exp() * logp).sum(-1)
        counts = dict.fromkeys(self.summaries, expert_counts(patch.routing, patch.counted)[None])
        return {**counts, "entropy": entropy if patch.counted is None else entropy[patch.counted]}


def expert_counts(routing: Routing, counted: Tensor | None) -> Tensor:
    """How many of the tokens that are counted (B,T), None for all, chose each routed expert, (E) in float32."""
    # shared experts have the ids from E on; a size known beforehand keeps the count free of a device sync
    experts = routing.logits.shape[-1]
    index = routing.index.clamp(max=experts)
    ones = torch.ones_like(index, dtype=torch.float32) * (1 if counted is None else counted.unsqueeze(-1))
    return ones.new_zeros(experts + 1).scatter_add(0, index.flatten(), ones.flatten())[:-1]


def mean_of(values: Tensor, counted: Tensor | None) -> Tensor:
    """The mean of the values (B,T) that are counted, 0 if none is."""
    return values.mean() if counted is None else (values * counted).sum() / counted.sum().clamp(min=1)


def balance_loss(routing: Routing, counted: Tensor | None, share_E: Tensor, score: str) -> Tensor:
    """E Σ_e f_e p_e, 1 at balance for any K (Fedus et al. 2021, arXiv 2101.03961); p: mean probability of experts; f:
    share of choices in the whole step before, of all parts and processes (Qiu et al. 2025, arXiv 2501.11873)."""
    score_EN = SCORES["sigmoid" if score == "sigmoid" else "softmax"](routing.logits.flatten(0, -2).mT)
    p_EN = score_EN / score_EN.sum(0)
    f_p_BT = (share_E.to(p_EN) @ p_EN).view(routing.logits.shape[:-1])
    return len(share_E) * mean_of(f_p_BT, counted)


class ExpertLoad(CatMetric):
    """The number `of` the choices of each expert, (E), over all batches and processes; update(count_1E)."""

    def __init__(self, of: Callable[[Tensor], Tensor]):
        super().__init__()
        self.of = of

    def compute(self) -> Tensor:
        return self.of(torch.as_tensor(super().compute()).sum(0))


class MoE(Model):
    """A decoder whose FFN is E blocks of a wide one, K of them used per token (Jiang et al. 2024, arXiv 2401.04088)."""

    Config = MoEConfig
    Family = ExpertRouting
