"""The combinations that every law is tested on: family, task and options, all of them tiny."""

from __future__ import annotations

import functools
import itertools
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from zoo.core.layers import Layout
from zoo.core.patch import Patch
from zoo.lens.exact import Replaced
from zoo.models import MODELS, Model
from zoo.tasks import Batch


class Case(NamedTuple):
    name: str
    family: str
    task: str
    options: dict[str, Any]


@dataclass(frozen=True)
class Family:
    """What tests must know of a family. tiny: options that make it small, beside the sizes of `options_of`; busy: those
    that turn on what is off by default; countable: those under which PyTorch counts all its FLOPs; changes: another
    value for each option, a tuple adds what the option needs; keeps: numbers per token and layer that its losses keep
    for the backward pass, beside what enters the layer; starts_plain: step 0 of another family is the transformer."""

    tiny: dict[str, Any] = field(default_factory=dict)
    busy: dict[str, Any] = field(default_factory=dict)
    countable: dict[str, Any] = field(default_factory=dict)
    changes: dict[str, Any] = field(default_factory=dict)
    keeps: int = 0
    starts_plain: bool = True


SIZES = {"dim": 32, "layers": 1, "heads": 4, "kv_heads": 1, "hidden": 8, "tied": True, "theta": 20.0, "eps": 0.5}
FAMILIES = {
    "transformer": Family(changes=SIZES, starts_plain=False),
    "hypernet": Family(
        tiny={"code_dim": 8},
        changes={
            **SIZES,
            **{"emission": "full", "matrices": ["down"], "rank": 2, "code_dim": 4, "context": "running", "chunk": 8},
            **{"attend_context": (True, {"task": "regression"}), "code": "constant"},
        },
    ),
    "moe": Family(
        tiny={"hidden": 12},
        busy={"bias_rate": 0.1},
        countable={"backend": "loop"},  # PyTorch does not count grouped products, which do the same work
        changes={
            **SIZES,
            **{"experts": 5, "top_k": 1, "shared": 1, "score": "sigmoid", "renormalise": False, "backend": "reference"},
            **{"route_on": "context", "chunk": (8, {"route_on": "context"}), "router": "frozen"},
            **{"balance_weight": 1.0, "z_weight": 1.0, "bias_rate": 0.2},
        },
        keeps=12,
        starts_plain=False,
    ),
    "hyper_moe": Family(
        tiny={"code_dim": 8},
        busy={"bias_rate": 0.1},
        changes={
            **SIZES,
            **{"experts": 3, "top_k": 1, "rank": 1, "code_dim": 4, "context": "running", "chunk": 8},
            **{"attend_context": (True, {"task": "regression"}), "balance_weight": 1.0, "bias_rate": 0.2},
        },
        keeps=12,
    ),
    "merged_experts": Family(
        changes={
            **{**SIZES, "experts": 3, "score": "softmax", "context": "running", "chunk": 8},
            **{"attend_context": (True, {"task": "regression"})},
        },
    ),
    "fast_weights": Family(
        changes={
            **{**SIZES, "rule": "sum", "chunk": 8},
            **{"attend_context": (True, {"task": "regression"})},
        },
    ),
}
CASES = [
    Case("transformer-regression", "transformer", "regression", {}),
    Case("transformer-regression-gqa", "transformer", "regression", {"kv_heads": 1}),
    Case("transformer-noise-tied", "transformer", "noise", {"tied": True}),
    Case("transformer-noise-gqa-tied", "transformer", "noise", {"kv_heads": 1, "tied": True}),
    Case("hypernet-segment-low-rank", "hypernet", "regression", {}),
    Case("hypernet-segment-attend", "hypernet", "regression", {"attend_context": True}),
    Case("hypernet-segment-full", "hypernet", "regression", {"emission": "full"}),
    Case("hypernet-segment-scale-gqa", "hypernet", "regression", {"emission": "scale", "kv_heads": 1}),
    Case("hypernet-segment-down", "hypernet", "regression", {"matrices": ["down"], "rank": 2}),
    Case("hypernet-chunk", "hypernet", "noise", {"chunk": 4}),
    Case("hypernet-chunk-scale-tied", "hypernet", "noise", {"chunk": 4, "emission": "scale", "tied": True}),
    Case("hypernet-running", "hypernet", "noise", {"context": "running"}),
    Case("hypernet-running-full-gqa", "hypernet", "noise", {"context": "running", "emission": "full", "kv_heads": 1}),
    Case("hypernet-token", "hypernet", "noise", {"context": "token"}),
    Case("hypernet-constant", "hypernet", "regression", {"code": "constant", "attend_context": True}),
    Case("moe-token", "moe", "regression", {}),
    Case("moe-token-top1-shared", "moe", "noise", {"top_k": 1, "shared": 1}),
    Case("moe-token-sigmoid-gqa-tied", "moe", "noise", {"score": "sigmoid", "kv_heads": 1, "tied": True}),
    Case("moe-context-linear", "moe", "regression", {"route_on": "context", "score": "linear"}),
    Case("moe-frozen", "moe", "regression", {"router": "frozen"}),
    Case("moe-uniform", "moe", "noise", {"router": "uniform", "experts": 3}),
    Case("moe-context-chunk", "moe", "noise", {"route_on": "context", "chunk": 4}),
    Case("transformer-prompts", "transformer", "prompts", {}),
    Case("hypernet-prompts", "hypernet", "prompts", {}),
    Case("hypernet-prompts-attend", "hypernet", "prompts", {"attend_context": True}),
    Case("moe-prompts", "moe", "prompts", {}),
    Case("moe-prompts-context", "moe", "prompts", {"route_on": "context"}),
    Case("hypernet-modules", "hypernet", "modules", {"emission": "full", "matrices": ["gate", "up"]}),
    Case("moe-recall", "moe", "recall", {}),
    Case("hyper-moe-segment", "hyper_moe", "regression", {}),
    Case("hyper-moe-chunk", "hyper_moe", "noise", {"chunk": 4}),
    Case(
        "hyper-moe-running-top1-gqa-tied",
        "hyper_moe",
        "noise",
        {"context": "running", "top_k": 1, "kv_heads": 1, "tied": True},
    ),
    Case("hyper-moe-prompts", "hyper_moe", "prompts", {}),
    Case("merged-experts-segment-softmax", "merged_experts", "regression", {"score": "softmax"}),
    Case("merged-experts-chunk", "merged_experts", "noise", {"chunk": 4}),
    Case("merged-experts-token-tied", "merged_experts", "noise", {"context": "token", "tied": True}),
    Case("merged-experts-prompts", "merged_experts", "prompts", {}),
    Case("fast-weights-segment", "fast_weights", "regression", {}),
    Case("fast-weights-segment-sum-attend", "fast_weights", "regression", {"rule": "sum", "attend_context": True}),
    Case("fast-weights-chunk", "fast_weights", "noise", {"chunk": 4}),
    Case("fast-weights-chunk-sum-tied", "fast_weights", "noise", {"chunk": 4, "rule": "sum", "tied": True}),
    Case("fast-weights-prompts", "fast_weights", "prompts", {}),
]
BY_NAME = {case.name: case for case in CASES}
AUTOREGRESSIVE = [case for case in CASES if case.task == "noise"]
TASK_OPTIONS: dict[str, dict[str, Any]] = {
    "regression": {"points": 7, "queries": 5},
    "noise": {"tokens": 12},
    "text": {"tokens": 12, "domains": ["code"]},
    "prompts": {"context": 7, "query": 1, "target": 4, "domains": ["code"]},
    "modules": {"context": "pairs", "pairs": 7, "queries": 5},
    "recall": {"vocabulary": 12, "pairs": 3, "queries": 5},
    "markov": {"letters": 7, "tokens": 12},
}


def taking_turns(names: str, first: Sequence[Any], *others: Sequence[Any]) -> pytest.MarkDecorator:
    """Each of `first` beside one of each of the others, which take turns: not the whole product."""
    rows = zip(first, *map(itertools.cycle, others), strict=False)
    return pytest.mark.parametrize(names, list(rows), ids=lambda value: value.name if isinstance(value, Case) else None)


def options_of(case: Case) -> dict[str, Any]:
    """The keyword arguments of the case's model."""
    sizes = {"dim": 16, "layers": 2, "heads": 2, "hidden": 24}
    model = {"name": case.family, **sizes, **FAMILIES[case.family].tiny, **case.options}
    task = {"name": case.task, **TASK_OPTIONS[case.task]}
    return {"model": model, "task": task, "optim": {"steps": 20, "warmup": 2, "batch_size": 8}}


def build(case: Case, seed: int = 0, random: bool = True) -> Model:
    """The case's model in float64 and eval mode; random: parameters that start at zero are drawn too."""
    torch.manual_seed(seed)
    model = MODELS[case.family](**options_of(case)).double().eval()
    if random:
        with torch.no_grad():
            for parameter in model.parameters():
                if not parameter.any():
                    parameter.normal_(std=0.3)
    return model


@functools.cache
def shared(name: str, dtype: torch.dtype = torch.float64) -> Model:
    """build() of the case `name` in `dtype`, made once: for tests that leave it as it is."""
    return build(BY_NAME[name]).to(dtype).requires_grad_(False)


@functools.cache
def trained(name: str) -> Model:
    """The model of the case `name` after 60 steps of AdamW from its own start, in float64 and eval mode."""
    return train(build(BY_NAME[name], random=False), 60)


def train(model: Model, steps: int) -> Model:
    """The model after a few steps on batches of eight, in float64 and eval mode."""
    model.float().train()
    optimizer: Any = model.configure_optimizers()["optimizer"]  # type: ignore[index,call-overload]
    with torch.enable_grad():
        for step in range(steps):
            optimizer.zero_grad()
            model.training_step(model.task.batch("train", step, 8), step).backward()
            optimizer.step()
    return model.double().eval().requires_grad_(False)


def length_of_context(model: Model) -> int:
    """Tokens of the separate context, or, of running text, as many as are taken for one."""
    return model.task.n_context or 7


BATCHES: dict[tuple[str, int, int], Batch] = {}


def batch_of(model: Model, size: int = 3) -> Batch:
    """A batch of the model's task in float64, the same for all models of equal tasks; its tokens may be changed."""
    key = (str(model.task.config), model.task.seed, size)
    if key not in BATCHES:  # reading the sources of prompts takes longer than most tests
        BATCHES[key] = model.task.batch("test", 0, size)
    tokens = BATCHES[key].tokens
    return BATCHES[key]._replace(tokens=tokens.double() if tokens.is_floating_point() else tokens.clone())


def plain_forward(model: Model, query: Tensor, patches: list[Patch], layout: Layout) -> Tensor:
    """The decoder written out once more, with a dense matrix per token or sequence and no notion of a patch."""
    x = model.decoder.embed(query)
    for block, patch in zip(model.decoder.blocks, patches, strict=True):
        v, ffn = block.attend(x, layout), block.ffn
        formed = {name: delta.matrix for name, delta in patch.weights.items() if isinstance(delta, Replaced)}
        W, z = formed or ffn.dense(patch), block.norm2(v)
        h = F.silu(_times(W["gate"], z)) * _times(W["up"], z)
        x = v + (_times(W["down"], h) + patch.biases.get("down", torch.zeros(())))
    return model.decoder.unembed(x)


def _times(W: Tensor, x: Tensor) -> Tensor:
    return (x.unsqueeze(-2) @ W.mT).squeeze(-2) if W.dim() == 4 else x @ W.mT


class Calls(TorchDispatchMode):
    """Counts operators by name."""

    def __init__(self) -> None:
        super().__init__()
        self.count: Counter[str] = Counter()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.count[func.overloadpacket.__name__] += 1
        return func(*args, **(kwargs or {}))
