"""Behind the experts: sorting and joining rows is what it says, and what torch.compile needs to know is true."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from cases import Calls
from zoo.core.experts import GROUPED_MATMULS, Combine, Dispatch, loop, sort_by_block

pytestmark = pytest.mark.numeric

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
    torch.library.opcheck(torch.ops.zoo.grouped_mm, (x, weight, offsets), test_utils=tests)
    y = torch.randn(11, O, dtype=dtype)
    torch.library.opcheck(torch.ops.zoo.grouped_mm, (x.detach().mT, y, offsets), test_utils=tests)


def test_one_graph_serves_all_routings() -> None:
    compiled = torch.compile(GROUPED_MATMULS["grouped_op"], fullgraph=True, backend="aot_eager")
    torch._dynamo.reset()
    with torch._dynamo.config.patch(error_on_recompile=True):
        for counts in ([5, 0, 6], [11, 0, 0], [1, 9, 1]):
            x, weight = rows()
            y = compiled(x, weight, torch.tensor(counts))
            torch.testing.assert_close(y, loop(x, weight, torch.tensor(counts)), rtol=0, atol=1e-5)
            y.sum().backward()
            assert x.grad is not None


def chosen(top_k: int) -> tuple[Tensor, Tensor, Tensor]:
    """The choices (T,K) of six tokens among four blocks, their weights, and rows x (T,D)."""
    torch.manual_seed(top_k)
    index = torch.stack([torch.randperm(4)[:top_k] for _ in range(6)])
    return index, torch.rand(6, top_k).double().requires_grad_(), torch.randn(6, 5).double().requires_grad_()


def joined(x_TD: Tensor, weight_TK: Tensor, index_TK: Tensor) -> Tensor:
    order = sort_by_block(index_TK)
    return Combine.apply(Dispatch.apply(x_TD, *order).sin(), weight_TK, *order)


@pytest.mark.parametrize("top_k", [1, 2, 3])
def test_rows_are_sorted_by_block_and_find_their_way_back(top_k: int) -> None:
    index, weight, x = chosen(top_k)
    order = choice, row = sort_by_block(index)
    blocks = [(int(index[t, k]), t) for t in range(6) for k in range(top_k)]
    rows = [(int(index.flatten()[n]), int(n) // top_k) for n in choice]
    assert rows == sorted(blocks)
    assert torch.equal(choice[row].flatten(), torch.arange(6 * top_k))
    assert torch.equal(Dispatch.apply(x, *order), torch.stack([x[t] for _, t in rows]))
    y = torch.randn(6 * top_k, 3).double()
    expected = [sum(weight[t, k] * y[row[t, k]] for k in range(top_k)) for t in range(6)]
    torch.testing.assert_close(Combine.apply(y, weight, *order), torch.stack(expected), rtol=0, atol=1e-14)  # type: ignore


@pytest.mark.parametrize("top_k", [1, 2, 3])
def test_first_and_second_derivatives_of_sorting_and_joining(top_k: int) -> None:
    index, weight, x = chosen(top_k)
    assert torch.autograd.gradcheck(joined, (x, weight, index))
    assert torch.autograd.gradgradcheck(joined, (x, weight, index))


def test_nothing_is_scattered_so_that_any_device_repeats_it_bit_for_bit() -> None:
    index, weight, x = chosen(3)
    with Calls() as seen:
        torch.autograd.grad(joined(x, weight, index).sum(), (x, weight))
    assert "_embedding_bag" in " ".join(seen.count)
    adding = {name for name in seen.count if "index_add" in name or "scatter_add" in name or "index_put" in name}
    assert not adding
    with Calls() as seen:  # what autograd would do
        torch.autograd.grad(x.index_select(0, index[:, 0]).sum(), x)
    assert any("index_add" in name or "scatter_add" in name for name in seen.count)
