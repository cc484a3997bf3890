"""Products of rows with the matrix of their block, the rows sorted by block: interchangeable ways to compute them.

Axes: N rows sorted by block, E blocks, i inputs, o outputs of one block.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

Product = Callable[[Tensor, Tensor, Tensor], Tensor]
"""From rows x (N,i), matrices (E,i,o) and the number of rows of each block (E) to (N,o)."""


def loop(x_Ni: Tensor, weight_Eio: Tensor, counts_E: Tensor) -> Tensor:
    """One product per block, any dtype; reads the counts on the host."""
    # unbind, not weight[e]: the backward of a select writes zeros of the whole stack for every block
    parts = zip(x_Ni.split(counts_E.tolist()), weight_Eio.unbind(0), strict=True)
    return torch.cat([part @ weight for part, weight in parts])


def grouped(x_Ni: Tensor, weight_Eio: Tensor, counts_E: Tensor) -> Tensor:
    """One kernel for all blocks."""
    dtype = product_dtype(x_Ni)  # grouped_mm does not take part in autocast
    return F.grouped_mm(x_Ni.to(dtype), weight_Eio.to(dtype), offs=counts_E.cumsum(0, dtype=torch.int32))


def grouped_op(x_Ni: Tensor, weight_Eio: Tensor, counts_E: Tensor) -> Tensor:
    """The same kernel as an operator that torch.compile takes as it is, in every dtype it knows."""
    dtype = product_dtype(x_Ni)
    return _rows_by_blocks(x_Ni.to(dtype), weight_Eio.to(dtype), counts_E.cumsum(0, dtype=torch.int32))


# torch 2.13 can trace F.grouped_mm in bfloat16 alone: its shapes and its gradient are stated here
@torch.library.custom_op("zoo::rows_by_blocks", mutates_args=())
def _rows_by_blocks(x_Ni: Tensor, weight_Eio: Tensor, offsets_E: Tensor) -> Tensor:
    return F.grouped_mm(x_Ni, weight_Eio, offs=offsets_E)


@_rows_by_blocks.register_fake
def _(x_Ni: Tensor, weight_Eio: Tensor, offsets_E: Tensor) -> Tensor:
    return x_Ni.new_empty(x_Ni.shape[0], weight_Eio.shape[2])


@torch.library.custom_op("zoo::blocks_of_rows", mutates_args=())
def _blocks_of_rows(x_Ni: Tensor, y_No: Tensor, offsets_E: Tensor) -> Tensor:
    """Σ x yᵀ over the rows of each block, (E,i,o)."""
    return F.grouped_mm(x_Ni.mT, y_No, offs=offsets_E)


@_blocks_of_rows.register_fake
def _(x_Ni: Tensor, y_No: Tensor, offsets_E: Tensor) -> Tensor:
    return x_Ni.new_empty(offsets_E.shape[0], x_Ni.shape[1], y_No.shape[1])


def _remember(ctx: Any, inputs: tuple[Tensor, ...], output: Tensor) -> None:
    ctx.save_for_backward(*inputs)


def _backward(ctx: Any, dy_No: Tensor) -> tuple[Tensor | None, Tensor | None, None]:
    x_Ni, weight_Eio, offsets_E = ctx.saved_tensors
    dy_No = dy_No.contiguous()  # the kernel wants rows of whole 16 bytes
    dx_Ni = _rows_by_blocks(dy_No, weight_Eio.mT, offsets_E) if ctx.needs_input_grad[0] else None
    dweight_Eio = _blocks_of_rows(x_Ni, dy_No, offsets_E) if ctx.needs_input_grad[1] else None
    return dx_Ni, dweight_Eio, None


_rows_by_blocks.register_autograd(_backward, setup_context=_remember)

PRODUCTS: dict[str, Product] = {"loop": loop, "grouped": grouped, "grouped_op": grouped_op}


def product_dtype(x: Tensor) -> torch.dtype:
    """The dtype in which a matrix product with x is computed here."""
    device = x.device.type
    return torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else x.dtype


def backend_for(x: Tensor, sizes: tuple[int, ...]) -> str:
    """The fastest of PRODUCTS for rows like x and matrices whose sides are `sizes`.

    The kernel knows no float64 and no other devices, and wants rows of whole 16 bytes and at least one of them.
    """
    dtype = product_dtype(x)
    if (
        dtype == torch.float64
        or x.device.type not in ("cpu", "cuda")
        or any(size * dtype.itemsize % 16 for size in sizes)
        or not x.numel()
    ):
        return "loop"
    return "grouped_op" if torch.compiler.is_compiling() else "grouped"
