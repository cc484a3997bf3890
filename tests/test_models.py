"""Every family on every task: shapes, gradients, options that rebuild the model."""

from __future__ import annotations

from dataclasses import fields
from typing import Any

import pytest
import torch

from cases import Case, options_of
from zoo.models import MODELS, Model
from zoo.tasks import TASKS

pytestmark = pytest.mark.numeric

PAIRS = [(family, task) for family in MODELS for task in TASKS]
every_pair = pytest.mark.parametrize(("family", "task"), PAIRS, ids=["-".join(pair) for pair in PAIRS])


def arguments_of(family: str, task: str) -> dict[str, Any]:
    return options_of(Case("", family, task, {}))


def make(family: str, task: str, seed: int = 0) -> Model:
    torch.manual_seed(seed)
    return MODELS[family](**arguments_of(family, task))


@every_pair
def test_output_and_loss(family: str, task: str) -> None:
    model = make(family, task)
    batch = model.task.batch("train", 0, 3)
    output = model(batch.tokens, batch.n_context)
    assert output.shape == (3, model.task.tokens, model.task.output_dim)
    errors = model.task.token_losses(output, batch)
    assert errors.isfinite().all()
    assert errors.numel() <= batch.targets.numel()
    values = model.task.evaluate(lambda tokens, n_context: model(tokens, n_context), batch)
    assert model.task.main_metric in values
    assert all(value.isfinite().all() for value in values.values())


@every_pair
def test_every_parameter_learns(family: str, task: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Model, "log", lambda *args, **kwargs: None)  # there is no trainer
    model = make(family, task).train()
    optimizer = model.configure_optimizers()["optimizer"]  # type: ignore[call-overload,index]
    for k in range(2):  # at the first step a hypernetwork's update is zero, and so are some gradients
        optimizer.zero_grad()
        model.training_step(model.task.batch("train", k, 8), k).backward()
        optimizer.step()
    for name, parameter in model.named_parameters():
        assert parameter.grad is not None, name
        assert parameter.grad.any(), name


def is_plain(value: Any) -> bool:
    if isinstance(value, dict):
        return type(value) is dict and all(type(key) is str and is_plain(item) for key, item in value.items())
    if isinstance(value, list):
        return type(value) is list and all(map(is_plain, value))
    return value is None or type(value) in (int, float, str, bool)


@every_pair
def test_saved_options_are_plain_and_rebuild_the_model(family: str, task: str) -> None:
    model = make(family, task)
    saved = dict(model.hparams)
    assert is_plain(saved)
    assert set(saved) == {"model", "task", "optim", "seed"}
    for group, config in (("model", model.config), ("task", model.task.config), ("optim", model.optim)):
        assert set(saved[group]) == {field.name for field in fields(config)}  # defaults are written down, too
    assert saved["model"]["kv_heads"] == 2
    other = MODELS[saved["model"]["name"]](**saved)
    assert type(other) is type(model)
    assert dict(other.hparams) == saved
    assert (other.config, other.task.config, other.optim) == (model.config, model.task.config, model.optim)
    other.load_state_dict(model.state_dict())
    batch = model.task.batch("test", 0, 2)
    assert torch.equal(model(batch.tokens, batch.n_context), other(batch.tokens, batch.n_context))


@every_pair
def test_seed_decides_the_weights(family: str, task: str) -> None:
    first, same, other = (make(family, task, seed).state_dict() for seed in (0, 0, 1))
    assert all(torch.equal(first[name], same[name]) for name in first)
    weight = "decoder.blocks.0.ffn.gate"
    assert not torch.equal(first[weight], other[weight])


SIZES = ["delta_norm_gate", "delta_norm_up", "delta_norm_down"]
NUMBERS = {
    **dict.fromkeys(("hypernet", "hyper_moe", "merged_experts", "fast_weights"), SIZES),
    "moe": ["load_max_over_mean", "dead_fraction", "entropy"],
}


@pytest.mark.parametrize("family", NUMBERS)
def test_numbers_of_each_layer_are_logged(family: str, monkeypatch: pytest.MonkeyPatch) -> None:
    logged: dict[str, Any] = {}
    model = make(family, "regression")
    monkeypatch.setattr(Model, "log", lambda self, name, value, **options: logged.update({name: value}))
    for k in range(2):
        model.validation_step(model.task.batch("validation", k, 8), k)
        for parameter in model.parameters():
            torch.nn.init.normal_(parameter, std=0.3)
    assert logged.pop("validation_loss")
    assert set(logged) == {f"layer{layer}/{name}" for layer in range(2) for name in NUMBERS[family]}
    numbers = {name: float(value.compute()) for name, value in logged.items()}
    if family == "moe":  # of all tokens, neither a mean of choices nor of batches
        assert numbers["layer0/dead_fraction"] <= 1 <= numbers["layer0/load_max_over_mean"] <= 4
    else:
        assert len({*numbers.values()}) == 6
