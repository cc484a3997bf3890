"""Every form of patch stands for the context exactly, is what its formula says, and says so where it cannot exist."""

from __future__ import annotations

import functools
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor

from cases import CASES, Case, batch_of, build, length_of_context, plain_forward, shared, taking_turns
from test_delta import at_most
from zoo.core.exact import LayerStates, replace_context
from zoo.core.patch import Patch
from zoo.lens.exact import EXACT_FORMS, exact
from zoo.models import MODELS, Model

pytestmark = pytest.mark.numeric

MISS = 1e-2
EXACT = {torch.float64: 1e-10, torch.float32: 1e-5}
every_case = pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
every_dtype = pytest.mark.parametrize("dtype", EXACT, ids=str)


def prefix(model: Model) -> Tensor:
    return torch.arange(model.task.tokens) < length_of_context(model)


def scattered(model: Model) -> Tensor:
    n = length_of_context(model)
    return torch.zeros(model.task.tokens, dtype=torch.bool).index_fill(0, torch.tensor([1, n - 3, n - 2]), True)


def tokens_of(model: Model) -> Tensor:
    """Tokens in the model's precision: a context, separate where the task says so, and a query."""
    tokens = batch_of(model).tokens
    return tokens.to(model.decoder.head.weight.dtype) if tokens.is_floating_point() else tokens


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


@every_case
@every_dtype
@torch.no_grad()
def test_exact(case: Case, dtype: torch.dtype) -> None:
    """Of a part of the context in factors; of all of it as matrices, which low precision asks for."""
    model, formed = shared(case.name, dtype), dtype == torch.float32
    tokens, n = tokens_of(model), length_of_context(model)
    removed = prefix(model) if formed else scattered(model)
    for form in EXACT_FORMS:
        patches = exact(model.decoder, tokens, removed, form, n, formed)
        errors = distances(model, tokens, removed, patches, n)
        assert max(errors["dense"], errors["patched"]) <= EXACT[dtype], (form, errors)
        assert errors["reduced"] > MISS


@every_case
@torch.no_grad()
def test_states_of_two_unpatched_passes_do_not_give_a_patch(case: Case) -> None:
    model = shared(case.name)
    tokens, wrong = tokens_of(model), {form: [] for form in EXACT_FORMS}  # type: ignore[var-annotated]

    def mistake(states: LayerStates) -> Patch:
        for form, patch_of in EXACT_FORMS.items():
            wrong[form].append(patch_of(states))
        return states.emit_without_context()  # the query's stream goes on as if nothing was patched

    replace_context(model.decoder, tokens, n := length_of_context(model), mistake)
    for form, patches in wrong.items():
        assert distances(model, tokens, prefix(model), patches, n)["dense"] > MISS, form


def states_of(model: Model, removed: Tensor | int) -> LayerStates:
    """Those of the first layer."""
    seen: list[LayerStates] = []
    n = length_of_context(model)
    replace_context(model.decoder, tokens_of(model), removed, lambda states: seen.append(states) or Patch(), n)  # type: ignore
    return seen[0]


@every_case
@torch.no_grad()
def test_no_smaller_update_does_what_they_do(case: Case) -> None:
    """Whatever is orthogonal to the states that an update serves, it maps to zero."""
    model = shared(case.name)
    states = states_of(model, length_of_context(model))
    for form in ("shear", "output"):
        patch, ffn = EXACT_FORMS[form](states), states.ffn
        assert patch.biases == {}
        emitted = states.emitted.weights if form == "shear" else {}
        reads = {"gate": states.z, "up": states.z, "down": ffn.hidden(states.z, patch)}
        for name, delta in patch.weights.items():
            W, served = ffn.weight(name), reads[name].unsqueeze(2)
            update = delta.dense(W) - (emitted[name].dense(W) if name in emitted else 0)
            projected = update @ torch.linalg.pinv(served) @ served
            torch.testing.assert_close(projected, update, rtol=1e-9, atol=1e-9)
            if model.decoder.attend_context or form != "shear":  # else attention adds nothing, up to rounding
                assert update.any() == (name == "down")


MOE = [case for case in CASES if case.family == "moe" and case.options.get("router") != "uniform"]


@pytest.mark.parametrize("case", MOE, ids=lambda case: case.name)
@torch.no_grad()
def test_the_router_sees_the_context_where_its_input_is_patched(case: Case) -> None:
    model = shared(case.name)
    states = states_of(model, length_of_context(model))
    alone = model.decoder.emit(states.z, 0, 0)
    contextual, reduced = (patch.routing.weight.flatten(2) for patch in (states.emitted, alone))  # type: ignore[union-attr]
    assert (contextual - reduced).abs().max() > MISS
    for form, patch_of in EXACT_FORMS.items():
        found = patch_of(states).routing.weight.flatten(2)  # type: ignore[union-attr]
        expected = contextual if form == "shear" else reduced
        torch.testing.assert_close(found, expected, rtol=0, atol=1e-12)


@every_case
@torch.no_grad()
def test_what_a_family_emits_alone_is_what_it_emits_for_the_kept_tokens(case: Case) -> None:
    model = shared(case.name)
    n_kept = model.task.n_context and model.task.n_context - 3
    positions = model.decoder.layout(model.task.tokens, length_of_context(model)).positions[~scattered(model)]
    _, used = model.decoder(tokens_of(model)[:, ~scattered(model)], n_kept, positions=positions)
    at = torch.arange(model.task.tokens - 3)
    states = states_of(model, scattered(model))
    alone, expected = (states.ffn.dense(patch.per_token(at)) for patch in (states.emit_without_context(), used[0]))
    for name, W in expected.items():
        torch.testing.assert_close(alone[name], W, rtol=0, atol=1e-12)


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


@functools.cache
def deep(family: str, dtype: torch.dtype) -> Model:
    return build_deep(family, 24, **FAMILIES[family]).to(dtype)


@taking_turns("family, dtype", [*FAMILIES], [torch.float32, torch.float64])
@torch.no_grad()
def test_24_layers(family: str, dtype: torch.dtype) -> None:
    """The law as users see it, W + ΔW in a plain forward pass: distance from the contextual output, relative to it.

    Each layer makes up for the rounding of those below. That is lost where weights are formed after the patches were
    made (mixed): there errors are those of any two passes of different arithmetic.
    """
    model, eps = deep(family, dtype), torch.finfo(dtype).eps
    tokens, removed = different_tokens(4, 25), torch.arange(25) < 20
    query, layout, contextual = tokens[:, 20:], model.decoder.layout(25, 0).keep(~removed), model(tokens)[:, 20:]

    def error(output: Tensor) -> float:
        return ((output - contextual).norm() / contextual.norm()).item()

    assert error(model(query, positions=layout.positions)) > 0.1
    for form in EXACT_FORMS:
        factors, formed = (exact(model.decoder, tokens, removed, form, 0, formed) for formed in (False, True))
        exactly = error(plain_forward(model, query, formed, layout))
        patched = error(model(query, patches=factors, positions=layout.positions))
        assert max(exactly, patched) <= 8 * eps, form
        assert exactly <= error(plain_forward(model, query, factors, layout)) <= 1000 * eps, form


@pytest.mark.parametrize("family", FAMILIES)
@torch.no_grad()
def test_bfloat16_gives_the_same_tokens(family: str) -> None:
    """One of 20 may differ where two logits are as good as equal, one step of bfloat16 apart at most."""
    model, positions = deep(family, torch.bfloat16), torch.arange(20, 25)
    tokens, removed = different_tokens(4, 25), torch.arange(25) < 20
    logits, query = model(tokens)[:, 20:], tokens[:, 20:]
    best = logits.argmax(-1)
    for form in ("shear", "bias"):
        patches = exact(model.decoder, tokens, removed, form)
        chosen = model(query, patches=patches, positions=positions).argmax(-1)
        regret = logits.amax(-1) - logits.gather(-1, chosen.unsqueeze(-1)).squeeze(-1)
        assert (regret <= torch.finfo(torch.bfloat16).eps * logits.amax(-1)).all()
        assert (chosen == best).sum() >= 19
    assert (model(query, positions=positions).argmax(-1) == best).sum() <= 2


@pytest.mark.parametrize("size", [0.0, 1e-30], ids=["zero", "whose square is zero"])
@torch.no_grad()
def test_without_hidden_units_a_bias_is_left(size: float) -> None:
    model = build(CASES[0]).float()
    model.decoder.blocks[1].ffn.up.mul_(size)
    tokens = tokens_of(model)
    for form in ("shear", "output"):
        with pytest.raises(ValueError, match="layer 1: the hidden units of the FFN are zero for a token"):
            exact(model.decoder, tokens, 7, form)
    assert distances(model, tokens, prefix(model), exact(model.decoder, tokens, 7, "bias"), 7)["dense"] <= 1e-5


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
    # what a family emits enters this form alone; the others see its routing
    forms = ("shear",) if family == "hypernet" else EXACT_FORMS
    for form in forms:
        with at_most(limit):
            patches = model.deltas(tokens, removed) if form == "shear" else exact(model.decoder, tokens, removed, form)
            model(tokens[:, 4:], patches=patches, positions=torch.arange(4, 64))
        if form == "shear":  # the recorder sees what it should
            with pytest.raises(AssertionError), at_most(limit):
                model.decoder.blocks[0].ffn.dense(replace(patches[0], routing=None).per_token(torch.arange(60)))
