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
    # unknown to PyTorch's table
    in_place = {torch.ops.aten.baddbmm_: lambda y, a, b, **rest: 2 * a[0] * a[1] * a[2] * b[2]}
    with FlopCounterMode(display=False, custom_mapping=in_place) as counter, sdpa_kernel(SDPBackend.MATH):
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
    assert (parts["context_to_delta"] == 0) == (model.decoder.context_to_delta is None)


@pytest.mark.parametrize(("top_k", "shared"), [(1, 0), (2, 0), (2, 1), (4, 1)])
def test_active_parameters_leave_idle_experts_out(top_k: int, shared: int) -> None:
    counts = parameters(make("moe", top_k=top_k, shared=shared))
    expert = 3 * 16 * 12 * 2  # three matrices in two layers
    assert counts["ffn"] == (4 + shared) * expert
    assert counts["total"] - counts["active"] == (4 - top_k) * expert


def test_experts_cost_what_is_chosen() -> None:
    one, two = (flops_per_token(make("moe", top_k=k)) for k in (1, 2))
    assert two - one == pytest.approx(2 * 3 * 16 * 12 * 2)
    assert flops_per_token(make("moe", experts=8)) - two == pytest.approx(2 * 2 * 16 * 4)  # the router's rows


def test_the_reference_backend_costs_all_experts() -> None:
    loop, reference = (make("moe", backend=backend) for backend in ("loop", "reference"))
    idle = 2 * 2 * 3 * 16 * 12 * 2
    assert counted(reference.double()) - counted(loop.double()) == pytest.approx(idle)
    assert flops_per_token(reference) - flops_per_token(loop) == pytest.approx(idle)
    assert parameters(reference) == parameters(loop)


def generation(model: Model) -> float:
    """FLOPs per token of making ΔW: what is left when applying it, the limit of many queries, is taken out."""
    context_to_delta = model.decoder.context_to_delta
    assert context_to_delta
    return context_to_delta.flops_per_token(model.task.tokens, 0) - context_to_delta.flops_per_token(10**12, 0)


def test_generation_is_shared_by_all_tokens_of_a_context() -> None:
    few, many = (make("hypernet", task_options={"points": 4, "queries": n}) for n in (6, 16))
    assert generation(few) == pytest.approx(2 * generation(many), rel=1e-6)
    per_context = 2 * 2 * (16 * 8 + 3 * 8 * 4 * (16 + 24))  # encoder and six heads of rank 4, two layers
    assert generation(many) * 20 == pytest.approx(per_context, rel=1e-6)


def test_generation_is_shared_by_the_tokens_of_a_chunk() -> None:
    def context_to_delta(**options: Any) -> float:
        model = make("hypernet", "noise", **options)
        assert model.decoder.context_to_delta
        return model.decoder.context_to_delta.flops_per_token(12, 0)

    every_token = context_to_delta(context="token")
    assert context_to_delta(context="running") == every_token
    applied = 2 * 2 * 3 * 4 * (16 + 24)
    assert every_token - applied == pytest.approx(4 * (context_to_delta(chunk=4) - applied))
    assert every_token - applied == pytest.approx(2 * (context_to_delta(chunk=2) - applied))


@pytest.mark.parametrize("rank", [2, 4])
def test_twice_the_rank_costs_the_predicted_difference(rank: int) -> None:
    half, whole = (make("hypernet", rank=r) for r in (rank, 2 * rank))
    D, F, C, L, T = 16, 24, 8, 2, 12
    more = 3 * rank * (D + F)  # entries of the factors of three matrices
    assert flops_per_token(whole) - flops_per_token(half) == pytest.approx(L * (2 * C * more / T + 2 * more))
    assert parameters(whole)["total"] - parameters(half)["total"] == C * more
