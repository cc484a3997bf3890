"""RMSNorm: its own gradient is that of torch's composition, in fewer passes over memory."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from zoo.bench.timing import saved_bytes
from zoo.core.norm import RMSNorm, _RMSNorm

pytestmark = pytest.mark.numeric

D = 8


def drawn(dtype: torch.dtype = torch.float64) -> tuple[RMSNorm, Tensor]:
    norm = RMSNorm(D, eps=1e-3).to(dtype)
    torch.nn.init.normal_(norm.weight)
    return norm, torch.randn(2, 3, D, dtype=torch.float64).to(dtype).requires_grad_()


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=str)
@pytest.mark.parametrize("shape", [(2, 3, D), (5, D), (D,)], ids=str)
def test_value_and_gradients_are_those_of_torch(dtype: torch.dtype, shape: tuple[int, ...]) -> None:
    norm, _ = drawn(dtype)
    x, dy = (torch.randn(*shape, dtype=dtype, requires_grad=True) for _ in range(2))
    theirs = F.rms_norm(x, (D,), norm.weight, 1e-3)
    torch.testing.assert_close(norm(x), theirs)
    ours = torch.autograd.grad(norm(x), (x, norm.weight), dy)
    torch.testing.assert_close(ours, torch.autograd.grad(theirs, (x, norm.weight), dy))


def test_first_and_second_derivatives_by_finite_differences() -> None:
    norm, x = drawn()
    for case in (x, 1e-2 * x.detach()):  # where eps does not matter, and where it does
        inputs = (case.requires_grad_(), norm.weight)
        assert torch.autograd.gradcheck(lambda x, weight: _RMSNorm.apply(x, weight, 1e-3), inputs)
        assert torch.autograd.gradgradcheck(lambda x, weight: _RMSNorm.apply(x, weight, 1e-3), inputs)


def test_it_squares_in_float32() -> None:
    norm, x = RMSNorm(D), torch.full((1, D), 300.0, dtype=torch.float16)  # 300² is beyond float16
    assert norm(x).dtype == torch.float16
    torch.testing.assert_close(norm(x), torch.ones_like(x))


def test_it_keeps_less_than_torch() -> None:
    x, weight = torch.randn(1000, D, requires_grad=True), torch.ones(D, requires_grad=True)
    ours = saved_bytes(lambda: _RMSNorm.apply(x, weight, 1e-3))
    assert ours < saved_bytes(lambda: F.rms_norm(x, (D,), weight, 1e-3))
