"""The hypernetwork: a generator reads the mean of the context and emits the weight update of every FFN.

Axes: B batch, T tokens, D model, F hidden, C code, R rank; `*` leading dims of the update, see zoo.core.delta.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any, Literal, Self

import torch
from torch import nn

from zoo.config import require_positive
from zoo.core.context import ContextMean, ContextToDelta
from zoo.core.delta import Delta, Full, LowRank, Scale
from zoo.core.norm import RMSNorm
from zoo.models.base import ContextConfig, Model
from zoo.tasks import Task


@dataclass(frozen=True)
class HypernetConfig(ContextConfig):
    """emission: the form of ΔW; matrices: those it changes; rank: of low_rank; code_dim: size of the code;
    code: constant replaces the context by a learned constant, the null model, of D parameters more."""

    name: str = "hypernet"
    emission: Literal["low_rank", "full", "scale"] = "low_rank"
    matrices: tuple[Literal["gate", "up", "down"], ...] = ("gate", "up", "down")
    rank: int | None = None
    code_dim: int = 64
    code: Literal["context", "constant"] = "context"

    def resolve(self, task: Task) -> Self:
        config = super().resolve(task)
        require_positive("model", code_dim=self.code_dim)
        if self.emission != "low_rank" and self.rank is not None:
            raise ValueError(f"model.rank={self.rank} needs model.emission=low_rank, not {self.emission}")
        if len({*self.matrices}) < max(len(self.matrices), 1):
            raise ValueError(f"model.matrices={list(self.matrices)} must be different ones of gate, up and down")
        rank = (4 if self.rank is None else self.rank) if self.emission == "low_rank" else None
        if rank is not None and not 0 < rank <= min(self.dim, self.hidden):
            raise ValueError(f"model.rank={rank} must be 1 to model.dim={self.dim} and model.hidden={self.hidden}")
        return replace(config, rank=rank)


class Generator(nn.Module):
    """From the mean of a context (*,D) to the factors of a layer's update: encoder, layer embedding, head per factor.

    All layers share the heads. v-heads give entries of variance 1/i, so that vᵀx starts at unit size; the others start
    at zero, and so does ΔW, and read code/√C, so that a step of Adam moves ΔW alike at any code size. D·C + L·C
    parameters, and for low rank C·R·(o + i) per matrix.
    """

    def __init__(self, config: HypernetConfig):
        super().__init__()
        D, F, C, R = config.dim, config.hidden, config.code_dim, config.rank or 0
        self.config, self.shapes = config, {"gate": (F, D), "up": (F, D), "down": (D, F)}
        self.summary_norm, self.code_norm = RMSNorm(D), RMSNorm(C)
        self.encoder = nn.Linear(D, C, bias=False)
        nn.init.normal_(self.encoder.weight, std=D**-0.5)
        self.layer = nn.Embedding(config.layers, C)  # std 1, the size of the encoded summary
        self.heads = nn.ModuleDict()
        for name in config.matrices:
            o, i = self.shapes[name]
            counts = {"low_rank": {"u": R * o, "v": R * i}, "full": {"full": o * i}, "scale": {"rows": o, "columns": i}}
            for factor, count in counts[config.emission].items():
                head = self.heads[f"{name}_{factor}"] = nn.Linear(C, count, bias=False)
                nn.init.normal_(head.weight, std=(C * i) ** -0.5 if factor == "v" else 0.0)

    def forward(self, context: ContextMean, layer: int) -> dict[str, Delta]:
        shift = self.layer(torch.full((), layer, device=context.mean.device))
        code = self.code_norm(self.encoder(self.summary_norm(context.mean)) + shift)
        small = code * (context.nonempty * code.shape[-1] ** -0.5)  # no context, no code: ΔW = 0, heads have no bias
        deltas: dict[str, Delta] = {}
        for name in self.config.matrices:
            if self.config.emission == "low_rank":  # products with factors that lie transposed in memory are faster
                u, v = self.heads[f"{name}_u"](small), self.heads[f"{name}_v"](code)
                deltas[name] = LowRank(*(factor.unflatten(-1, (self.config.rank, -1)).mT for factor in (u, v)))
            elif self.config.emission == "full":
                deltas[name] = Full(self.heads[f"{name}_full"](small).unflatten(-1, self.shapes[name]))
            else:
                deltas[name] = Scale(*(1 + self.heads[f"{name}_{side}"](small) for side in ("rows", "columns")))
        return deltas


class HypernetDelta(ContextToDelta):
    """One generator for all layers, fed with the mean state of the context at each layer."""

    lr_factor = 0.25  # 0.4 % less loss on text than at 1, a tenth less error on regression: docs/results.md

    def __init__(self, config: HypernetConfig):
        super().__init__(config.source, config.layers)
        self.config = config
        self.generator = Generator(config)
        self.constant = nn.Parameter(torch.randn(config.dim)) if config.code == "constant" else None

    def update(self, context: ContextMean, layer: int) -> dict[str, Delta]:
        if self.constant is not None:
            context = ContextMean(self.constant.expand_as(context.mean), torch.ones_like(context.nonempty))
        return self.generator(context, layer)

    def flops(self) -> tuple[float, float]:
        made = sum(m.weight.numel() for m in self.generator.modules() if isinstance(m, nn.Linear))
        # one product for each number of a factor; scaling is elementwise, as what zoo.models.flops leaves out
        heads: Any = [] if self.config.emission == "scale" else self.generator.heads.values()
        return 2 * made, 2 * sum(head.out_features for head in heads)


class Hypernet(Model):
    """A decoder whose FFN weights are W + ΔW(context), ΔW emitted by one small network for all layers.

    After Ha et al. 2016 (arXiv 1609.09106); low-rank emission as in doc-to-LoRA and HyperFormer++.
    """

    Config = HypernetConfig
    Family = HypernetDelta
