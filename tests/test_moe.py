"""Routing chooses and weighs as described, stays balanced, sees no future, and its metrics match hand computation."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from torch import Tensor

from cases import Case, batch_of, build
from zoo.core.layers import FeedForward
from zoo.core.patch import Patch, Routing
from zoo.models.moe import ExpertRouting, MoE, MoEConfig, Router, balance_loss, expert_counts

pytestmark = pytest.mark.numeric

D, E = 8, 4
every_backend = pytest.mark.parametrize("backend", ["reference", "loop", "grouped", "grouped_op"])
every_score = pytest.mark.parametrize("score", ["softmax", "sigmoid", "linear"])
FFN = FeedForward(D, 12, E)


def config(**options: Any) -> MoEConfig:
    return MoEConfig(**{"dim": D, "layers": 2, "experts": E, "renormalise": False, **options})


def moe(task: str = "regression", random: bool = True, **options: Any) -> Any:
    return build(Case("", "moe", task, options), random=random)


def routing_of(index: list[list[int]], logits: Tensor | None = None) -> Routing:
    """One row of tokens that chose the experts `index` (T,K)."""
    chosen = torch.tensor([index])
    return Routing(chosen, torch.ones(chosen.shape), torch.zeros(1, len(index), E) if logits is None else logits)


def balance_of_choices(routing: Routing, options: MoEConfig) -> Tensor:
    counts_E = expert_counts(routing, None)
    return balance_loss(routing, None, counts_E / counts_E.sum(), options.score)


def emitted(model: MoE, z: Tensor) -> Routing:
    routing = model.decoder.emit(z, 0, model.task.n_context).routing
    assert routing
    return routing


def states(model: MoE, size: int = 3) -> Tensor:
    return torch.randn(size, model.task.tokens, model.config.dim, dtype=torch.float64)


@every_score
@pytest.mark.parametrize("top_k", [1, 2, 3, 4])
def test_balance_loss_is_1_at_balance_and_more_when_collapsed(top_k: int, score: str) -> None:
    options = config(top_k=top_k, score=score)
    even = [[(t + k) % E for k in range(top_k)] for t in range(E)]
    assert balance_of_choices(routing_of(even), options).item() == pytest.approx(1)
    # everyone prefers the first K experts, so strongly that the others get no probability
    preferred = torch.tensor([30.0] * top_k + [-30.0] * (E - top_k)).expand(1, E, E)
    collapsed = balance_of_choices(routing_of([list(range(top_k))] * E, preferred), options)
    assert collapsed.item() == pytest.approx(E / top_k, rel=1e-4)


def test_balance_gradient_pushes_towards_idle_experts() -> None:
    logits = torch.zeros(1, 4, E, requires_grad=True)
    balance_of_choices(routing_of([[0], [0], [0], [1]], logits), config(top_k=1)).backward()
    assert logits.grad is not None
    towards = -logits.grad[0, 0]  # what a step of gradient descent adds to the logits
    assert towards[0] < towards[1] < towards[2]
    assert towards[2] == towards[3] > 0


def test_z_loss_is_the_mean_square_of_logsumexp() -> None:
    context_to_delta = ExpertRouting(config(balance_weight=0.0, z_weight=0.5))
    logits = torch.randn(2, 2, 6, E)
    loss = context_to_delta.aux_loss([Patch(routing=routing_of([[0]] * 6, part)) for part in logits], 0)
    torch.testing.assert_close(loss, 0.5 * logits.exp().sum(-1).log().square().mean())


@every_score
def test_bias_evens_out_a_skewed_router(score: str) -> None:
    context_to_delta = ExpertRouting(config(bias_rate=0.005, layers=1, top_k=1, score=score)).train()
    with torch.no_grad():
        context_to_delta.routers[0].weight[0, 0] += 4
    z = torch.randn(2, 64, D)
    z[..., 0] += 1
    busiest = []
    for _ in range(1000):
        patch = context_to_delta(z, 0, 0)
        busiest.append(expert_counts(patch.routing, None).max().item() / 32)
        context_to_delta.aux_loss([patch], 0)
        context_to_delta.after_step()
        assert abs(context_to_delta.routers[0].bias.mean().item()) < 1e-6
    assert busiest[0] > 2
    assert max(busiest[-10:]) < 1.3


@pytest.mark.parametrize("renormalise", [True, False])
def test_bias_moves_the_choice_but_not_the_weights(renormalise: bool) -> None:
    router = Router(config(renormalise=renormalise))
    router.bias.copy_(torch.tensor([0.0, 0.0, 9.0, 10.0]))
    forced = router(torch.randn(2, 5, D))
    assert forced.index.flatten(0, 1).tolist() == [[3, 2]] * 10
    score = forced.logits.softmax(-1)[..., [3, 2]]
    expected = score / score.sum(-1, keepdim=True) if renormalise else score
    torch.testing.assert_close(forced.weight, expected)


def test_choices_are_counted_once_for_each_part_of_a_batch() -> None:
    context_to_delta, z = ExpertRouting(config(bias_rate=0.1)), torch.randn(2, 5, D)
    patches = [context_to_delta(z, 0, 0), context_to_delta(z, 1, 0)]
    assert not context_to_delta.counts.any()  # a layer may be computed twice: forward counts nothing
    even = context_to_delta.aux_loss(patches, 0)
    for part, parts in ((0, 1), (1, 2), (2, 3), (0, 1)):  # a step's first part begins anew
        context_to_delta.aux_loss(patches, part)
        assert context_to_delta.counts.sum(1).tolist() == [parts * 20] * 2
    context_to_delta.after_step()
    torch.testing.assert_close(context_to_delta.state["shares"][1], expert_counts(patches[1].routing, None) / 20)
    assert not torch.isclose(torch.as_tensor(context_to_delta.aux_loss(patches, 0)), torch.as_tensor(even), rtol=1e-6)
    assert all(router.bias.any() for router in context_to_delta.routers)


@pytest.mark.parametrize("shares", [[[0.5] * E], [[0.5] * 3] * 2, [[0.5] * E, [0.5] * 3], [[math.nan] * E] * 2, "x", 5])
def test_shares_that_no_step_can_have_had_are_refused(shares: object) -> None:
    model, family = moe(), {"shares": [[0.1, 0.2, 0.3, 0.4]] * 2}
    with torch.device("meta"):  # where a checkpoint is tried
        meta = moe(random=False)
    for state in ({}, {"shares": []}, family):
        for each in (meta, model):
            each.on_load_checkpoint({"family": state})
    model.on_save_checkpoint(checkpoint := {})
    assert checkpoint["family"] == family
    with pytest.raises((ValueError, TypeError)):  # either is one line where a checkpoint is read
        model.on_load_checkpoint({"family": {"shares": shares}})


@pytest.mark.parametrize("renormalise", [True, False])
@every_score
def test_weights_are_the_scores_of_the_best(score: str, renormalise: bool) -> None:
    router, z = Router(config(score=score, renormalise=renormalise)), torch.randn(2, 5, D)
    routing, logits = router(z), z @ router.weight.T
    kinds = {"softmax": logits.softmax(-1), "sigmoid": 1 / (1 + (-logits).exp()), "linear": logits}
    best = kinds[score].sort(-1, descending=True).values[..., :2]
    torch.testing.assert_close(routing.weight, best / best.sum(-1, keepdim=True) if renormalise else best)
    torch.testing.assert_close(logits.gather(-1, routing.index), logits.sort(-1, descending=True).values[..., :2])


@every_score
def test_gradient_of_the_task_reaches_a_top_1_router(score: str) -> None:
    model = moe(top_k=1, score=score, balance_weight=0.0, z_weight=0.0)
    batch = batch_of(model)
    model.task.token_losses(model(batch.tokens, batch.n_context), batch).mean().backward()
    gradients = [router.weight.grad for router in model.decoder.context_to_delta.routers]
    assert all(gradient is not None and gradient.norm() > 1e-6 for gradient in gradients)


@pytest.mark.parametrize("router", ["frozen", "uniform"])
def test_null_routers_learn_nothing(router: str) -> None:
    family = moe(router=router).decoder.context_to_delta
    assert not [*family.parameters()]
    assert "routers.1.weight" in family.state_dict()


def test_shared_expert_serves_every_token_with_weight_1() -> None:
    model = moe(shared=1)
    z, ffn = states(model), model.decoder.blocks[0].ffn
    routing = emitted(model, z)
    assert (routing.index[..., -1] == 4).all()
    assert (routing.weight[..., -1] == 1).all()
    torch.testing.assert_close(routing.weight[..., :-1].sum(-1), torch.ones(3, 12, dtype=torch.float64))
    alone = FeedForward(16, 12).double()
    with torch.no_grad():
        for name in ("gate", "up", "down"):
            getattr(alone, name).copy_(getattr(ffn, name)[-12:])
    routed = Routing(routing.index[..., :-1], routing.weight[..., :-1], routing.logits)
    torch.testing.assert_close(ffn(z, Patch(routing=routing)) - ffn(z, Patch(routing=routed)), alone(z))


@pytest.mark.parametrize("task", ["regression", "noise"])
def test_routing_on_the_context_is_shared_and_lags(task: str) -> None:
    model = moe(task, route_on="context", top_k=1, **({} if task == "regression" else {"chunk": 5}))
    n, z = model.task.n_context, states(model, 16).requires_grad_()
    routing = emitted(model, z)
    # tokens of a separate context route on what they have seen; a chunk on all chunks before it
    expected = [range(min(t + 1, n)) if n else range(t // 5 * 5) for t in range(12)]
    for t, reads in enumerate(expected):
        total = routing.logits[:, t].square().sum()
        (gradient,) = torch.autograd.grad(total, z, retain_graph=True, materialize_grads=True)
        assert gradient.any(-1).all(0).nonzero().flatten().tolist() == list(reads)
    together = range(n, 12) if n else range(5, 10)  # all queries of a context, all tokens of a chunk
    # equal states are columns of one product, which may round at its edges in another way
    torch.testing.assert_close(
        routing.logits[:, list(together)], routing.logits[:, [together[0]] * 5], rtol=0, atol=1e-14
    )
    assert all(torch.equal(routing.index[:, t], routing.index[:, together[0]]) for t in together)
    assert len(routing.index[:, together[0]].unique()) > 1
    if not n:  # the first chunk has no context
        torch.testing.assert_close(routing.logits[0, :5], routing.logits[1, :5], rtol=0, atol=1e-14)


@every_backend
def test_an_expert_without_tokens_gets_a_zero_gradient(backend: str) -> None:
    model = moe(backend=backend, top_k=2).float()
    for router in model.decoder.context_to_delta.routers:
        router.bias[3] = -100
    batch = model.task.batch("train", 0, 4)
    model.task.token_losses(model(batch.tokens, batch.n_context), batch).mean().backward()
    for parameter in (p for block in model.decoder.blocks for p in block.ffn.parameters()):
        assert parameter.grad is not None
        assert parameter.grad.unflatten(0, (4, -1)).flatten(1).any(1).tolist() == [True, True, True, False]


@every_backend
def test_a_broken_token_stays_in_its_row(backend: str) -> None:
    model = moe(backend=backend).float()
    z, ffn = states(model).float(), model.decoder.blocks[0].ffn
    broken = z.clone()
    broken[0, 2] = math.nan
    whole, spoilt = (ffn(x, Patch(routing=emitted(model, x))) for x in (z, broken))
    assert spoilt[0, 2].isnan().all()
    spoilt[0, 2] = whole[0, 2]
    torch.testing.assert_close(spoilt, whole)


@every_backend
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_every_backend_runs_in_every_dtype(backend: str, dtype: torch.dtype) -> None:
    model = moe(backend=backend)  # 16 and 12 wide: rows of 12 numbers of 2 bytes are no whole 16 bytes
    tokens, n = batch_of(model).tokens, model.task.n_context
    expected, output = moe()(tokens, n), model.to(dtype)(tokens.to(dtype), n)
    assert output.dtype == dtype
    error = (output.double() - expected).norm() / expected.norm()
    assert error < 100 * torch.finfo(dtype).eps


def test_expert_load_by_hand() -> None:
    family = ExpertRouting(config())
    for name, value in (("load_max_over_mean", 4 / (7 / 4)), ("dead_fraction", 0.25)):
        summary = family.summaries[name]()
        for index in ([[0, 1], [0, 1], [0, 4]], [[0, 2]]):  # 4 is a shared expert
            summary.update(family.metrics(Patch(routing=routing_of(index)), FFN)[name])
        assert summary.compute().item() == pytest.approx(value)


def test_router_entropy_by_hand() -> None:
    for logits, value in (
        ([0.0] * E, math.log(E)),
        ([math.log(3.0), 0.0, -1e9, -1e9], 0.75 * math.log(4 / 3) + 0.25 * math.log(4)),
    ):
        patch = Patch(routing=routing_of([[0]], torch.tensor([[logits]])))
        assert ExpertRouting(config()).metrics(patch, FFN)["entropy"].mean().item() == pytest.approx(value)
