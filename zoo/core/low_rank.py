"""The product of a linear map under low-rank updates, with a gradient of its own; when such gradients step aside.

Axes: `*` one or more leading dims, N = all of them as one, an update for each; T tokens that share an update, R rank;
o outputs and i inputs of the map.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd import forward_ad

from zoo.core.experts import product_dtype


def transformed() -> bool:
    """Whether a transform of torch.func, or forward mode, is at work, in which gradients of our own cannot take part;
    asked in every layer, so it takes 0.3 µs."""
    if torch.compiler.is_compiling():  # what is compiled inside a transform is not looked into
        return False
    return torch._C._are_functorch_transforms_active() or forward_ad._current_level >= 0


def low_rank_linear(W: Tensor, x: Tensor, u: Tensor, v: Tensor, gate: Tensor | None) -> Tensor:
    """W x + u (gate ∘ vᵀx) for W (o,i), x (*,T,i), u (*,o,R), v (*,i,R), gate (*,T,R): (*,T,o).

    Differentiable in reverse mode, any number of times; not where `transformed`.
    """
    if x.dim() > 3:
        x_NTi, u, v = (t.flatten(0, -3) for t in (x, u, v))
        return low_rank_linear(W, x_NTi, u, v, gate if gate is None else gate.flatten(0, -3)).unflatten(0, x.shape[:-2])
    if torch.is_autocast_enabled(x.device.type):  # which does not reach a gradient that is not autograd's
        dtype = product_dtype(x)
        W, x, u, v = (t.to(dtype) for t in (W, x, u, v))
        gate = gate if gate is None else gate.to(dtype)
    return _LowRankLinear.apply(W, x, u, v, gate)


class _LowRankLinear(torch.autograd.Function):
    """Adds the update within the memory of the larger product, in both directions.

    Autograd would add the gradients that x has through W and through v in a further pass over them.
    """

    @staticmethod
    def forward(ctx: Any, W: Tensor, x_NTi: Tensor, u_NoR: Tensor, v_NiR: Tensor, gate_NTR: Tensor | None) -> Tensor:
        seen_NTR = torch.bmm(x_NTi, v_NiR)
        ctx.save_for_backward(W, x_NTi, u_NoR, v_NiR, gate_NTR, seen_NTR)
        code_NTR = seen_NTR if gate_NTR is None else seen_NTR * gate_NTR
        return F.linear(x_NTi, W).baddbmm_(code_NTR, u_NoR.mT)

    @staticmethod
    def backward(ctx: Any, dy_NTo: Tensor) -> tuple[Tensor | None, ...]:
        W, x_NTi, u_NoR, v_NiR, gate_NTR, seen_NTR = ctx.saved_tensors
        need_W, need_x, _, _, need_gate = ctx.needs_input_grad
        if torch.is_grad_enabled():  # a second derivative goes through this product too
            seen_NTR = torch.bmm(x_NTi, v_NiR)
        dcode_NTR = torch.bmm(dy_NTo, u_NoR)
        code_NTR, dseen_NTR = seen_NTR, dcode_NTR
        if gate_NTR is not None:
            code_NTR, dseen_NTR = seen_NTR * gate_NTR, dcode_NTR * gate_NTR
        # in this order each product finds what it reads in the cache, and dx is still there for whoever reads it next
        du_NoR = torch.bmm(code_NTR.mT, dy_NTo).mT  # products with few rows are faster than those with few columns
        dW = dy_NTo.flatten(0, 1).mT @ x_NTi.flatten(0, 1) if need_W else None
        dv_NiR = torch.bmm(dseen_NTR.mT, x_NTi).mT
        dgate_NTR = dcode_NTR * seen_NTR if need_gate else None
        dx_NTi = (dy_NTo @ W).baddbmm_(dseen_NTR, v_NiR.mT) if need_x else None
        return dW, dx_NTi, du_NoR, dv_NiR, dgate_NTR
