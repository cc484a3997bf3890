"""How updates grow: increments against dense matrices, telescoping, the delta rule, and both exact constructions."""

from __future__ import annotations

from collections.abc import Callable
from itertools import pairwise

import pytest
import torch
from cases import BY_NAME, CASES, Case, batch_of, build, shared, taking_turns
from torch import Tensor

from zoo.core.delta import InputShift
from zoo.core.layers import Attention, Layout
from zoo.lens.dynamics import growth
from zoo.lens.figure import Series
from zoo.lens.updates import MATRICES, PARTS, Matrix, Part, record
from zoo.models import Model
from zoo.papers.prefixes import growing, growing_states, shrinking, shrinking_states
from zoo.papers.toy_figures import slope

pytestmark = pytest.mark.numeric

every_case = pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
N = 4  # context tokens of a growing context, short to be quick


def close(actual: Tensor, expected: Tensor) -> None:
    torch.testing.assert_close(actual, expected, rtol=1e-10, atol=1e-12)


def short(model: Model) -> Tensor:
    """Two sequences of N context tokens and three queries."""
    batch = batch_of(model, 2)
    return torch.cat([batch.tokens[:, :N], batch.tokens[:, -3:]], 1)


def dense_prefixes(model: Model, tokens: Tensor, part: Part) -> Tensor:
    """W_0 … W_N of gate, up and down side by side, (N+1,L,M,B,Q,o·i), from dense weights and model.deltas alone."""
    prefixes = []
    for length in range(N + 1):
        sequence = torch.cat([tokens[:, :length], tokens[:, N:]], 1)
        later = torch.arange(length, sequence.shape[1])
        if part == "total":
            patches = model.deltas(sequence, torch.arange(sequence.shape[1]) < length)
        else:
            patches = [patch.per_token(later) for patch in model.decoder(sequence, length)[1]]
        layers = []
        for block, patch in zip(model.decoder.blocks, patches, strict=True):
            dense = block.ffn.dense(patch)
            layers.append(
                torch.stack([dense[name].expand(2, 3, *dense[name].shape[-2:]).flatten(-2) for name in MATRICES])
            )
        prefixes.append(torch.stack(layers))
    return torch.stack(prefixes)


@taking_turns("case, part", CASES, PARTS)
@torch.no_grad()
def test_growth_equals_that_of_dense_matrices(case: Case, part: Part) -> None:
    model = shared(case.name)
    tokens = short(model)
    dense, actual = dense_prefixes(model, tokens, part), growth(model, tokens, N, part=part)
    close(actual.increments, dense.diff(dim=0).norm(dim=-1))
    close(actual.distance, (dense - dense[0]).norm(dim=-1))
    assert not actual.distance[0].any()
    weights = [[block.ffn.weight(name).norm() for name in MATRICES] for block in model.decoder.blocks]
    close(actual.weights, torch.tensor(weights, dtype=torch.float64))
    together = actual.together()
    close(together.increments.squeeze(2), dense.diff(dim=0).transpose(2, -2).flatten(-2).norm(dim=-1).transpose(2, 3))
    close(together.weights.squeeze(1).square(), actual.weights.square().sum(1))
    close(actual.relative().increments[:, 1, 2] * actual.weights[1, 2], actual.increments[:, 1, 2])
    down = growth(model, tokens, N, ["down"], part)
    assert torch.equal(down.increments, actual.increments[:, :, 2:])


def matrices(model: Model, layer: int, part: Part = "total") -> dict[str, list[Matrix]]:
    """Each patched matrix after each prefix."""
    tokens = short(model)
    sequences = [torch.cat([tokens[:, :i], tokens[:, N:]], 1) for i in range(N + 1)]
    recorded = [record(model, sequence, i)[layer] for i, sequence in enumerate(sequences)]
    return {name: [states.matrix(name, part) for states in recorded] for name in MATRICES}


@every_case
@torch.no_grad()
def test_increments_telescope(case: Case) -> None:
    """Law L3: increments add up to the whole update, as maps and in squared norm; one of them left out is missed."""
    for W in matrices(shared(case.name), 1).values():
        increments = [after - before for before, after in pairwise(W)]
        whole = W[-1] - W[0]
        x = torch.randn(2, 3, 4, whole.W.shape[1]).double()
        close(sum((step.apply(x) for step in increments), torch.zeros(())), whole.apply(x))
        square = sum((a.inner(b) for a in increments for b in increments), torch.zeros(()))
        close(square, whole.inner(whole))  # of sums near zero the roots tell rounding apart, or are none
        close(whole.norm().square(), whole.inner(whole))
        without = sum((step.apply(x) for step in increments[1:]), torch.zeros(()))
        if increments[0].norm().max() > 1e-12:  # chunks of text and unpatched matrices stay as they are for a while
            assert (without - whole.apply(x)).abs().max() > 1e-3


@torch.no_grad()
def test_only_the_first_layer_keeps_its_key() -> None:
    """Layer 0: increments of rank 1, the delta rule with one key; layer 1: rank 2, as the patched stream moves."""
    model = build(BY_NAME["transformer-regression"])
    for layer, rank in ((0, 1), (1, 2)):
        W = [matrix.dense() for matrix in matrices(model, layer)["gate"]]
        for before, after in pairwise(W[1:]):  # at the first token all there is has rank 1
            assert ((torch.linalg.svdvals(after - before) > 1e-10).sum(-1) == rank).all()
    tokens = short(model)
    block, layout = model.decoder.blocks[0], model.decoder.layout
    stored, key = block.ffn.gate, record(model, tokens, N)[0].z
    rate = 1 / key.square().sum(-1)[..., None, None]
    W = [stored.expand(2, 3, -1, -1)]
    for length in range(1, N + 1):
        sequence = torch.cat([tokens[:, :length], tokens[:, N:]], 1)
        z = block.norm2(block.attend(model.decoder.embed(sequence), layout(length + 3, length)))[:, length:]
        missed = (z @ stored.mT - (W[-1] @ key[..., None]).squeeze(-1))[..., None]
        W.append(W[-1] + rate * missed @ key[..., None, :])
    for expected, actual in zip(W, matrices(model, 0)["gate"], strict=True):
        close(actual.dense(), expected)


@torch.no_grad()
def test_what_a_constant_emits_does_not_grow() -> None:
    constant, reading = (
        growth(model, short(model), N, part="emitted").increments
        for model in (build(BY_NAME["hypernet-constant"]), build(BY_NAME["hypernet-segment-attend"]))
    )
    assert not constant.any()
    assert reading.min() > 1e-2
    assert (
        growth(build(BY_NAME["hypernet-constant"]), short(build(BY_NAME["hypernet-constant"])), N).increments.min() > 0
    )


@torch.no_grad()
def test_what_the_separate_context_emits_is_the_same_for_all_queries() -> None:
    for name, equal in (("hypernet-segment-low-rank", True), ("moe-context-linear", True), ("moe-token", False)):
        model = build(BY_NAME[name])
        down = growth(model, short(model), N, ["down"], "emitted").increments
        assert torch.allclose(down, down[..., :1].expand_as(down), rtol=0, atol=1e-12) == equal


def test_growth_needs_a_context_and_known_matrices() -> None:
    model = build(BY_NAME["transformer-regression"])
    for n_context, names in ((0, MATRICES), (7, MATRICES), (N, ["gate", "key"]), (N, [])):
        with pytest.raises(ValueError, match=r"names out of .*'down'.*n_context=. must leave context and queries of 7"):
            growth(model, short(model), n_context, names)


# one block without skip


def block(seed: int, n: int, B: int = 8, D: int = 16) -> tuple[Attention, Tensor, Tensor, Tensor]:
    """Attention with drawn weights, a matrix that reads it, contexts of n tokens and a query."""
    torch.manual_seed(seed)
    attention = Attention(D, 4, 2, theta=100.0).double()
    return attention, *(torch.randn(*shape).double() for shape in ((12, D), (B, n, D), (B, 1, D)))


def test_states_are_those_of_prefixes_and_suffixes() -> None:
    attention, _, context, query = block(0, 5)
    growing_BD, shrinking_BD = (f(attention, context, query) for f in (growing_states, shrinking_states))
    for kept, actual in (([0, 1, 5], growing_BD[2]), ([5], growing_BD[0]), ([2, 3, 4, 5], shrinking_BD[2])):
        tokens = torch.cat([context, query], 1)[:, kept]
        close(actual, attention(tokens, Layout(torch.tensor(kept), None))[:, -1])
    close(growing_BD[-1], shrinking_BD[0])
    close(growing_BD[0], shrinking_BD[-1])


def test_a_growing_context_is_one_step_of_least_mean_squares_per_token() -> None:
    attention, W, context, query = block(1, 6, B=1)
    a = growing_states(attention, context, query)
    step = W
    for i in range(6):
        trained = step.detach().requires_grad_()
        loss = 0.5 * (trained @ a[0, 0] - W @ a[i + 1, 0]).square().sum()
        (gradient,) = torch.autograd.grad(loss, trained)
        step = step - gradient / a[0, 0].square().sum()
        close(growing(a).dense(W)[i + 1, 0], step - W)
        # half of the rate is another rule
        assert (step + gradient / a[0, 0].square().sum() / 2 - W - growing(a).dense(W)[i + 1, 0]).abs().max() > 1e-3


def test_both_constructions_are_exact_at_the_query_and_differ() -> None:
    attention, W, context, query = block(2, 24)
    a, s = growing_states(attention, context, query), shrinking_states(attention, context, query)
    one_key, many_keys = growing(a), shrinking(W, s)
    target = a[-1] @ W.mT
    product = W.expand(8, -1, -1)
    for k, update in enumerate(many_keys):
        matrix = W + update.dense(W)
        close(torch.einsum("boi,bi->bo", matrix, s[k]), target)
        if k:
            A = (s[k - 1] - s[k]).unsqueeze(-1) * (s[k] / s[k].square().sum(-1, keepdim=True)).unsqueeze(-2)
            product = product @ (torch.eye(16).double() + A)
        close(matrix, product)
    for k in range(25):
        close(torch.einsum("boi,bi->bo", W + one_key.dense(W)[k], a[0]), a[k] @ W.mT)
    ranks = [(torch.linalg.svdvals(dense) > 1e-9).sum(-1) for dense in (one_key.dense(W)[-1], many_keys[-1].dense(W))]
    assert (ranks[0] == 1).all()
    assert (ranks[1] == 12).all()  # of 24 keys in 16 dimensions, and 12 rows
    assert ((torch.linalg.svdvals(many_keys[3].dense(W)) > 1e-9).sum(-1) == 3).all()
    assert (one_key.norm(W)[-1] / many_keys[-1].norm(W)).median() < 0.8


def test_a_zero_state_has_no_update() -> None:
    a = torch.randn(4, 2, 5)
    a[0, 1] = 0
    with pytest.raises(ValueError, match="is zero"):
        growing(a)
    shrinking(torch.randn(3, 5), a)  # with all of the context, zero is a target like any other
    with pytest.raises(ValueError, match="is zero"):
        shrinking(torch.randn(3, 5), a.flip(0))


def mean_pooling(x: Tensor, layout: Layout) -> Tensor:
    return x.mean(1, keepdim=True)


def fading(x: Tensor, layout: Layout) -> Tensor:
    return (x * 0.9 ** torch.arange(x.shape[1]).flip(0)[:, None]).sum(1, keepdim=True)


@pytest.mark.parametrize("seed", range(3))
def test_increments_fall_as_fast_as_an_average_does(seed: int) -> None:
    """Untrained softmax attention and plain averaging: −1. A state that fades: 0, so the slope is no constant."""
    attention, W, context, query = block(seed, 200)
    layers: dict[str, tuple[Callable[[Tensor, Layout], Tensor], float]] = {
        "softmax": (attention, -1.0),
        "mean": (mean_pooling, -1.0),
        "fading": (fading, 0.0),
    }
    for layer, expected in layers.values():
        a = growing_states(layer, context, query)
        increments = InputShift(a[:1].expand_as(a[1:]), a.diff(dim=0)).norm(W)
        mean = Series("", tuple(range(len(increments))), tuple(increments.mean(1).tolist()))
        assert slope(mean) == pytest.approx(expected, abs=0.15)
