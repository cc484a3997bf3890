"""The hypernetwork learns from its start, and each option does what it says."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from cases import Case, batch_of, build
from zoo.core.context import ContextMean, Source
from zoo.core.delta import Full, LowRank, Scale
from zoo.models.hypernet import Hypernet

pytestmark = pytest.mark.numeric

EMISSIONS = {"low_rank": LowRank, "full": Full, "scale": Scale}
every_emission = pytest.mark.parametrize("emission", EMISSIONS)
ZERO_HEADS = {"low_rank": ("_u",), "full": ("_full",), "scale": ("_rows", "_columns")}
# every source of context, with the task it belongs to
SOURCES = [
    ("regression", {}),
    ("noise", {"chunk": 4}),
    ("noise", {"context": "running"}),
    ("noise", {"context": "token"}),
]
every_source = pytest.mark.parametrize(("task", "options"), SOURCES, ids=["segment", "chunk", "running", "token"])


def hypernet(task: str = "regression", random: bool = True, **options: Any) -> Any:
    return build(Case("", "hypernet", task, options), random=random)


def states(model: Hypernet, size: int = 3) -> Tensor:
    return torch.randn(size, model.task.tokens, model.config.dim, dtype=torch.float64)


def dense(model: Hypernet, z: Tensor, layer: int = 0, n_context: int | None = None) -> dict[str, Tensor]:
    """ΔW of each matrix at the last token, (B,o,i)."""
    patch = model.decoder.emit(z, layer, model.task.n_context if n_context is None else n_context)
    ffn, last = model.decoder.blocks[layer].ffn, torch.tensor([z.shape[1] - 1])
    return {name: delta.dense(ffn.weight(name))[:, 0] for name, delta in patch.per_token(last).weights.items()}


def gradients(model: Hypernet) -> set[str]:
    """The parameters whose gradient of the task's loss is not zero."""
    model.zero_grad()
    batch = batch_of(model, 8)
    output = model(batch.tokens, batch.n_context)
    model.task.token_losses(output.float(), batch).mean().backward()
    return {name for name, p in model.named_parameters() if p.grad is not None and p.grad.any()}


@every_emission
@pytest.mark.parametrize("code", ["context", "constant"])
@every_source
def test_gradients_at_step_0_and_1(task: str, options: dict[str, Any], emission: str, code: str) -> None:
    model = hypernet(task, random=False, emission=emission, code=code, **options)
    heads = "decoder.context_to_delta"
    first = {name for name in gradients(model) if name.startswith(heads)}
    expected = {n for n, _ in model.named_parameters() if f"{heads}.generator.heads" in n}
    assert first == {n for n in expected if n.split(".")[-2].endswith(ZERO_HEADS[emission])}
    with torch.no_grad():
        for parameter in model.parameters():
            parameter -= 0.1 * (0 if parameter.grad is None else parameter.grad)
    assert gradients(model) == {name for name, _ in model.named_parameters()}


@pytest.mark.parametrize("scale", [0.1, 1.0, 10.0])
@pytest.mark.parametrize("code_dim", [16, 64])
def test_v_factors_have_unit_fan_in_variance_at_any_scale_of_the_context(scale: float, code_dim: int) -> None:
    model = hypernet(random=False, dim=64, hidden=96, code_dim=code_dim)
    context = scale * torch.randn(64, 64, dtype=torch.float64)
    nonempty = torch.ones(64, 1, dtype=torch.float64)
    deltas = model.decoder.context_to_delta.generator(ContextMean(context, nonempty), 1)
    for name, fan_in in (("gate", 64), ("up", 64), ("down", 96)):
        delta = deltas[name]
        assert isinstance(delta, LowRank)
        assert delta.v.std().item() == pytest.approx(fan_in**-0.5, rel=0.1)
        assert delta.v.shape == (64, fan_in, 4)


@every_emission
def test_context_tokens_pass_through_the_unpatched_ffn(emission: str) -> None:
    model = hypernet(emission=emission)
    z, n, ffn = states(model), model.task.n_context, model.decoder.blocks[0].ffn
    patched, plain = ffn(z, model.decoder.emit(z, 0, n)), ffn(z)
    torch.testing.assert_close(patched[:, :n], plain[:, :n], rtol=0, atol=1e-14)
    assert ((patched - plain)[:, n:].abs().amax(-1) > 1e-3).all()


def test_layer_embedding_makes_layers_differ() -> None:
    model = hypernet()
    generator, z = model.decoder.context_to_delta.generator, states(model)
    summary = Source("segment").mean(z, model.task.n_context)
    W = model.decoder.blocks[0].ffn.gate
    first, second = (generator(summary, layer)["gate"].dense(W) for layer in (0, 1))
    assert (first - second).norm() > 0.1 * first.norm()
    with torch.no_grad():
        generator.layer.weight[1] = generator.layer.weight[0]
    assert torch.equal(first, generator(summary, 1)["gate"].dense(W))


@every_emission
def test_emission_is_the_form_of_the_update(emission: str) -> None:
    model = hypernet(emission=emission)
    patch = model.decoder.emit(states(model), 0, model.task.n_context)
    assert {type(delta) for delta in patch.weights.values()} == {EMISSIONS[emission]}
    rank = torch.linalg.matrix_rank(dense(model, states(model))["gate"])
    assert (rank == (4 if emission == "low_rank" else 16)).all()


@pytest.mark.parametrize("matrices", [["down"], ["gate", "up"], ["up", "down", "gate"]])
def test_matrices_are_those_that_change(matrices: list[str]) -> None:
    model = hypernet(matrices=matrices)
    assert list(dense(model, states(model))) == matrices


READS = [  # which tokens decide ΔW of the last of 12 tokens
    ("noise", {"chunk": 4}, range(8)),
    ("noise", {"chunk": 5}, range(10)),
    ("noise", {"context": "running"}, range(12)),
    ("noise", {"context": "token"}, range(11, 12)),
    ("regression", {}, range(7)),
    ("regression", {"code": "constant"}, range(0)),
    ("noise", {"chunk": 4, "code": "constant"}, range(0)),
]


@pytest.mark.parametrize(("task", "options", "expected"), READS)
def test_context_decides_what_the_update_reads(task: str, options: dict[str, Any], expected: range) -> None:
    model = hypernet(task, **options)
    z = states(model).requires_grad_()
    total = sum((delta.square().sum() for delta in dense(model, z).values()), torch.zeros(()))
    (gradient,) = torch.autograd.grad(total, z, allow_unused=True, materialize_grads=True)
    assert gradient.any(-1).all(0).nonzero().flatten().tolist() == list(expected)
    assert total > 0


@pytest.mark.parametrize("attend", [True, False])
def test_attend_context_is_the_only_other_way_in(attend: bool) -> None:
    model = hypernet(random=False, attend_context=attend)  # ΔW = 0, so only attention can carry the context
    tokens, _, n = batch_of(model)[:3]
    other = torch.cat([tokens.roll(1, 0)[:, :n], tokens[:, n:]], 1)
    same = torch.equal(model(tokens, n)[:, n:], model(other, n)[:, n:])
    assert same == (not attend)


@every_emission
@every_source
def test_relative_norm_is_that_of_the_dense_update(task: str, options: dict[str, Any], emission: str) -> None:
    model = hypernet(task, emission=emission, **options)
    z, n, ffn = states(model), model.task.n_context, model.decoder.blocks[1].ffn
    patch = model.decoder.emit(z, 1, n)
    for name, delta in patch.weights.items():
        W, values = ffn.weight(name), model.decoder.context_to_delta.metrics(patch, ffn)[f"delta_norm_{name}"]
        whole = delta.dense(W)
        size = whole.flatten(-2).norm(dim=-1) / W.norm()
        expected = size[:, 1:].mean() if options.get("chunk") else size.mean()  # before the first chunk is no context
        assert values.mean().item() == pytest.approx(expected.item(), rel=1e-6)
