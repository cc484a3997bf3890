"""The structure and growth of updates, against dense weights made apart and textbook definitions."""

from __future__ import annotations

from itertools import pairwise

import pytest
import torch
from torch import Tensor

from cases import CASES, Case, batch_of, length_of_context, shared
from test_delta import at_most
from zoo.core.delta import Scale
from zoo.core.layers import FeedForward
from zoo.lens.structure import context_share, cosines, grid, increments, participation_ratio, relative_norms, updates
from zoo.models import Model

pytestmark = pytest.mark.numeric

every_case = pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)


def close(actual: Tensor, expected: Tensor) -> None:
    torch.testing.assert_close(actual, expected, rtol=1e-9, atol=1e-11, equal_nan=True)


def context_of(model: Model) -> tuple[Tensor, int]:
    """Sequences and how many of their tokens are taken for the context."""
    return batch_of(model).tokens, length_of_context(model)


def test_a_norm_is_never_the_root_of_a_rounding_error_below_zero() -> None:
    """Hundreds of scalings that cancel: whatever the CPU, the sums of many of their squares are below zero."""
    scale, W = torch.rand(500, 1).double() + 0.5, torch.randn(6, 5).double()
    norm = Scale(scale.expand(-1, 6), 1 / scale.expand(-1, 5)).norm(W)
    assert norm.isfinite().all()
    assert 0 <= norm.min() <= norm.max() < 1e-6


@every_case
@torch.no_grad()
def test_updates_and_their_norms_are_relative_to_the_query_alone(case: Case) -> None:
    model = shared(case.name)
    tokens, n_context = context_of(model)
    query = tokens[:, n_context:]
    totals, alone = model.deltas(tokens, torch.arange(tokens.shape[1]) < n_context), model.decoder(query)[1]
    norms, changes = relative_norms(model, tokens, n_context), [*updates(model, tokens, n_context)]
    assert len(changes) == len(norms) == 2
    for layer, (block, total, null) in enumerate(zip(model.decoder.blocks, totals, alone, strict=True)):
        before = block.ffn.dense(null.per_token(torch.arange(query.shape[1])))
        assert tuple(changes[layer]) == FeedForward.matrices
        for index, (name, dense) in enumerate(block.ffn.dense(total).items()):
            difference = (dense - before[name]).expand(*query.shape[:2], *dense.shape[-2:])
            close(changes[layer][name], difference)
            W = block.ffn.weight(name)
            close(norms[layer, index], difference.flatten(2).norm(dim=2) / W.norm())
    assert norms.max() > 1e-3 or case.name == "hypernet-constant"
    assert not relative_norms(model, query, 0).any()  # without a context


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
        stored = torch.cat([block.ffn.weight(name).flatten() for name in FeedForward.matrices]).norm()
        close(actual[:, layer], torch.stack(step).diff(dim=0).norm(dim=-1) / stored)


@torch.no_grad()
def test_only_the_first_layer_keeps_its_key() -> None:
    """Layer 0: increments of rank 1, the delta rule with one key; layer 1: rank 2, as the patched stream moves."""
    model = shared("transformer-regression")
    patches = [model.deltas(sequence, length) for length, sequence in enumerate(prefixes(model))]
    for layer, rank in ((0, 1), (1, 2)):
        W = [model.decoder.blocks[layer].ffn.dense(layers[layer])["gate"] for layers in patches]
        for before, after in pairwise(W[1:]):  # at the first token all there is has rank 1
            assert ((torch.linalg.svdvals(after - before) > 1e-10).sum(-1) == rank).all()


@torch.no_grad()
def test_the_matrices_of_one_sequence_are_formed_at_once() -> None:
    model = shared("moe-token")
    tokens, n_context = context_of(model)
    limit = tokens[0, n_context:].shape[0] * max(
        parameter.numel() for parameter in model.decoder.blocks[0].parameters()
    )
    with at_most(limit):
        relative_norms(model, tokens, n_context)
        increments(model, tokens, n_context)
    with pytest.raises(AssertionError), at_most(limit):  # the recorder sees what it should
        grid(model, tokens, n_context)


def test_participation_ratio_counts_equal_singular_values() -> None:
    close(participation_ratio(torch.tensor([3.0, 3.0, 3.0, 0.0]).double()), torch.tensor(3.0).double())
    close(participation_ratio(torch.tensor([[2.0, 0.0], [1.0, 1.0]]).double()), torch.tensor([1.0, 2.0]).double())
    A = torch.randn(7, 4).double()
    covariance = A.mT @ A
    expected = covariance.trace().square() / (covariance @ covariance).trace()
    close(participation_ratio(torch.linalg.svdvals(5 * A)), expected)
    assert 1 < expected < torch.linalg.matrix_rank(A)
    assert participation_ratio(torch.zeros(3)).isnan()


def test_cosines_equal_those_of_flat_matrices() -> None:
    x = torch.randn(2, 3, 6, 5).double()
    flat = x.view(6, 30)
    close(cosines(x), torch.nn.functional.cosine_similarity(flat[:, None], flat[None], dim=-1))
    close(cosines(x).diagonal(), torch.ones(6).double())
    x[0, 1] = 0
    assert cosines(x)[1].isnan().all()


def naive_share(dense: Tensor) -> Tensor:
    """Law of total variance on updates (B,Q,o,i), by loops."""
    mean = dense.mean((0, 1))
    between = sum((row.mean(0) - mean).square().sum() * len(row) for row in dense)
    return between / sum((one - mean).square().sum() for row in dense for one in row)  # type: ignore[return-value]


def test_context_share_splits_the_variance() -> None:
    x, W = torch.randn(4, 3, 6, 5).double(), torch.randn(6, 5).double()
    close(context_share(x, W), naive_share(x))
    assert context_share(x, W) < 0.6
    close(context_share(x[:, :1].expand(-1, 3, -1, -1), W), torch.tensor(1.0).double())
    of_query = x[:1].expand(4, -1, -1, -1)
    assert context_share(of_query, W).abs() < 1e-12
    for equal in (of_query[:, :1], 0 * x, 1e-15 * x):  # up to rounding
        assert context_share(equal, W).isnan()


SHARED = [f"hypernet-segment-{kind}" for kind in ("low-rank", "full", "scale-gqa")]


@pytest.mark.parametrize("name", [*SHARED, "moe-token", "transformer-regression"])
@torch.no_grad()
def test_what_is_made_from_the_context_alone_differs_between_contexts_alone(name: str) -> None:
    model = shared(name)
    tokens, n_context = context_of(model)
    queries = tokens[:1, n_context:].expand(len(tokens), -1, -1)
    *_, expected = updates(model, torch.cat([tokens[:, :n_context], queries], 1), n_context)
    last = grid(model, tokens, n_context)
    for matrix in ("down",) if name == "moe-token" else FeedForward.matrices:
        close(last[matrix], expected[matrix])
        share = context_share(last[matrix], model.decoder.blocks[-1].ffn.weight(matrix)).item()
        assert share == pytest.approx(1, abs=1e-12) if name in SHARED else share < 0.95
