"""The tables of docs/scale.md: memory, traffic and time of large models on 8 to 512 GPUs, on paper.

python docs/scale.py        # a minute; counts on tensors without memory, trains nothing, and writes the page
"""

from __future__ import annotations

import functools
import itertools
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import torch

from zoo.console import say
from zoo.devices import plan
from zoo.files import write
from zoo.models import MODELS, Model, flops
from zoo.records.results import PEAKS

PAGE = Path(__file__).with_suffix(".md")
TASK = {"name": "noise", "vocabulary": 50304, "tokens": 1024}
SIZES: dict[str, dict[str, int]] = {
    "124M": {"dim": 768, "layers": 12, "heads": 12, "hidden": 2048},
    "1.3B": {"dim": 2048, "layers": 24, "heads": 16, "hidden": 5504},
    "7B": {"dim": 4096, "layers": 32, "heads": 32, "hidden": 11008},
}
BATCH = {"124M": 512, "1.3B": 1024, "7B": 4096}
"""Sequences of a step."""
FAMILIES: dict[str, dict[str, Any]] = {
    "transformer": {},
    "hypernet": {"rank": 8, "code_dim": 256, "chunk": 128},
    "moe": {"experts": 8, "top_k": 2},
    "hyper_moe": {"code_dim": 256, "chunk": 128},
    "merged_experts": {"chunk": 128},
    "fast_weights": {"chunk": 128},
}
GPUS = (8, 64, 512)
MEMORY, FREE = 80e9, 0.2
"""Bytes of a GPU, and the share left for what is not counted."""
PRODUCTS, WIDE_PRODUCTS, MFU = PEAKS["H100"], 67e12, 0.4
"""FLOP/s in 16 bits and in float32, and the share of both that is reached."""
NVLINK, INFINIBAND, REACHED = 450e9, 50e9, 0.7
"""Bytes/s that a GPU sends within a machine of 8, and to others, and the share that is reached."""


@functools.cache
def built(family: str, size: str, optim: str = "muon", layers: int = 0, again: bool = False) -> Model:
    """A model of the tables, without memory; layers: another number of them."""
    sizes = {**SIZES[size], **({"layers": layers} if layers else {})}
    if family == "moe":
        sizes["hidden"] //= 2  # two of eight experts are as wide as the others' FFN
    with torch.device("meta"):
        model = MODELS[family]({"name": family, "tied": True, **sizes, **FAMILIES[family]}, TASK, {"name": optim})
    model.decoder.activation_checkpointing = again
    return model


@functools.cache
def kept(family: str, size: str, again: bool, layers: int = 0) -> tuple[float, float]:
    """Bytes for the backward pass in bfloat16: in any case, and for each sequence; again: activation checkpointing."""
    ends = growth(family, size, again)
    layers = layers or SIZES[size]["layers"]
    once_more = [layer for _, layer in growth(family, size, False)] if again else [0, 0]
    always, each = (two + (layers - 2) * layer + x for (two, layer), x in zip(ends, once_more, strict=True))
    return always, each


@functools.cache
def growth(family: str, size: str, again: bool) -> list[tuple[int, int]]:
    """What is kept in any case, and for each sequence: of two layers, and of each further one. Both grow by the same
    with each layer and sequence, so two and three of them tell."""
    found = {}
    for layers, count in itertools.product((2, 3), (1, 2)):
        model = built(family, size, layers=layers, again=again)
        found[layers, count] = plan.activations(model, model.task.batch("train", 0, count), narrow=True)
    each = {layers: found[layers, 2] - found[layers, 1] for layers in (2, 3)}
    always = {layers: found[layers, 1] - each[layers] for layers in (2, 3)}
    return [(x[2], x[3] - x[2]) for x in (always, each)]


class Way(NamedTuple):
    """How a model may be trained on some GPUs, what one of them holds, in bytes, and seconds of a step."""

    name: str
    at_once: int
    memory: dict[str, float]
    sent: float
    seconds: dict[str, float]

    @property
    def total(self) -> float:
        m = self.memory
        return m["own"] + max(m["gathered"] + m["kept"], m["muon"])

    @property
    def time(self) -> float:
        return max(self.seconds["computing"], self.seconds["sending"]) + self.seconds["muon"]


def way(family: str, size: str, W: int, strategy: str, optim: str, again: bool) -> Way:
    """With as many sequences at once as fit, a power of two, and one at least."""
    model, share = built(family, size, optim), BATCH[size] // W
    held, (always, each) = plan.held(model, strategy, W), kept(family, size, again)
    own = sum(held[name] for name in ("weights", "gradients", "moments", "buckets"))
    room = MEMORY * (1 - FREE) - own - held["gathered"] - always
    at_once = 2 ** max(0, min(int(room // each), share).bit_length() - 1) if room > each else 1
    memory = {"own": own, "gathered": held["gathered"], "kept": always + at_once * each, "muon": held["muon"]}
    total = plan.in_a_step(model, strategy, W, share * TASK["tokens"], share // at_once, narrow=True)  # type: ignore[operator]
    work = 3 * (4 / 3 if again else 1) * flops.flops_per_token(model) * share * TASK["tokens"]  # type: ignore[operator]
    seconds = {
        "computing": work / (MFU * PRODUCTS),
        "sending": total / (REACHED * (NVLINK if W <= 8 else INFINIBAND)),
        "muon": newton_schulz(model, strategy, W) / (MFU * WIDE_PRODUCTS),
    }
    name = " ".join([strategy, *(["checkpointing"] if again else []), *(["adamw"] if optim == "adamw" else [])])
    return Way(name, at_once, memory, total, seconds)


def newton_schulz(model: Model, strategy: str, W: int) -> float:
    """FLOPs of Muon's step on one of W processes: all matrices, but for blocks that lie whole where they are."""
    optimizer: Any = model.configure_optimizers()["optimizer"]  # type: ignore[index,call-overload]
    total = 0.0
    for group in (group for group in optimizer.param_groups if "blocks" in group):
        for o, i in (p.shape for p in group["params"]):
            rows = o // group["blocks"]
            small, large = sorted((rows, i))
            blocks = group["blocks"] / (W if strategy != "ddp" and not -(-o // W) % rows else 1)
            total += blocks * 5 * (4 * small**2 * large + 2 * small**3)
    return total


def chosen(family: str, size: str, W: int) -> tuple[Way, bool]:
    """The fastest way that fits, with Muon where any does; else the smallest, and that it does not fit."""
    strategies = ["ddp", "fsdp"] + ["experts"] * (family == "moe" and built(family, size).config.blocks % W == 0)
    ways: list[Way] = []
    for optim in ("muon", "adamw"):
        ways += [way(family, size, W, *rest) for rest in itertools.product(strategies, [optim], (False, True))]
        fit = [one for one in ways if one.total <= MEMORY * (1 - FREE)]
        if fit:
            return min(fit, key=lambda one: (one.time, one.sent)), True
    return min(ways, key=lambda one: one.total), False


def memory_rows() -> Iterator[list[str]]:
    head = "model, parameters|generator, memories, routers|FFN, experts|weights|moments|Muon's step|gathered, 64 GPUs"
    yield [*head.split("|"), "kept always", "kept of a sequence", "with checkpointing"]
    for size, family in itertools.product(SIZES, FAMILIES):
        model = built(family, size)
        count, held = flops.parameters(model), plan.held(model, "ddp", 8)
        label = f"{size} {family}, {count['total'] / 1e9:.2f}e9"
        parts = [4 * count["context_to_delta"], 4 * count["ffn"], held["weights"], held["moments"], held["muon"]]
        parts += [plan.held(model, "fsdp", 64)["gathered"], *kept(family, size, False), sum(kept(family, size, True))]
        yield [label, *map(gigabytes, parts)]


def choice_rows() -> Iterator[list[str]]:
    head = "model|GPUs|trained by|sequences at once|weights, gradients, moments|gathered|kept|Muon|at most"
    yield [*head.split("|"), "sent in a step", "computing, sending, Muon, s", "bottleneck"]
    for size, family, W in itertools.product(SIZES, FAMILIES, GPUS):
        one, fits = chosen(family, size, W)
        slowest = max(one.seconds.items(), key=lambda item: item[1])[0]
        times = [f"{x:.2g}" if x < 99.5 else f"{x:.0f}" for x in one.seconds.values()]
        memory = [gigabytes(x) for x in (*one.memory.values(), one.total)]
        label = one.name if fits else f"nothing; least: {one.name}"
        yield [
            f"{size} {family}",
            str(W),
            label,
            str(one.at_once),
            *memory,
            gigabytes(one.sent),
            " ".join(times),
            slowest if fits else "memory",
        ]


def gigabytes(count: float) -> str:
    return f"{count / 1e9:.2g}" if count < 9.95e9 else f"{count / 1e9:,.0f}"


def table(rows: Iterator[list[str]]) -> str:
    head, *rest = rows
    return "\n".join(f"| {' | '.join(row)} |" for row in (head, ["---"] * len(head), *rest))


def page(text: str) -> str:
    """The text with its tables made anew."""
    for mark, rows in (("memory", memory_rows()), ("choice", choice_rows())):
        made = f"<!-- {mark} -->\n{table(rows)}\n<!-- /{mark} -->"
        text = re.sub(rf"<!-- {mark} -->\n.*?<!-- /{mark} -->", lambda _: made, text, flags=re.DOTALL)  # noqa: B023
    return text


if __name__ == "__main__":
    write(PAGE, page(PAGE.read_text(encoding="utf-8")))
    say(str(PAGE))
