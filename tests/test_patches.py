"""Every form of patch stands for the context exactly, is what its formula says, and says so where it cannot exist."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterable
from dataclasses import replace
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from cases import CASES, Case, batch_of, build, length_of_context, plain_forward, shared, taking_turns, train
from test_delta import at_most
from zoo.core.delta import LowRank
from zoo.core.exact import EXACT_FORMS, LayerStates, exact, replace_context
from zoo.core.layers import FeedForward
from zoo.core.patch import Patch, Routing
from zoo.models import MODELS, Model

pytestmark = pytest.mark.numeric

MISS = 1e-2
EXACT = {torch.float64: 1e-10, torch.float32: 1e-5}
STATIC = ("static", "static_output")
every_case = pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
every_dtype = pytest.mark.parametrize("dtype", EXACT, ids=str)


def prefix(model: Model) -> Tensor:
    return torch.arange(model.task.tokens) < length_of_context(model)


def scattered(model: Model) -> Tensor:
    n = length_of_context(model)
    return torch.zeros(model.task.tokens, dtype=torch.bool).index_fill(0, torch.tensor([1, n - 3, n - 2]), True)


def tokens_of(model: Model) -> Tensor:
    """Tokens in the model's precision: a context, separate where the task says so, and a query."""
    tokens, n = batch_of(model).tokens, length_of_context(model)
    if tokens.is_floating_point():
        return tokens.to(model.decoder.head.weight.dtype)
    # tokens that see themselves alone have no static patch where they are equal
    tokens[:, 2] = (tokens[:, 0] + 1) % (model.task.vocabulary or 1)
    tokens[:, n:] = (tokens[:, :1] + 2 + torch.arange(tokens.shape[1] - n)) % (model.task.vocabulary or 1)
    return tokens


def distances(model: Model, tokens: Tensor, removed: Tensor, patches: list[Patch], n_context: int) -> dict[str, float]:
    """Largest distance from the contextual output, relative to it: with dense weights, with patches, with neither."""
    kept = ~removed
    query, layout = tokens[:, kept], model.decoder.layout(tokens.shape[1], n_context).keep(kept)
    n_kept = int(kept[:n_context].sum()) if model.task.n_context else 0
    contextual = model(tokens, n_context)[:, kept]
    outputs = {
        "dense": plain_forward(model, query, patches, layout),
        "patched": model(query, n_kept, patches, layout.positions),
        "reduced": model(query, n_kept, positions=layout.positions),
    }
    largest = contextual.abs().max()
    return {name: ((output - contextual).abs().max() / largest).item() for name, output in outputs.items()}


# what is removed, precision, options of exact()
Way = tuple[Callable[[Model], Tensor], torch.dtype, dict[str, Any]]
PART: Way = (scattered, torch.float64, {})
WAYS: dict[str, Way] = {
    "float32": (prefix, torch.float32, {"formed": True}),
    "parallel": (prefix, torch.float64, {"parallel": True}),
}


@taking_turns("case, way", [*CASES, *CASES], [*[PART] * len(CASES), *[*WAYS.values()] * len(CASES)])
@torch.no_grad()
def test_exact(case: Case, way: Way) -> None:
    which, dtype, options = way
    model = shared(case.name, dtype)
    tokens, removed, n = tokens_of(model), which(model), length_of_context(model)
    for form in EXACT_FORMS:
        patches = exact(model.decoder, tokens, removed, form, n_context=n, **options)
        errors = distances(model, tokens, removed, patches, n)
        assert max(errors["dense"], errors["patched"]) <= EXACT[dtype], (form, errors)
        assert errors["reduced"] > MISS


@every_case
@torch.no_grad()
def test_states_of_two_unpatched_passes_do_not_give_a_patch(case: Case) -> None:
    model = shared(case.name)
    tokens, wrong = tokens_of(model), {form: [] for form in EXACT_FORMS}  # type: ignore[var-annotated]

    def mistake(pair: LayerStates) -> Patch:
        for form, patch_of in EXACT_FORMS.items():
            wrong[form].append(patch_of(pair))
        return pair.emit_without_context()  # the query's stream goes on as if nothing was patched

    replace_context(model.decoder, tokens, n := length_of_context(model), mistake)
    for form, patches in wrong.items():
        assert distances(model, tokens, prefix(model), patches, n)["dense"] > MISS, form


def pair_of(model: Model, tokens: Tensor | None = None, removed: Tensor | None = None) -> LayerStates:
    """The states of the first layer."""
    pairs: list[LayerStates] = []
    tokens, n = tokens_of(model) if tokens is None else tokens, length_of_context(model)
    gone = n if removed is None else removed
    replace_context(model.decoder, tokens, gone, lambda pair: pairs.append(pair) or Patch(), n)  # type: ignore
    return pairs[0]


def every_token(pair: LayerStates) -> list[list[int]]:
    return torch.cartesian_prod(*map(torch.arange, pair.z.shape[:2])).tolist()


def silu_product(W: dict[str, Tensor], z: Tensor) -> Tensor:
    return F.silu(W["gate"] @ z) * (W["up"] @ z)


def rank_1(u: Tensor, x: Tensor) -> Tensor:
    """The smallest matrix that maps x to u."""
    return torch.outer(u, x) / (x @ x)


def hidden_scale(ffn: FeedForward, routing: Routing | None, b: int, t: int) -> Tensor:
    """s of one token, by a loop over its chosen blocks."""
    if routing is None:
        return torch.ones(ffn.gate.shape[0]).double()
    scale = torch.zeros(ffn.blocks, ffn.hidden_per_block).double()
    for block, weight in zip(routing.index[b, t].flatten(), routing.weight[b, t].flatten(), strict=True):
        scale[block] += weight
    return scale.flatten()


def stored(ffn: FeedForward) -> dict[str, Tensor]:
    return {name: ffn.weight(name) for name in ("gate", "up", "down")}


def emitted(pair: LayerStates, b: int, t: int) -> dict[str, Tensor]:
    """Weights with what the family emitted at one token."""
    deltas = pair.emitted.weights
    return {n: W + deltas[n].dense(W)[b, t] if n in deltas else W for n, W in stored(pair.ffn).items()}


def formula(form: str, pair: LayerStates, alone: Routing | None, b: int, t: int) -> dict[str, Tensor]:
    """The dense weights of one token as the theory states them, s on the columns of `down`."""
    z, z_ctx, v, v_ctx, out_ctx = (state[b, t] for state in (pair.z, pair.z_ctx, pair.v, pair.v_ctx, pair.out_ctx))
    if form == "output":
        W, s = stored(pair.ffn), hidden_scale(pair.ffn, alone, b, t)
        h = s * silu_product(W, z)
        return {**W, "down": (W["down"] + rank_1(out_ctx - v - W["down"] @ h, h)) * s}
    W, s = emitted(pair, b, t), hidden_scale(pair.ffn, pair.emitted.routing, b, t)
    h = s * silu_product(W, z_ctx)
    down = (W["down"] + rank_1(v_ctx - v, h)) * s
    change = torch.eye(len(z)).double() + rank_1(z_ctx - z, z)
    return {"gate": W["gate"] @ change, "up": W["up"] @ change, "down": down}


def assert_equal_weights(actual: dict[str, Tensor], expected: dict[str, Tensor]) -> None:
    for name in ("gate", "up", "down"):
        torch.testing.assert_close(actual[name], expected[name], rtol=1e-9, atol=1e-9)


@every_case
@pytest.mark.parametrize("form", ["shear", "output"])
@torch.no_grad()
def test_patches_of_single_tokens_are_what_their_formulas_say(case: Case, form: str) -> None:
    model = shared(case.name)
    pair = pair_of(model)
    alone, dense = model.decoder.emit(pair.z, 0, 0).routing, pair.ffn.dense(EXACT_FORMS[form](pair))
    for b, t in every_token(pair):
        expected = formula(form, pair, alone, b, t)
        assert_equal_weights({name: W.expand(*pair.z.shape[:2], -1, -1)[b, t] for name, W in dense.items()}, expected)


@every_case
@torch.no_grad()
def test_a_bias_is_what_its_formula_says(case: Case) -> None:
    model = shared(case.name)
    pair = pair_of(model)
    alone, patch, W = model.decoder.emit(pair.z, 0, 0).routing, EXACT_FORMS["bias"](pair), stored(pair.ffn)
    assert not patch.weights
    for b, t in every_token(pair):
        ffn_z = W["down"] @ (hidden_scale(pair.ffn, alone, b, t) * silu_product(W, pair.z[b, t]))
        torch.testing.assert_close(patch.biases["down"][b, t], pair.out_ctx[b, t] - pair.v[b, t] - ffn_z)


@every_case
@pytest.mark.parametrize("form", STATIC)
@torch.no_grad()
def test_static_patches_are_what_their_formulas_say(case: Case, form: str) -> None:
    model = shared(case.name)
    pair = pair_of(model)
    patch, W = EXACT_FORMS[form](pair), stored(pair.ffn)
    routing = pair.emitted.routing if form == "static" else model.decoder.emit(pair.z, 0, 0).routing
    dense, T = pair.ffn.dense(replace(patch, routing=None)), pair.z.shape[1]
    for b in range(3):
        expected = dict(W)
        if form == "static":
            for name in ("gate", "up"):
                read = torch.stack([emitted(pair, b, t)[name] @ pair.z_ctx[b, t] for t in range(T)], 1)
                expected[name] = W[name] + (read - W[name] @ pair.z[b].T) @ torch.linalg.pinv(pair.z[b].T)
        units = [hidden_scale(pair.ffn, routing, b, t) * silu_product(expected, pair.z[b, t]) for t in range(T)]
        H = torch.stack(units, 1)
        missing = (pair.out_ctx - pair.v)[b].T - W["down"] @ H
        expected["down"] = W["down"] + missing @ torch.linalg.pinv(H)
        assert_equal_weights({name: total.expand(3, -1, -1)[b] for name, total in dense.items()}, expected)


MOE = [case for case in CASES if case.family == "moe"]


@pytest.mark.parametrize("case", MOE, ids=lambda case: case.name)
@torch.no_grad()
def test_experts_share_the_residual_with_the_smallest_norm(case: Case) -> None:
    """ΔD_e = δv γ_e h_eᵀ / Σ γ²|h|² over the chosen experts; splitting δv evenly, or to the best alone, is larger."""
    pair = pair_of(shared(case.name))
    ffn, routing = pair.ffn, pair.emitted.routing
    assert routing is not None
    down = EXACT_FORMS["shear"](pair).weights["down"].dense(ffn.weight("down"))
    for b, t in every_token(pair):
        shift, z_ctx = (pair.v_ctx - pair.v)[b, t], pair.z_ctx[b, t]
        chosen = list(zip(routing.index[b, t].flatten().tolist(), routing.weight[b, t].flatten(), strict=True))
        gate, up = (W.unflatten(0, (ffn.blocks, -1)) for W in (ffn.gate, ffn.up))
        units = {e: F.silu(gate[e] @ z_ctx) * (up[e] @ z_ctx) for e, _ in chosen}
        total = sum(weight**2 * units[e].square().sum() for e, weight in chosen)
        expected = torch.zeros(ffn.dim, ffn.blocks, ffn.hidden_per_block).double()
        for e, weight in chosen:
            expected[:, e] = torch.outer(shift, weight * units[e]) / total
        torch.testing.assert_close(down[b, t], expected.flatten(1), rtol=1e-9, atol=1e-12)
        evenly = sum(1 / units[e].square().sum() for e, _ in chosen) ** 0.5 / sum(w for _, w in chosen).abs()
        best = 1 / max(weight.abs() * units[e].norm() for e, weight in chosen)
        assert expected.norm() <= (1 + 1e-12) * shift.norm() * min(evenly, best)


@pytest.mark.parametrize("case", MOE, ids=lambda case: case.name)
@torch.no_grad()
def test_the_router_sees_the_context_where_its_input_is_patched(case: Case) -> None:
    model = shared(case.name)
    pair = pair_of(model)
    alone = model.decoder.emit(pair.z, 0, 0).routing
    assert alone is not None
    assert pair.emitted.routing is not None
    contextual, reduced = (r.weight.flatten(2) for r in (pair.emitted.routing, alone))
    assert (contextual - reduced).abs().max() > MISS
    for form, patch_of in EXACT_FORMS.items():
        routing = patch_of(pair).routing
        assert routing is not None
        expected = contextual if form in ("shear", "static") else reduced
        torch.testing.assert_close(routing.weight.flatten(2), expected, rtol=0, atol=1e-12)


@every_case
@torch.no_grad()
def test_what_a_family_emits_alone_is_what_it_emits_for_the_kept_tokens(case: Case) -> None:
    model = shared(case.name)
    n_kept = model.task.n_context and model.task.n_context - 3
    positions = model.decoder.layout(model.task.tokens, length_of_context(model)).positions[~scattered(model)]
    _, used = model.decoder(tokens_of(model)[:, ~scattered(model)], n_kept, positions=positions)
    at = torch.arange(model.task.tokens - 3)
    pair = pair_of(model, removed=scattered(model))
    alone, expected = (pair.ffn.dense(patch.per_token(at)) for patch in (pair.emit_without_context(), used[0]))
    for name, W in expected.items():
        torch.testing.assert_close(alone[name], W, rtol=0, atol=1e-12)


@every_case
@torch.no_grad()
def test_where_nothing_goes_no_weight_changes(case: Case) -> None:
    model = shared(case.name)
    tokens = tokens_of(model)[:, length_of_context(model) :]
    if any(patch.weights for patch in model.decoder(tokens)[1]):
        pytest.skip("updates weights from the query itself")
    for form in EXACT_FORMS:
        patches = exact(model.decoder, tokens, 0, form)
        for block, patch in zip(model.decoder.blocks, patches, strict=True):
            dense = block.ffn.dense(replace(patch, routing=None))
            for name, W in stored(block.ffn).items():
                assert (dense[name] - W).abs().max() <= 1e-10, form
            assert patch.biases.get("down", torch.zeros(1)).abs().max() <= 1e-10, form


def build_deep(family: str, layers: int, **options: Any) -> Model:
    """A model of running text with drawn weights and a vocabulary that a query need not repeat."""
    torch.manual_seed(0)
    sizes = {"dim": 32, "heads": 4, "hidden": 20 if family == "moe" else 80}
    model = MODELS[family](
        model={"name": family, "layers": layers, **sizes, **options},
        task={"name": "noise", "vocabulary": 256},
        optim={},
    )
    with torch.no_grad():
        for parameter in model.parameters():
            if not parameter.any():
                parameter.normal_(std=0.3)
    return model.eval()


def different_tokens(rows: int, count: int) -> Tensor:
    generator = torch.Generator().manual_seed(1)
    return torch.stack([torch.randperm(256, generator=generator)[:count] for _ in range(rows)])


FAMILIES: dict[str, dict[str, Any]] = {"transformer": {}, "hypernet": {"chunk": 4}, "moe": {}}
every_family = pytest.mark.parametrize("family", FAMILIES)


@functools.cache
def deep(family: str, dtype: torch.dtype) -> Model:
    return build_deep(family, 24, **FAMILIES[family]).to(dtype)


def assert_exact_at_depth(model: Model, tokens: Tensor, removed: Tensor, n_context: int, forms: Iterable[str]) -> None:
    """The law as users see it, W + ΔW in a plain forward pass: distance from the contextual output, relative to it.

    Each layer makes up for the rounding of those below. That is lost where weights are formed after the patches were
    made (mixed), or layers patched in parallel: there errors are those of any two passes of different arithmetic.
    """
    kept, eps = ~removed, torch.finfo(model.decoder.head.weight.dtype).eps
    query, layout = tokens[:, kept], model.decoder.layout(tokens.shape[1], n_context).keep(kept)
    contextual = model(tokens, n_context)[:, kept]

    def error(output: Tensor) -> float:
        return ((output - contextual).norm() / contextual.norm()).item()

    def patched(patches: list[Patch] | None) -> float:
        return error(model(query, patches=patches, positions=layout.positions))

    assert patched(None) > 0.1
    for form in forms:
        factors, formed = (
            exact(model.decoder, tokens, removed, form, n_context=n_context, formed=f) for f in (False, True)
        )
        exactly = error(plain_forward(model, query, formed, layout))
        assert max(exactly, patched(factors)) <= 8 * eps, form
        assert exactly <= error(plain_forward(model, query, factors, layout)) <= 1000 * eps, form
    parallel = exact(model.decoder, tokens, removed, parallel=True, n_context=n_context)
    assert patched(exact(model.decoder, tokens, removed, n_context=n_context)) <= patched(parallel) <= 1000 * eps


@pytest.mark.parametrize(
    ("family", "dtype", "forms"),
    [
        ("transformer", torch.float32, EXACT_FORMS),
        ("moe", torch.float32, EXACT_FORMS),
        ("hypernet", torch.float64, EXACT_FORMS),
    ],
)
@torch.no_grad()
def test_24_layers(family: str, dtype: torch.dtype, forms: Iterable[str]) -> None:
    assert_exact_at_depth(deep(family, dtype), different_tokens(4, 25), torch.arange(25) < 20, 0, forms)


@pytest.mark.slow
@every_family
@torch.no_grad()
def test_24_trained_layers(family: str) -> None:
    sizes = {"dim": 16, "layers": 24, "heads": 2, "hidden": 24}
    model = MODELS[family](model={"name": family, **sizes}, task={"name": "regression"}, optim={"steps": 100})
    with torch.enable_grad():
        train(model, 30)
    batch = model.task.batch("test", 0, 32)
    removed = torch.arange(batch.tokens.shape[1]) < batch.n_context
    for dtype in EXACT:
        assert_exact_at_depth(
            model.to(dtype), batch.tokens.to(dtype), removed, batch.n_context, ("shear", "output", "bias")
        )


@pytest.mark.parametrize(
    ("family", "form"),
    [
        ("transformer", "shear"),
        ("transformer", "output"),
        ("hypernet", "bias"),
        ("hypernet", "shear"),
        ("moe", "output"),
    ],
)
@torch.no_grad()
def test_bfloat16_gives_the_same_tokens(family: str, form: str) -> None:
    """One of 20 may differ where two logits are as good as equal, one step of bfloat16 apart at most."""
    model, positions = deep(family, torch.bfloat16), torch.arange(20, 25)
    tokens, removed = different_tokens(4, 25), torch.arange(25) < 20
    logits, query = model(tokens)[:, 20:], tokens[:, 20:]
    best, chosen = (
        logits.argmax(-1),
        model(query, patches=exact(model.decoder, tokens, removed, form), positions=positions),
    )
    regret = logits.amax(-1) - logits.gather(-1, chosen.argmax(-1, keepdim=True)).squeeze(-1)
    assert (regret <= torch.finfo(torch.bfloat16).eps * logits.amax(-1)).all()
    assert (chosen.argmax(-1) == best).sum() >= 19
    assert (model(query, positions=positions).argmax(-1) == best).sum() <= 2


@pytest.mark.parametrize(
    ("form", "what", "capacity"), [("static", "states", 32), ("static_output", "hidden units", 80)]
)
@every_family
@torch.no_grad()
def test_one_static_patch_serves_as_many_tokens_as_its_input_has_dimensions(
    family: str, form: str, what: str, capacity: int
) -> None:
    options = {"top_k": 4} if family == "moe" else FAMILIES[family]  # all experts run: all hidden units are there
    model = build_deep(family, 2, **options).double()
    removed = torch.arange(10 + capacity + 1) < 10
    tokens = different_tokens(2, len(removed))
    patches = exact(model.decoder, tokens[:, :-1], removed[:-1], form)
    errors = distances(model, tokens[:, :-1], removed[:-1], patches, 10)
    assert max(errors["dense"], errors["patched"]) <= EXACT[torch.float64]
    for patch in patches:
        assert patch.chunk is None
        for delta in patch.weights.values():
            assert isinstance(delta, LowRank)
            assert delta.u.shape[0] == 2
            assert delta.u.shape[-1] == capacity
    with pytest.raises(
        ValueError, match=rf"layer 0: {capacity + 1} tokens are more than the {capacity} {what} .* ridge"
    ):
        exact(model.decoder, tokens, removed, form)


@torch.no_grad()
def test_tokens_of_one_expert_share_its_hidden_units() -> None:
    model = build_deep("moe", 1, top_k=1).double()
    tokens, removed = different_tokens(2, 70), torch.arange(70) < 10
    routing = pair_of(model, tokens, removed).emit_without_context().routing
    assert routing is not None
    counts = F.one_hot(routing.index.squeeze(-1), 4).sum(1)
    rank = int(counts.clamp(max=20).sum(-1).min())
    assert rank < 60
    with pytest.raises(ValueError, match=f"layer 0: the hidden units of the FFN of 60 tokens have rank {rank} in"):
        exact(model.decoder, tokens, removed, "static_output")


@every_case
@pytest.mark.parametrize("form", STATIC)
@torch.no_grad()
def test_each_row_has_a_static_patch_of_its_own(case: Case, form: str) -> None:
    model = shared(case.name)
    tokens = tokens_of(model)
    together, alone = (exact(model.decoder, t, 7, form) for t in (tokens, tokens[1:2]))
    for block, many, one in zip(model.decoder.blocks, together, alone, strict=True):
        for name, delta in many.weights.items():
            W = block.ffn.weight(name)
            assert isinstance(delta, LowRank)
            torch.testing.assert_close(delta.dense(W)[1:2], one.weights[name].dense(W), rtol=0, atol=1e-9)
        down = many.weights["down"].dense(block.ffn.weight("down"))
        assert (down[0] - down[1]).abs().max() > MISS


@pytest.mark.parametrize("form", STATIC)
@pytest.mark.parametrize("dtype", EXACT, ids=str)
@torch.no_grad()
def test_equal_first_tokens_need_one_token_of_the_context(form: str, dtype: torch.dtype) -> None:
    model = build_deep("transformer", 2).to(dtype)
    tokens, removed = different_tokens(3, 15), torch.arange(15) < 10
    tokens[1, 11] = tokens[1, 10]
    with pytest.raises(ValueError, match=r"layer 0: .* of 5 tokens have rank 4 in torch.* \(row 1\).*keep one token"):
        exact(model.decoder, tokens, removed, form)
    errors = distances(model, tokens, removed, exact(model.decoder, tokens, removed), 10)
    removed[0] = False
    kept = distances(model, tokens, removed, exact(model.decoder, tokens, removed, form, n_context=10), 10)
    assert max(errors["dense"], kept["dense"]) <= EXACT[dtype]


@torch.no_grad()
def test_dependent_states_are_named_and_leave_the_output() -> None:
    """Queries blind to each other are linear in x and its image under attention: rank 2·3 in the first layer."""
    model = build(CASES[0])
    removed = torch.arange(14) < 7
    tokens = torch.randn(2, 14, 4).double()
    tokens[:, 7:, -1] = 0  # queries bring no y
    with pytest.raises(ValueError, match="layer 0: the states before the FFN of 7 tokens have rank 6 in"):
        exact(model.decoder, tokens, removed, "static")
    assert (
        distances(model, tokens, removed, exact(model.decoder, tokens, removed, "static_output"), 7)["dense"] <= 1e-10
    )


@torch.no_grad()
def test_a_token_with_small_hidden_units_would_spoil_the_others() -> None:
    """Its update is large, and what rounding leaves of that in the directions of other tokens is too."""
    pair = pair_of(build(CASES[0]))
    z_BTD = pair.z.clone()
    z_BTD[1, 2] *= 1e-5  # hidden units 1e-10 as large as those of others
    with pytest.raises(
        ValueError, match=r"the hidden units of the FFN of 5 tokens have rank 4 in torch.float64 \(row 1"
    ):
        EXACT_FORMS["static_output"](replace(pair, z=z_BTD))
    patch = EXACT_FORMS["output"](replace(pair, z=z_BTD))
    torch.testing.assert_close(pair.v + pair.ffn(z_BTD, patch), pair.out_ctx, rtol=0, atol=1e-12)


@torch.no_grad()
def test_without_hidden_units_a_bias_is_left() -> None:
    model = build(CASES[0])
    torch.nn.init.zeros_(model.decoder.blocks[1].ffn.up)
    tokens = tokens_of(model)
    for form in ("shear", "output", "static", "static_output"):
        with pytest.raises(ValueError, match="layer 1: the hidden units of the FFN are zero for a token"):
            exact(model.decoder, tokens, 7, form)
    assert distances(model, tokens, prefix(model), exact(model.decoder, tokens, 7, "bias"), 7)["dense"] <= 1e-10


@torch.no_grad()
def test_states_whose_square_is_no_number_above_zero_are_refused_too() -> None:
    model = build(CASES[0]).float()
    model.decoder.blocks[1].ffn.up.mul_(1e-30)
    with pytest.raises(ValueError, match="layer 1: the hidden units of the FFN are zero for a token"):
        exact(model.decoder, tokens_of(model), 7, "output")


def test_unknown_forms_are_named() -> None:
    model = build(CASES[0])
    with pytest.raises(ValueError, match="form 'sheer' does not exist; did you mean shear"):
        exact(model.decoder, tokens_of(model), 7, "sheer")


WIDE = {"dim": 320, "heads": 4, "layers": 2}
LARGE: dict[str, tuple[str, dict[str, Any], int]] = {
    "transformer": ("transformer", {"hidden": 320}, 0),
    "hypernet rank 1": ("hypernet", {"hidden": 320, "context": "running", "rank": 1, "code_dim": 8}, 1),
    "hypernet rank 4": ("hypernet", {"hidden": 320, "context": "running", "rank": 4, "code_dim": 8}, 4),
    "hypernet scale": ("hypernet", {"hidden": 320, "chunk": 8, "emission": "scale", "code_dim": 8}, 0),
    "moe": ("moe", {"hidden": 80}, 0),
}


@pytest.mark.parametrize("name", LARGE)
@torch.no_grad()
def test_no_matrix_per_token_is_formed(name: str) -> None:
    """Nothing is larger than the factors of one layer's patch, or a stored matrix, while patches are made and used."""
    family, options, rank = LARGE[name]
    model = build_deep(family, **{**WIDE, **options})
    tokens, removed = different_tokens(2, 64), torch.arange(64) < 4
    limit = max(2 * 64 * 320 * (rank + 1), 320 * 320)
    assert 50 * limit <= 2 * 60 * 320 * 320  # B·T·o·i
    # what a family emits enters these two forms alone; the others see its routing
    forms = ("shear", "static") if family == "hypernet" else EXACT_FORMS
    for form in forms:
        with at_most(limit):
            patches = model.deltas(tokens, removed) if form == "shear" else exact(model.decoder, tokens, removed, form)
            model(tokens[:, 4:], patches=patches, positions=torch.arange(4, 64))
        if form == "shear":  # the recorder sees what it should
            with pytest.raises(AssertionError), at_most(limit):
                model.decoder.blocks[0].ffn.dense(replace(patches[0], routing=None).per_token(torch.arange(60)))
