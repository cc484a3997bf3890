"""The product under a low-rank update: its own gradient is that of the plain formula, and costs what it says."""

from __future__ import annotations

from collections import Counter
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from cases import Calls
from zoo.core.low_rank import low_rank_linear

pytestmark = pytest.mark.numeric

OUT, IN, T, R = 6, 5, 4, 2
LEADS = {"sequences": (3,), "chunks": (3, 2), "one chunk": (3, 1), "tokens": (2, 3)}
every_lead = pytest.mark.parametrize("lead", LEADS.values(), ids=LEADS)
with_and_without_gate = pytest.mark.parametrize("gate", [False, True], ids=["no gate", "gate"])


def inputs(lead: tuple[int, ...], gate: bool, dtype: torch.dtype = torch.float64) -> tuple[Tensor | None, ...]:
    shapes = [(OUT, IN), (*lead, T, IN), (*lead, OUT, R), (*lead, IN, R), (*lead, T, R)]
    drawn = [torch.randn(*shape, dtype=dtype, requires_grad=True) for shape in shapes]
    return (*drawn[:4], drawn[4] if gate else None)


def plain(W: Tensor, x: Tensor, u: Tensor, v: Tensor, gate: Tensor | None) -> Tensor:
    code = x @ v
    return F.linear(x, W) + (code if gate is None else code * gate) @ u.mT


@every_lead
@with_and_without_gate
def test_value_and_gradients_are_those_of_the_plain_formula(lead: tuple[int, ...], gate: bool) -> None:
    given = inputs(lead, gate)
    leaves = [t for t in given if t is not None]
    dy = torch.randn(*lead, T, OUT, dtype=torch.float64)
    ours, theirs = low_rank_linear(*given), plain(*given)  # type: ignore[arg-type]
    torch.testing.assert_close(ours, theirs, rtol=0, atol=1e-13)
    for actual, expected in zip(
        torch.autograd.grad(ours, leaves, dy), torch.autograd.grad(theirs, leaves, dy), strict=True
    ):
        assert expected.abs().max() > 1e-2
        torch.testing.assert_close(actual, expected, rtol=0, atol=1e-13)


@every_lead
@with_and_without_gate
def test_first_and_second_derivatives_by_finite_differences(lead: tuple[int, ...], gate: bool) -> None:
    assert torch.autograd.gradcheck(low_rank_linear, inputs(lead, gate), fast_mode=True)
    assert torch.autograd.gradgradcheck(low_rank_linear, inputs(lead, gate), fast_mode=True)


@with_and_without_gate
def test_autocast_reaches_the_gradients(gate: bool) -> None:
    given = inputs((3,), gate, torch.float32)
    leaves = [t for t in given if t is not None]
    results = []
    for function in (low_rank_linear, plain):
        with torch.autocast("cpu", torch.bfloat16):
            y = function(*given)  # type: ignore[operator]
        assert y.dtype == torch.bfloat16
        results.append((y.float(), *torch.autograd.grad(y.float().square().sum(), leaves)))
    for ours, theirs in zip(*results, strict=True):
        assert ours.dtype == torch.float32
        assert 0 < (ours - theirs).norm() / theirs.norm() < 0.02 or torch.equal(ours, theirs)


def calls(function: Any, given: tuple[Any, ...], leaves: list[Tensor]) -> Counter[str]:
    with Calls() as seen:
        torch.autograd.grad(function(*given), leaves, torch.ones(3, T, OUT, dtype=torch.float64))
    return seen.count


def test_nothing_is_added_in_a_pass_of_its_own() -> None:
    given = inputs((3,), False)
    ours, theirs = (calls(f, given, list(given[:4])) for f in (low_rank_linear, plain))  # type: ignore[arg-type]
    assert ours["add"] == ours["add_"] == 0
    assert ours["baddbmm_"] == 2
    assert theirs["add"] + theirs["add_"] == 2  # the output, and the gradient of x


def test_a_frozen_matrix_costs_no_product() -> None:
    W, x, u, v, _ = inputs((3,), False)
    assert W is not None
    assert x is not None
    read = [(W, x), (W.detach(), x), (W.detach(), x.detach())]
    count = [calls(low_rank_linear, (*pair, u, v, None), [u, v])["mm"] for pair in read]  # type: ignore[list-item]
    assert count == [3, 2, 1]  # Wx; the gradient of x; that of W
