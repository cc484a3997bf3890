"""Ratios of times: variants of one computation run in turn, and each is divided by the baseline of its own round.

An absolute time says more about what else the machine did than about the code; the median of such ratios does not.
On a CPU the time is that of the one thread that works, so that waiting for other processes does not count.
"""

from __future__ import annotations

import time
import weakref
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from torch.utils._python_dispatch import TorchDispatchMode


@dataclass(frozen=True)
class Case:
    """variants: computations by name; baseline: the one that the others are divided by; bars: largest ratio wanted."""

    section: str
    name: str
    baseline: str
    variants: dict[str, Callable[[], Any]]
    bars: dict[str, float] = field(default_factory=dict)
    flops: dict[str, float] = field(default_factory=dict)


@dataclass(frozen=True)
class Row:
    """A line of the table: the median ratio and its quartiles over `pairs` rounds; seconds, peak_mb: of the variant."""

    section: str
    case: str
    variant: str
    baseline: str
    ratio: float
    low: float
    high: float
    pairs: int
    bar: float | None
    seconds: float
    peak_mb: float


def measure(case: Case, rounds: int, device: torch.device, tick: Callable[[], Any] = lambda: None) -> Iterator[Row]:
    """Runs all variants of a case in turn, `rounds` times after one that warms up."""
    seconds: dict[str, list[float]] = {name: [] for name in case.variants}
    peaks = {name: peak_bytes(work, device) for name, work in case.variants.items()}
    for round_ in range(rounds):
        names = list(case.variants)
        for name in names[round_ % len(names) :] + names[: round_ % len(names)]:  # no one is always first
            seconds[name].append(stopwatch(case.variants[name], device))
        tick()
    base = np.array(seconds[case.baseline])
    for name, values in seconds.items():
        if name != case.baseline:
            ratios = np.array(values) / base
            low, ratio, high = (float(x) for x in np.percentile(ratios, [25, 50, 75]))
            median = float(np.median(values))
            yield Row(
                *(case.section, case.name, name, case.baseline, ratio, low, high, rounds, case.bars.get(name)),
                *(median, peaks[name] / 2**20),
            )


def stopwatch(work: Callable[[], Any], device: torch.device) -> float:
    """Seconds of one run."""
    if device.type == "cpu":
        start = time.thread_time() if torch.get_num_threads() == 1 else time.perf_counter()
        work()
        return (time.thread_time() if torch.get_num_threads() == 1 else time.perf_counter()) - start
    torch.cuda.synchronize(device)
    start = time.perf_counter()
    work()
    torch.cuda.synchronize(device)
    return time.perf_counter() - start


def peak_bytes(work: Callable[[], Any], device: torch.device) -> int:
    """The most memory that one run holds at once beyond what was held before it."""
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
        before = torch.cuda.memory_allocated(device)
        work()
        return torch.cuda.max_memory_allocated(device) - before
    with LiveBytes() as live:
        work()
    return live.peak


class LiveBytes(TorchDispatchMode):
    """Counts the bytes of all storages that operators make, as long as they live."""

    def __init__(self) -> None:
        super().__init__()
        self.live = self.peak = 0
        self._seen: set[int] = set()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        old = {t.untyped_storage()._cdata for t in _tensors((args, kwargs))}
        out = func(*args, **(kwargs or {}))
        for t in _tensors(out):
            storage = t.untyped_storage()
            key = storage._cdata
            if key not in old and key not in self._seen:
                self._seen.add(key)
                self.live += storage.nbytes()
                self.peak = max(self.peak, self.live)
                weakref.finalize(storage, self._free, key, storage.nbytes())
        return out

    def _free(self, key: int, size: int) -> None:
        self._seen.discard(key)
        self.live -= size


def _tensors(tree: Any) -> list[torch.Tensor]:
    return [leaf for leaf in torch.utils._pytree.tree_leaves(tree) if torch.is_tensor(leaf)]


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
