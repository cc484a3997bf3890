"""Fast weights: the states of a context are written into the FFN's matrices, by the delta rule or as a sum.

Axes: B batch, T tokens, n tokens written at once, D model; o outputs and i inputs of a matrix.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any, Literal, Self

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from zoo.core.cache import LayerCache
from zoo.core.context import ContextToDelta, Source
from zoo.core.delta import Delta, Full, LowRank
from zoo.core.patch import Patch
from zoo.models.base import Model, ModelConfig, open_attend, open_chunk
from zoo.tasks import Task


@dataclass(frozen=True)
class FastWeightsConfig(ModelConfig):
    """rule: delta, a value takes the place of what ΔW gives for its key, or sum, it is added; chunk: tokens of running
    text that read the same ΔW; attend_context: queries also attend to a separate context, null: no."""

    name: str = "fast_weights"
    rule: Literal["delta", "sum"] = "delta"
    chunk: int | None = None
    attend_context: bool | None = None  # type: ignore[assignment]

    def resolve(self, task: Task) -> Self:
        chunk = open_chunk(self.chunk, task, "running text" if task.n_context else None)
        return replace(super().resolve(task), chunk=chunk, attend_context=open_attend(self.attend_context, task))


class Memory(nn.Module):
    """ΔW = Σ u kᵀ (o,i) of one matrix; a state z has a key k of length 1, a value v and a rate β between 0 and 1.

    sum: u = β v. delta: u = β (v − ΔW k), ΔW as the states before left it (Schlag et al. 2021, arXiv 2102.11174), by
    one triangular system (Yang et al. 2024, arXiv 2406.06484). D·(o + i + 1) parameters. Values and rates have zero
    weights at the start, so ΔW = 0; keys do not, or nothing would learn. A state of zero writes nothing.
    """

    def __init__(self, dim: int, o: int, i: int, rule: str):
        super().__init__()
        self.rule, self.shape, self.scale = rule, (o, i), 8 * dim**-0.5  # 1 where it was chosen, at dim=64
        self.key, self.value = nn.Linear(dim, i, bias=False), nn.Linear(dim, o + 1, bias=False)  # the last one is β
        nn.init.normal_(self.key.weight, std=dim**-0.5)
        nn.init.zeros_(self.value.weight)

    def forward(self, z_BnD: Tensor, before_Boi: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """u (B,n,o) and k (B,n,i) of the states z, in at least float32; before: ΔW without them, None: zero."""
        projected = self.key(z_BnD), self.value(z_BnD)
        with torch.autocast(z_BnD.device.type, enabled=False):
            k_Bni, value_Bnv = (t.to(torch.promote_types(t.dtype, torch.float32)) for t in projected)
            k_Bni, v_Bno, rate_Bn1 = F.normalize(k_Bni, dim=-1), value_Bnv[..., :-1], value_Bnv[..., -1:].sigmoid()
            if self.rule == "sum":
                return rate_Bn1 * v_Bno * self.scale, k_Bni
            known_Bno = 0.0 if before_Boi is None else k_Bni @ before_Boi.mT.to(k_Bni)
            # u_t = β_t (v_t − ΔW k_t − Σ_{s<t} u_s k_sᵀk_t): read below the diagonal, on which ones stand
            system_Bnn, u_Bno = rate_Bn1 * (k_Bni @ k_Bni.mT), rate_Bn1 * (v_Bno * self.scale - known_Bno)
            return torch.linalg.solve_triangular(system_Bnn, u_Bno, upper=False, unitriangular=True), k_Bni


class FastWeightsDelta(ContextToDelta):
    """A memory for each matrix of each layer: tokens read what earlier chunks, or the separate context, wrote."""

    def __init__(self, config: FastWeightsConfig):
        super().__init__(Source("chunk" if config.chunk else "segment", config.chunk), config.layers)
        D, F_, self.config = config.dim, config.hidden, config
        self.shapes = {"gate": (F_, D), "up": (F_, D), "down": (D, F_)}
        self.memories: Any = nn.ModuleList(
            nn.ModuleDict({name: Memory(D, *shape, config.rule) for name, shape in self.shapes.items()})
            for _ in range(config.layers)
        )

    def forward(
        self, z_BTD: Tensor, layer: int, n_context: int, cache: LayerCache | None = None, real: Tensor | None = None
    ) -> Patch:
        chunk, T, before = self.source.chunk, z_BTD.shape[1], cache.memory if cache else None
        if cache and cache.patch and (not chunk or cache.tokens % chunk):
            cache.pending += [z_BTD] if chunk else []
            return cache.patch
        state_BTD = z_BTD if real is None else z_BTD * real.unsqueeze(-1)
        parts = state_BTD.split(chunk, 1)[: (T - 1) // chunk] if chunk else ()  # chunks with a token after them
        parts = (torch.cat(cache.pending, 1),) if cache and before else parts
        weights: dict[str, Delta] = {}
        written: dict[str, Tensor] = {}
        for name, memory in self.memories[layer].items():
            if not chunk:
                weights[name] = LowRank(*(factor.mT.to(z_BTD) for factor in memory(state_BTD[:, :n_context])))
                continue
            matrices = [before[name] if before else z_BTD.new_zeros(len(z_BTD), *memory.shape)]
            for part_BnD in parts:
                u_Bno, k_Bni = memory(part_BnD, matrices[-1])
                matrices.append(matrices[-1] + u_Bno.mT @ k_Bni)
            written[name] = matrices[-1]
            weights[name] = Full(torch.stack(matrices[1:] if before else matrices, 1).to(z_BTD))
        counted = self.source.mean(z_BTD[..., :1], n_context, real=real).nonempty.squeeze(-1).bool()
        patch = Patch(weights=weights, chunk=chunk, served=self.source.served(z_BTD, n_context), counted=counted)
        if cache is not None:
            cache.patch, cache.memory = patch.per_token(torch.tensor([T - 1], device=z_BTD.device)), written
            cache.pending = [z_BTD[:, (T - 1) // chunk * chunk :].clone()] if chunk else []  # no view: it keeps all
        return patch

    def flops_per_token(self, tokens: int, n_context: int) -> float:
        chunk, D, delta = self.source.chunk, self.config.dim, self.config.rule == "delta"
        n, writes, total = chunk or n_context, (tokens - 1) // chunk if chunk else 1, 0.0
        for o, i in self.shapes.values():
            total += writes * n * (2 * D * (o + i + 1) + delta * (2 * n * i + (n - 1) * o))
            total += 2 * o * i * (tokens + writes * n * (1 + delta)) if chunk else 2 * tokens * n * (o + i)
        return self.layers * total / tokens


class FastWeights(Model):
    """A decoder whose FFN weights are W + ΔW, written by the states of the context as into an associative memory."""

    Config = FastWeightsConfig
    Family = FastWeightsDelta
