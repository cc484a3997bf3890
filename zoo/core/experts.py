"""Rows sorted by the block they chose, and interchangeable ways to multiply each with the matrix of its block.

Axes: T tokens, K blocks chosen by each, N = T·K rows sorted by block, E blocks, D width of a row, F hidden units of a
block; i inputs and o outputs of one of its matrices.
"""

from __future__ import annotations

from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor


def loop(x_Ni: Tensor, weight_Eio: Tensor, counts_E: Tensor) -> Tensor:
    """One product per block, any dtype; reads the counts on the host."""
    # unbind, not weight[e]: the backward of a select writes zeros of the whole stack for every block
    parts = zip(x_Ni.split(counts_E.tolist()), weight_Eio.unbind(0), strict=True)
    return torch.cat([part @ weight for part, weight in parts])


# torch 2.13 can trace F.grouped_mm in bfloat16 alone: its shapes and its gradient are stated here
@torch.library.custom_op("zoo::grouped_mm", mutates_args=())
def traceable(a: Tensor, b: Tensor, offs: Tensor) -> Tensor:
    """Rows (N,i) times matrices (E,i,o): (N,o); columns (i,N) times rows (N,o), block by block: (E,i,o)."""
    return F.grouped_mm(a, b, offs=offs)


@traceable.register_fake
def _(a: Tensor, b: Tensor, offs: Tensor) -> Tensor:
    blocks = offs.shape if a.dim() == b.dim() == 2 else ()
    return a.new_empty(*blocks, a.shape[-2], b.shape[-1])


def _backward(ctx: Any, dy_No: Tensor) -> tuple[Tensor | None, Tensor | None, None]:
    x_Ni, weight_Eio, offs_E = ctx.saved_tensors
    dy_No = dy_No.contiguous()  # the kernel wants rows of whole 16 bytes
    dx_Ni = traceable(dy_No, weight_Eio.mT, offs_E) if ctx.needs_input_grad[0] else None
    dweight_Eio = traceable(x_Ni.mT, dy_No, offs_E) if ctx.needs_input_grad[1] else None
    return dx_Ni, dweight_Eio, None


traceable.register_autograd(_backward, setup_context=lambda ctx, inputs, output: ctx.save_for_backward(*inputs))


def grouped(x_Ni: Tensor, weight_Eio: Tensor, counts_E: Tensor, kernel: Any = F.grouped_mm) -> Tensor:
    """One kernel for all blocks, which does not take part in autocast by itself."""
    dtype = product_dtype(x_Ni)
    return kernel(x_Ni.to(dtype), weight_Eio.to(dtype), offs=counts_E.cumsum(0, dtype=torch.int32))


GROUPED_MATMULS: dict[str, Any] = {"loop": loop, "grouped": grouped, "grouped_op": partial(grouped, kernel=traceable)}
"""From rows x (N,i), matrices (E,i,o) and the number of rows of each block (E) to (N,o)."""


def sort_by_block(index_TK: Tensor) -> tuple[Tensor, Tensor]:
    """Rows by the block that they chose, those of one block as the tokens stand: the choice t·K + k of each row, (N),
    and its inverse, the row of each choice, (T,K)."""
    choice_N = index_TK.flatten().argsort(stable=True)
    row_N = torch.empty_like(choice_N).scatter_(0, choice_N, torch.arange(len(choice_N), device=choice_N.device))
    return choice_N, row_N.view(index_TK.shape)


# The gradients of the next two gather too. Autograd would scatter: slower, and on a GPU in any order.
class Dispatch(torch.autograd.Function):
    """Each token's row once for each of its choices, sorted: apply(x_TD, *order) gives (N,D)."""

    @staticmethod
    def forward(ctx: Any, x_TD: Tensor, choice_N: Tensor, row_TK: Tensor) -> Tensor:
        ctx.save_for_backward(row_TK)
        return x_TD.index_select(0, choice_N // row_TK.shape[1])

    @staticmethod
    def backward(ctx: Any, dx_ND: Tensor) -> tuple[Tensor, None, None]:
        (row_TK,) = ctx.saved_tensors
        return F.embedding_bag(row_TK, dx_ND, mode="sum"), None, None


class Combine(torch.autograd.Function):
    """The weighted sum of the rows of each token: apply(y_ND, weight_TK, *order) gives (T,D)."""

    @staticmethod
    def forward(ctx: Any, y_ND: Tensor, weight_TK: Tensor, choice_N: Tensor, row_TK: Tensor) -> Tensor:
        ctx.save_for_backward(y_ND, weight_TK, choice_N, row_TK)
        return F.embedding_bag(row_TK, y_ND, mode="sum", per_sample_weights=weight_TK)

    @staticmethod
    def backward(ctx: Any, dy_TD: Tensor) -> tuple[Tensor, Tensor, None, None]:
        y_ND, weight_TK, choice_N, row_TK = ctx.saved_tensors
        dy_ND = dy_TD.index_select(0, choice_N // row_TK.shape[1])
        dweight_TK = (dy_ND * y_ND).sum(-1).index_select(0, row_TK.flatten()).view(row_TK.shape)
        weight_N1 = weight_TK.flatten().index_select(0, choice_N)[:, None]
        scaled_ND = dy_ND * weight_N1 if torch.is_grad_enabled() else dy_ND.mul_(weight_N1)
        return scaled_ND, dweight_TK, None, None


def product_dtype(x: Tensor) -> torch.dtype:
    """The dtype in which a matrix product with x is computed here."""
    device = x.device.type
    return torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else x.dtype


def backend_for(x: Tensor, sizes: tuple[int, ...], wanted: str = "auto") -> str:
    """The one of GROUPED_MATMULS that is wanted, auto: the fastest, for rows like x and matrices of sides `sizes`; loop
    where the kernel cannot: it wants rows of whole 16 bytes and at least one of them."""
    dtype = product_dtype(x)
    known = dtype != torch.float64 and x.device.type in ("cpu", "cuda")
    aligned = all(size * dtype.itemsize % 16 == 0 for size in sizes)
    if wanted == "loop" or not (known and aligned and x.numel()):
        return "loop"
    return "grouped_op" if torch.compiler.is_compiling() or wanted == "grouped_op" else "grouped"


def swiglu(x_ND: Tensor, counts_E: Tensor, backend: str, gate: Tensor, up: Tensor, down: Tensor) -> Tensor:
    """down_e · (silu(gate_e x) ∘ up_e x) of rows x sorted by block, with matrices (E·F,D)."""
    gate_EFD, up_EFD, down_EFD = (w.unflatten(0, (len(counts_E), -1)) for w in (gate, up, down))
    product = GROUPED_MATMULS[backend_for(x_ND, down_EFD.shape[1:], backend)]
    h_NF = F.silu(product(x_ND, gate_EFD.mT, counts_E)) * product(x_ND, up_EFD.mT, counts_E)
    return product(h_NF, down_EFD, counts_E)
