"""Sample queries after one context, for whatever is fitted on many queries of the same context.

Axes: K samples, n tokens of the context, T tokens, d input dimension.
"""

from __future__ import annotations

import torch
from torch import Tensor

from zoo.core.layers import FILLING
from zoo.tasks import Task


def cut(tokens: Tensor, n_context: int) -> Tensor:
    """The tokens up to where filling begins in one of the rows after its context."""
    if tokens.is_floating_point():
        return tokens
    return tokens[:, : n_context + int((tokens[:, n_context:] != FILLING).sum(1).min())]


def sample_queries(
    task: Task, context: Tensor, count: int, split: str = "train", k: int = 0, length: int | None = None
) -> Tensor:
    """The tokens of `context` (n) or (n,token_dim), each followed by queries of the task's batch k of `split`.

    Queries blind to each other share one row (1,n+count,token_dim): fresh inputs (x, 0). Text has one row per query
    (count,n+length): the first `length` tokens (None: 16, or all) of a sequence, or of what follows its separate
    context, fewer where one of them is shorter. Raises ValueError for queries that are longer than that.
    """
    if task.independent_queries:
        inputs_Kd = task.batch(split, k, -(-count // task.tokens)).tokens.flatten(0, 1)[:count].clone()
        inputs_Kd[:, -1] = 0
        return torch.cat([context, inputs_Kd.to(context)])[None]
    longest = task.tokens - task.n_context
    length = min(16, longest) if length is None else length
    if not 0 < length <= longest:
        raise ValueError(f"length={length} must lie between 1 and {longest}, the tokens of a query in this task")
    windows_KT = cut(task.batch(split, k, count).tokens, task.n_context)[:, task.n_context :][:, :length].to(context)
    return torch.cat([context.expand(count, -1), windows_KT], 1)
