"""Benchmarks of two processes that train one model, against two that each train alone on the same cores."""

from __future__ import annotations

import json
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any

from zoo.bench.pair import ALONE, SIZE, TASK
from zoo.bench.steps import build
from zoo.bench.timing import Case, Row, Setting, measure
from zoo.console import say
from zoo.devices import plan

WANTED = {"ddp": 0.9, "fsdp": 0.7, "experts": 0.7}
"""Throughput, relative to that of the two that train alone, each on half of the batch."""


def processes(setting: Setting) -> Iterator[Row]:
    """Two processes that train one model against two that train alone; bytes held and sent against the plan."""
    if setting.device.type != "cpu":
        say("processes: measured on a CPU alone", sys.stderr)
        return
    runs = {size: pair(setting.rounds, size=size) for size in (4 * SIZE, SIZE)[setting.quick :]}  # some cost per step
    for size, (family, ways) in ((size, one) for size, run in runs.items() for one in run["families"].items()):
        case, model = f"{family} on text, {size} sequences, 2 processes", build(family, {}, TASK)
        bars = {(way, ALONE): 1 / WANTED[way] for way in ways if way != ALONE}
        for kind, name, wanted in (("seconds", case, bars), ("worked", f"{case}, CPU time", {})):
            variants = {way: partial(next, iter(one[kind])) for way, one in ways.items()}
            yield from measure(Case(name, ALONE, variants, wanted), setting)
        for way in list(ways)[1:] if size == SIZE else ():
            one, sent = ways[way], sum(plan.sent(model, way, 2, SIZE // 2 * model.task.tokens).values())
            held = sum(plan.held(model, way, 2)[name] for name in one["held"])
            yield share(case, f"{way}, weights, gradients, moments", sum(one["held"].values()), held, 1.0)
            yield share(case, f"{way}, sent in a step", sum(one["sent"].values()), sent)
            if one["network"]:
                yield share(case, f"{way}, carried by the loopback device", one["network"], sent)
    two, one = runs[SIZE]["met"], pair(0, 1)["met"]
    yield share("torchrun, until all processes have met", "2 processes", two, one)._replace(baseline="1", seconds=two)


def share(case: str, what: str, measured: float, planned: float, bar: float | None = None) -> Row:
    """A line for a number that is measured once, in bytes."""
    ratio = measured / planned
    return Row(case, what, "plan", ratio, ratio, ratio, bar, 0.0, measured / 2**20)


def pair(rounds: int, count: int = 2, size: int = SIZE) -> dict[str, Any]:
    """What zoo.bench.pair finds, and the seconds until its processes met; raises RuntimeError where one fails."""
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(count), "-m"]
    with tempfile.TemporaryDirectory() as folder:
        out, began = Path(folder, "found.json"), time.time()
        command = [*torchrun, "zoo.bench.pair", str(out), str(rounds), str(size)]
        done = subprocess.run(command, capture_output=True, text=True, cwd=Path(__file__).parents[2])
        if done.returncode:
            raise RuntimeError(done.stderr[-3000:])
        found = json.loads(out.read_text())
    return {**found, "met": found["met"] - began}
