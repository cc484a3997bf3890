"""The shared body: who sees whom, what it refuses, and that every family starts as the transformer."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from types import SimpleNamespace

import pytest
import torch
from torch import Tensor

from cases import BY_NAME, CASES, FAMILIES, Case, batch_of, build, length_of_context, options_of, taking_turns
from zoo.core.decoder import Decoder
from zoo.core.patch import Patch
from zoo.models import MODELS, Model
from zoo.models.base import ContextConfig

pytestmark = pytest.mark.numeric

every_case = pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)


# of two tokens of a context and two after it: positions, and who sees whom, None for plain causal attention
LAYOUTS: dict[tuple[bool, bool], tuple[list[int], list[list[int]] | None]] = {
    (False, True): ([0, 1, 2, 3], None),
    (False, False): ([0, 1, 2, 3], [[1, 0, 0, 0], [1, 1, 0, 0], [0, 0, 1, 0], [0, 0, 1, 1]]),
    (True, True): ([0, 1, 2, 2], [[1, 0, 0, 0], [1, 1, 0, 0], [1, 1, 1, 0], [1, 1, 0, 1]]),
    (True, False): ([0, 1, 2, 2], [[1, 0, 0, 0], [1, 1, 0, 0], [0, 0, 1, 0], [0, 0, 0, 1]]),
}


@pytest.mark.parametrize(("independent", "attend"), LAYOUTS)
def test_layouts(independent: bool, attend: bool) -> None:
    """Independent queries all stand at the position after the context, and are blind to each other."""
    task = {"vocabulary": None, "token_dim": 3, "output_dim": 1, "n_context": 2, "filled": False}
    tokens = SimpleNamespace(**task, independent_queries=independent)
    layout = Decoder(ContextConfig(dim=8, layers=1, heads=2, hidden=8, attend_context=attend), tokens).layout(4, 2)
    mask = None if layout.mask is None else layout.mask.int().tolist()
    assert (layout.positions.tolist(), mask) == LAYOUTS[independent, attend]


@pytest.mark.parametrize("case", [c for c in CASES if c.task == "regression"], ids=lambda case: case.name)
def test_a_query_depends_on_the_context_and_on_no_other_query(case: Case) -> None:
    model = build(case)
    batch = batch_of(model)
    tokens, n = batch.tokens.requires_grad_(), batch.n_context
    output = model(tokens, n)
    for i in range(n, tokens.shape[1]):
        gradient = torch.autograd.grad(output[:, i].sum(), tokens, retain_graph=True)[0].abs().sum(-1)
        assert (gradient[:, i] > 0).all()
        assert (gradient[:, :n] > 0).all() or case.name == "hypernet-constant"
        gradient[:, :n], gradient[:, i] = 0, 0
        assert not gradient.any()


@pytest.mark.parametrize("name", ["transformer-regression", "hypernet-chunk"])
def test_tokens_that_do_not_fit_are_refused_in_the_same_words(name: str) -> None:
    model = build(BY_NAME[name])
    tokens = batch_of(model).tokens
    for wrong, n_context, message in (
        (tokens, -1, "n_context=-1 must lie between 0 and the 12 tokens given"),
        (tokens, 13, "n_context=13 must lie between 0 and the 12 tokens given"),
        (tokens[:, :0], 0, r"tokens of shape \(3, 0.*\): pass \(B,T\), at least one sequence"),
        (tokens[:0], 0, r"tokens of shape \(0, 12.*\): pass \(B,T\), at least one sequence"),
    ):
        calls: list[Callable[..., object]] = [model, lambda x, n: model.deltas(x, 7, n)]
        if model.task.vocabulary:
            calls += [lambda x, n: model.generate(x, 1, n), lambda x, n: model(x, n, cache=model.decoder.new_cache())]
        for call in calls:
            with pytest.raises(ValueError, match=message):
                call(wrong, n_context)


@pytest.mark.parametrize(
    "removed",
    [torch.arange(11) < 7, torch.ones(3, 12) > 0, (torch.arange(12) < 7).long(), torch.arange(12) < 12],
    ids=["too short", "per row", "not boolean", "all removed"],
)
def test_removed_must_be_a_mask_that_keeps_a_token(removed: Tensor) -> None:
    model = build(BY_NAME["transformer-regression"])
    with pytest.raises(ValueError, match="removed must be a boolean mask of 12 tokens that keeps at least one"):
        model.deltas(batch_of(model).tokens, removed)


def test_states_that_no_rank_1_patch_can_move_are_named() -> None:
    model = build(BY_NAME["hypernet-segment-low-rank"])
    tokens = batch_of(model).tokens
    tokens[1, 8] = 0  # a query that sees itself alone and has no state
    with pytest.raises(ValueError, match="layer 0: the state before the FFN"):
        model.deltas(tokens, 7)


def as_transformer(case: Case) -> Case:
    shared = {key: value for key, value in case.options.items() if key in ("kv_heads", "tied")}
    return Case("baseline", "transformer", case.task, shared)


SAME = [c for c in CASES if FAMILIES[c.family].starts_plain]


@pytest.mark.parametrize("case", SAME, ids=lambda case: case.name)
@torch.no_grad()
def test_step_0_is_the_transformer_bit_for_bit(case: Case) -> None:
    model, baseline = (build(c, random=False).float() for c in (case, as_transformer(case)))
    baseline.decoder.attend_context = model.decoder.attend_context  # the same mask
    batch = model.task.batch("test", 0, 3)
    assert torch.equal(model(batch.tokens, batch.n_context), baseline(batch.tokens, batch.n_context))
    sensitive = build(case).float()
    difference = sensitive(batch.tokens, batch.n_context) - baseline(batch.tokens, batch.n_context)
    assert difference.abs().max() > 1e-2


@every_case
def test_builds_on_the_meta_device(case: Case) -> None:
    with torch.device("meta"):
        model = MODELS[case.family](**options_of(case))
    assert {parameter.device.type for parameter in model.parameters()} == {"meta"}
    assert {k: v.shape for k, v in model.state_dict().items()} == {
        k: v.shape for k, v in build(case).state_dict().items()
    }


@taking_turns("case, autocast", CASES, [True, False])
@torch.no_grad()
def test_low_precision_is_near_float32(case: Case, autocast: bool) -> None:
    model = build(case).float()
    batch = model.task.batch("test", 0, 8)
    expected = model(batch.tokens, batch.n_context)
    tokens = batch.tokens
    if not autocast:
        model = model.bfloat16()
        tokens = tokens.bfloat16() if tokens.is_floating_point() else tokens
    with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
        output, patches = model.decoder(tokens, batch.n_context)
    assert output.dtype == torch.bfloat16
    assert 0 < (output.float() - expected).norm() < 0.1 * expected.norm()
    for patch in patches:
        assert patch.routing is None or patch.routing.logits.dtype == torch.float32


@torch.no_grad()
def test_an_added_patch_comes_on_top_of_what_the_family_emits() -> None:
    model = build(BY_NAME["hypernet-chunk"])
    tokens = batch_of(model).tokens
    bias = Patch(biases={"down": torch.ones(1, 16).double()})
    plain, emitted = model.decoder(tokens, 7)
    output, used = model.decoder(tokens, 7, added=[bias, bias])
    assert (output - plain).abs().max() > 1e-2
    assert used[0].biases["down"] is bias.biases["down"]
    assert used[0].weights["up"].u.equal(emitted[0].weights["up"].u)
    torch.testing.assert_close(model.decoder(tokens, 7, patches=used)[0], output)
    for option in ("added", "patches"):
        with pytest.raises(ValueError, match="1 patches for 2 layers"):
            model.decoder(tokens, 7, **{option: [bias]})
    with pytest.raises(ValueError, match="patch of 2 tokens or chunks for a pass of 1"):
        model(tokens[:, :1], patches=model.deltas(tokens, tokens.shape[1] - 2))


def called(model: Model, work: Callable[[], object]) -> Counter[str]:
    """How often the forward hook of each part of the decoder fires."""
    count: Counter[str] = Counter()
    hooks = [
        part.register_forward_hook(lambda *_, name=name: count.update([name]))  # type: ignore[misc]
        for name, part in model.decoder.named_modules()
    ]
    work()
    for hook in hooks:
        hook.remove()
    return count


@every_case
def test_hooks_fire_on_every_part(case: Case) -> None:
    model = build(case)
    tokens, n = batch_of(model).tokens, model.task.n_context
    lists = torch.nn.ModuleList | torch.nn.ModuleDict  # which nothing passes through
    parts = {name for name, part in model.decoder.named_modules() if not isinstance(part, lists)}
    assert set(called(model, lambda: model(tokens, n))) == parts
    twice = called(model, lambda: model.deltas(tokens, length_of_context(model)))  # with the context and without
    assert [twice[f"blocks.{layer}"] for layer in range(2)] == [2, 2]
    model.decoder.activation_checkpointing = True
    once = called(model.train(), lambda: model(tokens, n).sum().backward())  # running anew ends where all is there
    assert [once[f"blocks.{layer}"] for layer in range(2)] == [1, 1]
    if model.task.vocabulary and not model.task.independent_queries:
        steps = called(model, lambda: list(model.generate(tokens[:, : n + 2], 3, n)))
        assert [steps[f"blocks.{layer}"] for layer in range(2)] == [3, 3]


def test_a_hook_changes_what_leaves_a_block_and_the_law_holds_under_it() -> None:
    model = build(CASES[0])
    tokens, removed, n = batch_of(model).tokens, torch.arange(12) < 7, 7
    plain = model(tokens, n)
    model.decoder.blocks[0].register_forward_hook(lambda block, inputs, output: (output[0] + 1, output[1]))
    steered = model(tokens, n)[:, n:]
    assert (steered - plain[:, n:]).abs().max() > 1e-2
    patched = model(tokens[:, n:], patches=model.deltas(tokens, removed), positions=torch.full((5,), n))
    torch.testing.assert_close(patched, steered, rtol=0, atol=1e-10)
