"""What two processes find that train one model in turn in several ways: seconds, and bytes held, kept and sent.

zoo.bench.processes has torchrun start this file twice.
"""

from __future__ import annotations

import json
import re
import sys
import time
from collections import Counter, deque
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import DTensor
from torch.nn.parallel import DistributedDataParallel
from torch.utils._python_dispatch import TorchDispatchMode

from zoo.bench.steps import build
from zoo.devices.faults import settle
from zoo.devices.plan import saved_bytes
from zoo.devices.sharding import shard
from zoo.memory import keep_freed_memory
from zoo.models.optim import own
from zoo.training.data import Stream

ALONE = "alone"
WAYS = {"moe": (ALONE, "ddp", "fsdp", "experts"), "transformer": (ALONE, "ddp", "fsdp")}
TASK, SIZE = {"name": "text", "domains": ["code"]}, 64
NETWORK = Path("/proc/net/dev")


class Sent(TorchDispatchMode):
    """Counts bytes that collectives send from this process to others, where they go round in rings."""

    def __init__(self) -> None:
        super().__init__()
        self.bytes: Counter[str] = Counter()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if any(kind is DTensor for kind in types):
            return NotImplemented  # what becomes of it is seen
        if func.namespace in ("c10d", "_c10d_functional"):
            kind, count = _sent(func.overloadpacket.__name__, args, dist.get_world_size())
            self.bytes[kind] += round(count)
        return func(*args, **(kwargs or {}))


def _sent(name: str, args: Any, W: int) -> tuple[str, float]:
    """What a collective sends, as zoo.devices.plan names it, and how many bytes from one of W processes."""
    match name:
        case "allreduce_" if args[0][0].dim() == 1:  # a bucket of gradients is flat, counts of choices are not
            return "gradients", args[0][0].nbytes * 2 * (W - 1) / W
        case "_reduce_scatter_base_":
            return "gradients", args[0].nbytes * (W - 1)
        case "_allgather_base_":
            return "weights", args[1].nbytes * (W - 1)
        case "all_gather_into_tensor":
            return "muon", args[0].nbytes * (W - 1)
        case "alltoall_base_" if args[4]:
            here = args[4][dist.get_rank()]
            return "rows", args[1].nbytes * (1 - here / max(len(args[1]), 1))
    tensors = [x for x in (args[0] if isinstance(args[0], list) else [args[0]]) if isinstance(x, Tensor)]
    return "few", sum(x.nbytes for x in tensors if "wait" not in name and "wrap" not in name)


class Loss(nn.Module):
    """The training loss of a model as its output, which DDP wants."""

    def __init__(self, model: nn.Module):
        super().__init__()
        self.model = model

    def forward(self, batch: Any, index: int) -> Tensor:
        return self.model.training_step(batch, index)  # type: ignore[operator]


class Trainee:
    """A model that is trained in one way, with all that a step takes."""

    def __init__(self, family: str, way: str, size: int):
        self.model, rank, W = build(family, {}, TASK).train(), dist.get_rank(), dist.get_world_size()
        self.loss: Any = Loss(self.model)
        if way == "ddp":
            self.loss = DistributedDataParallel(self.loss)
        elif way != ALONE:
            shard(self.model, init_device_mesh("cpu", (W,)), way == "experts")
        configured: Any = self.model.configure_optimizers()
        self.optimizer, self.alone = configured["optimizer"], way == ALONE
        self.batch = next(iter(Stream(self.model.task, "train", size, 1, rank=rank, world=W)))

    def step(self) -> tuple[float, float]:
        """Takes a step and gives its seconds, from when all processes begin to when this one is done, and those that a
        core worked on it."""
        dist.barrier()
        began, worked = time.perf_counter(), time.process_time()
        self.optimizer.zero_grad()
        self.loss(self.batch, 0).backward()
        nn.utils.clip_grad_norm_(self.model.parameters(), self.model.optim.clip)
        self.optimizer.step()
        if self.model.decoder.context_to_delta and not self.alone:  # which adds up what all have counted
            self.model.decoder.context_to_delta.after_step()
        return time.perf_counter() - began, time.process_time() - worked

    def found(self) -> dict[str, Any]:
        """Bytes that lie here after a step, that are kept for a backward pass, and that a step sends."""
        self.step()
        weights = [*self.model.parameters()]
        moments = [x for state in self.optimizer.state.values() for name, x in state.items() if name != "step"]
        tensors: dict[str, list[Any]] = {"weights": weights, "moments": moments}
        tensors["gradients"] = [p.grad for p in weights if p.grad is not None]
        held = {name: sum(own(x).nbytes for x in some) for name, some in tensors.items()}
        kept, rows = {}, {}
        for name in ("wide", "narrow"):
            with torch.autocast("cpu", torch.bfloat16, enabled=name == "narrow"), Sent() as seen:
                kept[name] = saved_bytes(lambda: self.loss(self.batch, 0).backward())
            rows[name] = seen.bytes["rows"]
        with Sent() as seen:
            self.step()
        network = []
        for _ in range(3):  # what else travels there adds to it
            dist.barrier()
            before = loopback()
            self.step()
            dist.barrier()
            network.append((loopback() - before) / dist.get_world_size())
        return {"held": held, "kept": kept, "rows": rows, "sent": seen.bytes, "network": min(network)}


def loopback() -> int:
    """Bytes that this machine has sent to itself, as Linux counts them; 0 elsewhere."""
    counts = re.search(r"lo:((?: +\d+)+)", NETWORK.read_text() if NETWORK.exists() else "")
    return int(counts[1].split()[8]) if counts else 0


def main(out: str, rounds: str, size: str) -> None:
    """Writes seconds of each way, by round, and what it holds and sends; no rounds: when the processes met, alone."""
    keep_freed_memory()
    torch.set_num_threads(1)
    dist.init_process_group("gloo")
    dist.barrier()
    told: dict[str, Any] = {"met": time.time(), "families": {}}
    for family, ways in WAYS.items() if int(rounds) else ():
        trainees = {way: Trainee(family, way, int(size)) for way in ways}
        found = {way: one.found() for way, one in trainees.items()}
        taken: dict[str, list[tuple[float, float]]] = {way: [] for way in ways}
        order = deque(ways)
        for _ in range(int(rounds) + 1):  # the first one warms up
            for way in order:
                taken[way].append(trainees[way].step())
            order.rotate(-1)  # no one is always first
        for way in ways:
            both = torch.tensor(taken[way]).mT.contiguous()
            dist.all_reduce(both)
            seconds, worked = (both / dist.get_world_size()).tolist()
            told["families"].setdefault(family, {})[way] = {**found[way], "seconds": seconds, "worked": worked}
    if dist.get_rank() == 0:
        Path(out).write_text(json.dumps(told))
    settle()
    dist.destroy_process_group()


if __name__ == "__main__":
    main(*sys.argv[1:])
