"""Whether torch itself takes the code apart: then gradients of our own, which serve ordinary training, step aside."""

from __future__ import annotations

import torch
from torch.autograd import forward_ad


def transformed() -> bool:
    """Whether a transform of torch.func, or forward mode, is at work; asked in every layer, so it takes 0.3 µs."""
    if torch.compiler.is_compiling():  # what is compiled inside a transform is not looked into
        return False
    return torch._C._are_functorch_transforms_active() or forward_ad._current_level >= 0
