"""One token at a time equals the full forward pass, for every family, at the cost of one token.

Axes: B sequences, V vocabulary.
"""

from __future__ import annotations

import copy
import functools
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from torch import Tensor

import cases
from cases import AUTOREGRESSIVE, Case, build, taking_turns
from zoo.core.cache import LayerCache
from zoo.core.context import ContextToDelta
from zoo.core.delta import Full, InputShift, LowRank
from zoo.core.layers import FeedForward
from zoo.core.patch import Patch
from zoo.core.sampling import choose
from zoo.models import Model
from zoo.models.decoding import FORM_AFTER, JOIN_FOR, Joined
from zoo.models.hypernet import Generator
from zoo.tasks import TASKS, Batch, Task
from zoo.tasks.base import TaskConfig
from zoo.tasks.text.corpus import START

pytestmark = pytest.mark.numeric

EXACT, MISS = 1e-10, 1e-2
LENGTH = 22


@dataclass(frozen=True)
class RecallConfig(TaskConfig):
    name: str = "recall"


class Recall(Task):
    """Token ids with a separate context and queries in sequence."""

    Config = RecallConfig
    main_metric = "nats"
    vocabulary = output_dim = START + 1
    n_context, tokens = 6, 14

    def batch(self, split: str, k: int, size: int) -> Batch:
        ids = torch.randint(START, (size, self.tokens + 1), generator=self.generator(split, k))
        return Batch(ids[:, :-1], ids[:, 1 + self.n_context :], self.n_context)

    def token_losses(self, output: Tensor, batch: Batch) -> Tensor:
        raise NotImplementedError

    baselines = evaluate = token_losses  # type: ignore[assignment]

    def encode(self, text: str) -> list[int]:
        return [START, *text.encode()]

    def encode_context(self, text: str) -> list[int]:
        return list(text.encode())

    def decode(self, ids: Iterable[int]) -> bytes:
        return bytes(i for i in ids if i != START)


@pytest.fixture(autouse=True)
def recall(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(TASKS, "recall", Recall)
    monkeypatch.setitem(cases.TASK_OPTIONS, "recall", {})


WITH_CONTEXT = [
    Case("transformer", "transformer", "recall", {}),
    Case("transformer-gqa", "transformer", "recall", {"kv_heads": 1}),
    Case("segment", "hypernet", "recall", {}),
    Case("segment-attend", "hypernet", "recall", {"attend_context": True}),
    Case("segment-full-gqa", "hypernet", "recall", {"emission": "full", "kv_heads": 1}),
    Case(
        "segment-scale-attend-tied", "hypernet", "recall", {"emission": "scale", "attend_context": True, "tied": True}
    ),
    Case("segment-down", "hypernet", "recall", {"matrices": ["down"], "rank": 2}),
    Case("segment-constant", "hypernet", "recall", {"code": "constant", "attend_context": True}),
    Case("moe", "moe", "recall", {}),
    Case("moe-context", "moe", "recall", {"route_on": "context"}),
    Case("moe-context-reference", "moe", "recall", {"route_on": "context", "backend": "reference", "shared": 1}),
]
MORE = [
    Case("chunk-full", "hypernet", "noise", {"chunk": 5, "emission": "full"}),
    Case("chunk-constant", "hypernet", "noise", {"chunk": 4, "code": "constant"}),
    Case("chunk-one", "hypernet", "noise", {"chunk": 1}),
    Case("token-scale", "hypernet", "noise", {"context": "token", "emission": "scale"}),
    Case("moe-chunk-linear", "moe", "noise", {"route_on": "context", "chunk": 5, "score": "linear", "shared": 1}),
]
NAMED = {case.family for case in WITH_CONTEXT}
OTHERS = [case._replace(task="recall") for case in cases.CASES if case.task == "prompts" and case.family not in NAMED]
ALL = AUTOREGRESSIVE + MORE + WITH_CONTEXT + OTHERS
BY_NAME = {case.name: case for case in ALL}
every_case = pytest.mark.parametrize("case", ALL, ids=lambda case: f"{case.task}-{case.name}")


@functools.cache
def shared(name: str) -> Model:
    """build() of the case `name`, made once: for tests that leave it as it is."""
    return build(BY_NAME[name]).requires_grad_(False)


def ids(model: Model, length: int = LENGTH) -> Tensor:
    return torch.randint(model.task.vocabulary or 0, (3, length), generator=torch.Generator().manual_seed(5))


@torch.no_grad()
def full_logits(model: Model, tokens: Tensor, prompt: int, n_context: int) -> Tensor:
    """The last logits of a forward pass over everything, for each length from `prompt` on: (B,steps,V)."""
    return torch.stack([model(tokens[:, :t], n_context)[:, -1] for t in range(prompt, tokens.shape[1] + 1)], 1)


@torch.no_grad()
def cached_logits(model: Model, tokens: Tensor, prompt: int, n_context: int, room: int = 1) -> Tensor:
    """The same from one token at a time."""
    cache = model.decoder.new_cache(room)
    logits = [model.decoder(tokens[:, :prompt], n_context, cache=cache)[0][:, -1]]
    logits += [model.decoder(tokens[:, t : t + 1], cache=cache)[0][:, 0] for t in range(prompt, tokens.shape[1])]
    return torch.stack(logits, 1)


def error(model: Model, prompt: int, n_context: int, length: int = LENGTH) -> float:
    arguments = model, ids(model, length), prompt, n_context
    return (cached_logits(*arguments) - full_logits(*arguments)).abs().max().item()


@every_case
def test_cached_logits_equal_those_of_the_full_forward(case: Case) -> None:
    model = shared(case.name)
    tokens, n = ids(model), model.task.n_context
    full = full_logits(model, tokens, n + 1, n)
    for after in (1, 3, 4, 7):  # before, at and after the border of a chunk; the first one over all borders
        end = LENGTH if after == 1 else n + after + 6
        cached = cached_logits(model, tokens[:, :end], n + after, n)
        assert (cached - full[:, after - 1 : end - n]).abs().max() <= EXACT, after


@every_case
@pytest.mark.parametrize("rows", [1, 3])
def test_joined_matrices_give_the_same(case: Case, rows: int) -> None:
    model = shared(case.name)
    tokens, n = ids(model)[:rows], model.task.n_context
    full = full_logits(model, tokens, n + 3, n)
    cached = cached_logits(model, tokens, n + 3, n, JOIN_FOR)
    assert (cached - full).abs().max() <= EXACT


@pytest.mark.parametrize("case", WITH_CONTEXT, ids=lambda case: case.name)
@pytest.mark.parametrize("n_context", [0, 2, 11])
def test_contexts_of_any_length(case: Case, n_context: int) -> None:
    assert error(shared(case.name), n_context + 2, n_context, n_context + 8) <= EXACT


@taking_turns("case, dtype, temperature", ALL, [torch.float64, torch.float32], [1.0, 0.0])
@torch.no_grad()
def test_tokens_are_those_of_a_loop_over_full_forwards(case: Case, dtype: torch.dtype, temperature: float) -> None:
    model = build(case).to(dtype)
    n_context = model.task.n_context
    prompt = ids(model, n_context + 3)
    expected, generators = prompt, [torch.Generator().manual_seed(7) for _ in range(2)]
    count = 16 if temperature else 6  # 16: over three borders of chunks of 4 or 5
    for _ in range(count):
        logits = model(expected, n_context)[:, -1]
        expected = torch.cat([expected, choose(logits, temperature, None, generators[0])[:, None]], 1)
    found = torch.stack([*model.generate(prompt, count, n_context, temperature, None, generators[1])], 1)
    assert torch.equal(found, expected[:, prompt.shape[1] :])
    assert len(found.unique()) > 3 or not temperature


@torch.no_grad()
def test_joined_matrices_leave_patches_of_others_to_the_modules() -> None:
    """Total patches of one's own, of every kind, and a token that stands elsewhere."""
    model = shared("transformer")
    tokens, n = ids(model)[:1], model.task.n_context
    F_, D = model.config.hidden, model.config.dim
    u, v, gate = torch.randn(1, F_, 2).double(), torch.randn(1, D, 2).double(), torch.randn(1, 1, 2).double()
    shift = InputShift(torch.randn(1, D).double(), torch.randn(1, D).double())
    kinds = [
        Patch(weights={"up": LowRank(u, v)}),
        Patch(weights={"up": LowRank(u, v, gate)}),
        Patch(weights={"gate": LowRank(u, v), "down": Full(torch.randn(1, D, F_).double())}),
        Patch(input=shift, biases={"down": torch.randn(1, D).double()}),
    ]
    for patch in kinds:
        given = {"patches": [patch] * len(model.decoder.blocks)}
        found = []
        for room in (1, JOIN_FOR):
            cache = model.decoder.new_cache(room)
            steps = [model.decoder(tokens[:, : n + 2], n, cache=cache)]
            for t in range(n + 2, n + 8):
                at = {"positions": torch.tensor([t + 30])} if t == n + 7 else {}
                steps.append(model.decoder(tokens[:, t : t + 1], cache=cache, **given, **at))
            found.append(torch.cat([out[:, -1:] for out, _ in steps], 1))
        torch.testing.assert_close(*found, rtol=0, atol=EXACT)


@torch.no_grad()
def test_generations_of_joined_matrices_are_those_of_a_loop() -> None:
    """Past the first table of positions, and past the room taken at once."""
    for name, rows in (("transformer", 2), ("hypernet-chunk", 1), ("moe", 1)):
        model = build(BY_NAME[name])
        n = model.task.n_context
        prompt = ids(model, n + 250)[:rows]
        found = torch.stack([*model.generate(prompt, JOIN_FOR, n)], 1)
        for t in range(JOIN_FOR):
            logits = model(torch.cat([prompt, found[:, :t]], 1), n)[:, -1]
            assert torch.equal(logits.argmax(-1), found[:, t])


@torch.no_grad()
@pytest.mark.parametrize("part", ["norm1", "attention", "norm2", "ffn", "attention.q"])
def test_parts_that_somebody_looks_into_or_replaced_run_themselves(part: str) -> None:
    model, other = build(BY_NAME["transformer"]), build(BY_NAME["transformer"])
    tokens, n = ids(model)[:1], model.task.n_context
    plain = cached_logits(model, tokens, n + 3, n, JOIN_FOR)
    model.decoder.blocks[1].get_submodule(part).register_forward_hook(lambda module, args, output: -3 * output)
    module = other.decoder.blocks[1].get_submodule(part)
    module.__class__ = type(
        "Mine", (type(module),), {"forward": lambda self, *args: -3 * type(self).__base__.forward(self, *args)}
    )
    for changed in (model, other):
        found = cached_logits(changed, tokens, n + 3, n, JOIN_FOR)
        assert (found - full_logits(changed, tokens, n + 3, n)).abs().max() <= EXACT
        assert (found - plain).abs().max() > MISS


@pytest.mark.parametrize("room", [1, JOIN_FOR])
def test_a_cache_may_be_copied_and_used_with_gradients_or_in_inference_mode(room: int) -> None:
    model = build(BY_NAME["hypernet-chunk"])
    tokens = ids(model, 14)[:1]

    def step(cache: list[LayerCache], t: int) -> Tensor:
        return model.decoder(tokens[:, t : t + 1], cache=cache)[0][:, 0]

    full = model(tokens)[0]
    with torch.no_grad():
        cache = model.decoder.new_cache(room)
        model.decoder(tokens[:, :9], cache=cache)
        other = copy.deepcopy(cache)
        tokens[:, 9] = (tokens[:, 9] + 1) % 5
        step(other, 9)
        tokens[:, 9] = ids(model, 14)[:1, 9]
        step(cache, 9)
    assert other[0].joined is cache[0].joined
    loss = step(cache, 10).square().sum()
    with torch.no_grad():
        step(cache, 11)
    (gradient,) = torch.autograd.grad(loss, [model.decoder.blocks[0].ffn.gate])
    assert gradient.any()
    with torch.inference_mode():
        step(cache, 12)
    with torch.no_grad():
        assert (step(cache, 13)[0] - full[13]).abs().max() <= EXACT


@pytest.mark.parametrize("name", ["transformer", "hypernet-chunk", "moe-chunk-linear"])
def test_gradients_pass_through_a_cache(name: str) -> None:
    model = build(BY_NAME[name])
    tokens, n = ids(model, 12), model.task.n_context
    parameters = [p for p in model.parameters() if p.requires_grad]
    cache = model.decoder.new_cache(JOIN_FOR)
    logits = [model.decoder(tokens[:, :9], n, cache=cache)[0][:, -1]]
    logits += [model.decoder(tokens[:, t : t + 1], cache=cache)[0][:, 0] for t in range(9, 12)]
    found = torch.autograd.grad(torch.stack(logits).square().sum(), parameters, allow_unused=True)
    expected = torch.autograd.grad(model(tokens, n)[:, 8:].square().sum(), parameters, allow_unused=True)
    torch.testing.assert_close(found, expected, rtol=1e-9, atol=1e-9)


# what must be seen to fail


@pytest.mark.parametrize("name", ["hypernet-chunk", "hypernet-chunk-scale-tied", "chunk-full"])
def test_a_patch_that_stays_past_its_chunk_is_seen(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    original = ContextToDelta.forward

    def stale(self: Any, z: Tensor, layer: int, n_context: int, cache: LayerCache | None, *_: Any) -> Patch:
        return (cache and cache.patch) or original(self, z, layer, n_context, cache)

    monkeypatch.setattr(ContextToDelta, "forward", stale)
    assert error(build(BY_NAME[name]), 6, 0) > MISS


@pytest.mark.parametrize("name", ["hypernet-chunk", "hypernet-chunk-scale-tied", "chunk-full"])
def test_matrices_formed_from_another_context_are_seen(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    model, tokens = build(BY_NAME[name]), ids(build(BY_NAME[name]))[:1]
    n = model.task.n_context
    full = full_logits(model, tokens, n + 3, n)

    def forming_once(self: Joined, patch: Patch) -> bool:
        """The matrices of the first update serve all later ones."""
        self.uses += 1
        if self.uses == FORM_AFTER:
            self.formed = self._join(patch)
        return self.uses >= FORM_AFTER

    monkeypatch.setattr(Joined, "_serves_long", forming_once)
    assert (cached_logits(model, tokens, n + 3, n, JOIN_FOR) - full).abs().max() > MISS


@pytest.mark.parametrize("name", ["hypernet-chunk", "hypernet-running", "moe-context-chunk", "segment", "moe-context"])
def test_a_forgotten_context_is_seen(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    model = build(BY_NAME[name])
    original = type(model.decoder.context_to_delta).forward

    def forgetful(self: Any, z: Tensor, layer: int, n_context: int, *_: Any) -> Any:
        return original(self, z, layer, n_context)

    monkeypatch.setattr(type(model.decoder.context_to_delta), "forward", forgetful)
    assert error(model, model.task.n_context + 6, model.task.n_context) > MISS


@pytest.mark.parametrize("name", ["segment", "segment-full-gqa", "segment-down"])
def test_keys_of_a_context_that_nobody_attends_to_are_seen(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    original = LayerCache.extend
    monkeypatch.setattr(LayerCache, "extend", lambda self, k, v, mask: original(self, k, v, None))
    assert error(build(BY_NAME[name]), 9, 6) > MISS


# what it costs


@torch.no_grad()
def kept(case: Case, steps: int) -> list[LayerCache]:
    model = shared(case.name)
    cache, tokens, n = model.decoder.new_cache(), ids(model), model.task.n_context
    model.decoder(tokens[:, : n + 2], n, cache=cache)
    for t in range(n + 2, n + 2 + steps):
        model.decoder(tokens[:, t : t + 1], cache=cache)
    return cache


@every_case
def test_what_is_kept(case: Case) -> None:
    model = shared(case.name)
    for cache in kept(case, 5):
        n = model.task.n_context
        heads, width = model.config.kv_heads, 16 // 2
        assert cache.tokens == n + 7
        attended = cache.tokens if model.decoder.attend_context else 7
        assert cache.seen == attended
        assert attended <= cache.attended.shape[3] <= 7 + 2 * 16
        assert cache.attended.shape == (2, 3, heads, cache.attended.shape[3], width)
        kept_sums = [value for value in (cache.total, cache.memory) if torch.is_tensor(value)]
        assert all(value.shape in ((3, 1, 16), (3, 1, 1)) for value in kept_sums)


GENERATED = {  # calls per layer for a prompt of 6 tokens and 14 more
    "hypernet-chunk": 1 + 3,  # borders at 8, 12, 16
    "chunk-full": 1 + 2,  # at 10, 15
    "hypernet-running": 15,
    "hypernet-token": 15,
}


@pytest.mark.parametrize("name", [*GENERATED, "segment", "segment-attend", "transformer", "moe-context-chunk"])
def test_each_step_runs_its_own_token_and_each_context_generates_once(
    name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    model, calls, shapes = build(BY_NAME[name]), [], []
    for cls, record in ((Generator, lambda x: calls.append(x)), (FeedForward, lambda x: shapes.append(x.shape[1]))):
        original = cls.forward

        def spy(self: Any, x: Any, *rest: Any, original: Any = original, record: Any = record) -> Any:
            record(x)
            return original(self, x, *rest)

        monkeypatch.setattr(cls, "forward", spy)
    n = model.task.n_context
    assert len([*model.generate(ids(model, n + 6), 15, n)]) == 15
    assert shapes == [n + 6] * 2 + [1] * 2 * 14
    expected = GENERATED.get(name, 1) if model.config.name == "hypernet" else 0
    assert len(calls) == 2 * expected


def test_calls_that_do_not_fit_the_cache_are_refused() -> None:
    tokens, decoder = torch.zeros(2, 5, dtype=torch.long), build(BY_NAME["segment"]).decoder
    cache = decoder.new_cache()
    with pytest.raises(ValueError, match="all 5 tokens are context"):
        decoder(tokens, 5, cache=cache)
    decoder(tokens, 3, cache=cache)
    for following, n_context in ((tokens, 0), (tokens[:, :1], 1)):
        with pytest.raises(ValueError, match=f"n_context={n_context} after 5 others: pass the next token alone"):
            decoder(following, n_context, cache=cache)
    independent = build(cases.CASES[0])
    with pytest.raises(ValueError, match="the queries of this task are independent"):
        independent.decoder(cases.batch_of(independent).tokens, 7, cache=independent.decoder.new_cache())
