"""The structure and growth of updates, against dense matrices and textbook definitions."""

from __future__ import annotations

from itertools import pairwise

import pytest
import torch
from torch import Tensor

from cases import CASES, Case, batch_of, shared
from test_updates import context_of
from zoo.lens.structure import (
    codes,
    context_share,
    cosines,
    gram,
    increments,
    linear_r2,
    participation_ratio,
    relative_norms,
    shared_queries,
)
from zoo.lens.updates import MATRICES, PARTS, FactoredMatrix, record, updates
from zoo.models import Model

pytestmark = pytest.mark.numeric

every_case = pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)


def close(actual: Tensor, expected: Tensor) -> None:
    torch.testing.assert_close(actual, expected, rtol=1e-9, atol=1e-11, equal_nan=True)


def drawn(*lead: int) -> FactoredMatrix:
    sizes = ((6, 1), (5, 1), (6, 2), (5, 2))
    return FactoredMatrix(torch.randn(6, 5).double(), *(torch.randn(*lead, *shape).double() for shape in sizes))


@every_case
@torch.no_grad()
def test_norms_equal_those_of_dense_updates(case: Case) -> None:
    model = shared(case.name)
    tokens, n_context = context_of(model)
    norms = {part: relative_norms(model, tokens, n_context, part) for part in PARTS}
    for part in PARTS:
        for layer, change in enumerate(updates(model, tokens, n_context, part)):
            for index, name in enumerate(MATRICES):
                W = model.decoder.blocks[layer].ffn.weight(name)
                close(norms[part][layer, index], torch.linalg.matrix_norm(change[name].dense()) / W.norm())
    reads = case.family != "transformer" and case.name != "hypernet-constant"
    assert bool(norms["emitted"].any()) == reads
    attends = model.decoder.attend_context or not model.task.n_context
    assert (norms["total"] - norms["emitted"]).abs().max().gt(1e-3) == attends


N = 4  # context tokens of a growing context, short to be quick


def prefixes(model: Model) -> list[Tensor]:
    """Two sequences of the first 0 … N context tokens and three queries."""
    tokens = batch_of(model, 2).tokens
    return [torch.cat([tokens[:, :length], tokens[:, -3:]], 1) for length in range(N + 1)]


@every_case
@torch.no_grad()
def test_increments_equal_those_of_dense_matrices(case: Case) -> None:
    """W_0 … W_N from dense weights and model.deltas alone."""
    model = shared(case.name)
    steps: list[list[Tensor]] = [[] for _ in model.decoder.blocks]
    for length, sequence in enumerate(prefixes(model)):
        patches = model.deltas(sequence, torch.arange(sequence.shape[1]) < length)
        for step, block, patch in zip(steps, model.decoder.blocks, patches, strict=True):
            dense = [W.expand(2, 3, -1, -1).flatten(-2) for W in block.ffn.dense(patch).values()]
            step.append(torch.cat(dense, -1))
    actual = increments(model, prefixes(model)[-1], N)
    for layer, (step, block) in enumerate(zip(steps, model.decoder.blocks, strict=True)):
        stored = torch.cat([block.ffn.weight(name).flatten() for name in MATRICES]).norm()
        close(actual[:, layer], torch.stack(step).diff(dim=0).norm(dim=-1) / stored)


@torch.no_grad()
def test_only_the_first_layer_keeps_its_key() -> None:
    """Layer 0: increments of rank 1, the delta rule with one key; layer 1: rank 2, as the patched stream moves."""
    model = shared("transformer-regression")
    recorded = [record(model, sequence, length) for length, sequence in enumerate(prefixes(model))]
    W = [[layers[layer]["total"]["gate"].dense() for layers in recorded] for layer in (0, 1)]
    for layer, rank in ((0, 1), (1, 2)):
        for before, after in pairwise(W[layer][1:]):  # at the first token all there is has rank 1
            assert ((torch.linalg.svdvals(after - before) > 1e-10).sum(-1) == rank).all()


def test_participation_ratio_counts_equal_singular_values() -> None:
    close(participation_ratio(torch.tensor([3.0, 3.0, 3.0, 0.0]).double()), torch.tensor(3.0).double())
    close(participation_ratio(torch.tensor([[2.0, 0.0], [1.0, 1.0]]).double()), torch.tensor([1.0, 2.0]).double())
    A = torch.randn(7, 4).double()
    covariance = A.mT @ A
    expected = covariance.trace().square() / (covariance @ covariance).trace()
    close(participation_ratio(torch.linalg.svdvals(5 * A)), expected)
    assert 1 < expected < torch.linalg.matrix_rank(A)
    assert participation_ratio(torch.zeros(3)).isnan()


def test_cosines_equal_those_of_flat_dense_matrices() -> None:
    x, y = drawn(4), drawn(3)
    flat = [m.dense().flatten(1) for m in (x, y)]
    close(gram(x, y), flat[0] @ flat[1].mT)
    close(cosines(x, y), torch.nn.functional.cosine_similarity(flat[0][:, None], flat[1][None], dim=-1))
    close(cosines(x, x).diagonal(), torch.ones(4).double())
    assert cosines(x, y).abs().max() < 0.99
    zero = x.each(torch.zeros_like)
    assert cosines(x, zero).isnan().all()


def naive_share(dense: Tensor) -> Tensor:
    """Law of total variance on dense updates (B,Q,o,i)."""
    flat = dense.flatten(2)
    between = (flat.mean(1) - flat.mean((0, 1))).square().sum() * flat.shape[1]
    return between / (flat - flat.mean((0, 1))).square().sum()


def test_context_share_splits_the_variance() -> None:
    x = drawn(4, 3)
    close(context_share(x), naive_share(x.dense()))
    assert context_share(x) < 0.6
    of_context = x[:, :1].each(lambda t: t.expand(-1, 3, *t.shape[2:]))
    close(context_share(of_context), torch.tensor(1.0).double())
    of_query = x[:1].each(lambda t: t.expand(4, *t.shape[1:]))
    assert context_share(of_query).abs() < 1e-12
    for equal in (of_query[:, :1], x.each(torch.zeros_like), x.each(lambda t: 1e-9 * t)):  # up to rounding
        assert context_share(equal).isnan()


SHARED = [f"hypernet-segment-{kind}" for kind in ("low-rank", "attend", "full", "scale-gqa")] + ["moe-context-linear"]


@pytest.mark.parametrize("name", [*SHARED, "moe-token", "transformer-regression"])
@torch.no_grad()
def test_what_is_made_from_the_context_alone_differs_between_contexts_alone(name: str) -> None:
    model = shared(name)
    tokens, n_context = context_of(model)
    grid = shared_queries(tokens, n_context)
    assert torch.equal(grid[:, :n_context], tokens[:, :n_context])
    assert (grid[:, n_context:] == tokens[0, n_context:]).all()
    emitted, total = (updates(model, grid, n_context, part) for part in ("emitted", "total"))
    for layer in range(2):
        for matrix in ("down",) if model.config.name == "moe" else MATRICES:
            share = context_share(emitted[layer][matrix])
            if name in SHARED:
                assert share.item() == pytest.approx(1, abs=1e-12)
            else:
                assert share.isnan() or share < 0.5
        if model.decoder.attend_context:
            assert context_share(total[layer]["gate"]) < 0.95
            close(context_share(total[layer]["gate"]), naive_share(total[layer]["gate"].dense()))


@every_case
@torch.no_grad()
def test_codes_are_what_the_heads_read(case: Case) -> None:
    model = shared(case.name)
    tokens, n_context = context_of(model)
    if case.family != "hypernet":
        with pytest.raises(ValueError, match=f"model.name={case.family} has no code"):
            codes(model, tokens, n_context)
        return
    read = codes(model, tokens, n_context)
    head = {"low_rank": "v", "full": "full", "scale": "rows"}[model.config.emission]
    heads = model.decoder.context_to_delta.generator.heads  # type: ignore[union-attr]
    for code, patch in zip(read, model.decoder(tokens, n_context)[1], strict=True):
        delta = patch.weights["down"]
        if head == "v":
            close(heads["down_v"](code).unflatten(-1, (-1, 24)).mT, delta.v)  # type: ignore[attr-defined]
        elif head == "full" and model.config.context == "segment":
            close(heads["down_full"](code * 8**-0.5).unflatten(-1, (16, 24)), delta.matrix)  # type: ignore[attr-defined]
        elif head == "rows" and model.config.context == "segment":
            close(1 + heads["down_rows"](code * 8**-0.5), delta.rows)  # type: ignore[attr-defined]
        assert code.shape[-1] == 8
    assert not model.decoder.context_to_delta.generator.code_norm._forward_hooks  # type: ignore[union-attr]


@torch.no_grad()
def test_the_latent_of_regression_answers_the_queries() -> None:
    model = shared("transformer-regression")
    batch = batch_of(model, 16)
    answers = (batch.tokens[:, 7:, :-1] @ model.task.latent(batch)[:, :, None]).squeeze(-1)  # type: ignore[index]
    torch.testing.assert_close(answers, batch.targets.double(), rtol=0, atol=1e-5)
    assert (answers.roll(1, 0) - batch.targets).abs().mean() > 0.5


def test_linear_decoding_finds_what_is_linear_in_the_code() -> None:
    latent = torch.randn(400, 3).double()
    code = torch.cat([latent @ torch.randn(3, 5).double(), torch.randn(400, 3).double()], 1) + 7
    assert linear_r2(code, 2 * latent - 1) > 0.99
    assert -0.2 < linear_r2(code, latent[torch.randperm(400)]) < 0.1
    assert linear_r2(code, latent.square()) < 0.1
    assert linear_r2(code, latent, ridge=10) < 0.9
    assert linear_r2(torch.ones(400, 8).double(), latent) <= 0
