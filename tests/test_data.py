"""The loader: a training step never has to wait for its batch."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable
from typing import Any

import pytest

from zoo.bench.steps import bare_step, build
from zoo.training.data import Stream


def seconds(work: Callable[[], Any]) -> float:
    """CPU time of this thread: what else the machine does is left out."""
    start = time.thread_time()
    work()
    return time.thread_time() - start


@pytest.mark.parametrize("task", ["regression", "text", "prompts"])
def test_batches_are_made_50_times_as_fast_as_a_step_uses_them(task: str) -> None:
    """At default sizes, the transformer, which has the cheapest step."""
    domains = {"domains": ["law"]} if task != "regression" else {}
    model = build("transformer", {}, {"name": task, **domains})
    step, stream = bare_step(model), iter(Stream(model.task, "train", model.optim.batch_size, 1000))
    batch = next(stream)
    step(batch)
    ratios = [seconds(lambda: step(batch)) / seconds(lambda: next(stream)) for _ in range(3)]
    assert statistics.median(ratios) >= 50, ratios
