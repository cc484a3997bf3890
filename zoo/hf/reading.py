"""A foreign model beside a text, as the figures of the lens look at our own models and their tasks.

Axes: B sequences, T tokens.
"""

from __future__ import annotations

from collections.abc import Iterable
from functools import partial
from types import SimpleNamespace
from typing import Self

import torch

from zoo.hf.wrapped import Wrapped
from zoo.lens import figures
from zoo.lens.report import Makers
from zoo.tasks import Batch

TOKENS = 64
FIGURES: Makers = {
    "law-residuals": partial(figures.law_residuals, size=2, queries=1),
    "norms-and-alignment": partial(figures.norms_and_alignment, size=4, queries=4),
    "changed-experts": partial(figures.changed_experts, size=16),
    "expert-use": partial(figures.expert_use, size=16),
    "generation-strip": partial(figures.generation_strip, lines=2, prompt=32),
}
"""Of a model of millions of weights: matrices are formed for few queries."""


class Text:
    """Stretches of a text as batches; the context is the first half of each."""

    n_context, independent_queries, has_text = 0, False, True

    def __init__(self, model: Wrapped, ids: list[int], name: str):
        self.config, self.model = SimpleNamespace(name=f"text {name}"), model
        self.tokens = min(TOKENS, len(ids) // 2)
        if self.tokens < 16:
            raise ValueError(f"--text {name} is of {len(ids)} tokens: 32 at least are needed")
        self.ids = torch.tensor(ids, device=model.device)

    def batch(self, split: str, k: int, size: int) -> Batch:
        """Stretches at even distances, others for each k."""
        places = len(self.ids) - self.tokens + 1
        start_B = ((torch.arange(size) + k * size) * 0.6180339887 % 1 * places).long()
        tokens_BT = self.ids[start_B[:, None] + torch.arange(self.tokens)]
        return Batch(tokens_BT, tokens_BT[:, 1:], 0)

    def decode(self, ids: Iterable[int]) -> bytes:
        return self.model.tokenizer.decode(list(ids)).encode()


class Reading(Wrapped):
    """A wrapped model with a text to read."""

    task: Text

    def about(self, ids: list[int], name: str) -> Self:
        self.task = Text(self, ids, name)
        return self

    def to(self, dtype: torch.dtype) -> Self:
        self.model.to(dtype).set_experts_implementation("eager")  # whose other kernels know no float64
        return self
