"""Generated experts: a hypernetwork emits low-rank updates from the context, a router weighs some of them per token.

Axes: B batch, T tokens, D model, E experts, K chosen, R rank of one expert.
"""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from typing import Any, Self

from torch import Tensor, nn

from zoo.config import require_positive
from zoo.core.cache import LayerCache
from zoo.core.context import ContextMean, ContextToDelta
from zoo.core.delta import Delta
from zoo.core.layers import split_chunks
from zoo.core.patch import Patch
from zoo.models.base import ContextConfig, Model
from zoo.models.hypernet import Generator, HypernetConfig
from zoo.models.moe import ExpertRouting, MoEConfig
from zoo.tasks import Task


@dataclass(frozen=True)
class HyperMoEConfig(ContextConfig):
    """experts: updates emitted per matrix; top_k: those a token uses; rank: of each; code_dim: size of the code;
    balance_weight, bias_rate: of the two ways to keep a router from a few favourites, as in MoEConfig."""

    name: str = "hyper_moe"
    experts: int = 4
    top_k: int = 2
    rank: int = 2
    code_dim: int = 64
    balance_weight: float = 0.01
    bias_rate: float = 0.0

    def resolve(self, task: Task) -> Self:
        require_positive("model", rank=self.rank, code_dim=self.code_dim)
        if self.experts == 1:
            raise ValueError("model.experts=1 leaves the router nothing to choose: take 2 or more, or model=hypernet")
        self.routing.resolve(task)
        if self.experts * self.rank > min(self.dim, self.hidden):
            raise ValueError(
                f"model.experts={self.experts} times model.rank={self.rank} must not exceed model.dim={self.dim} and "
                f"model.hidden={self.hidden}: no update has a higher rank"
            )
        return super().resolve(task)

    @property
    def sizes(self) -> dict[str, Any]:
        """Those of the decoder, but for heads, that the parts share."""
        return {"dim": self.dim, "layers": self.layers, "hidden": self.hidden}

    @property
    def routing(self) -> MoEConfig:
        """The options of the routers."""
        same = {name: getattr(self, name) for name in ("heads", "experts", "top_k", "balance_weight", "bias_rate")}
        return MoEConfig(**self.sizes, **same, renormalise=self.top_k > 1)


@dataclass(frozen=True)
class ChosenPatch(Patch):
    """choice: the routing among updates, which is none of hidden blocks."""

    choice: Patch = field(default_factory=Patch)


class GeneratedExperts(ContextToDelta):
    """One generator for all layers, that of a hypernetwork of rank E·R; one router per layer, which reads the token."""

    lr_factor = 0.25
    reads_query = True  # the router does, even where the context is a separate one

    def __init__(self, config: HyperMoEConfig):
        super().__init__(config.source, config.layers)
        self.config, self.rank = config, config.experts * config.rank
        self.generator = Generator(HypernetConfig(**config.sizes, rank=self.rank, code_dim=config.code_dim))
        self.routing = ExpertRouting(config.routing)
        self.state = self.routing.state

    def update(self, context: ContextMean, layer: int) -> dict[str, Delta]:
        return self.generator(context, layer)

    def forward(
        self, z_BTD: Tensor, layer: int, n_context: int, cache: LayerCache | None = None, real: Tensor | None = None
    ) -> Patch:
        patch, choice = super().forward(z_BTD, layer, n_context, cache, real), self.routing(z_BTD, layer, 0, None, real)
        assert choice.routing is not None
        scale_BTE = choice.routing.scales(self.config.experts).to(z_BTD.dtype)
        gate = split_chunks(scale_BTE.repeat_interleave(self.config.rank, -1), patch.chunk)
        emitted: dict[str, Any] = dict(patch.weights)  # all of them LowRank
        weights = {name: replace(delta, gate=gate) for name, delta in emitted.items()}
        return ChosenPatch(**{**vars(patch), "weights": weights}, choice=choice)

    def aux_loss(self, patches: list[Any], part: int) -> Tensor | float:
        return self.routing.aux_loss([patch.choice for patch in patches], part)

    def after_step(self) -> None:
        self.routing.after_step()

    def flops(self) -> tuple[float, float]:
        made = sum(m.weight.numel() for m in self.generator.modules() if isinstance(m, nn.Linear))
        applied = 3 * self.rank * (self.config.dim + self.config.hidden)
        return 2.0 * made, 2.0 * applied + self.routing.flops()[1]


class HyperMoE(Model):
    """A decoder whose FFN weights are W + Σ_e s_e(token) ΔW_e(context): a router's choice of emitted updates."""

    Config = HyperMoEConfig
    Family = GeneratedExperts
