"""Benchmarks of one FFN with its family, forward and backward, against a dense FFN and plain matrix products.

Axes: B sequences, T tokens, D model, F hidden units of an expert, E experts, K chosen, n = B·T·K/E tokens per expert.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import replace
from typing import Any, Literal

import torch
from torch import Tensor, nn

from zoo.bench import peers
from zoo.bench.timing import Case, Row, Setting, backward, kernels, measure
from zoo.core.layers import FeedForward
from zoo.models.hypernet import HypernetConfig, HypernetDelta
from zoo.models.moe import ExpertRouting, MoEConfig

DIM, HIDDEN, TOKENS = 256, 512, 2048
"""D; F, also of the dense FFN; tokens that the experts share."""
MOVED = 19
"""Times that the state of a token is read or written for each of its choices: sorted, joined, and their gradients."""
ONCE, CHUNKS = "one code per sequence of 128", "lagged chunks of 64"


def layers(setting: Setting) -> Iterator[Row]:
    """One FFN with its family against a dense FFN of equal active FLOPs, matrix products alone, and a peer."""
    sizes = [(256, 1), (32, 1)] if setting.quick else [(512, 1), (256, 1), (128, 1), (64, 1), (32, 1), (256, 2)]
    for n, top_k in sizes:
        yield from measure(mixture(n, top_k, setting), setting)
    yield from measure(hypernetwork(setting.device), setting)


def mixture(n: int, top_k: int, setting: Setting) -> Case:
    """The mixture at n tokens per expert."""
    z, experts = torch.randn(1, TOKENS, DIM, device=setting.device), TOKENS * top_k // n
    module = routing(experts, top_k)
    variants = {"dense": backward(feed_forward(top_k * HIDDEN), z), "moe": backward(module, z)}
    variants |= {"matrix products": kernels(variants["dense"]), "moe, kernels alone": kernels(variants["moe"])}

    def wanted(seconds: Mapping[str, float]) -> float:
        """What the products, weights that are read again for fewer tokens, and the rows moved to their expert take."""
        share = seconds["matrix products"] / seconds["dense"]
        weights = 16 / 6 * setting.rates.products / (n * setting.rates.copies)  # 48·D·F bytes for 18·n·D·F FLOPs
        rows = MOVED * 4 * TOKENS * top_k * DIM / setting.rates.copies / seconds["dense"]
        return 1 + share * weights + rows

    bars: dict[tuple[str, str], Any] = {("moe", "dense"): wanted}
    if peers.installed():
        peer = "transformers Mixtral, grouped_mm"
        variants[peer] = backward(peers.mixtral(module.ffn, module.context_to_delta.routers[0], top_k), z)
        bars["moe", peer] = 1.03
    return Case(f"moe, n={n}, K={top_k}, E={experts}", "dense", variants, bars)


def hypernetwork(device: torch.device) -> Case:
    """The hypernetwork by how often it emits."""
    z = torch.randn(8, 128, DIM, device=device)
    modules = {"dense": feed_forward(HIDDEN), ONCE: emitting(8, None), CHUNKS: emitting(8, 64)}
    variants = {name: backward(module, z) for name, module in modules.items()}
    variants["matrix products"] = kernels(variants["dense"])
    variants |= {f"{name}, kernels alone": kernels(variants[name]) for name in (ONCE, CHUNKS)}
    bars = {(ONCE, "dense"): 1.35, (CHUNKS, "dense"): 1.5}
    return Case("hypernet, rank 8, three matrices", "dense", variants, bars)


@torch.no_grad()
def feed_forward(hidden: int, blocks: int = 1) -> FeedForward:
    """An FFN with drawn weights."""
    ffn = FeedForward(DIM, hidden, blocks)
    for parameter in ffn.parameters():
        parameter.normal_(std=DIM**-0.5)
    return ffn


class PatchedFeedForward(nn.Module):
    """The FFN and what updates it as one module of z (B,T,D), each sequence its own context if the family reads one."""

    def __init__(self, context_to_delta: Any, ffn: FeedForward):
        super().__init__()
        self.context_to_delta, self.ffn = context_to_delta, ffn

    def forward(self, z: Tensor) -> Tensor:
        patch = self.context_to_delta(z, 0, 0 if self.context_to_delta.reads_query else z.shape[1])
        return self.ffn(z, replace(patch, served=None))  # every token is patched


def routing(experts: int, top_k: int) -> PatchedFeedForward:
    sizes: Any = {"dim": DIM, "layers": 1, "hidden": HIDDEN, "experts": experts}
    config = MoEConfig(**sizes, top_k=top_k, renormalise=top_k > 1)
    return PatchedFeedForward(ExpertRouting(config), feed_forward(HIDDEN, experts))


def emitting(rank: int, chunk: int | None) -> PatchedFeedForward:
    """The generator on the mean of each sequence, or of all earlier chunks, and the FFN it patches."""
    context: Literal["chunk", "segment"] = "chunk" if chunk else "segment"
    config = HypernetConfig(dim=DIM, layers=1, hidden=HIDDEN, rank=rank, context=context, chunk=chunk)
    family = HypernetDelta(config)
    for weight in family.generator.heads.parameters():  # as after some training: at the start ΔW is zero
        nn.init.normal_(weight, std=config.code_dim**-0.5)
    return PatchedFeedForward(family, feed_forward(HIDDEN))
