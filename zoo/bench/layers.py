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
    module = routing(sizes, experts, top_k)
    work = backward(module, z)
    variants: dict[str, Callable[[], Any]] = {
        "dense": backward(feed_forward(sizes.dim, top_k * sizes.hidden), z),
        "matrix products": products(z, top_k * sizes.hidden),
        "moe": work,
        "moe, kernels alone": kernels(work),
    }
    others = peers.mixtures(module.ffn, module.context_to_delta.routers[0], top_k)
    variants |= {name: backward(block, z) for name, block in others.items()}
    wanted = {512: 1.15, 256: 1.15, 128: 1.30, 32: 1.75}
    bars = {("moe", "dense"): wanted[n]} if n in wanted else {}
    if GROUPED in variants:
        bars["moe", GROUPED] = 1.03
    return Case("layers", f"moe, n={n}, K={top_k}, E={experts}", "dense", variants, bars, tokens=sizes.tokens)


def hypernetwork(sizes: Sizes, device: torch.device) -> Case:
    z = torch.randn(8, 128, sizes.dim, device=device)
    variants = {
        "dense": backward(feed_forward(sizes.dim, sizes.hidden), z),
        "matrix products": products(z, sizes.hidden),
        ONCE: backward(emitting(sizes, 8, None), z),
        CHUNKS: backward(emitting(sizes, 8, 64), z),
    }
    variants |= {f"{name}, kernels alone": kernels(variants[name]) for name in (ONCE, CHUNKS)}
    bars = {(ONCE, "dense"): 1.35, (CHUNKS, "dense"): 1.5}
    return Case("layers", "hypernet, rank 8, three matrices", "dense", variants, bars, tokens=8 * 128)


def memory(sizes: Sizes, device: torch.device) -> Iterator[Row]:
    """The memory that one FFN keeps for its backward pass."""
    z = torch.randn(8, 128, sizes.dim, device=device, requires_grad=True)
    modules: dict[str, nn.Module] = {
        "dense": feed_forward(sizes.dim, sizes.hidden),
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


@torch.no_grad()
def feed_forward(dim: int, hidden: int, blocks: int = 1) -> FeedForward:
    """An FFN with drawn weights."""
    ffn = FeedForward(dim, hidden, blocks)
    for parameter in ffn.parameters():
        parameter.normal_(std=dim**-0.5)
    return ffn


class PatchedFeedForward(nn.Module):
    """The FFN and what updates it as one module of z (B,T,D), each sequence its own context if the family reads one."""

    def __init__(self, context_to_delta: Any, ffn: FeedForward):
        super().__init__()
        self.context_to_delta, self.ffn = context_to_delta, ffn

    def forward(self, z: Tensor) -> Tensor:
        reads_query = self.context_to_delta.reads_query
        patch = self.context_to_delta(z, 0, 0 if reads_query else z.shape[1])
        if not reads_query:  # every token is patched, none is masked
            patch = replace(patch, weights={name: replace(delta, gate=None) for name, delta in patch.weights.items()})
        return self.ffn(z, patch)


def routing(sizes: Sizes, experts: int, top_k: int) -> PatchedFeedForward:
    config = MoEConfig(
        dim=sizes.dim, layers=1, hidden=sizes.hidden, experts=experts, top_k=top_k, renormalise=top_k > 1
    )
    return PatchedFeedForward(ExpertRouting(config), feed_forward(sizes.dim, sizes.hidden, experts))


def emitting(sizes: Sizes, rank: int, chunk: int | None) -> PatchedFeedForward:
    """The generator on the mean of each sequence, or of all earlier chunks, and the FFN it patches."""
    context: Literal["chunk", "segment"] = "chunk" if chunk else "segment"
    config = HypernetConfig(dim=sizes.dim, layers=1, hidden=sizes.hidden, rank=rank, context=context, chunk=chunk)
    family = HypernetDelta(config)
    for head in family.generator.heads.values():  # as after some training: at the start ΔW is zero
        nn.init.normal_(head.weight, std=config.code_dim**-0.5)  # type: ignore[arg-type]
    return PatchedFeedForward(family, feed_forward(sizes.dim, sizes.hidden))


def attention(z: Tensor) -> Callable[[], Any]:
    layout = Layout(torch.arange(z.shape[1], device=z.device), None)
    return backward(Attention(z.shape[2], 8, 8), z, layout)
