"""Counts parameters by part, and the FLOPs of one forward pass per token, from formulas.

A multiply-add is 2 FLOPs; a training step costs three times the forward pass. Normalisation, rotary positions and
activations are left out. Axes: T tokens of a sequence, D model, L layers.
"""

from __future__ import annotations

from zoo.models import Model


def parameters(model: Model) -> dict[str, int]:
    """Parameters by part; `total` counts each once, `active` leaves out experts that a token does not use."""
    decoder, family = model.decoder, model.decoder.context_to_delta
    ffn = sum(p.numel() for block in decoder.blocks for p in block.ffn.parameters())
    parts = {
        "embedding": sum(p.numel() for p in decoder.embedding.parameters()),
        "attention": sum(p.numel() for block in decoder.blocks for p in block.attention.parameters()),
        "ffn": ffn,
        "norms": decoder.norm.weight.numel() * (1 + 2 * len(decoder.blocks)),
        "head": 0 if model.config.tied else sum(p.numel() for p in decoder.head.parameters()),
        "context_to_delta": sum(p.numel() for p in family.parameters()) if family else 0,
    }
    total = sum(p.numel() for p in model.parameters())
    assert total == sum(parts.values()), f"parts {parts} do not add up to {total} parameters"
    share = family.active_share if family else 1.0
    return {**parts, "total": total, "active": total - ffn + round(ffn * share)}


def flops_per_token(model: Model) -> float:
    """FLOPs of a forward pass per token of the task's sequences: matrices, attention scores, the family's own work."""
    decoder, task, config = model.decoder, model.task, model.config
    count = parameters(model)
    # the reference backend computes all experts, used or not
    family = decoder.context_to_delta
    computed = family.active_share if family and decoder.blocks[0].ffn.backend != "reference" else 1.0
    matrices = count["attention"] + count["ffn"] * computed + config.dim * task.output_dim
    if task.token_dim:
        matrices += config.dim * task.token_dim
    mask = decoder.layout(task.tokens, task.n_context).mask
    pairs = task.tokens * (task.tokens + 1) / 2 if mask is None else int(mask.sum())
    scores = 4 * config.dim * config.layers * pairs / task.tokens
    own = family.flops_per_token(task.tokens, task.n_context) if family else 0.0
    return 2 * matrices + scores + own
