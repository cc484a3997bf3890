"""Who updates which weights, by how much, and at which rate."""

from __future__ import annotations

import copy
from itertools import pairwise
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.optim import AdamW

from test_models import arguments_of, every_pair, make
from zoo.config import from_dict
from zoo.models import MODELS, Model
from zoo.models.optim import Combined, Muon, OptimConfig, optimizer_of, orthogonal

pytestmark = pytest.mark.numeric


def optimizer(model: Model, **options: Any) -> Any:
    return optimizer_of(model.decoder, from_dict(OptimConfig, options, "optim").resolve(model.task))[0]


def parameters(*groups: dict[str, Any]) -> set[int]:
    return {id(p) for group in groups for p in group["params"]}


@every_pair
def test_weight_decay_acts_on_matrices_alone(family: str, task: str) -> None:
    model = make(family, task)
    for options in ({"name": "adamw"}, {}):
        found = optimizer(model, **options)
        matrices = [group for group in found.param_groups if group["weight_decay"]]
        others = [group for group in found.param_groups if not group["weight_decay"]]
        assert {group["weight_decay"] for group in matrices} == {0.01}
        assert matrices[0]["betas"] == (0.9, 0.95)
        assert parameters(*matrices) == {id(p) for p in model.parameters() if p.dim() >= 2}
        assert sum(len(group["params"]) for group in found.param_groups) == len(list(model.parameters()))
        assert parameters(*others) >= {id(p) for name, p in model.named_parameters() if "norm" in name}


@every_pair
def test_a_family_has_its_own_part_of_the_rate_beside_muon(family: str, task: str) -> None:
    model, lr = make(family, task), 0.006
    adapter = model.decoder.context_to_delta
    own = {id(p) for p in adapter.parameters()} if adapter else set()
    for options, factor in (({"name": "adamw"}, 1.0), ({}, adapter.lr_factor if adapter else 1.0)):
        groups = optimizer(model, lr=lr, **options).param_groups
        rates = {id(p): group["initial_lr"] for group in groups if "betas" in group for p in group["params"]}
        assert {rates[i] for i in own} <= {factor * lr}
        assert {rates[i] for i in rates.keys() - own} == {lr} == {groups[0]["initial_lr"]}  # the one that rows tell
    if adapter:  # trained alone, without a matrix for Muon
        model.freeze_decoder()
        assert {g["initial_lr"] for g in optimizer(model, lr=lr).param_groups} == {adapter.lr_factor * lr}


@pytest.mark.parametrize("family", ["transformer", "moe"])
def test_muon_takes_the_matrices_of_blocks_and_each_expert_for_itself(family: str) -> None:
    model = make(family, "noise")
    adamw, muon = optimizer(model).parts
    assert (type(adamw), type(muon)) == (AdamW, Muon)
    names = {id(p): name for name, p in model.decoder.named_parameters()}
    taken = {names[i] for i in parameters(*muon.param_groups)}
    assert taken == {name for name in names.values() if name.startswith("blocks.") and "norm" not in name}
    assert [group["blocks"] for group in muon.param_groups] == [1, getattr(model.config, "experts", 1)]
    assert type(optimizer(model, name="adamw")) is AdamW


def test_orthogonal_keeps_singular_vectors_and_evens_out_their_values() -> None:
    x = torch.randn(3, 2, 24, 10, dtype=torch.float64)
    for matrix in (x, x.mT, 1e-3 * x):
        u, _, vh = torch.linalg.svd(matrix, full_matrices=False)
        values = u.mT @ orthogonal(matrix) @ vh.mT
        even = values.diagonal(dim1=-2, dim2=-1)
        assert 0.6 < even.min() < even.max() < 1.3
        assert (values - torch.diag_embed(even)).abs().max() < 1e-10
    assert not orthogonal(torch.zeros(4, 3)).any()


def stepped(make: Any, start: list[Tensor], gradients: list[list[Tensor]]) -> list[Tensor]:
    """The weights after a step with each of the gradients, by the optimiser that `make` makes of them."""
    weights = [nn.Parameter(w.clone()) for w in start]
    optimizer = make(weights)
    for gradient in gradients:
        for p, g in zip(weights, gradient, strict=True):
            p.grad = g
        optimizer.step()
    return [p.detach() for p in weights]


@pytest.mark.parametrize("blocks", [1, 3])
def test_muon_is_that_of_torch_for_each_expert(blocks: int) -> None:
    """But for bfloat16, in which torch computes."""
    shapes = [(12, 8), (12, 8), (24, 16)]
    start, *gradients = ([torch.randn(shape) for shape in shapes] for _ in range(4))

    def parts(matrices: list[Tensor]) -> list[Tensor]:
        return [part for matrix in matrices for part in matrix.chunk(blocks)]

    def ours(weights: list[nn.Parameter], blocks: int = blocks) -> Muon:
        return Muon([{"params": weights, "blocks": blocks}], 0.1, 0.01)

    def theirs(weights: list[nn.Parameter]) -> torch.optim.Muon:
        return torch.optim.Muon(weights, 0.1, 0.01, adjust_lr_fn="match_rms_adamw")

    expected = torch.cat([t.flatten() for t in stepped(theirs, parts(start), [parts(g) for g in gradients])])
    before = torch.cat([t.flatten() for t in start])
    for made, low, high in ((ours, 0, 0.02), (lambda weights: ours(weights, 4 - blocks), 0.2, 2)):
        found = torch.cat([t.flatten() for t in stepped(made, start, gradients)])
        assert low <= (found - expected).norm() / (expected - before).norm() <= high


def test_joined_optimisers_keep_one_state_that_goes_on() -> None:
    models = [make("moe", "noise") for _ in range(2)]
    optimizers = [optimizer(model) for model in models]

    def step(which: int, seed: int) -> None:
        generator = torch.Generator().manual_seed(seed)
        for p in models[which].parameters():
            p.grad = torch.randn(p.shape, generator=generator)
        optimizers[which].step()

    step(0, 1)
    models[1].load_state_dict(models[0].state_dict())
    optimizers[1].load_state_dict(copy.deepcopy(optimizers[0].state_dict()))
    for which in range(2):
        step(which, 2)
    pairs = zip(models[0].parameters(), models[1].parameters(), strict=True)
    assert all(torch.equal(a, b) for a, b in pairs)
    assert isinstance(optimizers[0], Combined)
    assert len(optimizers[0].state) == len(list(models[0].parameters()))


@pytest.mark.parametrize("min_lr", [0.0, 1e-3])
@pytest.mark.parametrize("warmup", [0, 5])
def test_rate_warms_up_then_decays_to_min_lr(warmup: int, min_lr: float) -> None:
    optim = OptimConfig(steps=40, warmup=warmup, lr=0.01, min_lr=min_lr)
    rates = [optim.lr * optim.lr_at(step) for step in range(optim.steps + 1)]
    up, down = rates[:warmup], rates[warmup:]
    assert up == pytest.approx([0.01 * (step + 1) / 5 for step in range(warmup)])
    assert down[0] == pytest.approx(0.01)
    assert all(later < earlier for earlier, later in pairwise(down))
    assert down[len(down) // 2] == pytest.approx((0.01 + min_lr) / 2, rel=0.05)
    assert rates[-1] == pytest.approx(min_lr, abs=1e-12)
    assert optim.lr * optim.lr_at(10 * optim.steps) == pytest.approx(min_lr, abs=1e-12)


def test_other_schedules() -> None:
    stable = OptimConfig(steps=20, warmup=2, lr=1.0, min_lr=0.2, schedule="wsd", decay=4)
    rates = [stable.lr_at(step) for step in range(22)]
    assert rates == pytest.approx([0.5, *[1.0] * 16, 0.8, 0.6, 0.4, 0.2, 0.2])
    assert OptimConfig(steps=20, schedule="wsd").resolve(make("moe", "noise").task).decay == 4
    constant = OptimConfig(steps=20, warmup=2, schedule="constant")
    assert [constant.lr_at(step) for step in range(22)] == [0.5, *[1.0] * 21]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"decay": 3}, "optim.decay=3 needs optim.schedule=wsd, not cosine"),
        ({"schedule": "wsd", "decay": 11}, "optim.decay=11 must lie between 0 and the 10 steps left"),
        ({"schedule": "constant", "min_lr": 1e-3}, "optim.min_lr=0.001 needs a schedule that falls"),
        ({"schedule": "linear"}, "known: cosine, wsd, constant"),
        ({"muon_lr": 0.0}, "optim.muon_lr=0.0 must be above 0"),
        ({"muon_lr": 0.1, "name": "adamw"}, "optim.muon_lr=0.1 needs optim.name=muon, not adamw"),
        ({"min_lr": 0.1}, "optim.min_lr=0.1 must lie between 0 and optim.lr=0.006"),
    ],
)
def test_options_that_do_not_fit(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        from_dict(OptimConfig, {"steps": 10, **options}, "optim").resolve(make("moe", "noise").task)


@pytest.mark.parametrize(
    ("task", "options", "rates"),
    [
        ("noise", {}, (0.006, 0.01)),
        ("text", {}, (0.012, 0.02)),
        ("text", {"lr": 0.5, "muon_lr": 0.25}, (0.5, 0.25)),
        ("text", {"name": "adamw"}, (0.003, None)),
    ],
)
def test_open_rates_are_those_of_the_task(task: str, options: dict[str, Any], rates: tuple[float, float]) -> None:
    arguments = arguments_of("transformer", task)
    model = MODELS["transformer"](**{**arguments, "optim": options})
    assert (model.optim.lr, model.optim.muon_lr) == rates
    assert (model.hparams["optim"]["lr"], model.hparams["optim"]["muon_lr"]) == rates
