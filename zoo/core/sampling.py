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
    n_context: int,
    temperature: float,
    top_k: int | None,
    generator: torch.Generator | None,
) -> Iterator[Tensor]:
    """The next `count` ids of each row, (B) at a time, in eval mode and without gradients, which the code between two
    of them does not see; arguments as checked by `check`."""
    cache = decoder.new_cache()
    for _ in range(count):
        training = [part for part in decoder.modules() if part.training]
        decoder.eval()
        try:
            with torch.no_grad():
                logits_BV = decoder(tokens_BT, n_context, cache=cache)[0][:, -1]
                ids_B = choose(logits_BV, temperature, top_k, generator)
        finally:
            for part in training:
                part.training = True
        yield ids_B
        tokens_BT, n_context = ids_B[:, None], 0


def check(vocabulary: int, tokens: Tensor, count: int, n_context: int, temperature: float, top_k: int | None) -> None:
    """Raises ValueError for arguments that nothing can be generated from."""
    if tokens.dim() != 2 or tokens.is_floating_point():
        raise ValueError(f"the prompt must be token ids (B,T), got {tokens.dtype} of shape {tuple(tokens.shape)}")
    check_tokens(tokens, n_context)
    LayerCache().check(tokens.shape[1], n_context)
    low, high = int(tokens.min()), int(tokens.max())
    if low < 0 or high >= vocabulary:
        raise ValueError(f"token ids from {low} to {high} do not fit the vocabulary, 0 to {vocabulary - 1}")
    if count < 1:
        raise ValueError(f"count={count} must be at least 1")
    if not 0 <= temperature < math.inf:
        raise ValueError(f"temperature={temperature} must be a finite number, 0 (the likeliest token) or above")
    if top_k is not None and not 1 <= top_k <= vocabulary:
        raise ValueError(f"top_k={top_k} must lie between 1 and the vocabulary of {vocabulary}")
