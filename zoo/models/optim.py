"""How a model is optimised: the options, the learning rate of each step, and who updates which weights."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any, Literal, Self

import torch
from torch import Tensor
from torch.optim import AdamW, Optimizer
from torch.optim.lr_scheduler import LambdaLR

from zoo.config import require_positive
from zoo.core.decoder import Decoder
from zoo.tasks import Task


@dataclass(frozen=True)
class OptimConfig:
    """name: muon, which updates the matrices of blocks, with AdamW for the rest; or adamw; batch_size: sequences
    of one optimiser step over all processes and accumulated parts; lr: of AdamW, muon_lr: of Muon, null: the task's, or
    .003 of AdamW alone; schedule: of both rates after a linear warm-up: cosine to min_lr, in terms of lr; wsd, which
    stays and then falls linearly in the last `decay` steps; or constant; warmup: null for min(50, steps // 20); decay:
    null for steps // 5; betas: of AdamW; clip: largest gradient norm, 0 for none; weight_decay acts on matrices."""

    name: Literal["muon", "adamw"] = "muon"
    steps: int = 1000
    batch_size: int = 64
    accumulate: int = 1
    lr: float | None = None
    muon_lr: float | None = None
    min_lr: float = 0.0
    schedule: Literal["cosine", "wsd", "constant"] = "cosine"
    warmup: int | None = None
    decay: int | None = None
    betas: tuple[float, ...] = (0.9, 0.95)
    weight_decay: float = 0.01
    clip: float = 1.0

    def resolve(self, task: Task) -> Self:
        """This with rates and steps of the schedule written down; raises ValueError for values that do not fit."""
        lr, muon_lr = (task.lr, task.muon_lr) if self.name == "muon" else (3e-3, None)
        if self.name == "adamw" and self.muon_lr is not None:
            raise ValueError(f"optim.muon_lr={self.muon_lr} needs optim.name=muon, not adamw")
        lr, muon_lr = (lr if self.lr is None else self.lr), (muon_lr if self.muon_lr is None else self.muon_lr)
        numbers = {"steps": self.steps, "batch_size": self.batch_size, "accumulate": self.accumulate, "lr": lr}
        require_positive("optim", **numbers, **({} if muon_lr is None else {"muon_lr": muon_lr}))
        if self.batch_size % self.accumulate:
            raise ValueError(f"optim.batch_size={self.batch_size} is no multiple of optim.accumulate={self.accumulate}")
        warmup = min(50, self.steps // 20) if self.warmup is None else self.warmup
        if not 0 <= warmup < self.steps:
            raise ValueError(f"optim.warmup={warmup} must be at least 0 and below optim.steps={self.steps}")
        decay = self.decay
        if self.schedule == "wsd":
            decay = self.steps // 5 if decay is None else decay
            if not 0 <= decay <= self.steps - warmup:
                raise ValueError(f"optim.decay={decay} must lie between 0 and the {self.steps - warmup} steps left")
        elif decay is not None:
            raise ValueError(f"optim.decay={decay} needs optim.schedule=wsd, not {self.schedule}")
        if not 0 <= self.min_lr <= lr:
            raise ValueError(f"optim.min_lr={self.min_lr} must lie between 0 and optim.lr={lr}")
        if self.min_lr and self.schedule == "constant":
            raise ValueError(f"optim.min_lr={self.min_lr} needs a schedule that falls, not optim.schedule=constant")
        if len(self.betas) != 2 or not all(0 <= beta < 1 for beta in self.betas):
            raise ValueError(f"optim.betas={list(self.betas)} must be two numbers in [0, 1)")
        if self.clip < 0 or self.weight_decay < 0:
            raise ValueError(f"optim.clip={self.clip} and optim.weight_decay={self.weight_decay} must not be negative")
        return replace(self, lr=lr, muon_lr=muon_lr, warmup=warmup, decay=decay)

    @property
    def flat_until(self) -> int:
        """The step up to which rates do not depend on `steps`, so that a longer run is the same."""
        return {"cosine": 0, "wsd": self.steps - (self.decay or 0), "constant": self.steps}[self.schedule]

    def lr_at(self, step: int) -> float:
        """The learning rates of optimiser step `step`, counted from 0, as a fraction of the highest."""
        warmup = self.warmup or 0
        if step < warmup:
            return (step + 1) / warmup
        falling = {"cosine": self.steps - warmup, "wsd": self.decay or 0, "constant": 0}[self.schedule]
        done = (step - self.steps + falling) / falling if falling else 0.0  # of the fall
        done = min(max(done, 0.0), 1.0)
        left = 1 - done if self.schedule == "wsd" else 0.5 * (1 + math.cos(math.pi * done))
        floor = self.min_lr / (self.lr or 1.0)
        return floor + (1 - floor) * left


class Muon(Optimizer):
    """Momentum whose steps are orthogonalised (Jordan et al. 2024), of the size of AdamW's (Liu et al. 2025, arXiv
    2502.16982); each of a group's `blocks` of rows, an expert, for itself.

    In float32, and one shape at once: in bfloat16, as in torch.optim.Muon, parts of a batch give visibly other weights.
    """

    def __init__(self, groups: list[dict[str, Any]], lr: float, weight_decay: float):
        super().__init__(groups, {"lr": lr, "weight_decay": weight_decay, "momentum": 0.95})

    @torch.no_grad()
    def step(self, closure: None = None) -> None:  # type: ignore[override]
        for group in self.param_groups:
            shapes: dict[torch.Size, list[Any]] = {}
            for p in group["params"]:
                if p.grad is not None:
                    shapes.setdefault(p.shape, []).append(p)
            for params in shapes.values():
                for p in params:
                    if p not in self.state:
                        self.state[p]["momentum_buffer"] = torch.zeros_like(p)
                gradients = [own(p.grad) for p in params]
                moments = [own(self.state[p]["momentum_buffer"]) for p in params]
                torch._foreach_lerp_(moments, gradients, 1 - group["momentum"])
                ahead_Lri = torch.stack(torch._foreach_lerp(gradients, moments, group["momentum"]))  # Nesterov's
                size = 0.2 * math.sqrt(max(params[0].shape[0] // group["blocks"], params[0].shape[1]))
                step_Lri = orthogonal_blocks(ahead_Lri, params[0], group["blocks"])
                weights = [own(p) for p in params]
                torch._foreach_mul_(weights, 1 - group["lr"] * group["weight_decay"])
                torch._foreach_add_(weights, step_Lri.to(weights[0]).unbind(), alpha=-group["lr"] * size)


def own(t: Any) -> Tensor:
    """The part of a tensor that is stored here: all of it, but for a DTensor, see zoo.devices.sharding."""
    return t.to_local() if hasattr(t, "to_local") else t


def orthogonal_blocks(x_Lri: Tensor, like: Any, blocks: int) -> Tensor:
    """orthogonal() of each of the `blocks` of rows of L matrices, of which x has the rows that `like` has here."""
    rows = like.shape[0] // blocks
    if not hasattr(like, "to_local") or not -(-like.shape[0] // like.device_mesh.size()) % rows:  # whole blocks
        return orthogonal(x_Lri.unflatten(1, (-1, rows))).flatten(1, 2)
    from torch.distributed.tensor import DTensor, Shard, distribute_tensor

    mesh, cut, steps = like.device_mesh, [Shard(0)], []
    for x_ri in x_Lri:  # one after the other: all together are as many whole weights
        whole_ri = DTensor.from_local(x_ri, mesh, cut, shape=like.shape, stride=like.stride()).full_tensor()
        step_ri = orthogonal(whole_ri.unflatten(0, (-1, rows))).flatten(0, 1)
        steps.append(distribute_tensor(step_ri, mesh, cut, src_data_rank=None).to_local())
    return torch.stack(steps)


def orthogonal(x: Tensor) -> Tensor:
    """About u vᵀ of each matrix u s vᵀ, (*,o,i): singular values between .7 and 1.2, by five Newton-Schulz steps."""
    wide = x.shape[-2] <= x.shape[-1]
    y = (x if wide else x.mT).to(torch.promote_types(x.dtype, torch.float32))
    y = y / torch.linalg.matrix_norm(y, keepdim=True).clamp(min=1e-7)
    for _ in range(5):
        gram = y @ y.mT
        y = 3.4445 * y + (2.0315 * gram @ gram - 4.775 * gram) @ y
    return y if wide else y.mT


class Combined(Optimizer):
    """Optimisers of different weights as one: one state, one step."""

    def __init__(self, *parts: Optimizer):
        self.parts = parts
        super().__init__([group for part in parts for group in part.param_groups], {})

    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        loss = closure() if closure else None
        groups = iter(self.param_groups)  # load_state_dict makes new ones
        for part in self.parts:
            part.state, part.param_groups = self.state, [next(groups) for _ in part.param_groups]
            part.step()
        return loss


def optimizer_of(decoder: Decoder, config: OptimConfig) -> tuple[Optimizer, LambdaLR]:
    """The optimiser of a decoder's weights, but of frozen ones, and the schedule of its rates, by resolved options."""
    attention = [p for block in decoder.blocks for p in block.attention.parameters() if p.requires_grad]
    ffns = [p for block in decoder.blocks for p in block.ffn.parameters() if p.requires_grad]
    matrices = {id(p) for p in [*attention, *ffns] if config.muon_lr is not None}
    family = decoder.context_to_delta
    factors = {id(p): family.lr_factor for p in family.parameters()} if family and config.muon_lr is not None else {}
    rest: dict[tuple[float, bool], list[Tensor]] = {}
    for p in decoder.parameters():
        if p.requires_grad and id(p) not in matrices:
            rest.setdefault((factors.get(id(p), 1.0), p.dim() > 1), []).append(p)
    groups: list[dict[str, Any]] = [
        {
            "params": rest[factor, decayed],
            "lr": factor * (config.lr or 0.0),
            "weight_decay": decayed * config.weight_decay,
        }
        for factor, decayed in sorted(rest, reverse=True)
    ]
    optimizer: Optimizer = AdamW(groups, betas=(config.betas[0], config.betas[1]))
    if config.muon_lr is not None and matrices:
        groups = [{"params": attention, "blocks": 1}, {"params": ffns, "blocks": decoder.blocks[0].ffn.blocks}]
        optimizer = Combined(optimizer, Muon(groups, config.muon_lr, config.weight_decay))
    return optimizer, LambdaLR(optimizer, config.lr_at)
