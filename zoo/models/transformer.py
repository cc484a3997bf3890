"""The baseline: a plain transformer, whose attention turns the context into a weight update implicitly."""

from __future__ import annotations

from zoo.models.base import Model, ModelConfig


class Transformer(Model):
    """Llama-like decoder; ΔW is rank 1 per token and never formed (Dherin et al. 2025, arXiv 2507.16003)."""

    Config = ModelConfig
