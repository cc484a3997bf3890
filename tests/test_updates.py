"""The patched matrices as vectors: every operation on factors equals the one on dense matrices."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from cases import CASES, Case, batch_of, length_of_context, options_of, shared, taking_turns
from test_delta import at_most
from zoo.core.delta import Full, LowRank, Scale
from zoo.core.layers import FeedForward
from zoo.core.patch import Patch, Routing
from zoo.lens import structure
from zoo.lens.routing import switched
from zoo.lens.updates import PARTS, FactoredMatrix, Part, patched, record, updates
from zoo.models import MODELS, Model

pytestmark = pytest.mark.numeric

every_case_and_a_part = taking_turns("case, part", CASES, PARTS)
B, T, OUT, IN = 2, 3, 6, 5
W = torch.randn(OUT, IN, dtype=torch.float64, generator=torch.Generator().manual_seed(0))


def close(actual: Tensor, expected: Tensor, tolerance: float = 1e-12) -> None:
    torch.testing.assert_close(actual, expected, rtol=tolerance, atol=tolerance)


def context_of(model: Model) -> tuple[Tensor, int]:
    """Sequences and how many of their tokens are taken for the context."""
    return batch_of(model).tokens, length_of_context(model)


def drawn(pairs: int, rank: int, W: Tensor = W) -> FactoredMatrix:
    sizes = ((W.shape[0], pairs), (W.shape[1], pairs), (W.shape[0], rank), (W.shape[1], rank))
    return FactoredMatrix(W, *(torch.randn(B, T, *shape, dtype=W.dtype) for shape in sizes))


KINDS = {"scaled": (2, 0), "low-rank": (0, 3), "full": (0, IN), "all": (1, 2), "none": (0, 0)}
every_pair = pytest.mark.parametrize(
    ("x", "y"), [(x, y) for x in KINDS.values() for y in KINDS.values()], ids=[f"{x}-{y}" for x in KINDS for y in KINDS]
)


def test_a_norm_is_never_the_root_of_a_rounding_error_below_zero() -> None:
    """Hundreds of updates that cancel: whatever the CPU, the sums of many of their squares are below zero."""
    a, c, b = (torch.randn(500, size, 1).double() for size in (OUT, OUT, IN))
    nothing = torch.zeros(500, 1, 0).double()
    factors = torch.cat([a, c, -(a + c) / 3], -1), torch.cat([b, b, 3 * b], -1)
    cancelling = FactoredMatrix(W, nothing.expand(-1, OUT, -1), nothing.expand(-1, IN, -1), *factors)
    assert (cancelling.inner(cancelling) < 0).any()
    scale = torch.rand(500, 1).double() + 0.5
    for norm in (cancelling.norm(), Scale(scale.expand(-1, OUT), 1 / scale.expand(-1, IN)).norm(W)):
        assert norm.isfinite().all()
        assert 0 <= norm.min() <= norm.max() < 1e-6


@every_pair
def test_operations_equal_those_of_dense_matrices(x: Any, y: Any) -> None:
    a, b = drawn(*x), drawn(*y, W=W.flip(0))
    dense = [m.W * (m.rows @ m.columns.mT) + m.u @ m.v.mT for m in (a, b)]
    close(a.dense(), dense[0])
    close(a.inner(b), (dense[0] * dense[1]).sum((-2, -1)))
    close(a.norm(), torch.linalg.matrix_norm(dense[0]))
    values = a.svdvals()
    assert values.shape[-1] == (IN if x[0] else x[1])
    close(values, torch.linalg.svdvals(dense[0])[..., : values.shape[-1]])
    close(values.norm(dim=-1), a.norm())
    rows = torch.randn(B, T, 4, IN, dtype=W.dtype)
    close(a.apply(rows), rows @ dense[0].mT)
    c = drawn(*y)  # of the same W as a
    close((a - c).dense(), a.dense() - c.dense())
    close((a - c).norm(), torch.linalg.matrix_norm(a.dense() - c.dense()))
    close(a[1, 1:].dense(), dense[0][1, 1:])


def test_only_matrices_of_one_model_have_a_difference() -> None:
    for other in (W.mT, W + 1):
        with pytest.raises(ValueError, match="different stored W"):
            drawn(0, 1) - drawn(0, 1, W=other)


def test_a_small_difference_keeps_its_digits() -> None:
    a, step = drawn(1, 2), drawn(1, 2)
    near = FactoredMatrix(W, a.rows + 1e-10 * step.rows, a.columns, a.u, a.v + 1e-10 * step.v)
    exact = 1e-10 * torch.linalg.matrix_norm(W * (step.rows @ a.columns.mT) + a.u @ step.v.mT)
    error = ((near - a).norm() / exact - 1).abs().max()
    assert error < 1e-5
    naive = (near.inner(near) - 2 * near.inner(a) + a.inner(a)).clamp(min=0).sqrt()
    assert (naive / exact - 1).abs().max() > 0.1
    assert not (a - a).norm().any()


@every_case_and_a_part
@torch.no_grad()
def test_a_patched_matrix_is_that_of_the_network(case: Case, part: Part) -> None:
    model = shared(case.name)
    tokens, n_context = context_of(model)
    emitted = model.decoder(tokens, n_context)[1]
    totals = model.deltas(tokens, torch.arange(tokens.shape[1]) < n_context)
    recorded = record(model, tokens, n_context)
    for layer, block, total, own in zip(recorded, model.decoder.blocks, totals, emitted, strict=True):
        patch = total if part == "total" else own.per_token(torch.arange(n_context, tokens.shape[1]))
        for name, dense in block.ffn.dense(patch).items():
            matrix = layer[part][name]
            close(matrix.dense(), dense.expand_as(matrix.dense()))
            x = torch.randn(*matrix.u.shape[:2], 1, dense.shape[-1]).double()
            close(matrix.apply(x), x @ dense.mT)


@every_case_and_a_part
@torch.no_grad()
def test_updates_are_relative_to_the_query_alone(case: Case, part: Part) -> None:
    model = shared(case.name)
    tokens, n_context = context_of(model)
    query = tokens[:, n_context:]
    removed = torch.arange(tokens.shape[1]) < n_context
    totals, alone = model.deltas(tokens, removed), model.decoder(query)[1]
    emitted = model.decoder(tokens, n_context)[1]
    changes = updates(model, tokens, n_context, part)
    for block, change, total, own, null in zip(model.decoder.blocks, changes, totals, emitted, alone, strict=True):
        patch = total if part == "total" else own.per_token((~removed).nonzero().squeeze(1))
        before = block.ffn.dense(null.per_token(torch.arange(query.shape[1])))
        for name, dense in block.ffn.dense(patch).items():
            difference = (dense - before[name]).expand(*query.shape[:2], *dense.shape[-2:])
            close(change[name].dense(), difference)
            close(change[name].norm(), torch.linalg.matrix_norm(difference))
            other = change[name].each(lambda t: t.roll(1, 0))
            close(change[name].inner(other), (difference * difference.roll(1, 0)).sum((-2, -1)))
    # without a context: exactly nothing, but for deeper layers, where patched and unpatched streams round differently
    for index, change in enumerate(updates(model, query, 0, part)):
        assert max(matrix.norm().max() for matrix in change.values()) <= (1e-14 if index else 0)


@pytest.mark.parametrize("kind", ["scale", "full"])
def test_a_routing_scales_what_was_emitted(kind: str) -> None:
    ffn = FeedForward(IN, 2, blocks=3).double()
    for parameter in ffn.parameters():
        torch.nn.init.normal_(parameter)
    scale = Scale(torch.rand(B, T, IN).double(), torch.rand(B, T, 6).double())
    delta = scale if kind == "scale" else Full(torch.randn(B, T, IN, 6).double())
    residual = LowRank(torch.randn(B, T, IN, 1).double(), torch.randn(B, T, 6, 1).double())
    weight = torch.rand(B, T, 1, 2).double()
    routing = Routing(torch.tensor([0, 2]).expand(B, T, 1, 2), weight, torch.zeros(B, T, 1, 3))
    patch = Patch(weights={"down": delta + residual}, routing=routing, chunk=1)
    close(patched(ffn, patch, "down", torch.Size((B, T))).dense(), ffn.dense(patch)["down"])


WIDE: dict[str, dict[str, Any]] = {
    "transformer": {},
    "hypernet": {"rank": 1, "attend_context": True},
    "hypernet-scale": {"emission": "scale"},
    "moe": {"hidden": 96},
}


def wide(name: str) -> tuple[Model, Tensor]:
    """A model with square matrices of 384, and 4 contexts of 2 tokens with 24 queries each."""
    case = Case("", name.split("-")[0], "regression", {"dim": 384, "hidden": 384, "layers": 1, **WIDE[name]})
    torch.manual_seed(0)
    model = MODELS[case.family](**options_of(case)).double().eval()
    return model, torch.randn(4, 26, 4).double()


LIMIT = 4 * 24 * 384 * 384 // 50


@pytest.mark.parametrize("name", ["hypernet", "hypernet-scale", "moe"])
@torch.no_grad()
def test_nothing_forms_a_matrix_per_token(name: str) -> None:
    model, tokens = wide(name)
    with at_most(LIMIT):
        structure.increments(model, tokens, 2)
        structure.relative_norms(model, tokens, 2)
        for change in updates(model, tokens, 2)[0].values():
            structure.context_share(change)
            structure.cosines(change[0], change[1])
        if name == "moe":
            switched(model, tokens, 2)
        elif name != "hypernet-scale":
            updates(model, tokens, 2)[0]["gate"].svdvals()
    with pytest.raises(AssertionError), at_most(50 * LIMIT - 1):  # the recorder sees what it should
        updates(model, tokens, 2)[0]["gate"].dense()


@torch.no_grad()
def test_singular_values_of_scaled_matrices_are_found_one_by_one() -> None:
    model, tokens = wide("moe")
    down = updates(model, tokens[:1, :4], 2)[0]["down"]
    assert down.rows.shape[-1] == 1
    with at_most(384 * 384):
        values = down.svdvals()
    close(values, torch.linalg.svdvals(down.dense()), 1e-10)
