"""Thought vectors and matrices: each form against its dense definition, and what one patch does for many queries."""

from __future__ import annotations

import copy
import functools
import statistics
from pathlib import Path

import pytest
import torch
from torch import Tensor

from cases import BY_NAME, CASES, Case, build, taking_turns, trained
from test_delta import at_most
from zoo import load, train
from zoo.core.delta import LowRank, Sum
from zoo.core.patch import Patch
from zoo.lens.static import STATIC_FORMS, answer, fit, relative_error, solve
from zoo.models import Model

pytestmark = pytest.mark.numeric

INPUTS, OUTPUTS = 6, 4


def samples(count: int, rank: int = INPUTS) -> tuple[Tensor, Tensor]:
    """Unrelated a (N,6), on a subspace of `rank` dims away from zero, and y (N,4)."""
    turn = torch.linalg.qr(torch.randn(INPUTS, INPUTS).double()).Q
    a = torch.randn(count, rank).double() @ turn[:rank] + 0.5 * (rank == INPUTS)
    return a, torch.randn(count, OUTPUTS).double()


def solved(a: Tensor, y: Tensor, form: str, ridge: float) -> tuple[Tensor, Tensor]:
    """M (o,i) and b (o)."""
    low_rank, bias = solve(a, y, STATIC_FORMS[form], ridge)
    return low_rank.dense(torch.empty(0))[0], bias[0]


def dense(a: Tensor, y: Tensor, ridge: float, samples_side: bool) -> Tensor:
    """Y Aᵀ (A Aᵀ + λI)⁻¹ or Y (AᵀA + λI)⁻¹ Aᵀ for the columns A = aᵀ, Y = yᵀ; λ as a share of the mean eigenvalue."""
    A, Y = a.mT, y.mT
    penalty = ridge * A.square().sum() / min(A.shape)
    gram = A.mT @ A if samples_side else A @ A.mT
    inverse = torch.linalg.inv(gram + penalty * torch.eye(len(gram)).double())
    return Y @ inverse @ A.mT if samples_side else Y @ A.mT @ inverse


@pytest.mark.parametrize("ridge", [1e-3, 0.5])
@pytest.mark.parametrize("count", [1, 3, 6, 7, 40])
def test_matrix_is_ridge_regression_on_both_sides(count: int, ridge: float) -> None:
    a, y = samples(count)
    M, b = solved(a, y, "matrix", ridge)
    for samples_side in (True, False):
        torch.testing.assert_close(M, dense(a, y, ridge, samples_side), rtol=0, atol=1e-10)
    assert not b.any()


@pytest.mark.parametrize("ridge", [1e-3, 0.5])
@pytest.mark.parametrize("count", [2, 3, 7, 40])
def test_affine_is_the_same_on_centred_samples(count: int, ridge: float) -> None:
    a, y = samples(count)
    M, b = solved(a, y, "affine", ridge)
    # centred samples have one direction less: the mean eigenvalue is over count − 1
    share = ridge * min(count, INPUTS) / min(count - 1, INPUTS)
    expected = dense(a - a.mean(0), y - y.mean(0), share, count <= INPUTS)
    torch.testing.assert_close(M, expected, rtol=0, atol=1e-10)
    torch.testing.assert_close(b, y.mean(0) - expected @ a.mean(0), rtol=0, atol=1e-10)


@pytest.mark.parametrize(("form", "count"), [("vector", 1), ("vector", 9), ("affine", 1)])
def test_a_vector_is_the_mean_and_all_that_one_sample_gives(form: str, count: int) -> None:
    a, y = samples(count)
    M, b = solved(a, y, form, 1e-3)
    assert not M.any()
    torch.testing.assert_close(b, y.mean(0))


@pytest.mark.parametrize(("form", "unknowns"), [("matrix", INPUTS), ("affine", INPUTS + 1)])
def test_as_many_samples_as_unknowns_are_met_exactly_and_no_more(form: str, unknowns: int) -> None:
    for count in range(1, unknowns + 2):
        a, y = samples(count)
        M, b = solved(a, y, form, 0.0)
        error = (a @ M.mT + b - y).abs().max()
        assert error < 1e-9 if count <= unknowns else error > 1e-2, count


def test_without_ridge_the_smallest_solution() -> None:
    a, y = samples(4)
    torch.testing.assert_close(solved(a, y, "matrix", 0.0)[0], (torch.linalg.pinv(a) @ y).mT, rtol=0, atol=1e-10)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
@pytest.mark.parametrize(("count", "rank", "expected"), [(4, INPUTS, 4), (40, INPUTS, 6), (40, 2, 2), (1, 1, 1)])
def test_the_rank_is_that_of_the_samples(count: int, rank: int, expected: int, dtype: torch.dtype) -> None:
    """Rounding is no direction of its own; without a cut, ridge 0 would fit it with a huge matrix."""
    a, y = (t.to(dtype) for t in samples(count, rank))
    low_rank, _ = solve(a, y, STATIC_FORMS["matrix"], 0.0)
    assert low_rank.u.shape == (1, OUTPUTS, expected)
    assert low_rank.v.shape == (1, INPUTS, expected)


def test_zero_states_get_no_matrix() -> None:
    low_rank, bias = solve(torch.zeros(5, INPUTS), torch.ones(5, OUTPUTS), STATIC_FORMS["affine"], 1e-3)
    assert low_rank.u.shape[-1] == 0
    torch.testing.assert_close(bias, torch.ones(1, OUTPUTS).double())


def linear_attention(count: int, constant: bool) -> tuple[Tensor, Tensor, Tensor]:
    """Queries a, what a context of linear attention adds to them, Σ v (k·a), or plus a constant; and the map itself."""
    keys, values = torch.randn(5, 16).double(), torch.randn(5, 16).double()
    M, a = values.mT @ keys, torch.randn(count, 16).double()
    return a, a @ M.mT + 3 * constant, M


def test_what_linear_attention_adds_is_one_matrix_and_no_mean_of_token_patches() -> None:
    a, y, M = linear_attention(4096, False)
    torch.testing.assert_close(solved(a[:16], y[:16], "matrix", 0.0)[0], M, rtol=0, atol=1e-9)
    assert (solved(a[:15], y[:15], "matrix", 0.0)[0] - M).norm() > 0.05 * M.norm()
    mean = (y.mT @ (a / a.square().sum(-1, keepdim=True))) / len(a)  # too small by the dimension
    assert ((mean - M).norm() / M.norm()).sub(1 - 1 / 16).abs() < 0.02
    assert (16 * mean - M).norm() < 0.2 * M.norm()


def test_a_vector_and_a_matrix_at_once_need_both() -> None:
    a, y, M = linear_attention(40, True)
    estimate, b = solved(a, y, "affine", 0.0)
    torch.testing.assert_close(estimate, M, rtol=0, atol=1e-9)
    torch.testing.assert_close(b, torch.full((16,), 3.0).double(), rtol=0, atol=1e-9)
    for form in ("vector", "matrix"):
        estimate, b = solved(a, y, form, 0.0)
        assert (a @ estimate.mT + b - y).norm() > 0.1 * y.norm()


# patches of whole models


def contexts(model: Model) -> Tensor:
    """Two contexts: the separate ones of the task, or the first 6 tokens of a text."""
    tokens = model.task.batch("test", 0, 2).tokens[:, : model.task.n_context or 6]
    return tokens.double() if tokens.is_floating_point() else tokens


def queries(model: Model, context: Tensor, count: int, k: int = 0) -> tuple[Tensor, int]:
    """`count` samples after `context`, on text as rows of four tokens, and the length of the context."""
    if model.task.independent_queries:
        return model.task.sample_queries(context, count, "validation", k), len(context)
    return model.task.sample_queries(context, -(-count // 4), "validation", k)[:, : len(context) + 4], len(context)


@taking_turns("case, form", CASES, ["matrix", "affine", "output"])
@torch.no_grad()
def test_few_queries_are_met_exactly(case: Case, form: str) -> None:
    """Up to D queries, gate, up and down, or down alone, can stand for the context without any error."""
    model = build(case)
    tokens, n = queries(model, contexts(model)[0], 8)
    patches = fit(model.decoder, tokens, n, form, ridge=0.0)
    expected = model(tokens, n)[:, n:]
    torch.testing.assert_close(answer(model.decoder, tokens[:, n:], patches), expected, rtol=0, atol=1e-7)
    if case.name != "hypernet-constant":
        assert (model(tokens[:, n:]) - expected).abs().max() > 1e-2
    weights = {name for patch in patches for name in patch.weights}
    if not any(patch.weights for patch in model.decoder(tokens, n)[1]):
        assert weights == ({"down"} if form == "output" else {"gate", "up", "down"})


@pytest.mark.parametrize("name", ["transformer-regression", "transformer-noise-tied", "hypernet-segment-low-rank"])
@torch.no_grad()
def test_the_patched_model_is_a_plain_model_with_other_weights(name: str) -> None:
    model = build(BY_NAME[name])
    tokens, n = queries(model, contexts(model)[0], 8)
    plain = copy.deepcopy(model)
    plain.decoder.context_to_delta = None
    for block, patch in zip(plain.decoder.blocks, fit(model.decoder, tokens, n, "matrix", 0.0), strict=True):
        for matrix, weight in block.ffn.dense(patch).items():
            assert weight.shape[0] == 1
            block.ffn.weight(matrix).copy_(weight[0])
    torch.testing.assert_close(plain(tokens[:, n:]), model(tokens, n)[:, n:], rtol=0, atol=1e-7)


@torch.no_grad()
def test_equal_first_tokens_of_text_have_no_static_patch() -> None:
    """Alone, two equal tokens have equal states; after a context they do not: no matrix tells them apart."""
    model = build(BY_NAME["transformer-noise-tied"])
    tokens, n = queries(model, contexts(model)[0], 8)
    tokens[:, n + 1] = tokens[:, n]
    patches = fit(model.decoder, tokens, n, "matrix", 0.0)
    error = (answer(model.decoder, tokens[:, n:], patches) - model(tokens, n)[:, n:]).abs()
    assert error[:, :2].max() > 1e-2


SEGMENT = [BY_NAME[f"hypernet-segment-{kind}"] for kind in ("low-rank", "full", "scale-gqa", "down")]


@taking_turns("case, form", SEGMENT, list(STATIC_FORMS))
@torch.no_grad()
def test_what_a_hypernetwork_emits_is_the_static_patch(case: Case, form: str) -> None:
    """For queries it was not fitted on: from one sample, and nothing is left to fit."""
    model = build(case)
    tokens, n = queries(model, contexts(model)[0], 1)
    others, _ = queries(model, contexts(model)[0], 30, k=1)
    patches = fit(model.decoder, tokens, n, form)
    torch.testing.assert_close(answer(model.decoder, others[:, n:], patches), model(others, n)[:, n:])
    emitted = model.decoder(others, n)[1]
    for block, patch, full in zip(model.decoder.blocks, patches, emitted, strict=True):
        for name, delta in full.weights.items():
            W = block.ffn.weight(name)
            torch.testing.assert_close(patch.weights[name].dense(W), delta.per_token(torch.tensor([n])).dense(W)[:, 0])
    assert relative_error(model.decoder, others, n, [Patch()] * 2) > 1e-2


@torch.no_grad()
def test_a_router_that_reads_the_context_alone_has_chosen_for_good() -> None:
    model = build(BY_NAME["moe-context-linear"])
    tokens, n = queries(model, contexts(model)[0], 5)
    for patch, emitted in zip(fit(model.decoder, tokens, n), model.decoder(tokens, n)[1], strict=True):
        assert patch.routing is not None
        assert emitted.routing is not None
        for name in ("index", "weight"):
            static, each = getattr(patch.routing, name), getattr(emitted.routing, name)
            assert static.shape == (1, 1, 2)
            torch.testing.assert_close(static.expand(-1, 5, -1), each[:, n:], rtol=0, atol=1e-14)
            assert not torch.equal(static.expand(-1, 7, -1), each[:, :n])


@torch.no_grad()
def test_where_queries_attend_to_the_context_more_is_left_to_fit() -> None:
    model = build(BY_NAME["hypernet-segment-attend"])
    tokens, n = queries(model, contexts(model)[0], 200)
    others, _ = queries(model, contexts(model)[0], 200, k=1)
    emitted = [Patch(weights={m: LowRank(d.u, d.v) for m, d in p.weights.items()}) for p in model.decoder(tokens, n)[1]]
    fitted = fit(model.decoder, tokens, n)
    errors = [relative_error(model.decoder, others, n, patches) for patches in (fitted, emitted)]
    assert 1e-6 < errors[0] < 0.6 * errors[1]


@functools.cache
def trained_samples(name: str) -> tuple[Model, Tensor, Tensor, int]:
    """A trained model, 200 samples and 200 held-out queries after a context, and its length."""
    model = trained(name)
    (tokens, n), (held_out, _) = (queries(model, contexts(model)[0], 200, k) for k in (0, 1))
    return model, tokens, held_out, n


@pytest.mark.parametrize("name", ["transformer-regression", "hypernet-running", "moe-token"])
def test_a_static_patch_transfers_to_held_out_queries(name: str) -> None:
    """The context's own patch, against none, against that of another context, and against a vector."""
    model, tokens, held_out, n = trained_samples(name)
    others, _ = queries(model, contexts(model)[1], 200)
    fits = [fit(model.decoder, *what) for what in ((tokens, n), (tokens, n, "vector"), (others, n))]
    own, *controls = (relative_error(model.decoder, held_out, n, patches) for patches in (*fits, [Patch()] * 2))
    assert own < min(controls) / 3, (own, controls)


@pytest.mark.parametrize(("form", "dimension"), [("matrix", 16), ("output", 24)])
def test_without_ridge_as_many_samples_as_dimensions_are_the_worst_choice(form: str, dimension: int) -> None:
    """Double descent: met well, and useless for other queries; ridge repairs it, and so do more samples."""
    model, tokens, held_out, n = trained_samples("transformer-noise-tied")
    rows = dimension // 4
    errors = {
        (count, ridge): relative_error(model.decoder, held_out, n, fit(model.decoder, tokens[:count], n, form, ridge))
        for count in (1, rows, 50)
        for ridge in (0.0, 1e-2)
    }
    assert errors[rows, 0.0] > 5 * max(errors[1, 0.0], errors[50, 0.0], errors[rows, 1e-2]), errors
    few = tokens[:rows]  # of which two start alike, which no patch can meet
    assert relative_error(model.decoder, few, n, fit(model.decoder, few, n, form, 0.0)) < 0.01


@torch.no_grad()
def test_relative_error_is_one_for_the_best_constant_and_zero_for_the_context() -> None:
    model = build(BY_NAME["transformer-regression"])
    tokens, n = queries(model, contexts(model)[0], 8)
    y = model(tokens, n)[0, n:, 0]
    none = [Patch()] * 2
    alone = answer(model.decoder, tokens[:, n:], none)[0, :, 0]
    expected = (alone - y).square().mean() / y.var(correction=0)
    assert relative_error(model.decoder, tokens, n, none) == pytest.approx(float(expected))
    exact = fit(model.decoder, tokens, n, "matrix", 0.0)
    assert relative_error(model.decoder, tokens, n, exact) < 1e-12


BY_FACTORS = [
    "transformer-noise-gqa-tied",
    "hypernet-segment-attend",
    "hypernet-running",
    "hypernet-token",
    "moe-prompts",
]


@taking_turns("name, form", BY_FACTORS, list(STATIC_FORMS))
@torch.no_grad()
def test_no_update_is_formed_per_token(name: str, form: str) -> None:
    model = build(BY_NAME[name])
    tokens, n = queries(model, contexts(model)[0], 12)
    with at_most(12 * model.decoder.blocks[0].ffn.gate.numel() - 1):
        answer(model.decoder, tokens[:, n:], fit(model.decoder, tokens, n, form))


def test_one_update_for_many_others_is_not_repeated() -> None:
    static = LowRank(torch.randn(1, 5, 1), torch.randn(1, 4, 1))
    total = LowRank(torch.randn(3, 7, 5, 2), torch.randn(3, 7, 4, 2)) + static
    assert isinstance(total, Sum)
    assert total.second is static


def test_what_cannot_be_fitted_is_refused() -> None:
    model = build(BY_NAME["transformer-regression"])
    tokens, n = queries(model, contexts(model)[0], 5)
    other, _ = queries(model, contexts(model)[1], 5)
    for arguments, message in (
        ((tokens, n, "afine"), "form of a static patch 'afine' does not exist; did you mean affine"),
        ((tokens, n, "affine", -1.0), "ridge=-1.0 must not be negative"),
        ((torch.cat([tokens, other]), n), "stands for one context: the first 7 tokens differ between rows"),
        ((tokens, 0), "n_context=0 must lie between 1 and 11"),
        ((tokens, 12), "n_context=12 must lie between 1 and 11"),
    ):
        with pytest.raises(ValueError, match=message):
            fit(model.decoder, *arguments)  # type: ignore[arg-type]


@pytest.mark.slow
def test_the_default_transformer_after_training(tmp_path: Path) -> None:
    """What the context does to 300 held-out queries, by K samples: medians over 16 contexts."""
    model = load(train(out=str(tmp_path), trainer={"accelerator": "cpu"})["checkpoint"])
    task, n = model.task, model.task.n_context

    def median(form: str, count: int, ridge: float) -> float:
        errors = []
        for k, context in enumerate(task.batch("test", 0, 16).tokens[:, :n]):
            patches = fit(model.decoder, task.sample_queries(context, count, "train", k), n, form, ridge)
            held_out = task.sample_queries(context, 300, "test", k + 1)
            errors.append(relative_error(model.decoder, held_out, n, patches))
        return statistics.median(errors)

    assert median("output", 256, 1e-3) < 0.01
    assert median("affine", 256, 1e-3) < 0.03
    assert median("vector", 256, 1e-3) > 0.8
    # one sample for each hidden unit, fitted exactly
    assert median("output", 128, 0.0) > 50 * median("output", 128, 1e-3)
