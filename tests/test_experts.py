"""The operators behind the experts: what torch.compile needs to know of them is true."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from zoo.experts import PRODUCTS, grouped_op, loop

E, I, O = 3, 16, 8  # noqa: E741
COUNTS = torch.tensor([5, 0, 6])


def rows(dtype: torch.dtype = torch.float32) -> tuple[Tensor, Tensor]:
    torch.manual_seed(0)
    shapes = ((11, I), (E, I, O))
    return tuple(torch.randn(*shape, dtype=dtype).requires_grad_() for shape in shapes)  # type: ignore[return-value]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_opcheck(dtype: torch.dtype) -> None:
    x, weight = rows(dtype)
    offsets = COUNTS.cumsum(0, dtype=torch.int32)
    tests = ("test_schema", "test_autograd_registration", "test_faketensor", "test_aot_dispatch_dynamic")
    torch.library.opcheck(torch.ops.zoo.rows_by_blocks, (x, weight, offsets), test_utils=tests)
    y = torch.randn(11, O, dtype=dtype)
    torch.library.opcheck(torch.ops.zoo.blocks_of_rows, (x.detach(), y, offsets), test_utils=tests[::2])


@pytest.mark.parametrize("name", ["grouped", "grouped_op"])
def test_gradients_are_those_of_the_loop(name: str) -> None:
    gradients = []
    for product in (loop, PRODUCTS[name]):
        x, weight = rows()
        y = product(x, weight.mT.contiguous().mT, COUNTS)
        y.square().sum().backward()
        gradients.append((y.detach(), x.grad, weight.grad))
    torch.testing.assert_close(*gradients, rtol=0, atol=1e-5)
    assert not gradients[1][2][1].any()  # the block without rows


def test_one_graph_serves_all_routings() -> None:
    compiled = torch.compile(grouped_op, fullgraph=True, backend="aot_eager")
    torch._dynamo.reset()
    with torch._dynamo.config.patch(error_on_recompile=True):
        for counts in ([5, 0, 6], [11, 0, 0], [1, 9, 1]):
            x, weight = rows()
            y = compiled(x, weight, torch.tensor(counts))
            torch.testing.assert_close(y, loop(x, weight, torch.tensor(counts)), rtol=0, atol=1e-5)
            y.sum().backward()
            assert x.grad is not None
