"""torch.func and forward mode go through every family; what is compared with is ordinary autograd on the fast paths."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.autograd import forward_ad, functional
from torch.func import functional_call, grad, hessian, jacfwd, jacrev, jvp, vmap
from torch.nn.attention import SDPBackend, sdpa_kernel

from cases import BY_NAME, CASES, Case, batch_of, build
from zoo.core.low_rank import transformed
from zoo.models import Model

pytestmark = pytest.mark.numeric

every_case = pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
# each form of update, source of a context, mask and way to route once
SOME = [
    "transformer-noise-gqa-tied",
    "hypernet-segment-low-rank",
    "hypernet-chunk-scale-tied",
    "hypernet-running-full-gqa",
    "moe-token-top1-shared",
    "moe-context-linear",
    "moe-context-chunk",
    "fast-weights-chunk",
]
some_cases = pytest.mark.parametrize("case", [BY_NAME[name] for name in SOME], ids=SOME)
Parameters = dict[str, Tensor]
SCALE = "decoder.blocks.0.norm1.weight"


def close(actual: Any, expected: Any) -> None:
    torch.testing.assert_close(actual, expected, rtol=0, atol=1e-8)


def made(case: Case) -> tuple[Model, Parameters, Parameters]:
    """The case's model, its parameters, and a direction in which they move."""
    model = build(case)
    parameters = {name: parameter.detach() for name, parameter in model.named_parameters()}
    return model, parameters, {name: torch.randn_like(value) for name, value in parameters.items()}


def loss_of(model: Model, tokens: Tensor) -> Callable[[Parameters], Tensor]:
    n = model.task.n_context
    return lambda parameters: functional_call(model, parameters, (tokens, n)).sin().mean()


def gradient(model: Model, tokens: Tensor) -> Parameters:
    """By ordinary autograd."""
    loss = model(tokens, model.task.n_context).sin().mean()
    names, values = zip(*model.named_parameters(), strict=True)
    return dict(zip(names, torch.autograd.grad(loss, values, materialize_grads=True), strict=True))


def along(gradients: Parameters, direction: Parameters) -> Tensor:
    return sum(((gradients[name] * direction[name]).sum() for name in direction), torch.zeros(()))


@every_case
def test_first_derivatives_are_those_of_ordinary_autograd(case: Case) -> None:
    model, parameters, direction = made(case)
    tokens = batch_of(model).tokens
    loss, expected = loss_of(model, tokens), gradient(model, tokens)
    assert along(expected, direction).abs() > 1e-3
    close(jvp(loss, (parameters,), (direction,))[1], along(expected, direction))
    with forward_ad.dual_level():
        moving = {name: forward_ad.make_dual(parameters[name], direction[name]) for name in parameters}
        close(forward_ad.unpack_dual(loss(moving)).tangent, along(expected, direction))
    close(grad(loss)(parameters), expected)


@every_case
def test_vmap_is_a_loop_over_sequences_and_gives_each_its_gradient(case: Case) -> None:
    model, parameters, _ = made(case)
    tokens, n = batch_of(model).tokens, model.task.n_context
    close(vmap(lambda row: model(row[None], n)[0])(tokens), model(tokens, n))
    each = vmap(lambda row, p: grad(loss_of(model, row[None]))(p), (0, None))(tokens, parameters)
    for row, expected in enumerate(gradient(model, tokens[[row]]) for row in range(len(tokens))):
        close({name: value[row] for name, value in each.items()}, expected)


@some_cases
def test_vmap_over_parameters_runs_many_models_at_once(case: Case) -> None:
    model, parameters, direction = made(case)
    both = [parameters, {name: parameters[name] + 0.1 * direction[name] for name in parameters}]
    stacked = {name: torch.stack([p[name] for p in both]) for name in parameters}
    loss = loss_of(model, batch_of(model).tokens)
    close(vmap(loss)(stacked), torch.stack([loss(p) for p in both]))


@some_cases
def test_second_derivatives_and_jacobians_agree_however_they_are_taken(case: Case) -> None:
    model, parameters, direction = made(case._replace(options={**case.options, "layers": 1}))
    tokens, scale = batch_of(model).tokens, parameters[SCALE]
    loss, n = loss_of(model, tokens), model.task.n_context
    forward_over_reverse = jvp(grad(loss), (parameters,), (direction,))[1]
    close(grad(lambda p: along(grad(loss)(p), direction))(parameters), forward_over_reverse)

    def moved(scale: Tensor) -> Tensor:
        return loss({**parameters, SCALE: scale})

    def outputs(scale: Tensor) -> Tensor:
        return functional_call(model, {**parameters, SCALE: scale}, (tokens, n))[0, -2:].flatten()

    with sdpa_kernel(SDPBackend.MATH):  # the fused kernels of attention have no second derivative in ordinary autograd
        curvature = functional.hessian(moved, scale)
    close(hessian(moved)(scale), curvature)
    assert curvature.abs().max() > 1e-5
    jacobian = functional.jacobian(outputs, scale)
    for other in (jacrev(outputs), jacfwd(outputs), lambda s: functional.jacobian(outputs, s, vectorize=True)):
        close(other(scale), jacobian)


@pytest.mark.parametrize("name", ["transformer-regression", "hypernet-segment-low-rank", "moe-token"])
def test_forward_mode_goes_through_the_update_that_stands_for_a_context(name: str) -> None:
    model = build(BY_NAME[name]).requires_grad_(False)
    tokens, removed, W = batch_of(model).tokens, torch.arange(12) < 7, model.decoder.blocks[1].ffn.weight("down")
    direction = torch.randn_like(tokens)

    def update(tokens: Tensor) -> Tensor:
        return model.deltas(tokens, removed)[1].weights["down"].dense(W).sin().sum()

    (expected,) = torch.autograd.grad(update(tokens.requires_grad_()), tokens)
    close(jvp(update, (tokens.detach(),), (direction,))[1], (expected * direction).sum())


def test_only_a_transform_makes_the_fast_paths_step_aside() -> None:
    assert not transformed()
    seen: dict[Any, str] = {}
    for name in ("hypernet-chunk", "moe-token"):
        model = build(BY_NAME[name])
        nodes: list[Any] = [model(batch_of(model).tokens, model.task.n_context).sum().grad_fn]
        while nodes:
            node = nodes.pop()
            if node not in seen:
                seen[node] = node.name()
                nodes += [parent for parent, _ in node.next_functions if parent]
    ours = {"_RMSNormBackward", "_LowRankLinearBackward", "DispatchBackward", "CombineBackward"}
    assert ours <= set(seen.values())
    inside: list[bool] = []
    vmap(lambda x: inside.append(transformed()) or x)(torch.zeros(2))  # type: ignore[func-returns-value]
    with forward_ad.dual_level():
        inside.append(transformed())
    assert inside == [True, True]
    assert not transformed()
