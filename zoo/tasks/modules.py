"""Modules: functions put together of a few parts that never change; which parts, is in the context or in the token.

    variant     a token carries                     the answer y
    combined    z, or pairs (y,x), then x           R relu(Σ_k z_k Θ_k x), one to three equal entries of z, the others 0
    routed      x alone                             M_k x, where centre k is the nearest to x

The combinations z are split: some are never trained on, so that who answers them has found the parts, not the sums
(hyperteacher, Schug et al. 2023, arXiv 2312.15001). z has length 1: models normalise what they read, and could not tell
how many modules a longer one has. The parts are drawn from the seed, once for all splits.
Axes: B functions, C context tokens, Q queries, K modules, Z combinations, d input dimension, U hidden units, O outputs.
"""

from __future__ import annotations

import functools
import itertools
import math
from dataclasses import dataclass, replace
from typing import Any, ClassVar, Literal, Self

import torch
import torch.nn.functional as F
from torch import Tensor

from zoo.tasks.base import Batch, Predict, Task, TaskConfig

OWN_OPTION: dict[str, tuple[str, Any]] = {
    "units": ("combined", 16),
    "held_out": ("combined", 0.5),
    "pairs": ("pairs", 24),
}
SIZES = (1, 2, 3)  # of combinations
PARTS = ("", "_unseen")


@dataclass(frozen=True)
class ModulesConfig(TaskConfig):
    """variant: combined, sums of up to three modules, or routed, one module for each x; context: of combined, the code
    of the combination (null), or `pairs` of x and y; held_out: the share of all combinations kept for the test."""

    name: str = "modules"
    variant: Literal["combined", "routed"] = "combined"
    context: Literal["code", "pairs"] | None = None
    modules: int | None = None
    dimension: int = 8
    units: int | None = None
    outputs: int = 4
    queries: int = 16
    held_out: float | None = None
    pairs: int | None = None

    def resolve(self) -> Self:
        config = super().resolve()
        if config.context is not None and self.variant == "routed":
            raise ValueError(f"task.context={self.context} needs task.variant=combined, not routed: x tells its module")
        context = config.context or ("code" if self.variant == "combined" else None)
        modules = (6 if self.variant == "combined" else 8) if self.modules is None else self.modules
        config = replace(config, context=context, modules=modules)
        for option, (needs, default) in OWN_OPTION.items():
            value, has = getattr(self, option), needs in (self.variant, context)
            if value is not None and not has:
                group = "context" if needs == "pairs" else "variant"
                raise ValueError(f"task.{option}={value} needs task.{group}={needs}, not {getattr(config, group)}")
            config = replace(config, **{option: default if value is None and has else value})
        if self.variant == "combined":
            several, count = math.comb(modules, 2) + math.comb(modules, 3), config.held()
            if not 0 < count < several:
                raise ValueError(
                    f"task.held_out={config.held_out} of the {several + modules} combinations of task.modules={modules}"
                    f" is {count}: hold out 1 to {several - 1}, none of them of one module alone"
                )
        return config

    def held(self) -> int:
        """How many combinations are held out."""
        return round((self.held_out or 0.0) * sum(math.comb(self.modules or 0, size) for size in SIZES))


class Teacher:
    """The modules, drawn once: parts (K,U,d), of the routed variant (K,O,d); which combinations (Z,K) are seen
    in training and which are not; moments: mean (O) and variance of y of both, over 4,096 x."""

    def __init__(self, config: ModulesConfig, generator: torch.Generator):
        K, d = config.modules or 0, config.dimension
        U = config.units or config.outputs
        self.parts_KUd = torch.randn(K, U, d, generator=generator) * (3 / d) ** 0.5  # x has variance 1/3
        x_Nd = torch.rand(4096, d, generator=generator) * 2 - 1
        if config.variant == "routed":
            centres_Kd = torch.randn(K, d, generator=generator)
            self.centres_Kd = centres_Kd / centres_Kd.norm(dim=-1, keepdim=True)  # of one length: nearest is most alike
            answers = [self.routed(x_Nd)]
        else:
            self.readout_OU = torch.randn(config.outputs, U, generator=generator) * (2 / U) ** 0.5
            chosen = [each for size in SIZES for each in itertools.combinations(range(K), size)]
            z_ZK = F.normalize(torch.stack([torch.eye(K)[[*each]].sum(0) for each in chosen]), dim=-1)
            order = K + torch.randperm(len(z_ZK) - K, generator=generator)  # those of one module alone are all seen
            self.unseen = z_ZK[order[: config.held()]]
            self.seen = torch.cat([z_ZK[:K], z_ZK[order[config.held() :]]])
            answers = [self.combined(x_Nd.expand(len(z), -1, -1), z).flatten(0, 1) for z in (self.seen, self.unseen)]
        self.moments = [(y_NO.mean(0), float(y_NO.var(0).mean())) for y_NO in answers]

    def combined(self, x_BTd: Tensor, z_BK: Tensor) -> Tensor:
        """y (B,T,O) of x under the combinations z."""
        weight_BUd = torch.einsum("bk,kud->bud", z_BK.to(x_BTd), self.parts_KUd.to(x_BTd))
        return (x_BTd @ weight_BUd.mT).relu() @ self.readout_OU.to(x_BTd).mT

    def routed(self, x: Tensor) -> Tensor:
        """y (*,O) of x (*,d), each by the module whose centre is the nearest."""
        y_KO = torch.einsum("...d,kod->...ko", x, self.parts_KUd.to(x))
        nearest = (x @ self.centres_Kd.to(x).mT).argmax(-1)
        return torch.take_along_dim(y_KO, nearest[..., None, None], -2).squeeze(-2)

    def fitted(self, x_BCd: Tensor, y_BCO: Tensor) -> Tensor:
        """The combination (B,K) out of all that fits pairs of x and y best."""
        z_ZK = torch.cat([self.seen, self.unseen]).to(x_BCd)
        errors_ZB = [(self.combined(x_BCd, z.expand(len(x_BCd), -1)) - y_BCO).square().sum((1, 2)) for z in z_ZK]
        return z_ZK[torch.stack(errors_ZB).argmin(0)]


class Modules(Task):
    """Predict the numbers y of each x; errors are squared, and divided by the variance of y where reported."""

    Config = ModulesConfig
    main_metric = "nmse"
    labels: ClassVar = {
        "nmse": "test error (squared, over the variance of y)",
        "nmse_without_context": "  with its context removed",
        "nmse_wrong_context": "  with another combination's context",
        "nmse_teacher": "  the teacher, told the modules or fitted to the pairs",
        "nmse_mean": "  predicting the mean",
    }
    unit = "squared error"

    def __init__(self, options: dict[str, Any], seed: int):
        super().__init__(options, seed)
        config = self.config
        contexts = {"code": (1, config.modules), "pairs": (config.pairs, config.outputs), None: (0, 0)}
        self.n_context, self.inputs = contexts[config.context]
        self.token_dim, self.output_dim = self.inputs + config.dimension + 1, config.outputs
        self.tokens = self.n_context + config.queries
        self.independent_queries = self.n_context > 0

    @functools.cached_property
    def teacher(self) -> Teacher:
        """What no model is told."""
        return Teacher(self.config, self.generator("fixed"))

    def batch(self, split: str, k: int, size: int) -> Batch:
        generator, teacher, C = self.generator(split, k), self.teacher, self.n_context
        x_BTd = torch.rand(size, self.tokens, self.config.dimension, generator=generator) * 2 - 1
        one_BT1 = torch.ones(size, self.tokens, 1)  # else the first norm would hide how long x is
        if not C:
            return Batch(torch.cat([x_BTd, one_BT1], -1), teacher.routed(x_BTd), 0)
        pick_B, shift_B = torch.rand(2, size, generator=generator)
        # in the test every other function is of a combination that was never trained on
        group_B = torch.arange(size) % 2 if split == "test" else torch.zeros(size, dtype=torch.long)
        z_BK, other_BK = torch.empty(2, size, self.config.modules)
        for group, z_ZK in enumerate((teacher.seen, teacher.unseen)):
            rows, Z = group_B == group, len(z_ZK)
            index = (pick_B[rows] * Z).long()
            z_BK[rows], other_BK[rows] = z_ZK[index], z_ZK[(index + 1 + (shift_B[rows] * (Z - 1)).long()) % Z]
        y_BTO = teacher.combined(x_BTd, z_BK)
        tokens = torch.cat([torch.zeros(size, self.tokens, self.inputs), x_BTd, one_BT1], -1)
        wrong_BC = tokens[:, :C].clone()
        for context_BC, z in ((tokens[:, :C], z_BK), (wrong_BC, other_BK)):
            if self.config.context == "pairs":
                context_BC[..., : self.inputs] = teacher.combined(x_BTd[:, :C], z)
            else:
                context_BC[:, 0] = F.pad(z, (0, self.config.dimension + 1))
        return Batch(tokens, y_BTO[:, C:], C, wrong_BC, group_B)

    def token_losses(self, output: Tensor, batch: Batch) -> Tensor:
        return (output[:, -batch.targets.shape[1] :] - batch.targets).square().mean(-1)

    def scored(self, batch: Batch) -> Tensor:
        return torch.ones(batch.targets.shape[:2], dtype=torch.bool, device=batch.targets.device)

    def baselines(self) -> dict[str, float]:
        return {"predicting the mean": self.teacher.moments[0][1]}

    def rows(self, batch: Batch) -> Tensor:
        row_N = super().rows(batch)  # of combinations of training: the others are another metric
        return row_N if batch.group is None else row_N[(batch.group == 0)[row_N]]

    def evaluate(self, predict: Predict, batch: Batch) -> dict[str, Tensor]:
        errors, targets = self.errors(predict, batch), batch.targets
        errors["nmse_teacher"] = (self._told(batch) - targets).square().mean(-1)
        values: dict[str, Tensor] = {}
        for group, (mean_O, variance) in enumerate(self.teacher.moments):
            errors["nmse_mean"] = (mean_O.to(targets) - targets).square().mean(-1)
            rows = slice(None) if batch.group is None else batch.group == group
            values |= {f"{name}{PARTS[group]}": error[rows] / variance for name, error in errors.items()}
        return values

    def _told(self, batch: Batch) -> Tensor:
        """Answers (B,Q,O) of who knows the modules, and reads what models read."""
        n, inputs, x_BTd = batch.n_context, self.inputs, batch.tokens[..., self.inputs : -1]
        if not n:
            return self.teacher.routed(x_BTd)
        if self.config.context == "pairs":
            z_BK = self.teacher.fitted(x_BTd[:, :n], batch.tokens[:, :n, :inputs])
        else:
            z_BK = batch.tokens[:, 0, :inputs]
        return self.teacher.combined(x_BTd[:, n:], z_BK)
