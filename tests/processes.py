"""What one process of several finds, beside one that works alone: writes a table of errors.

torchrun --nproc-per-node 2 tests/processes.py OUT CASE:STRATEGY…
"""

from __future__ import annotations

import copy
import json
import sys
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.nn.parallel import DistributedDataParallel

from cases import BY_NAME, batch_of, build, length_of_context
from zoo.bench.pair import Loss
from zoo.devices import sharding
from zoo.devices.faults import settle
from zoo.models import Model
from zoo.training.data import Stream


def gradients(model: Model, loss: nn.Module, rank: int, world: int) -> dict[str, Tensor]:
    """Whole gradients of a step in two parts on the slice of this process."""
    size = 8 * (1 + 2 * (dist.get_world_size() == 3))  # as many for each part
    for batch in Stream(model.task, "train", size, 1, parts=2, rank=rank, world=world):
        if batch.tokens.is_floating_point():
            batch = batch._replace(tokens=batch.tokens.double(), targets=batch.targets.double())
        (loss(batch, 0) / 2).backward()
    return {name: whole(p.grad) for name, p in model.named_parameters() if p.grad is not None}


def whole(t: Any) -> Tensor:
    return t.full_tensor() if hasattr(t, "full_tensor") else t


def distance(found: dict[str, Tensor], alone: dict[str, Tensor]) -> float:
    """The largest error of a tensor over its largest entry."""
    assert found.keys() == alone.keys()
    return max(float((found[k] - w).abs().max() / w.abs().max().clamp(min=1e-6)) for k, w in alone.items())


def law(model: Model) -> Tensor:
    """The output under patches that stand for the context."""
    batch, n = batch_of(model), length_of_context(model)
    patches = model.deltas(batch.tokens, n, n)
    positions = model.decoder.layout(batch.tokens.shape[1], n).positions[n:]
    return model(batch.tokens[:, n:], 0, patches, positions)


def errors(name: str, how: str) -> dict[str, float]:
    """Errors beside a process alone: of gradients, of weights after a step, of the law, which is also that against the
    pass with the context; and the share of the weights that lie here."""
    alone = build(BY_NAME[name])
    model, mean = copy.deepcopy(alone), sharding._mean_gradient
    loss: nn.Module = Loss(model)
    if how == "ddp":
        loss = DistributedDataParallel(loss)
    else:
        if how == "wrong":
            sharding._mean_gradient = lambda w, mesh: w
        sharding.shard(model, init_device_mesh("cpu", (dist.get_world_size(),)), how != "fsdp")
    batch, n = batch_of(alone), length_of_context(alone)
    with torch.no_grad():
        out, expected, full = law(model), law(alone), alone(batch.tokens, n)[:, n:]
    found = gradients(model, loss, dist.get_rank(), dist.get_world_size())
    told = {
        "gradients": distance(found, gradients(alone, Loss(alone), 0, 1)),
        "law": float((out - expected).abs().max()),
        "context": float((out - full).abs().max()),
        "share": sum(getattr(p, "_local_tensor", p).numel() for p in model.decoder.blocks.parameters())
        / sum(p.numel() for p in model.decoder.blocks.parameters()),
    }
    sharding._mean_gradient = mean
    for each in (alone, model):
        optimizer: Any = each.configure_optimizers()["optimizer"]  # type: ignore[index,call-overload]
        optimizer.step()
    weights = [{k: whole(w) for k, w in each.state_dict().items()} for each in (model, alone)]
    return told | {"weights": distance(*weights)}


def main(out: str, *jobs: str) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo")
    told = {job: errors(*job.split(":")) for job in jobs}
    if dist.get_rank() == 0:
        Path(out).write_text(json.dumps(told))
    settle()
    dist.destroy_process_group()


if __name__ == "__main__":
    main(*sys.argv[1:])
