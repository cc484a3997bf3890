"""Merged experts: the context mixes expert updates of the FFN's weights into one, so that a token runs one FFN.

Axes: D model, F hidden, E experts; o outputs and i inputs of a matrix; `*` leading dims of the update, see
zoo.core.delta.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal, Self

from torch import nn

from zoo.config import require_positive
from zoo.core.context import ContextMean, ContextToDelta
from zoo.core.delta import Delta, Full
from zoo.core.norm import RMSNorm
from zoo.models.base import ContextConfig, Model
from zoo.tasks import Task


@dataclass(frozen=True)
class MergedExpertsConfig(ContextConfig):
    """experts: updates that are mixed; score: what turns the router's logits into their weights."""

    name: str = "merged_experts"
    experts: int = 4
    score: Literal["linear", "softmax"] = "linear"

    def resolve(self, task: Task) -> Self:
        require_positive("model", experts=self.experts)
        if self.score == "softmax" and self.experts < 2:
            raise ValueError("model.score=softmax with model.experts=1 weighs it by 1 in every context: take 2 or more")
        return super().resolve(task)


class MergedUpdates(ContextToDelta):
    """ΔW = Σ_e g_e M_e with M_e (o,i) learned and g = score(router · norm(mean of the context)), layer by layer.

    L·(3·E·D·F + E·D) + D parameters. All M start at zero, and so does ΔW; the routers do not, or nothing would learn.
    """

    def __init__(self, config: MergedExpertsConfig):
        super().__init__(config.source, config.layers)
        D, F, E = config.dim, config.hidden, config.experts
        self.config, self.shapes = config, {"gate": (F, D), "up": (F, D), "down": (D, F)}
        self.norm = RMSNorm(D)
        self.routers = nn.ModuleList(nn.Linear(D, E, bias=False) for _ in range(config.layers))
        self.experts: Any = nn.ModuleList(
            nn.ModuleDict({name: nn.Linear(E, o * i, bias=False) for name, (o, i) in self.shapes.items()})
            for _ in range(config.layers)
        )
        for router in self.routers.parameters():
            nn.init.normal_(router, std=D**-0.5)
        for matrices in self.experts.parameters():
            nn.init.zeros_(matrices)

    def update(self, context: ContextMean, layer: int) -> dict[str, Delta]:
        logits = self.routers[layer](self.norm(context.mean))
        # linear weights are of size 1 each: divided, so that a step of Adam moves ΔW alike at any number of experts
        weight = logits.softmax(-1) if self.config.score == "softmax" else logits * self.config.experts**-0.5
        weight = weight * context.nonempty
        experts = self.experts[layer].items()
        return {name: Full(mixed(weight).unflatten(-1, self.shapes[name])) for name, mixed in experts}

    def flops(self) -> tuple[float, float]:
        matrices = 3 * self.config.dim * self.config.hidden
        return 2.0 * self.config.experts * (self.config.dim + matrices), 2.0 * matrices


class MergedExperts(Model):
    """A decoder whose FFN the context merges from experts: SMEAR (Muqeeth et al. 2023, arXiv 2306.03745), or on
    earlier chunks, Lory (Zhong et al. 2024, arXiv 2405.03133)."""

    Config = MergedExpertsConfig
    Family = MergedUpdates
