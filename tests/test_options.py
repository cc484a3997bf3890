"""No option is dead: changing any of them changes a result; options that contradict each other are refused by name."""

from __future__ import annotations

import atexit
import json
import shutil
import tempfile
from dataclasses import fields
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode

from cases import FAMILIES
from runs import one_line, rows, small, weights
from zoo.models import MODELS, Model
from zoo.models.optim import OptimConfig
from zoo.tasks import TASKS

TINY = {"dim": 16, "layers": 2, "heads": 2, "hidden": 24}
FILES = [str(Path(__file__).with_name("prompts.jsonl"))]
BASE: dict[str, dict[str, Any]] = {
    **{name: {**TINY, **family.tiny, **family.busy} for name, family in FAMILIES.items()},
    "regression": {"points": 7, "queries": 5},
    "text": {"tokens": 40, "domains": ["law"]},
    "prompts": {"context": 20, "query": 8, "target": 12, "domains": ["law"]},
    "noise": {"tokens": 40},
    "modules": {"queries": 5},
    "recall": {"queries": 5},
    "markov": {"tokens": 40},
}
MODEL_CHANGES = {name: family.changes for name, family in FAMILIES.items()}

TEXTS = Path(tempfile.mkdtemp(prefix="zoo-texts-"))
atexit.register(shutil.rmtree, TEXTS, ignore_errors=True)
for kind in ("a", "b"):
    (TEXTS / kind).mkdir()
    lines = [{"text": f"The {kind} {k} of text. " * 9, "body": f"The body {k} of {kind}. " * 9} for k in range(60)]
    (TEXTS / kind / "train.jsonl").write_text("\n".join(map(json.dumps, lines)))
(TEXTS / "README.md").write_text(
    "---\nconfigs:\n"
    "- config_name: a\n  data_files: a/*.jsonl\n  default: true\n"
    "- config_name: b\n  data_files: b/*.jsonl\n---\n"
)
NO_DOMAINS: dict[str, Any] = {"domains": None}
HUB = {**NO_DOMAINS, "hub": str(TEXTS)}

# of tasks; those of models are in cases.FAMILIES
TASK_CHANGES: dict[str, dict[str, Any]] = {
    "regression": {
        "function": "network",
        "dimension": 4,
        "points": 8,
        "queries": 6,
        "nonzero": (2, {"function": "sparse"}),
        "noise": (0.1, {"function": "noisy"}),
        "units": (5, {"function": "network"}),
    },
    "prompts": {
        **{"context": 21, "query": 9, "target": 13, "domains": ["medicine"], "files": (FILES, {"domains": None})},
        **{"tokenizer": "bpe", "vocabulary": (512, {"tokenizer": "bpe"})},
    },
    "text": {
        "tokens": 41,
        "domains": ["medicine"],
        "files": ([str(TEXTS / "a" / "*.jsonl")], NO_DOMAINS),
        "hub": (str(TEXTS), NO_DOMAINS),
        "subset": ("b", HUB),
        "documents": (30, HUB),
        "column": ("body", HUB),
        "tokenizer": "bpe",
        "vocabulary": (512, {"tokenizer": "bpe"}),
    },
    "noise": {"vocabulary": 9, "tokens": 41},
    "modules": {
        **{"variant": "routed", "context": "pairs", "modules": 5, "dimension": 4, "units": 5, "outputs": 3},
        **{"queries": 6, "held_out": 0.2, "pairs": (9, {"context": "pairs"})},
    },
    "recall": {"vocabulary": 40, "pairs": 5, "overwritten": 0.0, "queries": 6, "haystack": [20, 30]},
    "markov": {"domains": 3, "letters": 7, "sharpness": 1.0, "tokens": 41},
}
OPTIM_CHANGES = {
    **{"steps": 5, "batch_size": 8, "accumulate": 2, "lr": 0.01, "min_lr": 0.001, "warmup": 2},
    **{"betas": [0.5, 0.6], "weight_decay": 10.0, "clip": 0.01, "muon_lr": 0.1, "schedule": "wsd"},
    "decay": (2, {"schedule": "wsd"}),
}


def split(change: Any) -> tuple[Any, dict[str, Any]]:
    return change if isinstance(change, tuple) else (change, {})


def pairs(tables: dict[str, dict[str, Any]]) -> list[tuple[str, str]]:
    return [(name, option) for name, table in tables.items() for option in table]


def test_the_tables_cover_every_option() -> None:
    tables = {name: (MODELS[name].Config, table) for name, table in MODEL_CHANGES.items()}
    tables |= {name: (TASKS[name].Config, table) for name, table in TASK_CHANGES.items()}
    assert set(tables) == set(MODELS) | set(TASKS)
    tables["optim"] = (OptimConfig, OPTIM_CHANGES)
    for name, (config, table) in tables.items():
        # `name` chooses the class itself, or the optimiser; `base` is in test_hf_base
        assert set(table) == {field.name for field in fields(config)} - {"name", "base"}, name


def differ(before: dict[str, Any], after: dict[str, Any]) -> set[str]:
    """The keys of results that are not equal up to rounding."""

    def same(a: Any, b: Any) -> bool:
        if isinstance(a, Tensor) and isinstance(b, Tensor):
            return a.shape == b.shape and torch.allclose(a, b, rtol=1e-4, atol=1e-5)
        return a == b

    return {key for key in before if not same(before[key], after[key])}


@pytest.fixture(scope="module")
def before() -> dict[str, dict[str, Any]]:
    """What models give before an option is changed: each is trained twice, once and for all tests."""
    return {}


def trained(name: str, options: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> dict[str, Any]:
    """What a model gives after three steps, and what these cost."""
    monkeypatch.setattr(Model, "log", lambda *args, **kwargs: None)  # there is no trainer
    options = dict(options)
    task = options.pop("task", "noise")
    torch.manual_seed(0)
    model = MODELS[name](
        {"name": name, **BASE[name], **options}, {"name": task, **BASE[task]}, {"steps": 10, "warmup": 0}
    ).train()
    configured: Any = model.configure_optimizers()
    optimizer, losses = configured["optimizer"], []
    for k in range(3):
        optimizer.zero_grad()
        with FlopCounterMode(display=False) as counter:
            loss = model.training_step(model.task.batch("train", k, 4), k)
        loss.backward()
        optimizer.step()
        if model.decoder.context_to_delta:
            model.decoder.context_to_delta.after_step()
        losses.append(loss.detach())
    batch = model.task.batch("test", 0, 4)
    return {
        "output": model(batch.tokens, batch.n_context).detach(),
        "losses": torch.stack(losses),
        "parameters": sum(p.numel() for p in model.parameters()),
        "buffers": torch.cat([torch.zeros(1), *(b.flatten().float() for n, b in model.named_buffers() if "bias" in n)]),
        "work": counter.get_total_flops(),
    }


@pytest.mark.parametrize(("name", "option"), pairs(MODEL_CHANGES))
def test_model_option_matters(
    name: str, option: str, before: dict[str, dict[str, Any]], monkeypatch: pytest.MonkeyPatch
) -> None:
    value, needs = split(MODEL_CHANGES[name][option])
    key = f"{name} {needs}"
    if key not in before:
        before[key] = trained(name, needs, monkeypatch)
        assert not differ(before[key], trained(name, needs, monkeypatch))
    changed = differ(before[key], trained(name, {**needs, option: value}, monkeypatch))
    # the way in which experts are computed is the one option that must not change the result
    assert changed == {"work"} if option == "backend" else changed - {"work"}, changed


@pytest.mark.parametrize(("name", "option"), pairs(TASK_CHANGES))
def test_task_option_matters(name: str, option: str) -> None:
    value, needs = split(TASK_CHANGES[name][option])

    def batch(**changes: Any) -> dict[str, Any]:
        made = TASKS[name]({"name": name, **BASE[name], **needs, **changes}, 0)
        return made.batch("train", 0, 32)._asdict()

    assert not differ(batch(), batch())
    assert differ(batch(), batch(**{option: value}))


@pytest.fixture(scope="module")
def run_once(tmp_path_factory: pytest.TempPathFactory) -> Any:
    """From options of the optimiser to what a real run gives; each is run once."""
    done: dict[str, dict[str, Any]] = {}

    def run(**changes: Any) -> dict[str, Any]:
        key = json.dumps(changes)
        if key not in done:
            folder = tmp_path_factory.mktemp("run") / "out"
            steps = {"steps": 4, "batch_size": 4, "warmup": 1}
            metrics = small(folder, "moe", "noise", optim={**steps, **changes}, validate_every=100)
            best = [t.flatten() for t in weights(folder, "best").values() if t.is_floating_point()]
            losses = torch.tensor([row["loss"] for row in rows(folder) if "loss" in row])
            done[key] = {"losses": losses, "weights": torch.cat(best), "tokens": metrics["tokens"]}
        return done[key]

    return run


@pytest.mark.parametrize("option", OPTIM_CHANGES)
def test_optim_option_matters(option: str, run_once: Any) -> None:
    change, others = split(OPTIM_CHANGES[option])
    changed = differ(run_once(**others), run_once(**others, **{option: change}))
    assert bool(changed) == (option != "accumulate")  # parts save memory, and change nothing


ALONE: dict[str, Any] = {"task.domains": None}

# family, task, changed options, and what the message must name: both options with both values
REFUSED: list[tuple[str, str, dict[str, Any], list[str]]] = [
    ("transformer", "noise", {"model.dim": 18, "model.heads": 4}, ["model.dim=18", "2·model.heads=8"]),
    ("transformer", "noise", {"model.heads": 2, "model.kv_heads": 3}, ["model.heads=2", "model.kv_heads=3"]),
    ("transformer", "noise", {"model.kv_heads": 0}, ["model.heads=2", "model.kv_heads=0"]),
    ("transformer", "noise", {"model.layers": 0}, ["model.layers=0"]),
    ("transformer", "regression", {"model.tied": True}, ["model.tied=true", "task.name=regression"]),
    ("transformer", "regression", {"model.theta": 0.0}, ["model.theta=0.0", "above 0"]),
    ("transformer", "regression", {"model.eps": -1e-6}, ["model.eps=-1e-06", "above 0"]),
    ("hypernet", "noise", {"model.rank": 17}, ["model.rank=17", "model.dim=16", "model.hidden=24"]),
    ("hypernet", "noise", {"model.rank": 9, "model.hidden": 8}, ["model.rank=9", "model.dim=16", "model.hidden=8"]),
    ("hypernet", "noise", {"model.rank": 2, "model.emission": "full"}, ["model.rank=2", "model.emission", "full"]),
    ("hypernet", "noise", {"model.chunk": 4, "model.context": "token"}, ["model.chunk=4", "model.context", "token"]),
    ("hypernet", "regression", {"model.chunk": 4}, ["model.chunk=4", "model.context", "segment"]),
    ("hypernet", "noise", {"model.chunk": 0}, ["model.chunk=0"]),
    ("hypernet", "noise", {"model.chunk": 40}, ["model.chunk=40", "task.tokens=40"]),
    ("hypernet", "noise", {"model.attend_context": True}, ["model.attend_context=true", "a separate context"]),
    ("hypernet", "text", {"model.context": "segment"}, ["model.context=segment", "without a separate context"]),
    ("hypernet", "regression", {"model.context": "chunk"}, ["model.context=chunk", "with a separate context"]),
    ("hypernet", "noise", {"model.matrices": []}, ["model.matrices=[]", "gate"]),
    ("hypernet", "noise", {"model.matrices": ["up", "up"]}, ["model.matrices=['up', 'up']"]),
    ("moe", "noise", {"model.top_k": 5}, ["model.top_k=5", "model.experts=4"]),
    ("moe", "noise", {"model.top_k": 0}, ["model.top_k=0"]),
    ("moe", "noise", {"model.shared": -1}, ["model.shared=-1"]),
    ("moe", "noise", {"model.balance_weight": -0.5}, ["model.balance_weight=-0.5"]),
    ("moe", "noise", {"model.renormalise": True, "model.top_k": 1}, ["model.renormalise=true", "model.top_k=1"]),
    ("moe", "noise", {"model.renormalise": True, "model.score": "linear"}, ["renormalise=true", "model.score=linear"]),
    ("moe", "noise", {"model.chunk": 4}, ["model.chunk=4", "model.route_on=context"]),
    ("moe", "regression", {"model.chunk": 4, "model.route_on": "context"}, ["model.chunk=4", "running text"]),
    ("moe", "noise", {"model.chunk": 0, "model.route_on": "context"}, ["model.chunk=0"]),
    ("moe", "noise", {"model.chunk": 41, "model.route_on": "context"}, ["model.chunk=41", "task.tokens=40"]),
    ("hyper_moe", "noise", {"model.experts": 1}, ["model.experts=1", "model=hypernet"]),
    ("hyper_moe", "noise", {"model.top_k": 5}, ["model.top_k=5", "model.experts=4"]),
    ("hyper_moe", "noise", {"model.rank": 5}, ["model.experts=4", "model.rank=5", "model.dim=16", "model.hidden=24"]),
    ("hyper_moe", "noise", {"model.rank": 0}, ["model.rank=0"]),
    ("merged_experts", "noise", {"model.experts": 0}, ["model.experts=0"]),
    ("merged_experts", "noise", {"model.experts": 1, "model.score": "softmax"}, ["model.experts=1", "softmax"]),
    ("fast_weights", "regression", {"model.chunk": 4}, ["model.chunk=4", "running text"]),
    ("fast_weights", "noise", {"model.chunk": 40}, ["model.chunk=40", "task.tokens=40"]),
    ("fast_weights", "noise", {"model.attend_context": False}, ["model.attend_context=false", "a separate context"]),
    ("moe", "regression", {"task.points": 0}, ["task.points=0"]),
    ("moe", "regression", {"task.noise": 0.1}, ["task.noise=0.1", "task.function=noisy", "linear"]),
    ("moe", "regression", {"task.nonzero": 2}, ["task.nonzero=2", "task.function=sparse", "linear"]),
    ("moe", "regression", {"task.units": 2}, ["task.units=2", "task.function=network", "linear"]),
    ("moe", "regression", {"task.function": "sparse", "task.nonzero": 4}, ["task.nonzero=4", "task.dimension=3"]),
    ("moe", "modules", {"task.variant": "routed", "task.context": "pairs"}, ["task.context=pairs", "task.variant"]),
    ("moe", "modules", {"task.variant": "routed", "task.units": 4}, ["task.units=4", "task.variant=combined"]),
    ("moe", "modules", {"task.pairs": 4}, ["task.pairs=4", "task.context=pairs", "code"]),
    ("moe", "modules", {"task.held_out": 0.9}, ["task.held_out=0.9", "41", "task.modules=6", "37", "1 to 34"]),
    ("moe", "modules", {"task.modules": 1}, ["task.held_out=0.5", "task.modules=1"]),
    ("moe", "recall", {"task.pairs": 9}, ["task.pairs=9", "8 keys", "task.vocabulary=16"]),
    ("moe", "recall", {"task.vocabulary": 9}, ["task.vocabulary=9", "even"]),
    ("moe", "recall", {"task.overwritten": 1.5}, ["task.overwritten=1.5", "0 to 1"]),
    ("moe", "recall", {"task.haystack": [11, 40]}, ["task.haystack=[11, 40]", "12"]),
    ("moe", "recall", {"task.haystack": [40]}, ["task.haystack=[40]", "2 numbers"]),
    ("moe", "markov", {"task.letters": 63}, ["task.letters=63", "62"]),
    ("moe", "text", {"task.domains": []}, ["task.domains=[]", "medicine"]),
    ("moe", "text", {"task.domains": ["law", "law"]}, ["task.domains=['law', 'law']"]),
    ("moe", "prompts", {"task.context": 0}, ["task.context=0"]),
    ("moe", "prompts", {"task.files": ["a.jsonl"]}, ["task.files=['a.jsonl']", "task.domains=['law']"]),
    ("moe", "text", {"task.files": ["a.txt"]}, ["task.domains=['law']", "task.files=['a.txt']"]),
    ("moe", "text", {"task.hub": "a/b"}, ["task.domains=['law']", "task.hub='a/b'"]),
    ("moe", "text", {**ALONE, "task.files": ["a"], "task.hub": "a/b"}, ["task.files=['a']", "task.hub='a/b'"]),
    ("moe", "text", {**ALONE, "task.files": []}, ["task.files=[]"]),
    ("moe", "text", {"task.column": "body"}, ["task.column=body", "task.hub or task.files"]),
    ("moe", "text", {"task.subset": "x"}, ["task.subset=x", "task.hub"]),
    ("moe", "text", {**ALONE, "task.files": ["a"], "task.documents": 5}, ["task.documents=5", "task.hub"]),
    ("moe", "text", {**ALONE, "task.hub": "a/b", "task.documents": 0}, ["task.documents=0"]),
    ("moe", "text", {"task.vocabulary": 300}, ["task.vocabulary=300", "task.tokenizer=bpe"]),
    ("moe", "text", {"task.tokenizer": "bpe", "task.vocabulary": 257}, ["task.vocabulary=257", "258", "524288"]),
    ("moe", "text", {"optim.steps": 0}, ["optim.steps=0"]),
    ("moe", "text", {"optim.batch_size": 9, "optim.accumulate": 2}, ["optim.batch_size=9", "optim.accumulate=2"]),
    ("moe", "text", {"optim.warmup": 20, "optim.steps": 20}, ["optim.warmup=20", "optim.steps=20"]),
    ("moe", "text", {"optim.lr": 0.1, "optim.min_lr": 0.2}, ["optim.min_lr=0.2", "optim.lr=0.1"]),
    ("moe", "text", {"optim.betas": [0.9, 1.0]}, ["optim.betas=[0.9, 1.0]"]),
    ("moe", "text", {"optim.clip": -1.0}, ["optim.clip=-1.0"]),
]


@pytest.mark.parametrize(
    ("family", "task", "changes", "named"), REFUSED, ids=[f"{row[0]}-{row[1]}-{row[2]}" for row in REFUSED]
)
def test_contradictions_are_refused_by_name(family: str, task: str, changes: dict[str, Any], named: list[str]) -> None:
    groups: dict[str, Any] = {
        "model": {"name": family, **BASE[family]},
        "task": {"name": task, **BASE[task]},
        "optim": {},
    }
    for key, value in changes.items():
        group, option = key.split(".")
        groups[group][option] = value
    message = one_line(lambda: MODELS[family](**groups))
    assert all(name in message for name in named), message
