"""In-context regression: read pairs (x, y) of an unknown function, answer queries (Garg et al. 2022, arXiv 2208.01066).

    token      0      1    ...   C-1   |   C      C+1   ...
    carries  (x,y)  (x,y)  ...  (x,y)  | (x,0)   (x,0)  ...     Q queries, all at position C, blind to each other

The linear class is the task of "context as a weight update" (Dherin et al. 2025, arXiv 2507.16003).
Axes: B functions, C context pairs, Q queries, T = C + Q, d input dimension, U hidden units of the network class.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any, ClassVar, Literal, Self

import torch
from torch import Tensor

from zoo.tasks.base import Batch, Predict, Task, TaskConfig

OWN_OPTION: dict[str, tuple[str, Any]] = {"sparse": ("nonzero", 1), "noisy": ("noise", 0.5), "network": ("units", 20)}


@dataclass(frozen=True)
class RegressionConfig(TaskConfig):
    """function: linear, y = w·x with w, x ~ N(0, I); sparse, only `nonzero` entries of w; noisy, y + N(0, noise²);
    network, y = √(2/U) W2 relu(W1 x) with `units` hidden units and N(0,1) weights."""

    name: str = "regression"
    function: Literal["linear", "sparse", "noisy", "network"] = "linear"
    dimension: int = 3
    points: int = 20
    queries: int = 8
    nonzero: int | None = None
    noise: float | None = None
    units: int | None = None

    def resolve(self) -> Self:
        config = super().resolve()
        for function, (option, default) in OWN_OPTION.items():
            value = getattr(self, option)
            if value is not None and function != self.function:
                raise ValueError(f"task.{option}={value} needs task.function={function}, not {self.function}")
            if value is None and function == self.function:
                config = replace(config, **{option: default})
        if (config.nonzero or 0) > self.dimension:
            raise ValueError(f"task.nonzero={config.nonzero} exceeds task.dimension={self.dimension}")
        return config


class Regression(Task):
    """Predict y of Q queries from C pairs; errors are squared, and divided by the variance of y where reported."""

    Config = RegressionConfig
    main_metric = "nmse"
    labels: ClassVar = {
        "nmse": "test error (squared, over the variance of y)",
        "nmse_without_context": "  with its context removed",
        "nmse_wrong_context": "  with another function's context",
        "nmse_first": "  with the first of its pairs alone",
        "nmse_ridge": "  ridge regression, closed form",
        "nmse_ridge_first": "  ridge regression on the first pairs",
        "nmse_lasso": "  lasso",
        "nmse_nearest": "  the y of the nearest x",
        "nmse_zero": "  predicting zero",
    }
    unit = "squared error"
    independent_queries = True
    output_dim = 1

    def __init__(self, options: dict[str, Any], seed: int):
        super().__init__(options, seed)
        config = self.config
        self.token_dim = config.dimension + 1
        self.n_context = config.points
        self.tokens = config.points + config.queries
        self.variance = (config.nonzero or config.dimension) + (config.noise or 0.0) ** 2

    def batch(self, split: str, k: int, size: int) -> Batch:
        tokens, targets = self._draw(split, k, size)
        # wrong within the global batch: the control must not depend on how processes share it
        wrong = tokens.roll(1, 0) if size > 1 else self._draw(split, k + 1, 1)[0]
        return Batch(tokens, targets, self.n_context, wrong[:, : self.n_context])

    def _draw(self, split: str, k: int, size: int) -> tuple[Tensor, Tensor]:
        config, generator = self.config, self.generator(split, k)
        x_BTd = torch.randn(size, self.tokens, config.dimension, generator=generator)
        if config.function == "network":
            first_BUd = torch.randn(size, config.units, config.dimension, generator=generator)
            second_BU = torch.randn(size, config.units, generator=generator)
            hidden_BTU = torch.relu(x_BTd @ first_BUd.mT)
            y_BT = (2 / config.units) ** 0.5 * (hidden_BTU @ second_BU[:, :, None]).squeeze(-1)
        else:
            w_Bd = torch.randn(size, config.dimension, generator=generator)
            if config.function == "sparse":
                rank_Bd = torch.rand(size, config.dimension, generator=generator).argsort(-1).argsort(-1)
                w_Bd = w_Bd * (rank_Bd < config.nonzero)
            y_BT = (x_BTd @ w_Bd[:, :, None]).squeeze(-1)
            if config.function == "noisy":
                y_BT = y_BT + config.noise * torch.randn(size, self.tokens, generator=generator)
        tokens = torch.cat([x_BTd, y_BT[:, :, None]], -1)
        tokens[:, self.n_context :, -1] = 0
        return tokens, y_BT[:, self.n_context :]

    def token_losses(self, output: Tensor, batch: Batch) -> Tensor:
        return (output[:, -batch.targets.shape[1] :, 0] - batch.targets).square()

    def baselines(self) -> dict[str, float]:
        return {"predicting zero": float(self.variance)}

    def evaluate(self, predict: Predict, batch: Batch) -> dict[str, Tensor]:
        errors, n, query_BTd = self.errors(predict, batch), batch.n_context, batch.tokens[:, batch.n_context :]
        answers = {"nmse_ridge": self._ridge(batch)}
        for count in sorted({n // 4, n // 2} - {0, n}):
            few = batch._replace(tokens=torch.cat([batch.tokens[:, :count], query_BTd], 1), n_context=count)
            errors[f"nmse_first_{count}"] = self.token_losses(predict(few.tokens, count), few)
            answers[f"nmse_ridge_first_{count}"] = self._ridge(few)
        answers["nmse_nearest"] = _nearest(batch)
        if self.config.function == "sparse":
            answers["nmse_lasso"] = _lasso(batch)
        errors |= {name: (answer - batch.targets).square() for name, answer in answers.items()}
        errors["nmse_zero"] = batch.targets.square()
        return {name: error / self.variance for name, error in errors.items()}

    def _ridge(self, batch: Batch) -> Tensor:
        """Answers (B,Q) by ridge regression on the context: the Bayes optimum for linear and noisy functions."""
        tokens, n = batch.tokens.double(), batch.n_context
        x_BTd, y_BC1 = tokens[..., :-1], tokens[:, :n, -1:]
        x_BCd, penalty = x_BTd[:, :n], max((self.config.noise or 0.0) ** 2, 1e-9)
        gram = x_BCd.mT @ x_BCd + penalty * torch.eye(x_BTd.shape[-1], dtype=torch.float64, device=tokens.device)
        return (x_BTd[:, n:] @ torch.linalg.solve(gram, x_BCd.mT @ y_BC1)).squeeze(-1)


def _nearest(batch: Batch) -> Tensor:
    """Answers (B,Q) of the nearest neighbour: the y of the pair whose x is the closest."""
    x_BTd, n = batch.tokens[..., :-1].float(), batch.n_context
    return batch.tokens[:, :n, -1].gather(1, torch.cdist(x_BTd[:, n:], x_BTd[:, :n]).argmin(-1))


def _lasso(batch: Batch, penalty: float = 0.01, steps: int = 500) -> Tensor:
    """Answers (B,Q) by the w that minimises |y - Xw|²/2n + penalty·|w|₁, found by iterative soft thresholding with
    momentum (FISTA: Beck & Teboulle 2009)."""
    tokens, n = batch.tokens.double(), batch.n_context
    x_BTd, y_BC1 = tokens[..., :-1], tokens[:, :n, -1:]
    x_BCd = x_BTd[:, :n]
    gram_Bdd, xy_Bd1 = x_BCd.mT @ x_BCd / n, x_BCd.mT @ y_BC1 / n
    rate_B11 = 1 / torch.linalg.matrix_norm(gram_Bdd, 2, keepdim=True)
    w_Bd1 = ahead_Bd1 = torch.zeros_like(xy_Bd1)
    for step in range(steps):
        old_Bd1, moved_Bd1 = w_Bd1, ahead_Bd1 - rate_B11 * (gram_Bdd @ ahead_Bd1 - xy_Bd1)
        w_Bd1 = moved_Bd1.sign() * (moved_Bd1.abs() - rate_B11 * penalty).clamp(min=0)
        ahead_Bd1 = w_Bd1 + step / (step + 3) * (w_Bd1 - old_Bd1)
    return (x_BTd[:, n:] @ w_Bd1).squeeze(-1)
