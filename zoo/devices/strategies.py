"""Lightning's strategies for several processes, by name: ddp, fsdp, experts."""

from __future__ import annotations

from collections.abc import Mapping
from contextlib import suppress
from datetime import timedelta
from typing import Any

import torch
from lightning.pytorch.strategies import DDPStrategy, Strategy
from torch import Tensor
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.distributed_c10d import _set_pg_timeout
from torch.utils._pytree import tree_map

from zoo.config import did_you_mean, show
from zoo.devices.faults import Launcher
from zoo.models.base import Model

START = timedelta(minutes=10)
KNOWN = ("auto", "ddp", "fsdp", "experts")  # Lightning has others, whose checkpoints are no whole files


def strategy_of(given: dict[str, Any], model: Model, compiled: bool) -> Any:
    """The strategy that arguments of the trainer name, of which `timeout` is taken: for how many minutes a process
    waits for another one. Raises ValueError for one that does not fit."""
    name, devices, minutes = given.get("strategy"), given["devices"], given.pop("timeout", 10)
    if isinstance(minutes, bool) or not isinstance(minutes, int | float) or not 0.01 <= minutes < 1e5:
        raise ValueError(f"trainer.timeout={show(minutes)} must be minutes, .01 or more")
    if isinstance(name, str) and name not in KNOWN:
        raise ValueError(f"trainer.strategy={show(name)} does not exist here{did_you_mean(name, KNOWN)}")
    wait = timedelta(minutes=minutes)
    gpus = torch.cuda.device_count() if given["accelerator"] in ("auto", "gpu", "cuda") else 1
    count = len(devices) if isinstance(devices, list) else gpus if str(devices) in ("auto", "-1") else devices
    several = str(count) not in ("0", "1", "None") or given.get("num_nodes", 1) != 1
    if name == "ddp" or (several and name in (None, "auto")):
        return Processes(timeout=wait)
    return Sharded(name, wait, model, compiled) if name in ("fsdp", "experts") else name or "auto"


class Processes(DDPStrategy):
    """Lightning's DDP, which says why a run ends, see zoo.devices.faults; `timeout` holds once all have come."""

    strategy_name = "ddp"

    def setup_distributed(self) -> None:
        timeout, self._timeout = self._timeout, max(self._timeout or START, START)
        super().setup_distributed()
        _set_pg_timeout(timeout or START)

    def _configure_launcher(self) -> None:
        assert self.cluster_environment is not None
        if not self.cluster_environment.creates_processes_externally:
            self._launcher = Launcher(self.cluster_environment, self.num_processes, self.num_nodes)


class Sharded(Processes):
    """Lightning's way to the processes of DDP, for a model that `shard` cuts: name is fsdp or experts, apart: blocks
    that stay where they are. Raises ValueError for a model, or a compiled one, that the strategy does not fit."""

    setup = Strategy.setup

    def __init__(self, name: str, timeout: timedelta, model: Model, compiled: bool):
        super().__init__(timeout=timeout)
        blocks = model.decoder.blocks[0].ffn.blocks
        self.strategy_name, self.apart = name, blocks if name == "experts" else 0
        if compiled:  # the gathering of weights is no part of a graph
            raise ValueError(f"compile=true does not fit trainer.strategy={name}: leave one of them away")
        if self.apart == 1:
            raise ValueError(f"trainer.strategy=experts: model={model.config.name} has no experts to part, take fsdp")

    def model_to_device(self) -> None:
        """Not before it is cut: it may not fit."""

    def teardown(self) -> None:
        """Not in the way of an error within a pass: what is gathered then cannot be moved."""
        with suppress(AttributeError):
            super().teardown()

    def _setup_model(self, model: Any) -> Any:
        from zoo.devices.sharding import shard  # takes a quarter of a second

        mesh = init_device_mesh(self.root_device.type, (self.world_size,))
        shard(model, mesh, self.strategy_name == "experts")
        return model.to(self.root_device)

    def lightning_module_state_dict(self) -> dict[str, Any]:
        assert self.lightning_module is not None
        return self._whole(self.lightning_module.state_dict())

    def optimizer_state(self, optimizer: Any) -> dict[str, Any]:
        return self._whole(super().optimizer_state(optimizer))

    def _whole(self, state: Any) -> Any:
        """`state` with whole tensors, on the first process alone, others keep nothing of one; all must call this."""

        def whole(value: Any) -> Any:
            if hasattr(value, "full_tensor"):
                value = value.full_tensor()
                value = value if self.is_global_zero else value.new_empty(0)
            return value.cpu() if isinstance(value, Tensor) else value

        return tree_map(whole, state)

    def load_optimizer_state_dict(self, checkpoint: Mapping[str, Any]) -> None:
        from zoo.devices.sharding import scattered

        for optimizer, state in zip(self.optimizers, checkpoint["optimizer_states"], strict=True):
            weights = [p for group in optimizer.param_groups for p in group["params"]]
            cut = {
                i: {
                    name: scattered(x, weights[i].device_mesh, weights[i].placements)
                    if isinstance(x, Tensor) and x.shape == weights[i].shape
                    else x
                    for name, x in moments.items()
                }
                for i, moments in state["state"].items()
            }
            optimizer.load_state_dict({**state, "state": cut})
