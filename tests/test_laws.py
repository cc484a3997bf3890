"""The laws: a context equals a weight update, no context equals none, and its form and size are as described."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor

from cases import CASES, Case, batch_of, length_of_context, plain_forward, shared, trained
from zoo.core.delta import Delta, InputShift, LowRank
from zoo.core.layers import Attention, Layout
from zoo.core.patch import Patch
from zoo.models import Model

pytestmark = pytest.mark.numeric

EXACT, MISS = 1e-10, 1e-2
TRAINED = [
    *("transformer-noise-gqa-tied", "moe-token", "moe-prompts"),
    *("hypernet-segment-attend", "hypernet-chunk", "hypernet-running-full-gqa"),
    *("hyper-moe-segment", "fast-weights-chunk"),
]
RANDOM = [(case, "random") for case in CASES]
ALL = RANDOM + [(case, "trained") for case in CASES if case.name in TRAINED]


def every(pairs: list[tuple[Case, str]]) -> pytest.MarkDecorator:
    ids = [f"{weights}-{case.name}" for case, weights in pairs]
    return pytest.mark.parametrize(("case", "model"), pairs, ids=ids, indirect=["model"])


@pytest.fixture
def model(request: pytest.FixtureRequest, case: Case) -> Model:
    """The case's model with drawn weights, or after a short training."""
    return (shared if request.param == "random" else trained)(case.name)


def context_of(model: Model) -> tuple[Tensor, int]:
    """Tokens and how many of them are the context; running text has no border, so any will do."""
    batch = batch_of(model)
    return batch.tokens, length_of_context(model)


def prefix(tokens: Tensor, length: int) -> Tensor:
    return torch.arange(tokens.shape[1]) < length


def equivalence(model: Model, tokens: Tensor, n_context: int, removed: Tensor) -> dict[str, float]:
    """Largest distance from the contextual output: with the dense weights, the patch, none, and a wrong one."""
    kept = ~removed
    query, layout = tokens[:, kept], model.decoder.layout(tokens.shape[1], n_context).keep(kept)
    n_kept = int(kept[:n_context].sum()) if model.task.n_context else 0
    other = torch.where(removed.view(1, -1, *[1] * (tokens.dim() - 2)), tokens.roll(1, 0), tokens)
    patches, wrong = (model.deltas(t, removed, n_context) for t in (tokens, other))
    outputs = {
        "dense": plain_forward(model, query, patches, layout),
        "patched": model(query, n_kept, patches, layout.positions),
        "unpatched": model(query, n_kept, [Patch()] * len(patches), layout.positions),
        "reduced": model(query, n_kept, positions=layout.positions),
        "wrong": model(query, n_kept, wrong, layout.positions),
    }
    contextual = model(tokens, n_context)[:, kept]
    return {name: (output - contextual).abs().max().item() for name, output in outputs.items()}


def assert_equivalent(errors: dict[str, float]) -> None:
    assert max(errors.pop("dense"), errors.pop("patched")) <= EXACT
    assert min(errors.values()) > MISS, errors


@every(ALL)
@torch.no_grad()
def test_equivalence(case: Case, model: Model) -> None:
    tokens, n_context = context_of(model)
    assert_equivalent(equivalence(model, tokens, n_context, prefix(tokens, n_context)))


@every(RANDOM)
@torch.no_grad()
def test_equivalence_when_part_of_the_context_goes(case: Case, model: Model) -> None:
    gone = ([0, 1, 2], [1, 4, 5])[CASES.index(case) % 2]
    tokens, n_context = context_of(model)
    removed = torch.zeros(tokens.shape[1], dtype=torch.bool).index_fill(0, torch.tensor(gone), True)
    assert_equivalent(equivalence(model, tokens, n_context, removed))


@every(RANDOM)
@torch.no_grad()
def test_equivalence_at_other_lengths_of_the_context(case: Case, model: Model) -> None:
    tokens, n_context = context_of(model)
    for length in (1, 2, n_context - 1):  # all of it: test_equivalence
        growing = torch.cat([tokens[:, :length], tokens[:, n_context:]], 1)
        assert_equivalent(equivalence(model, growing, length, prefix(growing, length)))


@torch.no_grad()
def test_a_growing_context_is_the_delta_rule() -> None:
    """Theory §2.1: W ← W + (u − W k) kᵀ with k = a0/|a0|, u = W0 a_{i+1}/|a0|, a_i what attention gives after i."""
    attention = Attention(8, 2, 2, theta=100.0).double()
    W0, x, context = torch.randn(12, 8).double(), torch.randn(1, 1, 8).double(), torch.randn(1, 6, 8).double()

    def attended(length: int) -> Tensor:
        sequence = torch.cat([context[:, :length], x], 1)
        return attention(sequence, Layout(torch.arange(length + 1), None))[0, -1]

    a0 = attended(0)
    W, key = W0, a0 / a0.norm()
    for length in range(1, 7):
        a = attended(length)
        W = W + torch.outer(W0 @ a / a0.norm() - W @ key, key)
        torch.testing.assert_close(InputShift(a0, a - a0).dense(W0), W - W0, rtol=0, atol=1e-13)
        torch.testing.assert_close(W @ a0, W0 @ a, rtol=0, atol=1e-13)


@every([pair for pair in ALL if pair[0].name != "hypernet-constant"])
@torch.no_grad()
def test_null_no_context_is_no_update(case: Case, model: Model) -> None:
    tokens, n_context = context_of(model)
    query = tokens[:, n_context:]
    output, alone = model.decoder(query)
    nothing = torch.zeros(query.shape[1], dtype=torch.bool)
    assert (model(query, patches=model.deltas(query, nothing)) - output).abs().max() <= 1e-12
    for block, some, none in zip(model.decoder.blocks, model.decoder(tokens, n_context)[1], alone, strict=True):
        for name, delta in some.per_token(torch.arange(tokens.shape[1])).weights.items():
            W = block.ffn.weight(name)
            assert delta.norm(W).max() > 1e-3 * W.norm()  # or the laws would hold of nothing
            # running text has a context at every later token, wherever it is cut
            assert not (model.task.n_context and none.per_token(torch.arange(2)).weights[name].dense(W).any())


SHARED = [("moe-context-linear", 0), ("moe-context-linear", 7), ("moe-context-chunk", 0), ("moe-prompts-context", 7)]


@pytest.mark.parametrize(("name", "length"), SHARED)
@torch.no_grad()
def test_null_a_context_that_all_tokens_share_routes_them_alike(name: str, length: int) -> None:
    model = shared(name)
    tokens, n_context = context_of(model)
    # four queries: one chunk, as the second chunk of text has the first as its context
    for patch in model.decoder(tokens[:, n_context - length : n_context + 4], length)[1]:
        weight, index = patch.routing.weight[:, length:], patch.routing.index[:, length:]
        # equal states are rows of one product, which may round at its edges in another way
        assert (weight - weight[:, :1]).abs().max() < 1e-14
        assert torch.equal(index, index[:, :1].expand_as(index))
        assert ((weight - weight[:1]).abs().max() < 1e-14) == (length == 0)


def rank(matrix: Tensor) -> int:
    ranks = (torch.linalg.svdvals(matrix) > 1e-10).sum(-1)
    assert (ranks == ranks.flatten()[0]).all()
    return int(ranks.flatten()[0])


@every(ALL)
@torch.no_grad()
def test_structure_rank(case: Case, model: Model) -> None:
    tokens, n_context = context_of(model)
    totals = model.deltas(tokens, prefix(tokens, n_context))
    later = torch.arange(n_context, tokens.shape[1])
    # what attention adds to the emitted update has rank 1, or 0 where queries do not attend to the context
    implicit = int(model.decoder.attend_context)
    for block, emitted, total in zip(model.decoder.blocks, model.decoder(tokens, n_context)[1], totals, strict=True):
        patch, W = replace(emitted.per_token(later), routing=None), block.ffn.dense(Patch())
        explicit, dense = block.ffn.dense(patch), block.ffn.dense(replace(total, routing=None))
        for name in W:
            assert rank(dense[name] - explicit[name]) == implicit
            if isinstance(delta := patch.weights.get(name), LowRank):
                (R,) = delta.u.any(-2).sum(-1).unique().tolist()  # a router leaves some factors out
                assert rank(explicit[name] - W[name]) == R
                assert rank(dense[name] - W[name]) == R + implicit


@every([pair for pair in RANDOM if pair[0].family == "moe"])
@torch.no_grad()
def test_structure_routing(case: Case, model: Model) -> None:
    tokens, n_context = context_of(model)
    config, query = model.config, tokens[:, n_context:]
    totals = model.deltas(tokens, prefix(tokens, n_context))
    empty = model.deltas(query, torch.zeros(query.shape[1], dtype=torch.bool))
    for block, total, null in zip(model.decoder.blocks, totals, empty, strict=True):
        scales, null_scales = (p.routing.scales(block.ffn.blocks) for p in (total, null) if p.routing)
        assert (scales.count_nonzero(-1) == config.top_k + config.shared).all()
        down, null_down = (block.ffn.dense(Patch(routing=p.routing, chunk=1))["down"] for p in (total, null))
        touched = (down - null_down).unflatten(-1, (block.ffn.blocks, -1)).abs().sum((-3, -1)) > 0
        assert torch.equal(touched, (scales != null_scales).squeeze(-2))
        assert (touched.sum(-1) <= 2 * config.top_k).all()
        assert touched.any()


def updates(model: Model) -> list[tuple[Tensor, Delta]]:
    """The first layer's total updates, one per token, each with a matrix that it acts on."""
    tokens, n_context = context_of(model)
    patch, ffn = model.deltas(tokens, prefix(tokens, n_context))[0], model.decoder.blocks[0].ffn
    assert patch.input is not None
    return [(ffn.gate, patch.input), *((ffn.weight(name), delta) for name, delta in patch.weights.items())]


def moved(value: Any, by: int) -> Any:
    """A copy of an update whose row 1 is another one, in the same memory layout for any `by`."""
    if torch.is_tensor(value):
        return torch.cat([value[:1], value[1:2] + by, value[2:]])
    return value and type(value)(*(moved(part, by) for part in vars(value).values()))


@every(RANDOM)
@torch.no_grad()
def test_apply_and_norms_equal_those_of_dense_row_by_row(case: Case, model: Model) -> None:
    for W, delta in updates(model):
        dense = delta.dense(W)
        x = torch.randn(*dense.shape[:2], 2, W.shape[1]).double()
        y, same, changed = (update.linear(W, x) for update in (delta, moved(delta, 0), moved(delta, 1)))
        for b, t in torch.cartesian_prod(*(torch.arange(n) for n in x.shape[:2])):
            torch.testing.assert_close(y[b, t], x[b, t] @ (W + dense[b, t]).T, rtol=1e-11, atol=1e-11)
        assert torch.equal(changed[::2], same[::2])
        assert (changed[1] - y[1]).abs().max() > MISS
        torch.testing.assert_close(delta.norm(W), torch.linalg.matrix_norm(dense), rtol=1e-10, atol=1e-10)
        largest = delta.svdvals(W)  # all others are zero: the norm is theirs alone
        torch.testing.assert_close(largest, torch.linalg.svdvals(dense)[..., : largest.shape[-1]], rtol=0, atol=1e-10)
        torch.testing.assert_close(largest.norm(dim=-1), delta.norm(W), rtol=1e-10, atol=1e-10)
