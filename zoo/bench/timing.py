"""Ratios of times: variants of one computation run in turn, and each is divided by the baseline of its own round.

An absolute time says more about what else the machine did than about the code; the median of such ratios does not.
On a CPU the time is that of the one thread that works, so that waiting for other processes does not count.
"""

from __future__ import annotations

import time
import weakref
from collections import deque
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode


@dataclass(frozen=True)
class Case:
    """Variants of one computation: each is divided by the baseline, and by those that `bars` names besides.

    variants: by name; one that returns a float has taken its own time, in seconds. bars: the largest ratio wanted of
    (variant, baseline). compiled: variants whose memory cannot be counted, since no operator of theirs is seen.
    """

    name: str
    baseline: str
    variants: dict[str, Callable[[], Any]]
    bars: dict[tuple[str, str], float] = field(default_factory=dict)
    compiled: tuple[str, ...] = ()


class Row(NamedTuple):
    """A line of the table: the median ratio and its quartiles over rounds; seconds, megabytes: of the variant.

    megabytes: the most that a run holds at once, or in the section `memory` what it keeps for its backward pass.
    """

    case: str
    variant: str
    baseline: str
    low: float
    ratio: float
    high: float
    bar: float | None
    seconds: float | None
    megabytes: float | None


def measure(case: Case, rounds: int, device: torch.device, tick: Callable[[], Any] = lambda: None) -> Iterator[Row]:
    """Runs all variants of a case in turn, `rounds` times after one that warms up."""
    seconds: dict[str, list[float]] = {name: [] for name in case.variants}
    megabytes: dict[str, float] = {}
    for name, work in case.variants.items():
        if name in case.compiled:
            work()
        else:
            megabytes[name] = peak_bytes(work, device) / 2**20
    names = deque(case.variants)
    for _ in range(rounds):
        for name in names:
            seconds[name].append(stopwatch(case.variants[name], device))
        names.rotate(-1)  # no one is always first
        tick()
    pairs = dict.fromkeys((name, case.baseline) for name in seconds if name != case.baseline)
    for name, base in pairs | dict.fromkeys(case.bars):
        low, ratio, high = np.percentile(np.array(seconds[name]) / np.array(seconds[base]), [25, 50, 75]).tolist()
        bar, median = case.bars.get((name, base)), float(np.median(seconds[name]))
        yield Row(case.name, name, base, low, ratio, high, bar, median, megabytes.get(name))


def clock(device: torch.device) -> Callable[[], float]:
    """Seconds: CPU time where one thread works alone, so that what others do on the machine does not count."""
    return time.thread_time if device.type == "cpu" and torch.get_num_threads() == 1 else time.perf_counter


def stopwatch(work: Callable[[], Any], device: torch.device) -> float:
    """Seconds of one run."""
    now, finish = clock(device), torch.cuda.synchronize if device.type == "cuda" else lambda: None
    finish()
    start = now()
    own = work()
    finish()
    return own if isinstance(own, float) else now() - start


def rates(device: torch.device) -> tuple[float, float]:
    """GFLOP/s of a large float32 matrix product and GB/s of a large copy, reads and writes counted: medians."""
    a, b = torch.randn(2048, 256, device=device), torch.randn(256, 704, device=device)
    c = torch.empty(2048, 704, device=device)
    big = torch.ones(2**24, device=device)
    target = torch.empty_like(big)
    product = [stopwatch(lambda: torch.mm(a, b, out=c), device) for _ in range(30)][9:]
    copy = [stopwatch(lambda: target.copy_(big), device) for _ in range(10)][1:]
    return 2e-9 * a.numel() * b.shape[1] / float(np.median(product)), 2e-9 * big.nbytes / float(np.median(copy))


def peak_bytes(work: Callable[[], Any], device: torch.device) -> int:
    """The most memory that one run holds at once beyond what was held before it."""
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        work()
        return torch.cuda.max_memory_allocated() - before
    with LiveBytes() as live:
        work()
    return live.peak


class LiveBytes(TorchDispatchMode):
    """Counts the bytes of all storages that operators make, as long as they live."""

    def __init__(self) -> None:
        super().__init__()
        self.sizes: dict[int, int] = {}  # of living storages
        self.peak = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        old = {t.untyped_storage()._cdata for t in _tensors((args, kwargs))}
        out = func(*args, **(kwargs or {}))
        for storage in (t.untyped_storage() for t in _tensors(out)):
            key = storage._cdata
            if key not in old and key not in self.sizes:
                self.sizes[key] = storage.nbytes()
                weakref.finalize(storage, self.sizes.pop, key)
        self.peak = max(self.peak, sum(self.sizes.values()))
        return out


def _tensors(tree: Any) -> list[torch.Tensor]:
    return [leaf for leaf in torch.utils._pytree.tree_leaves(tree) if torch.is_tensor(leaf)]


KERNELS = ("mm", "addmm", "bmm", "baddbmm", "baddbmm_", "_grouped_mm", "rows_by_blocks", "blocks_of_rows")


class _Kernels(TorchDispatchMode):
    """Keeps the calls of matrix products and attention, with their arguments."""

    def __init__(self) -> None:
        super().__init__()
        self.calls: list[tuple[Any, Any, Any]] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = func.overloadpacket.__name__
        if name in KERNELS or name.startswith("_scaled_dot_product"):
            self.calls.append((func, args, kwargs or {}))
        return func(*args, **(kwargs or {}))


def kernels(work: Callable[[], Any]) -> Callable[[], None]:
    """The matrix products and attentions of a computation alone, on the same numbers: code around them adds to that."""
    with _Kernels() as seen:
        work()

    def replay() -> None:
        with torch.no_grad():
            for func, args, kwargs in seen.calls:
                func(*args, **kwargs)

    return replay


def saved_bytes(work: Callable[[], Any]) -> int:
    """Bytes that a forward pass keeps for its backward pass, parameters left out, each storage once."""
    kept: dict[int, int] = {}

    def note(t: torch.Tensor) -> torch.Tensor:
        if not isinstance(t, torch.nn.Parameter) and not isinstance(t._base, torch.nn.Parameter):
            kept[t.untyped_storage().data_ptr()] = t.untyped_storage().nbytes()
        return t

    with torch.autograd.graph.saved_tensors_hooks(note, lambda t: t):
        alive = work()  # as long as the graph lives, no storage is used twice
    del alive
    return sum(kept.values())


def backward(module: nn.Module, z: Tensor, *rest: Any) -> Callable[[], Any]:
    """Forward and backward of a module, gradients for z and all weights."""
    leaf = z.detach().requires_grad_()
    leaves = [leaf, *module.to(z.device).parameters()]

    def work() -> Any:
        out = module(leaf, *rest)
        return torch.autograd.grad(out, leaves, z, allow_unused=True)  # z is as good as any gradient of the output

    return work
