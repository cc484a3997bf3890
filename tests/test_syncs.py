"""The training step never waits for the device: no operator reads values on the host, or has a shape made of them.

On a CPU nothing waits; what would wait on a GPU is known by name.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from typing import Any
from unittest import mock

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from cases import CASES, FAMILIES, Case, options_of
from zoo.models import MODELS, Model

# values read one by one, shapes made of values, and copies between host and device
OPERATORS = {
    "_local_scalar_dense",
    "equal",
    "nonzero",
    "masked_select",
    "masked_scatter",
    "_unique",
    "_unique2",
    "unique_dim",
    "unique_consecutive",
    "bincount",
    "repeat_interleave",
    "lift_fresh",
}
METHODS = ("tolist", "numpy", "cpu")  # on a CPU they reach no operator
INDEXING = {"index", "index_put", "index_put_", "_unsafe_index", "_unsafe_index_put"}


class HostReads(TorchDispatchMode):
    """Counts the operators that run, forward and backward, and among them those that a GPU would be waited for."""

    def __init__(self) -> None:
        super().__init__()
        self.operators, self.reads = Counter[str](), Counter[str]()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = func.overloadpacket.__name__
        self.operators[name] += 1
        marks = name in INDEXING and any(t is not None and t.dtype in (torch.bool, torch.uint8) for t in args[1])
        if name in OPERATORS or marks:
            self.reads[name] += 1
        return func(*args, **(kwargs or {}))


def watch(work: Callable[[], Any]) -> HostReads:
    seen = HostReads()

    def counted(name: str) -> Callable[..., Any]:
        method = getattr(torch.Tensor, name)

        def call(*args: Any, **kwargs: Any) -> Any:
            seen.reads[name] += 1
            return method(*args, **kwargs)

        return call

    with mock.patch.multiple(torch.Tensor, **{name: counted(name) for name in METHODS}), seen:
        work()
    return seen


def training(case: Case) -> tuple[Model, Callable[[], None]]:
    """The case's model in float32, and its training step without the optimiser."""
    options = options_of(case)
    options["model"].update({**FAMILIES[case.family].busy, "hidden": 16})  # rows of 16 bytes
    model = MODELS[case.family](**options).train()
    batch = model.task.batch("train", 0, 8)

    def step() -> None:
        model.training_step(batch, 0).backward()
        if model.decoder.context_to_delta:
            model.decoder.context_to_delta.after_step()

    return model, step


TEXT = [Case(f"{name}-text", name, "text", {}) for name in MODELS]


@pytest.mark.parametrize("case", CASES + TEXT, ids=[case.name for case in CASES + TEXT])
def test_no_training_step_reads_on_the_host(case: Case) -> None:
    _, step = training(case)
    assert not watch(step).reads


@pytest.mark.parametrize("again", [False, True], ids=["kept", "activation_checkpointing"])
@pytest.mark.parametrize("backend", ["reference", "loop", "grouped", "grouped_op"])
def test_of_the_ways_to_compute_experts_only_the_loop_reads(backend: str, again: bool) -> None:
    layers = 2
    model, step = training(Case("", "moe", "noise", {"backend": backend, "layers": layers, "shared": 1}))
    model.decoder.activation_checkpointing = again
    seen = watch(step)
    forward, gradients = 3 * layers, 6 * layers
    kernels = {"grouped": "_grouped_mm", "grouped_op": "grouped_mm"}
    if backend in kernels:
        # all products were watched, those of the backward pass too
        assert seen.operators[kernels[backend]] >= forward + gradients + again
    assert seen.reads == ({"tolist": forward * (1 + again)} if backend == "loop" else {})


@pytest.mark.parametrize(
    "work",
    [
        lambda x: x.sum().item(),
        lambda x: bool(x.any()),
        lambda x: float(x[0]),
        lambda x: x.tolist(),
        lambda x: x.cpu(),
        lambda x: x.numpy(),
        lambda x: x[x > 0],
        lambda x: x.__setitem__(x > 0, torch.ones(1)),
        lambda x: x.masked_select(x > 0),
        lambda x: x.nonzero(),
        lambda x: torch.where(x > 0),
        lambda x: x.unique(),
        lambda x: x.unique_consecutive(),
        lambda x: x.long().bincount(),
        lambda x: x.repeat_interleave(torch.ones(3, dtype=torch.int64)),
        lambda x: torch.tensor([1.0, 2.0]),
        lambda x: torch.equal(x, x),
    ],
)
def test_what_waits_is_seen(work: Callable[[torch.Tensor], Any]) -> None:
    assert watch(lambda: work(torch.arange(3.0))).reads


@pytest.mark.parametrize(
    "work",
    [
        lambda x: x.repeat_interleave(2),
        lambda x: torch.where(x > 0, x, 0.0),
        lambda x: x[torch.arange(2)],
        lambda x: x.masked_fill(x > 0, 1.0),
        lambda x: x.new_zeros(3).scatter_add(0, x.long(), x),
    ],
)
def test_what_does_not_wait_is_not(work: Callable[[torch.Tensor], Any]) -> None:
    assert not watch(lambda: work(torch.arange(3.0))).reads
