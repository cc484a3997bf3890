"""Benchmarks of one FFN with its family's seat, forward and backward, against a dense FFN and plain matrix products.

Axes: B sequences, T tokens, D model, F hidden units of an expert, E experts, K chosen, n = B·T·K/E tokens per expert.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any, Literal

import torch
from torch import Tensor, nn

from zoo.bench import peers
from zoo.bench.timing import Case
from zoo.delta import Patch
from zoo.layers import FeedForward
from zoo.models.hypernet import EmittedDelta, HypernetConfig
from zoo.models.moe import MoEConfig, RoutedDelta

D, F, TOKENS = 256, 512, 2048


def seats(device: torch.device, quick: bool) -> Iterator[Case]:
    """The mixture by tokens per expert, and the hypernetwork by how often it emits."""
    for n in (256, 32) if quick else (512, 256, 128, 64, 32):
        yield mixture(n, 1, device)
    if not quick:
        yield mixture(256, 2, device)
    yield hypernetwork(device)


def growth(device: torch.device, quick: bool) -> Iterator[Case]:
    """How cost grows: experts at constant n and K (flat per token), rank (linear), length of attention (quadratic)."""
    experts = (4, 16) if quick else (4, 8, 16, 32)
    work = {f"E={e}": _mixture_work(e, 128 * e, 1, device)[0] for e in experts}
    yield Case("growth", "experts, n=128, K=1", f"E={experts[0]}", work)
    ranks = (4, 64) if quick else (1, 8, 16, 32, 64, 128)
    z = torch.randn(8, 128, D, device=device)
    yield Case("growth", "rank", f"R={ranks[0]}", {f"R={r}": _emitted(z, r, None)[0] for r in ranks})
    lengths = (128, 1024) if quick else (128, 256, 512, 1024, 2048)
    yield Case(
        "growth", "attention, 4096 tokens", f"T={lengths[0]}", {f"T={t}": _attention(t, device) for t in lengths}
    )


def mixture(n: int, top_k: int, device: torch.device) -> Case:
    experts = TOKENS * top_k // n
    work, routing = _mixture_work(experts, TOKENS, top_k, device)
    z = torch.randn(1, TOKENS, D, device=device)
    variants: dict[str, Callable[[], Any]] = {
        "dense": backward(FeedForward(D, top_k * F).to(device), z),
        "matrix products": products(TOKENS, top_k * F, device),
        "moe": work,
    }
    wanted = {512: 1.15, 256: 1.15, 128: 1.30, 32: 1.75}
    bars = {"moe": wanted[n]} if n in wanted else {}
    variants |= peers.mixtures(D, F, experts, top_k, z, routing)
    return Case("seats", f"moe, n={n}, K={top_k}, E={experts}", "dense", variants, bars)


def hypernetwork(device: torch.device) -> Case:
    z = torch.randn(8, 128, D, device=device)
    once, chunked = _emitted(z, 8, None), _emitted(z, 8, 64)
    variants = {
        "dense": backward(FeedForward(D, F).to(device), z),
        "matrix products": products(z[..., 0].numel(), F, device),
        "one code per sequence of 128": once[0],
        "lagged chunks of 64": chunked[0],
    }
    bars = {"one code per sequence of 128": 1.35, "lagged chunks of 64": 1.5}
    return Case("seats", "hypernet, rank 8, three matrices", "dense", variants, bars)


def backward(module: nn.Module, z: Tensor, *rest: Any) -> Callable[[], Any]:
    """Forward and backward of a module, gradients for z and all weights."""
    _draw(module)
    leaf = z.detach().requires_grad_()
    leaves = [leaf, *module.parameters()]
    dy = torch.randn_like(z)

    def work() -> Any:
        out = module(leaf, *rest)
        return torch.autograd.grad(out, leaves, dy, allow_unused=True)

    return work


def products(rows: int, hidden: int, device: torch.device) -> Callable[[], Any]:
    """The nine matrix products that a gated FFN and its backward pass cannot do without."""
    x, h = torch.randn(rows, D, device=device), torch.randn(rows, hidden, device=device)
    W = torch.randn(hidden, D, device=device)

    def work() -> None:
        for _ in range(3):
            torch.mm(x, W.mT)
            torch.mm(h, W)
            torch.mm(h.mT, x)

    return work


class Seat(nn.Module):
    """A seat and its FFN as one module of z."""

    def __init__(self, seat: nn.Module, ffn: FeedForward, patch_of: Callable[[nn.Module, Tensor], Patch]):
        super().__init__()
        self.seat, self.ffn, self.patch_of = seat, ffn, patch_of

    def forward(self, z: Tensor) -> Tensor:
        return self.ffn(z, self.patch_of(self.seat, z))


def _mixture_work(experts: int, tokens: int, top_k: int, device: torch.device) -> tuple[Callable[[], Any], nn.Module]:
    config = MoEConfig(dim=D, layers=1, hidden=F, experts=experts, top_k=top_k, renormalise=top_k > 1)
    routers = RoutedDelta(config)
    module = Seat(routers, FeedForward(D, F, experts), lambda seat, z: seat(z, 0, 0)).to(device)
    return backward(module, torch.randn(1, tokens, D, device=device)), routers.routers[0]


def _emitted(z: Tensor, rank: int, chunk: int | None) -> tuple[Callable[[], Any], nn.Module]:
    """The generator on the mean of each sequence, or of all earlier chunks, and the FFN it patches."""
    context: Literal["chunk", "segment"] = "chunk" if chunk else "segment"
    config = HypernetConfig(dim=D, layers=1, hidden=F, rank=rank, context=context, chunk=chunk)
    module = Seat(EmittedDelta(config), FeedForward(D, F), _emit if chunk is None else lambda seat, z: seat(z, 0, 0))
    return backward(module.to(z.device), z), module


def _emit(seat: nn.Module, z: Tensor) -> Patch:
    # as if the sequence were its own context: every token is patched, none is masked
    from dataclasses import replace

    patch = seat(z, 0, z.shape[1])
    return replace(patch, weights={name: replace(d, core=None) for name, d in patch.weights.items()})


def _attention(tokens: int, device: torch.device) -> Callable[[], Any]:
    from zoo.layers import Attention, Layout

    layout = Layout(torch.arange(tokens, device=device), None)
    return backward(Attention(D, 8, 8, 1e4).to(device), torch.randn(4096 // tokens, tokens, D, device=device), layout)


@torch.no_grad()
def _draw(module: nn.Module) -> None:
    for parameter in module.parameters():
        if parameter.dim() > 1:
            parameter.normal_(std=parameter.shape[-1] ** -0.5)
