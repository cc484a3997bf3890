"""Benchmarks of generation: families against `transformers`, and against reading all that a token needs once.

Axes: B sequences, L layers, D model.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import torch

from zoo.bench import peers
from zoo.bench.steps import build
from zoo.bench.timing import Case, Row, Setting, kernels, measure
from zoo.models import Model

SMALL = {"dim": 256, "layers": 4, "heads": 8, "hidden": 704}
LARGE = {"dim": 768, "layers": 12, "heads": 12, "hidden": 2048}
PROMPT, V = 64, 257
FASTER = {"transformer": 1.5, "hypernet": 1.2, "moe": 1.2}
"""Wanted tokens per second, relative to those of the peer."""
PEER, ONCE = "transformers generate", "bytes read once"


def generation(setting: Setting) -> Iterator[Row]:
    """New tokens of each family against those of a peer, and against the bytes that a token must read."""
    sizes = [(1, 32)] if setting.quick else [(1, 128), (8, 128), (1, 1024), (8, 1024)]
    few = setting._replace(rounds=min(setting.rounds, 9))
    for B, count in sizes:
        yield from measure(against_peer(B, count, setting.device), few)
    yield from measure(against_memory(SMALL if setting.quick else LARGE, setting.device), few)


def against_peer(B: int, count: int, device: torch.device) -> Case:
    """All families at equal active FLOPs, each with a cache, greedy."""
    variants: dict[str, Callable[[], Any]] = {}
    bars = {}
    for name, faster in FASTER.items():
        model = of_family(name, SMALL, device)
        variants[name] = new_tokens(model, B, count)
        variants[f"{name}, kernels alone"] = kernels(variants[name])
        bars[name, PEER] = 1 / faster
        if name == "transformer" and peers.installed():
            variants[PEER] = peers.new_tokens(peers.llama(model, use_cache=True), prompts(model, B), count)
    base = PEER if PEER in variants else "transformer"
    return Case(f"{count} new tokens, d=256, 4 layers, B={B}", base, variants, bars if base == PEER else {})


def against_memory(size: dict[str, Any], device: torch.device) -> Case:
    """The transformer against one pass over the weights and caches of each token: half of that rate is wanted."""
    model, count = of_family("transformer", size, device), 32
    numbers = sum(p.numel() for name, p in model.decoder.named_parameters() if name != "embedding.weight")
    numbers += 2 * size["layers"] * size["dim"] * (PROMPT + count // 2)
    stored = torch.ones(numbers, device=device)

    def once() -> None:
        for _ in range(count):
            stored.sum()

    variants = {ONCE: once, "transformer": new_tokens(model, 1, count)}
    name = f"{count} new tokens, d={size['dim']}, {size['layers']} layers, B=1"
    bars = {("transformer", ONCE): 2.0} if size is LARGE else {}  # smaller ones lie in a cache
    return Case(name, ONCE, variants, bars)


def of_family(name: str, size: dict[str, Any], device: torch.device) -> Model:
    """The family at these sizes; experts are half as wide, two of four are used."""
    size = {**size, "hidden": size["hidden"] // 2, "experts": 4, "top_k": 2} if name == "moe" else size
    return build(name, size, {"name": "noise", "vocabulary": V, "tokens": 128}).to(device).eval()


def prompts(model: Model, B: int) -> torch.Tensor:
    return torch.randint(V, (B, PROMPT), generator=torch.Generator().manual_seed(0)).to(model.device)


def new_tokens(model: Model, B: int, count: int) -> Callable[[], Any]:
    ids = prompts(model, B)
    return lambda: [*model.generate(ids, count)]
