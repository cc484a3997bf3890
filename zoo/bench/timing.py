"""Ratios of times: variants of one computation run in turn, and each is divided by the baseline of its own round.

An absolute time says more about what else the machine did than about the code; the median of such ratios does not.
On a CPU the time is that of the one thread that works, so that waiting for other processes does not count.
"""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from tqdm import trange

from zoo.devices.plan import saved_bytes


@dataclass(frozen=True)
class Case:
    """Variants of one computation: each is divided by the baseline, and by those that `bars` names besides.

    variants: by name; one that returns a float has taken its own time, in seconds. bars: the largest ratio wanted of
    (variant, baseline), or what gives it, from the median seconds of all variants.
    """

    name: str
    baseline: str
    variants: Mapping[str, Callable[[], Any]]
    bars: Mapping[tuple[str, str], float | Callable[[Mapping[str, float]], float]] = field(default_factory=dict)


class Rates(NamedTuple):
    """Of a machine: FLOP/s of a large product in float32, bytes/s of a large copy, reads and writes counted."""

    products: float
    copies: float


class Setting(NamedTuple):
    """How to measure. quick: fewer sizes; compiled: compiled steps too; model: a folder of `transformers`."""

    device: torch.device
    rounds: int
    rates: Rates
    quick: bool = False
    compiled: bool = False
    model: str | None = None


class Row(NamedTuple):
    """A line of the table: the median ratio and its quartiles over rounds; the variant's seconds, and the megabytes
    that it keeps for its backward pass, see saved_bytes."""

    case: str
    variant: str
    baseline: str
    low: float
    ratio: float
    high: float
    bar: float | None
    seconds: float
    megabytes: float


def measure(case: Case, setting: Setting) -> Iterator[Row]:
    """Runs all variants of a case in turn, round by round after a run that warms up."""
    seconds: dict[str, list[float]] = {name: [] for name in case.variants}
    megabytes = {name: saved_bytes(work) / 2**20 for name, work in case.variants.items()}
    names = deque(case.variants)
    for _ in trange(setting.rounds, desc=case.name[:40], unit="round", leave=False, disable=None):
        for name in names:
            seconds[name].append(stopwatch(case.variants[name], setting.device))
        names.rotate(-1)  # no one is always first
    medians = {name: float(np.median(taken)) for name, taken in seconds.items()}
    pairs = dict.fromkeys((name, case.baseline) for name in seconds if name != case.baseline)
    for name, base in pairs | dict.fromkeys(case.bars):
        low, ratio, high = np.percentile(np.array(seconds[name]) / np.array(seconds[base]), [25, 50, 75]).tolist()
        bar = case.bars.get((name, base))
        wanted = bar(medians) if callable(bar) else bar
        yield Row(case.name, name, base, low, ratio, high, wanted, medians[name], megabytes[name])


def clock(device: torch.device) -> Callable[[], float]:
    """Seconds: CPU time where one thread works alone, so that what others do on the machine does not count."""
    return time.thread_time if device.type == "cpu" and torch.get_num_threads() == 1 else time.perf_counter


def stopwatch(work: Callable[[], Any], device: torch.device) -> float:
    """Seconds of one run."""
    now = clock(device)
    finish = torch.cuda.synchronize if device.type == "cuda" else lambda: None
    finish()
    start = now()
    own = work()
    finish()
    return own if isinstance(own, float) else now() - start


def rates(device: torch.device) -> Rates:
    """Medians of products of the size of an FFN's, and of copies that no cache holds."""
    a, b = torch.randn(2048, 256, device=device), torch.randn(256, 704, device=device)
    c, big = torch.empty(2048, 704, device=device), torch.ones(2**24, device=device)
    target = torch.empty_like(big)
    product = np.median([stopwatch(lambda: torch.mm(a, b, out=c), device) for _ in range(30)][9:])
    copy = np.median([stopwatch(lambda: target.copy_(big), device) for _ in range(10)][1:])
    return Rates(2.0 * a.numel() * b.shape[1] / float(product), 2.0 * big.nbytes / float(copy))


KERNELS = ("mm", "addmm", "bmm", "baddbmm", "baddbmm_", "_grouped_mm", "grouped_mm")


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


def backward(module: nn.Module, z: Tensor, *rest: Any) -> Callable[[], Any]:
    """Forward and backward of a module, gradients for z and all weights."""
    leaf = z.detach().requires_grad_()
    leaves = [leaf, *module.to(z.device).parameters()]

    def work() -> Any:
        out = module(leaf, *rest)
        # z is as good as any gradient of the output
        return torch.autograd.grad(out, leaves, z.to(out.dtype), allow_unused=True)

    return work
