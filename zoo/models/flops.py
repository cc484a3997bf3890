"""Counts parameters by part, and the FLOPs of one forward pass per token, from formulas.

A multiply-add is 2 FLOPs; a training step costs three times the forward pass. Normalisation, rotary positions and
activations are left out. Axes: T tokens of a sequence, D model, L layers.
"""

from __future__ import annotations

from zoo.models import Model


def parameters(model: Model) -> dict[str, int]:
    """Parameters by part; `total` counts each once, `active` leaves out experts that a token does not use."""
    parts = dict.fromkeys(("embedding", "attention", "ffn", "norms", "head", "context_to_delta"), 0)
    for name, parameter in model.decoder.named_parameters():
        words = ["norms" if word.startswith("norm") else word for word in name.split(".")]
        parts[next(word for word in words if word in parts)] += parameter.numel()
    total, family = sum(parts.values()), model.decoder.context_to_delta
    idle = parts["ffn"] * (1 - family.active_share) if family else 0
    return {**parts, "total": total, "active": total - round(idle)}


def flops_per_token(model: Model) -> float:
    """FLOPs of a forward pass per token of the task's sequences: matrices, attention scores, the family's own work."""
    decoder, task, config, count = model.decoder, model.task, model.config, parameters(model)
    # the reference backend computes all experts, used or not
    family = decoder.context_to_delta
    computed = family.active_share if family and decoder.blocks[0].ffn.backend != "reference" else 1.0
    ends = config.dim * (task.output_dim + (task.token_dim or 0))
    mask = decoder.layout(task.tokens, task.n_context).mask
    pairs = task.tokens * (task.tokens + 1) / 2 if mask is None else int(mask.sum())
    scores = 4 * config.dim * config.layers * pairs / task.tokens
    own = family.flops_per_token(task.tokens, task.n_context) if family else 0.0
    return 2 * (count["attention"] + count["ffn"] * computed + ends) + scores + own


def step_cost(model: Model) -> dict[str, float]:
    """Tokens and FLOPs of one training step of all processes, forward and backward."""
    tokens = model.optim.batch_size * model.task.tokens
    return {"tokens": tokens, "flops": 3 * tokens * flops_per_token(model)}
