"""The hypernetwork: a generator reads a summary of the context and emits the weight update of every FFN.

Axes: B batch, T tokens, D model, F hidden, C code, R rank; `*` leading dims of the update, see zoo.core.delta.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torchmetrics import MeanMetric, Metric

from zoo.config import require_positive
from zoo.core.cache import LayerCache
from zoo.core.context import ContextMean, ContextToDelta, context_mean
from zoo.core.delta import Delta, Full, LowRank, Patch, Scale
from zoo.core.layers import FeedForward
from zoo.core.norm import RMSNorm
from zoo.models.base import Model, ModelConfig
from zoo.tasks import Task

MATRICES = ("gate", "up", "down")


@dataclass(frozen=True)
class HypernetConfig(ModelConfig):
    """emission: the form of ΔW; matrices: those it changes; rank: of low_rank; code_dim: size of the code.

    context: what a token's update is made from: segment (a separate context, once for all queries), chunk (all earlier
    chunks of `chunk` tokens), running (mean up to the token), token (its own state after attention); null: segment
    where the task has a separate context, else chunk. attend_context: queries also attend to the separate context.
    code: constant replaces the context by a learned constant, the null model with equal parameters.
    """

    name: str = "hypernet"
    emission: Literal["low_rank", "full", "scale"] = "low_rank"
    matrices: tuple[str, ...] = MATRICES
    rank: int | None = None
    code_dim: int = 64
    context: Literal["segment", "chunk", "running", "token"] | None = None
    chunk: int | None = None
    attend_context: bool | None = None
    code: Literal["context", "constant"] = "context"

    def resolve(self, task: Task) -> HypernetConfig:
        config = super().resolve(task)
        assert isinstance(config, HypernetConfig)
        require_positive("model", code_dim=self.code_dim)
        context = self.context or ("segment" if task.n_context else "chunk")
        if (context == "segment") != bool(task.n_context):
            raise ValueError(
                f"model.context={context} does not fit task.name={task.config.name}: segment is for tasks with a "
                f"separate context (regression, prompts), chunk, running and token for running text"
            )
        if context != "segment" and self.attend_context is not None:
            raise ValueError(
                f"model.attend_context={str(self.attend_context).lower()} needs model.context=segment, not {context}"
            )
        if context != "chunk" and self.chunk is not None:
            raise ValueError(f"model.chunk={self.chunk} needs model.context=chunk, not {context}")
        if self.emission != "low_rank" and self.rank is not None:
            raise ValueError(f"model.rank={self.rank} needs model.emission=low_rank, not {self.emission}")
        unknown = set(self.matrices) - set(MATRICES)
        if unknown or not self.matrices or len(set(self.matrices)) < len(self.matrices):
            raise ValueError(f"model.matrices={list(self.matrices)} must be different names out of {list(MATRICES)}")
        rank = (4 if self.rank is None else self.rank) if self.emission == "low_rank" else None
        if rank is not None and not 0 < rank <= min(self.dim, self.hidden):
            raise ValueError(
                f"model.rank={rank} must lie between 1 and model.dim={self.dim}, model.hidden={self.hidden}"
            )
        chunk = (32 if self.chunk is None else self.chunk) if context == "chunk" else None
        if chunk is not None and not 0 < chunk < task.tokens:
            raise ValueError(
                f"model.chunk={chunk} must lie between 1 and task.tokens={task.tokens} - 1, else no token is patched"
            )
        attend = bool(self.attend_context) if context == "segment" else None
        return replace(config, context=context, rank=rank, chunk=chunk, attend_context=attend)


class FactorHead(nn.Linear):
    """A linear map from a code (*,C) to the numbers of one factor, (*,shape)."""

    def __init__(self, code_dim: int, shape: tuple[int, ...], std: float):
        super().__init__(code_dim, torch.Size(shape).numel(), bias=False)
        self.shape = shape
        nn.init.normal_(self.weight, std=std)

    def forward(self, code: Tensor) -> Tensor:
        return super().forward(code).unflatten(-1, self.shape)


class Generator(nn.Module):
    """From a summary (*,D) to the factors of one layer's update: encoder, layer embedding, a head per factor.

    Heads are shared by all layers and have no bias. v-heads give entries of variance 1/i, so that vᵀx starts at unit
    size; the others (u, full, scale) start at zero, so ΔW = 0 at the start, and read code/√C, so that a step of Adam
    moves ΔW alike at any code size. D·C + L·C parameters, and for low rank C·R·(o + i) per matrix.
    """

    def __init__(self, config: HypernetConfig):
        super().__init__()
        D, C, R = config.dim, config.code_dim, config.rank or 0
        sizes = {"gate": (config.hidden, D), "up": (config.hidden, D), "down": (D, config.hidden)}
        self.emission, self.matrices = config.emission, config.matrices
        self.summary_norm, self.code_norm = RMSNorm(D), RMSNorm(C)
        self.encoder = nn.Linear(D, C, bias=False)
        nn.init.normal_(self.encoder.weight, std=D**-0.5)
        self.layer = nn.Embedding(config.layers, C)  # std 1, the size of the encoded summary
        self.heads = nn.ModuleDict()
        for name in config.matrices:
            o, i = sizes[name]
            if config.emission == "low_rank":  # products with factors that lie transposed in memory are faster
                self.heads[f"{name}_u"] = FactorHead(C, (R, o), 0.0)
                self.heads[f"{name}_v"] = FactorHead(C, (R, i), (C * i) ** -0.5)
            elif config.emission == "full":
                self.heads[f"{name}_full"] = FactorHead(C, (o, i), 0.0)
            else:
                self.heads[f"{name}_rows"] = FactorHead(C, (o,), 0.0)
                self.heads[f"{name}_columns"] = FactorHead(C, (i,), 0.0)

    def forward(self, summary: ContextMean, layer: int, gate: Tensor | None) -> dict[str, Delta]:
        shift = self.layer(torch.full((), layer, device=summary.mean.device))
        code = self.code_norm(self.encoder(self.summary_norm(summary.mean)) + shift)
        small = code * (
            summary.nonempty * code.shape[-1] ** -0.5
        )  # no context, no code: heads without bias give ΔW = 0
        deltas: dict[str, Delta] = {}
        for name in self.matrices:
            if self.emission == "low_rank":
                u = self.heads[f"{name}_u"](small).mT
                v = self.heads[f"{name}_v"](code).mT
                deltas[name] = LowRank(u, v, None if gate is None else gate.expand(*gate.shape[:-1], u.shape[-1]))
            elif self.emission == "full":
                deltas[name] = Full(self.heads[f"{name}_full"](small), gate)
            else:
                rows = 1 + self.heads[f"{name}_rows"](small)
                columns = 1 + self.heads[f"{name}_columns"](small)
                deltas[name] = Scale(rows, columns, gate)
        return deltas


class HypernetDelta(ContextToDelta):
    """One generator for all layers, fed with the mean state of the context at each layer."""

    def __init__(self, config: HypernetConfig):
        super().__init__()
        self.config = config
        self.reads_query = config.context != "segment"
        self.generator = Generator(config)
        self.constant = nn.Parameter(torch.randn(config.dim)) if config.code == "constant" else None

    @property
    def code(self) -> nn.Module:  # type: ignore[override]
        return self.generator.code_norm

    def forward(
        self, z_BTD: Tensor, layer: int, n_context: int, cache: LayerCache | None = None, real: Tensor | None = None
    ) -> Patch:
        config = self.config
        assert config.context is not None
        chunk = {"segment": None, "chunk": config.chunk}.get(config.context, 1)
        summary = context_mean(z_BTD, config.context, n_context, config.chunk, cache, real)
        if cache is not None and cache.patch is not None and cache.within(chunk):
            return cache.patch
        if self.constant is not None:
            summary = ContextMean(self.constant.expand_as(summary.mean), torch.ones_like(summary.nonempty))
        gate = None
        if n_context and config.context == "segment":
            # the context's own tokens pass the FFN as it is; one product over all rows keeps the baseline's rounding
            B, T, _ = z_BTD.shape
            gate = (torch.arange(T, device=z_BTD.device) >= n_context).to(z_BTD.dtype)[None, :, None].expand(B, T, 1)
        counted = summary.nonempty.squeeze(-1).bool()
        patch = Patch(weights=self.generator(summary, layer, gate), chunk=chunk, counted=counted)
        if cache is not None and chunk != 1:
            cache.patch = patch.per_token(torch.tensor([z_BTD.shape[1] - 1], device=z_BTD.device))
        return patch

    def flops_per_token(self, tokens: int) -> float:
        config = self.config
        products = sum(m.weight.numel() for m in self.generator.modules() if isinstance(m, nn.Linear))
        updates = {"segment": 1, "chunk": tokens / (config.chunk or 1)}.get(str(config.context), tokens)
        per_update = 2 * products
        low_rank = sum(config.dim + config.hidden for _ in config.matrices) * (config.rank or 0)
        applied = {
            "low_rank": 2 * low_rank,
            "full": 2 * len(config.matrices) * config.dim * config.hidden,
            "scale": len(config.matrices) * (config.dim + config.hidden),
        }[config.emission]
        return config.layers * (per_update * updates / tokens + applied)

    def metrics(self) -> dict[str, Metric]:
        return {f"delta_norm_{name}": RelativeNorm(name) for name in self.config.matrices}


class RelativeNorm(MeanMetric):
    """Mean of ‖ΔW‖/‖W‖ (Frobenius) of one matrix over contexts that are not empty; nan if all are."""

    def __init__(self, name: str):
        super().__init__()
        self.matrix = name

    def update(self, patch: Patch, ffn: FeedForward) -> None:  # type: ignore[override]
        delta, W = patch.weights[self.matrix], ffn.weight(self.matrix)
        whole = replace(delta, gate=None)  # type: ignore[type-var]
        size = whole.norm(W) / torch.linalg.matrix_norm(W, dtype=torch.promote_types(W.dtype, torch.float32))
        super().update(size, 1.0 if patch.counted is None else patch.counted.expand_as(size))


class Hypernet(Model):
    """A decoder whose FFN weights are W + ΔW(context), ΔW emitted by one small network for all layers.

    After Ha et al. 2016 (arXiv 1609.09106); low-rank emission as in doc-to-LoRA and HyperFormer++.
    """

    Config = HypernetConfig

    def decoder_options(self) -> dict[str, Any]:
        return {**super().decoder_options(), "attend_context": self.config.attend_context is not False}

    def make_context_to_delta(self) -> ContextToDelta:
        return HypernetDelta(self.config)
