"""One token after the other from any family: each step runs the newest token alone, see zoo.core.cache.LayerCache.

Axes: B batch, T tokens, V vocabulary, K likeliest tokens.
"""

from __future__ import annotations

import math
from collections.abc import Iterator

import torch
from torch import Tensor

from zoo.core.cache import LayerCache
from zoo.core.decoder import Decoder, check_tokens


def choose(logits_BV: Tensor, temperature: float, top_k: int | None, generator: torch.Generator | None) -> Tensor:
    """One token id per row, (B): the likeliest at temperature 0, else drawn from softmax(logits / temperature) of the
    top_k likeliest. Draws on the generator's device, default the CPU, so that a seed gives the same ids everywhere."""
    if temperature == 0:
        return logits_BV.argmax(-1)
    device = generator.device if generator else torch.device("cpu")
    logits_BK, ids_BK = logits_BV.to(device, torch.float64).topk(top_k or logits_BV.shape[-1])
    # relative to the largest, a tiny temperature overflows to -inf alone
    probability_BK = ((logits_BK - logits_BK[:, :1]) / temperature).softmax(-1)
    return ids_BK.gather(1, torch.multinomial(probability_BK, 1, generator=generator))[:, 0].to(logits_BV.device)


def generate(
    decoder: Decoder,
    tokens_BT: Tensor,
    count: int,
    n_context: int = 0,
    temperature: float = 0.0,
    top_k: int | None = None,
    generator: torch.Generator | None = None,
) -> Iterator[Tensor]:
    """The next `count` ids of each row, (B) at a time, without gradients.

    n_context: how many leading tokens are a separate context. top_k: None for all. Same seed of `generator`, same ids.
    Raises ValueError, at once, for arguments that nothing can be generated from.
    """
    if tokens_BT.dim() != 2 or tokens_BT.is_floating_point():
        raise ValueError(f"the prompt must be token ids (B,T), got {tokens_BT.dtype} of shape {tuple(tokens_BT.shape)}")
    check_tokens(tokens_BT, n_context, LayerCache())
    vocabulary, low, high = decoder.head.out_features, int(tokens_BT.min()), int(tokens_BT.max())
    if low < 0 or high >= vocabulary:
        raise ValueError(f"token ids from {low} to {high} do not fit the vocabulary, 0 to {vocabulary - 1}")
    if count < 1:
        raise ValueError(f"count={count} must be at least 1")
    if not 0 <= temperature < math.inf:
        raise ValueError(f"temperature={temperature} must be a finite number, 0 (the likeliest token) or above")
    if top_k is not None and not 1 <= top_k <= vocabulary:
        raise ValueError(f"top_k={top_k} must lie between 1 and the vocabulary of {vocabulary}")

    def steps() -> Iterator[Tensor]:
        new_BT, n_new = tokens_BT, n_context
        with torch.no_grad():
            cache = decoder.new_cache(min(count, 1024))  # a text may end long before
        for _ in range(count):
            with torch.no_grad():  # which the code between two of them does not see
                ids_B = choose(decoder(new_BT, n_new, cache=cache)[0][:, -1], temperature, top_k, generator)
            yield ids_B
            new_BT, n_new = ids_B[:, None], 0

    return steps()
