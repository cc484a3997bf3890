"""The summary of a context equals a loop over its tokens, and reads no token later than those it serves."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from zoo.core.cache import LayerCache
from zoo.core.context import Source

pytestmark = pytest.mark.numeric

B, T, D = 2, 13, 4

# source, n_context, chunk; 13 tokens are no multiple of 4 or 5, and fewer than 20
SETTINGS = [
    ("segment", 5, None),
    ("segment", T, None),
    ("segment", 0, None),
    ("chunk", 0, 4),
    ("chunk", 0, 5),
    ("chunk", 0, 1),
    ("chunk", 0, T),
    ("chunk", 0, 20),
    ("running", 0, None),
    ("token", 0, None),
]
every_setting = pytest.mark.parametrize(("source", "n_context", "chunk"), SETTINGS)


def read_by(source: str, n_context: int, chunk: int | None) -> list[range]:
    """The tokens that each entry of a summary is the mean of, by definition."""
    if source == "segment":
        return [range(n_context)]
    if source == "chunk":
        assert chunk
        return [range(start) for start in range(0, T, chunk)]
    return [range(0 if source == "running" else t, t + 1) for t in range(T)]


def as_entries(mean: Tensor) -> Tensor:
    """(B,D) or (B,S,D) as (B,S,D)."""
    return mean if mean.dim() == 3 else mean[:, None]


@every_setting
def test_mean_equals_a_loop_over_tokens(source: str, n_context: int, chunk: int | None) -> None:
    z = torch.randn(B, T, D, dtype=torch.float64)
    mean, nonempty = Source(source, chunk).mean(z, n_context)
    reads = read_by(source, n_context, chunk)
    for b in range(B):
        for s, tokens in enumerate(reads):
            expected = sum((z[b, t] for t in tokens), torch.zeros(D, dtype=z.dtype)) / max(len(tokens), 1)
            torch.testing.assert_close(as_entries(mean)[b, s], expected, rtol=0, atol=1e-14)
            assert as_entries(nonempty)[b, s].tolist() == [float(len(tokens) > 0)]
    assert as_entries(mean).shape == (B, len(reads), D)
    assert mean.dim() == (2 if source == "segment" else 3)


@every_setting
@pytest.mark.parametrize("first", [5, 8])
def test_one_token_at_a_time(source: str, n_context: int, chunk: int | None, first: int) -> None:
    z, cache, n_context = torch.randn(B, T, D, dtype=torch.float64), LayerCache(), min(n_context, first)
    mean, nonempty = (as_entries(t) for t in Source(source, chunk).mean(z, n_context))
    Source(source, chunk).mean(z[:, :first], n_context, cache)
    for t in range(first, T):
        cache.tokens = t
        found = [as_entries(t) for t in Source(source, chunk).mean(z[:, t : t + 1], 0, cache)]
        entry = {"segment": 0, "chunk": t // (chunk or 1)}.get(source, t)
        assert found[0].shape == (B, 1, D)
        torch.testing.assert_close(found, [mean[:, [entry]], nonempty[:, [entry]]], rtol=0, atol=1e-14)


@pytest.mark.parametrize(("source", "chunk"), [("segment", None), ("chunk", 100), ("running", None), ("token", None)])
def test_bfloat16_sums_do_not_stall(source: str, chunk: int | None) -> None:
    # adding ones one by one in bfloat16 ends at 256
    mean = Source(source, chunk).mean(torch.ones(1, 3000, 1, dtype=torch.bfloat16), 3000).mean
    assert mean.dtype == torch.bfloat16
    assert as_entries(mean)[0, -1].item() == 1
