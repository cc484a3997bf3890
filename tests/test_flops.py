"""Counted parameters add up, and the formula for FLOPs equals what PyTorch counts, attention scores aside."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

import cases
from cases import FAMILIES, Case, build, options_of
from zoo.models import MODELS, Model
from zoo.models.flops import flops_per_token, parameters

CASES = [case._replace(options=FAMILIES[case.family].countable | case.options) for case in cases.CASES]
CASES += [Case("moe-reference", "moe", "regression", {"backend": "reference"})]
CASES += [Case("moe-shared-context", "moe", "regression", {"backend": "loop", "shared": 2, "route_on": "context"})]
every_case = pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)


def make(family: str, task: str = "regression", task_options: dict[str, Any] | None = None, **options: Any) -> Model:
    arguments = options_of(Case("", family, task, options))
    arguments["task"].update(task_options or {})
    return MODELS[family](**arguments)


def counted(model: Model) -> float:
    """FLOPs per token of a forward pass as PyTorch counts them, attention scores as products of all T×T pairs."""
    tokens, _, n_context = model.task.batch("test", 0, 2)[:3]
    tokens = tokens.double() if tokens.is_floating_point() else tokens
    model.requires_grad_(False)
    # to PyTorch's table
    unknown: dict[Any, Any] = {torch.ops.aten.baddbmm_: lambda y, a, b, **rest: 2 * a[0] * a[1] * a[2] * b[2]}
    # with ones on the diagonal: row t takes t multiply-adds a column
    unknown[torch.ops.aten.linalg_solve_triangular] = lambda a, b, **rest: b[0] * b[1] * (b[1] - 1) * b[2]
    with FlopCounterMode(display=False, custom_mapping=unknown) as counter, sdpa_kernel(SDPBackend.MATH):
        model(tokens, n_context)
    return counter.get_total_flops() / (2 * model.task.tokens)


def pairs(model: Model) -> int:
    """How many (query, key) pairs the mask leaves, from the task's description."""
    C = model.task.n_context
    Q = model.task.tokens - C
    own = Q if model.task.independent_queries else Q * (Q + 1) // 2
    return C * (C + 1) // 2 + own + C * Q * model.decoder.attend_context


@every_case
def test_formula_equals_pytorchs_count(case: Case) -> None:
    # PyTorch counts all T×T scores though a causal kernel needs half: that part is taken out of both and compared
    # with the pairs of the mask. Both leave elementwise work out.
    model = build(case)
    T, D, L = model.task.tokens, model.config.dim, model.config.layers
    scores = 4 * D * L * pairs(model) / T
    assert flops_per_token(model) - scores == pytest.approx(counted(model) - 4 * D * L * T)


@every_case
def test_parts_add_up(case: Case) -> None:
    model = build(case)
    parts = parameters(model)
    total, active = parts.pop("total"), parts.pop("active")
    assert sum(parts.values()) == total == sum(p.numel() for p in model.parameters())
    assert 0 < active <= total
    assert (parts["head"] == 0) == model.config.tied
    family = model.decoder.context_to_delta
    assert (parts["context_to_delta"] == 0) == (family is None or not [*family.parameters()])


@pytest.mark.parametrize(("top_k", "shared"), [(1, 0), (2, 0), (2, 1), (4, 1)])
def test_active_parameters_leave_idle_experts_out(top_k: int, shared: int) -> None:
    counts = parameters(make("moe", top_k=top_k, shared=shared))
    expert = 3 * 16 * 12 * 2  # three matrices in two layers
    assert counts["ffn"] == (4 + shared) * expert
    assert counts["total"] - counts["active"] == (4 - top_k) * expert
