"""What one of W processes holds and sends in a training step, from a model before it is cut, in bytes.

Weights may lie on the meta device. What is gathered and summed is float32 whatever the precision of the step; a process
is the first one, whose part of a weight that W does not divide is the largest. tests/test_scale.py holds this against
what two processes hold and send.
Axes: W processes, D model.
"""

from __future__ import annotations

import weakref
from collections import Counter
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode

from zoo.models import Model
from zoo.tasks import Batch

WIDE = 4
"""Bytes of a number in float32."""


def saved_bytes(work: Callable[[], Any]) -> int:
    """The most bytes that a computation keeps for backward passes at once, parameters left out, each storage once."""
    sizes: dict[int, int] = {}  # of living storages
    most = 0

    def note(t: Tensor) -> Tensor:
        nonlocal most
        storage = t.untyped_storage()
        key = storage._cdata
        if key not in sizes and not isinstance(t, nn.Parameter) and not isinstance(t._base, nn.Parameter):
            sizes[key] = storage.nbytes()
            weakref.finalize(storage, sizes.pop, key)
            most = max(most, sum(sizes.values()))
        return t

    with torch.autograd.graph.saved_tensors_hooks(note, lambda t: t):
        work()
    return most


def activations(model: Model, batch: Batch, narrow: bool = False) -> int:
    """What a process keeps for the backward pass of `batch`, on tensors without memory; narrow: by autocast in
    bfloat16, copies of weights included. By experts, a process keeps the rows that arrive in place of its own."""
    options: dict[str, Any] = {**model.hparams}
    if model.decoder.blocks[0].ffn.backend == "auto" and model.decoder.blocks[0].ffn.blocks > 1:
        options["model"] = {**options["model"], "backend": "grouped_op"}  # the one that runs on them
    with FakeTensorMode() as fake, torch.autocast("cpu", torch.bfloat16, enabled=narrow):
        twin = type(model)(**options).train()
        twin.decoder.activation_checkpointing = model.decoder.activation_checkpointing
        given = batch._asdict()
        tensors: dict[str, Any] = {name: fake.from_tensor(x) for name, x in given.items() if torch.is_tensor(x)}
        return saved_bytes(lambda: twin.training_step(batch._replace(**tensors), 0))


def groups(model: Model, strategy: str) -> tuple[list[nn.Parameter], list[list[nn.Parameter]], list[nn.Parameter]]:
    """Weights as zoo.devices.sharding gathers them: all in a step, those of a part of a block, and those that stay."""
    experts = strategy == "experts"
    parts = [part for block in model.decoder.blocks for part in ([block.attention], [block.ffn])[: 2 - experts]]
    blocks = [[*part.parameters()] for (part,) in parts]
    apart = [p for block in model.decoder.blocks for p in block.ffn.parameters()] if experts else []
    known = {id(p) for group in [*blocks, apart] for p in group}
    return [p for p in model.parameters() if id(p) not in known], blocks, apart


def own(p: Tensor, processes: int) -> int:
    """Numbers of a weight that lie on the first of them."""
    return -(-p.shape[0] // processes) * (p.numel() // p.shape[0])


def held(model: Model, strategy: str, processes: int) -> dict[str, int]:
    """Bytes by what they are; gathered: whole weights and their gradients by FSDP2, of which those of the root stay
    through the backward pass and a block's come with the next one and a copy of the gradient to cut; buckets: copies of
    gradients that DDP sums; muon: what its step takes besides, at the end, when nothing else is gathered."""
    W = 1 if strategy == "ddp" else processes
    root, blocks, _ = groups(model, strategy)
    trained = [p for p in model.parameters() if p.requires_grad]
    optimizer: Any = model.configure_optimizers()["optimizer"]  # type: ignore[index,call-overload]
    moments = {id(p): 1 if "blocks" in group else 2 for group in optimizer.param_groups for p in group["params"]}
    whole = [W * sum(own(p, W) for p in group) for group in (root, *blocks)]
    gradients = sum(own(p, W) for p in trained)
    numbers = {
        "weights": sum(own(p, W) for p in model.parameters()),
        "gradients": gradients,
        "moments": sum(moments[id(p)] * own(p, W) for p in trained),
        "buckets": gradients if strategy == "ddp" else 0,
        "gathered": 0 if strategy == "ddp" else 2 * whole[0] + 4 * max(whole[1:]),
        "muon": _orthogonal(model, strategy, processes)[0],
    }
    return {name: WIDE * n for name, n in numbers.items()}


def _orthogonal(model: Model, strategy: str, W: int) -> tuple[int, int]:
    """Numbers that live at once in a step of Muon, besides its moments: of all matrices of a shape together, or of one
    by one where they are cut; and those that this process gives to be gathered."""
    optimizer: Any = model.configure_optimizers()["optimizer"]  # type: ignore[index,call-overload]
    most, given, before = 0, 0, 0
    for group in (group for group in optimizer.param_groups if "blocks" in group):
        counts = Counter(p.shape for p in group["params"])
        for (o, i), count in counts.items():
            here, rows = o if strategy == "ddp" else -(-o // W), o // group["blocks"]
            cut = bool(here % rows)  # see zoo.models.optim.orthogonal_blocks
            left, n = count * here * i, (o if cut else count * here) * i
            square = n // (rows * i) * min(rows, i) ** 2
            # a product of Newton and Schulz has five of the size of its matrices, or two and five of their squares
            most = max(most, max(5 * n + square, 2 * n + 5 * square) + 2 * cut * left + before)
            given, before = given + cut * left, left
    return most, given


def sent(model: Model, strategy: str, processes: int, tokens: int = 0, narrow: bool = False) -> dict[str, float]:
    """Bytes that one process sends to others by rings, for one batch of `tokens` tokens of its own and the step after
    it: DDP sums gradients once; FSDP2 gathers the root once, blocks for both passes, and cuts the sum of gradients;
    rows of tokens go to experts and back in both passes, as if evenly chosen; Muon gathers what is no whole block."""
    W, (root, blocks, apart) = processes, groups(model, strategy)
    if strategy == "ddp":
        trained = sum(p.numel() for p in model.parameters() if p.requires_grad)
        return {"weights": 0.0, "gradients": WIDE * trained * 2 * (W - 1) / W, "muon": 0.0, "rows": 0.0}
    cut = [sum(own(p, W) for p in group) for group in (root, *blocks)]
    config, rows = model.config, 0.0
    if apart:
        chosen = (config.top_k + config.shared) * config.layers * tokens
        rows = chosen * config.dim * 2 * 2 * (2 if narrow else WIDE)
    return {
        "weights": float(WIDE * (W - 1) * (cut[0] + 2 * sum(cut[1:]))),
        "gradients": float(WIDE * (W - 1) * sum(cut)),
        "muon": float(WIDE * (W - 1) * _orthogonal(model, strategy, W)[1]),
        "rows": rows * (W - 1) / W,
    }


def in_a_step(model: Model, strategy: str, processes: int, tokens: int, parts: int = 1, narrow: bool = False) -> float:
    """Bytes that one process sends in a step of `tokens` tokens of its own, in as many parts: see sent."""
    each = sent(model, strategy, processes, tokens, narrow)
    return (parts if strategy != "ddp" else 1) * (each["weights"] + each["gradients"]) + each["muon"] + each["rows"]


HOLDS = {
    "ddp": "all weights, gradients and moments",
    "fsdp": "1/{W} of weights, gradients and moments",
    "experts": "{e} of {E} experts and 1/{W} of all else",
}


def told(model: Model, trainer: Any) -> str:
    """What each process of a run holds, reads and sends in a step, and what each of eight would: lines, none for a run
    of one process."""
    optim, E, lines = model.optim, getattr(trainer.strategy, "apart", 0), []
    name = getattr(trainer.strategy, "strategy_name", "")
    for W in sorted({trainer.world_size, 8}) if trainer.world_size > 1 and name in HOLDS else ():
        head, size = f"{name}, {W} processes: ", optim.batch_size // W
        if optim.batch_size % (W * optim.accumulate):
            lines.append(f"{head}they cannot divide {optim.batch_size} sequences, in parts of {optim.accumulate}")
        elif E % W:
            lines.append(f"{head}they cannot divide model.experts + model.shared={E}")
        else:
            own = sum(x for part, x in held(model, name, W).items() if part not in ("gathered", "muon"))
            sends = in_a_step(model, name, W, size * model.task.tokens, optim.accumulate, "mixed" in trainer.precision)
            what = HOLDS[name].format(W=W, E=E, e=E // W)
            does = f"reads {size} of {optim.batch_size} sequences and sends {sends / 1e6:,.3g} MB in a step"
            lines.append(f"{head}each holds {what}, {own / 1e6:,.3g} MB, {does}")
    return "".join(f"{line}\n" for line in lines)
