"""The use of experts, counted once more by loops, and what becomes of it without the context."""

from __future__ import annotations

import math
from collections import Counter

import pytest
import torch
from torch import Tensor

from cases import BY_NAME, CASES, Case, batch_of, build, shared
from zoo.core.layers import FILLING
from zoo.core.patch import Patch, Routing
from zoo.lens.routing import drawn_anew, expert_sets, information, mutual_information, switched, usage
from zoo.models import Model
from zoo.tasks import Batch

pytestmark = pytest.mark.numeric

MOE = [case for case in CASES if case.family == "moe" and case.options.get("router") != "uniform"]
every_moe = pytest.mark.parametrize("case", MOE, ids=lambda case: case.name)


def close(actual: Tensor, expected: Tensor | list[float]) -> None:
    expected = torch.as_tensor(expected, dtype=actual.dtype)
    torch.testing.assert_close(actual, expected, rtol=1e-6, atol=1e-9)


def grouped(model: Model, size: int = 6) -> Batch:
    return batch_of(model, size)._replace(group=torch.arange(size) % 3)


def sets_of(index: Tensor, experts: int) -> list[list[frozenset[int]]]:
    """The routed experts of each token of each sequence."""
    return [[frozenset(k for k in token if k < experts) for token in row] for row in index.tolist()]


def naive_information(pairs: list[tuple[int, int]]) -> float:
    def entropy(values: list[object]) -> float:
        return -sum(n / len(values) * math.log(n / len(values)) for n in Counter(values).values())

    x, y = (entropy([pair[side] for pair in pairs]) for side in (0, 1))
    return 2 * (x + y - entropy([*pairs])) / (x + y)


@every_moe
@torch.no_grad()
def test_usage_equals_counts_by_loops(case: Case) -> None:
    model = shared(case.name)
    batch, E, K = grouped(model), model.config.experts, model.config.top_k
    actual = usage(model, [batch.rows(0, 2), batch.rows(2, 4)])
    assert batch.group is not None
    for layer, patch in enumerate(model.decoder(batch.tokens, batch.n_context)[1]):
        assert patch.routing is not None
        sets = sets_of(patch.routing.index, E)
        tokens = [chosen for row in sets for chosen in row]
        assert {len(chosen) for chosen in tokens} == {K}
        counts = [sum(e in chosen for chosen in tokens) for e in range(E)]
        close(actual.load()[layer], [count * E / (K * len(tokens)) for count in counts])
        for e in range(E):
            both = [sum({e, f} <= chosen for chosen in tokens) / len(tokens) for f in range(E)]
            close(actual.together[layer, e], both)
        pairs = [(e, int(g)) for g, row in zip(batch.group, sets, strict=True) for chosen in row for e in chosen]
        table = Counter(pairs)
        close(actual.by_group()[layer], torch.tensor([[table[e, g] for e in range(E)] for g in range(3)]).double())
        close(mutual_information(actual.by_group()[layer]), naive_information(pairs))


@torch.no_grad()
def test_places_without_a_token_count_for_nothing() -> None:
    model = build(BY_NAME["moe-prompts"])
    model.decoder.filled = True
    tokens = batch_of(model).tokens
    filled = torch.cat([tokens, torch.full_like(tokens[:, :3], FILLING)], 1)
    cut, whole = (usage(model, [batch_of(model)._replace(tokens=t)]) for t in (tokens, filled))
    close(whole.chosen, cut.chosen)
    close(whole.together, cut.together)


def test_shared_experts_are_left_out() -> None:
    index = torch.tensor([[[2, 0, 4], [3, 1, 4]]])
    routing = Routing(index, torch.tensor([0.0, -1.0, 1.0]).expand(1, 2, 3), torch.zeros(1, 2, 4))
    assert expert_sets(Patch(routing=routing)).tolist() == [[[True, False, True, False], [False, True, False, True]]]


def test_mutual_information_of_tables() -> None:
    tables = {"same": torch.eye(3), "independent": torch.tensor([1.0, 2, 3])[:, None] * torch.tensor([2.0, 5])}
    assert mutual_information(tables["same"]).item() == pytest.approx(1)
    assert mutual_information(tables["independent"]).item() == pytest.approx(0, abs=1e-6)
    table = torch.tensor([[3.0, 1], [0, 4]])
    pairs = [(x, y) for x in range(2) for y in range(2) for _ in range(int(table[x, y]))]
    close(mutual_information(torch.stack([table, table.mT, 7 * table])), [naive_information(pairs)] * 3)
    assert mutual_information(torch.tensor([[5.0]])).isnan()


@torch.no_grad()
def test_experts_that_follow_the_group_stand_out_from_every_control() -> None:
    """A router that was made to tell two halves of the vocabulary apart."""
    model = build(BY_NAME["moe-token-top1-shared"])
    group = torch.arange(40) % 2
    tokens = torch.randint(2, (40, 12))
    apart, alike = Batch(tokens + 2 * group[:, None], tokens, 0, group=group), Batch(tokens, tokens, 0, group=group)
    z = [usage_states(model, tokens + 2 * g) for g in (0, 1)]
    router = model.decoder.context_to_delta.routers[0]  # type: ignore[union-attr]
    router.weight.copy_(torch.stack([z[1] - z[0], z[0] - z[1], *(0 * router.weight[2:])]) * 10)
    for batch, stands_out in ((apart, True), (alike, False)):
        found = {label: values[:, 0] for label, values in information(model, [batch]).items()}
        (trained,) = found.pop("as trained").tolist()
        assert (trained > 0.5) == stands_out
        assert all(len(values) == count for values, count in zip(found.values(), (5, 1, 20), strict=True))
        assert all(trained > values.mean() + 0.2 for values in found.values()) == stands_out


def usage_states(model: Model, tokens: Tensor) -> Tensor:
    """The mean state that the first router reads, (D)."""
    block, decoder = model.decoder.blocks[0], model.decoder
    return block.norm2(block.attend(decoder.embed(tokens), decoder.layout(tokens.shape[1], 0))).mean((0, 1))


@torch.no_grad()
def test_controls_draw_the_router_alone_or_everything() -> None:
    model = shared("moe-token-sigmoid-gqa-tied")
    for router_alone in (True, False):
        fresh, again, other = (drawn_anew(model, seed, router_alone) for seed in (0, 0, 1))
        for name, weight in model.state_dict().items():
            kept = torch.equal(fresh.state_dict()[name], weight)
            if weight.dim() > 1:  # norms and biases start as they are
                assert kept == (router_alone and ".context_to_delta." not in name), name
                assert torch.equal(again.state_dict()[name], fresh.state_dict()[name])
                assert torch.equal(other.state_dict()[name], fresh.state_dict()[name]) == kept


@every_moe
@torch.no_grad()
def test_a_sheared_router_chooses_as_with_the_context(case: Case) -> None:
    """Once more with the router's dense patched matrix; a router of the context's mean reads no sheared state."""
    model = shared(case.name)
    batch, E = batch_of(model, 8), model.config.experts
    tokens, n_context = batch.tokens, batch.n_context or 7
    reduced, sheared = switched(model, tokens, n_context)
    assert reduced.min() > 0.05
    if model.config.route_on == "context":
        assert sheared.min() > 0.05
        return
    assert not sheared.any()
    removed = torch.arange(tokens.shape[1]) < n_context
    for layer, patch in enumerate(model.deltas(tokens, removed)):
        assert patch.input is not None
        assert patch.routing is not None
        router = model.decoder.context_to_delta.routers[layer]  # type: ignore[union-attr]
        index = patch.routing.index.squeeze(2)
        contextual = [chosen for row in sets_of(index, E) for chosen in row]
        z, stored = patch.input.a, router.weight
        choices = []
        for W in (stored.expand(*z.shape[:2], -1, -1), stored + patch.input.dense(stored)):
            score = torch.einsum("bqed,bqd->bqe", W, z)
            chosen = score.topk(model.config.top_k, -1).indices.flatten(0, 1).tolist()
            choices.append([frozenset(c) != other for c, other in zip(chosen, contextual, strict=True)])
        close(reduced[layer], sum(choices[0]) / len(choices[0]))
        assert not any(choices[1])


def test_models_without_experts_are_refused() -> None:
    model = shared("hypernet-constant")
    batch = batch_of(model)
    for call in (lambda: usage(model, [batch]), lambda: switched(model, batch.tokens, 7)):
        with pytest.raises(ValueError, match="the model has no experts"):
            call()
