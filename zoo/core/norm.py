"""RMSNorm, on a CPU with a gradient of its own.

Axes: `*` leading dims, D width.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from zoo.core.low_rank import transformed


class RMSNorm(nn.Module):
    """x / rms(x) · weight over the last axis, in at least float32 (Zhang & Sennrich 2019, arXiv 1910.07467)."""

    def __init__(self, dim: int, eps: float = 1e-6):
        super().__init__()
        self.weight = nn.Parameter(torch.ones(dim))
        self.eps = eps

    def forward(self, x: Tensor) -> Tensor:
        dtype = torch.promote_types(x.dtype, torch.float32)
        wide, weight = x.to(dtype), self.weight.to(dtype)
        if x.device.type == "cpu" and not torch.compiler.is_compiling() and not transformed():
            if not torch.is_grad_enabled():
                return (wide * inverse_rms(wide, self.eps)).mul_(weight).to(x.dtype)
            return _RMSNorm.apply(wide, weight, self.eps).to(x.dtype)
        return F.rms_norm(wide, x.shape[-1:], weight, self.eps).to(x.dtype)  # one kernel


class _RMSNorm(torch.autograd.Function):
    """In half the passes over memory that torch's composition of small operators takes on a CPU."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, eps: float) -> Tensor:
        scale, ctx.eps = inverse_rms(x, eps), eps
        ctx.save_for_backward(x, weight, scale)
        return x * scale * weight

    @staticmethod
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor, Tensor, None]:
        x, weight, scale = ctx.saved_tensors
        if torch.is_grad_enabled():  # a second derivative goes through it too
            scale = inverse_rms(x, ctx.eps)
        product = (dy * x).reshape(-1, x.shape[-1])
        dscale = (product @ weight).view(scale.shape)
        dx = (dy * weight).mul_(scale).addcmul_(x, dscale * scale**3, value=-1 / x.shape[-1])
        return dx, scale.flatten() @ product, None


def inverse_rms(x: Tensor, eps: float) -> Tensor:
    """1 / rms(x), (*,1)."""
    norm = torch.linalg.vector_norm(x, dim=-1, keepdim=True)
    return torch.addcmul(x.new_full((), eps), norm, norm, value=1 / x.shape[-1]).rsqrt()
