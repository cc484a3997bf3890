"""Benchmarks of one FFN with its family, forward and backward, against a dense FFN and plain matrix products.

Axes: B sequences, T tokens, D model, F hidden units of an expert, E experts, K chosen, n = B·T·K/E tokens per expert.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from functools import partial
from typing import Any, Literal

import torch
from torch import Tensor, nn

from zoo.bench import peers
from zoo.bench.timing import Case, Row, backward, kernels, saved_bytes
from zoo.core.layers import Attention, FeedForward, Layout
from zoo.core.patch import Patch
from zoo.models.hypernet import HypernetConfig, HypernetDelta
from zoo.models.moe import ExpertRouting, MoEConfig


@dataclass(frozen=True)
class Sizes:
    """dim: of the model; hidden: units of one expert, or of a dense FFN; tokens: of the batch that experts share."""

    dim: int = 256
    hidden: int = 512
    tokens: int = 2048


ONCE, CHUNKS = "one code per sequence of 128", "lagged chunks of 64"
GROUPED = "transformers Mixtral, grouped_mm"


def cases(sizes: Sizes, device: torch.device, quick: bool) -> Iterator[Case]:
    """The mixture by tokens per expert, and the hypernetwork by how often it emits."""
    for n in (256, 32) if quick else (512, 256, 128, 64, 32):
        yield mixture(sizes, n, 1, device)
    if not quick:
        yield mixture(sizes, 256, 2, device)
    yield hypernetwork(sizes, device)


def mixture(sizes: Sizes, n: int, top_k: int, device: torch.device) -> Case:
    experts = sizes.tokens * top_k // n
    z = torch.randn(1, sizes.tokens, sizes.dim, device=device)
    module = routing(sizes, experts, top_k).to(device)
    work = backward(module, z)
    variants: dict[str, Callable[[], Any]] = {
        "dense": backward(FeedForward(sizes.dim, top_k * sizes.hidden).to(device), z),
        "matrix products": products(z, top_k * sizes.hidden),
        "moe": work,
        "moe, kernels alone": kernels(work),
        **peers.mixtures(module.ffn, module.context_to_delta.routers[0], top_k, z),
    }
    wanted = {512: 1.15, 256: 1.15, 128: 1.30, 32: 1.75}
    bars = {("moe", "dense"): wanted[n]} if n in wanted else {}
    if GROUPED in variants:
        bars["moe", GROUPED] = 1.03
    return Case("layers", f"moe, n={n}, K={top_k}, E={experts}", "dense", variants, bars, tokens=sizes.tokens)


def hypernetwork(sizes: Sizes, device: torch.device) -> Case:
    z = torch.randn(8, 128, sizes.dim, device=device)
    variants = {
        "dense": backward(FeedForward(sizes.dim, sizes.hidden).to(device), z),
        "matrix products": products(z, sizes.hidden),
        ONCE: emitted(sizes, z, 8, None),
        CHUNKS: emitted(sizes, z, 8, 64),
    }
    variants |= {f"{name}, kernels alone": kernels(variants[name]) for name in (ONCE, CHUNKS)}
    bars = {(ONCE, "dense"): 1.35, (CHUNKS, "dense"): 1.5}
    return Case("layers", "hypernet, rank 8, three matrices", "dense", variants, bars, tokens=8 * 128)


def memory(sizes: Sizes, device: torch.device) -> Iterator[Row]:
    """What one FFN keeps for its backward pass."""
    z = torch.randn(8, 128, sizes.dim, device=device, requires_grad=True)
    modules: dict[str, nn.Module] = {
        "dense": FeedForward(sizes.dim, sizes.hidden),
        ONCE: emitting(sizes, 8, None),
        CHUNKS: emitting(sizes, 8, 64),
        "moe, K=1": routing(sizes, 8, 1),
    }
    kept = {name: saved_bytes(partial(module.to(device), z)) for name, module in modules.items()}
    for name, size in kept.items():
        ratio, bar = size / kept["dense"], 1.5 if name == ONCE else None
        if name != "dense":
            case = "kept for the backward pass"
            yield Row("memory", case, name, "dense", ratio, ratio, ratio, 1, bar, None, size / 2**20, None)


def products(z: Tensor, hidden: int) -> Callable[[], Any]:
    """The nine matrix products that a gated FFN and its backward pass cannot do without."""
    x = z.flatten(0, -2)
    h, W = torch.randn(len(x), hidden, device=z.device), torch.randn(hidden, x.shape[1], device=z.device)

    def work() -> None:
        for _ in range(3):
            torch.mm(x, W.mT)
            torch.mm(h, W)
            torch.mm(h.mT, x)

    return work


class PatchedFeedForward(nn.Module):
    """The FFN and what updates it as one module of z (B,T,D)."""

    def __init__(self, context_to_delta: Any, ffn: FeedForward, patch_of: Callable[[Any, Tensor], Patch]):
        super().__init__()
        self.context_to_delta, self.ffn, self.patch_of = context_to_delta, ffn, patch_of

    def forward(self, z: Tensor) -> Tensor:
        return self.ffn(z, self.patch_of(self.context_to_delta, z))


def routing(sizes: Sizes, experts: int, top_k: int) -> PatchedFeedForward:
    config = MoEConfig(
        dim=sizes.dim, layers=1, hidden=sizes.hidden, experts=experts, top_k=top_k, renormalise=top_k > 1
    )
    ffn = FeedForward(sizes.dim, sizes.hidden, experts)
    return PatchedFeedForward(ExpertRouting(config), ffn, lambda context_to_delta, z: context_to_delta(z, 0, 0))


def routed(sizes: Sizes, z: Tensor, experts: int, top_k: int) -> Callable[[], Any]:
    return backward(routing(sizes, experts, top_k).to(z.device), z)


def emitting(sizes: Sizes, rank: int, chunk: int | None) -> PatchedFeedForward:
    """The generator on the mean of each sequence, or of all earlier chunks, and the FFN it patches."""
    context: Literal["chunk", "segment"] = "chunk" if chunk else "segment"
    config = HypernetConfig(dim=sizes.dim, layers=1, hidden=sizes.hidden, rank=rank, context=context, chunk=chunk)
    patch_of = _whole if chunk is None else lambda context_to_delta, z: context_to_delta(z, 0, 0)
    return PatchedFeedForward(HypernetDelta(config), FeedForward(sizes.dim, sizes.hidden), patch_of)


def emitted(sizes: Sizes, z: Tensor, rank: int, chunk: int | None) -> Callable[[], Any]:
    return backward(emitting(sizes, rank, chunk).to(z.device), z)


def _whole(context_to_delta: nn.Module, z: Tensor) -> Patch:
    # as if the sequence were its own context: every token is patched, none is masked
    patch = context_to_delta(z, 0, z.shape[1])
    return replace(patch, served=None)


def attention(z: Tensor) -> Callable[[], Any]:
    layout = Layout(torch.arange(z.shape[1], device=z.device), None)
    return backward(Attention(z.shape[2], 8, 8).to(z.device), z, layout)
