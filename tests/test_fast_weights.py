"""Fast weights are what the rules say token by token, and generation keeps no more than one chunk and one matrix."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from cases import Case, build, shared
from test_leaks import gradients
from zoo.core.delta import Full, LowRank
from zoo.core.patch import Patch
from zoo.models.fast_weights import FastWeightsDelta

pytestmark = pytest.mark.numeric

RULES = ("delta", "sum")


def fast_weights(task: str, **options: Any) -> Any:
    return build(Case("", "fast_weights", task, options))


def token_by_token(memory: Any, z_TD: Tensor, rule: str) -> Tensor:
    """ΔW (o,i) by the recurrence itself, as it stands in the papers."""
    M_oi = torch.zeros(memory.shape, dtype=z_TD.dtype)
    for z_D in z_TD:
        k_i = memory.key.weight @ z_D
        k_i = k_i / k_i.norm()
        *values, rate = (memory.value.weight @ z_D).unbind()
        v_o = torch.stack(values) * memory.scale
        known_o = M_oi @ k_i if rule == "delta" else 0.0
        M_oi = M_oi + rate.sigmoid() * torch.outer(v_o - known_o, k_i)
    return M_oi


@pytest.mark.parametrize("rule", RULES)
@pytest.mark.parametrize("task", ["regression", "noise"])
@torch.no_grad()
def test_one_system_is_the_rule_token_by_token(task: str, rule: str) -> None:
    model = fast_weights(task, rule=rule, **({"chunk": 4} if task == "noise" else {}))
    family, n = model.decoder.context_to_delta, model.task.n_context
    z_BTD = torch.randn(2, 12, 16).double()
    patch = family(z_BTD, 1, n)
    other = "sum" if rule == "delta" else "delta"
    for name, memory in family.memories[1].items():
        W, delta = model.decoder.blocks[1].ffn.weight(name), patch.weights[name]
        assert isinstance(delta, LowRank if n else Full)
        dense = delta.dense(W)
        for row, z_TD in enumerate(z_BTD):
            read = [z_TD[:n]] if n else [z_TD[:0], z_TD[:4], z_TD[:8]]  # by the chunks of 4, those before them
            found = dense[row][None] if n else dense[row]
            expected, wrong = (torch.stack([token_by_token(memory, z, r) for z in read]) for r in (rule, other))
            torch.testing.assert_close(found, expected, rtol=1e-10, atol=1e-12)
            assert (found - wrong).abs().max() > 1e-3


@torch.no_grad()
def test_a_value_that_the_delta_rule_writes_at_full_rate_is_read_back() -> None:
    """However many were written before; of the sum rule's it is one part."""
    found = {}
    for rule in RULES:
        memory = fast_weights("regression", rule=rule).decoder.context_to_delta.memories[0]["up"]
        memory.value.weight[-1] = 0
        z_nD = torch.randn(30, 16).double()
        memory.value.weight[-1] = 60 * torch.linalg.lstsq(z_nD[-1:], torch.ones(1, 1).double()).solution[:, 0]
        u_no, k_ni = (t[0] for t in memory(z_nD[None]))
        v_o = memory.value.weight[:-1] @ z_nD[-1] * memory.scale
        found[rule] = float((u_no.mT @ k_ni @ k_ni[-1] - v_o).norm() / v_o.norm())
    assert found["delta"] < 1e-10 < 1e-1 < found["sum"]


@torch.no_grad()
def test_a_state_of_zero_writes_nothing() -> None:
    """So do places without a token."""
    family = shared("fast-weights-prompts").decoder.context_to_delta
    z_BTD, real_BT = torch.randn(2, 12, 16).double(), torch.ones(2, 12, dtype=torch.bool)
    real_BT[:, :3] = False
    padded, cut = family(z_BTD, 0, 7, real=real_BT), family(z_BTD[:, 3:], 0, 4)
    seen = family(z_BTD, 0, 7)
    for name in padded.weights:
        W = shared("fast-weights-prompts").decoder.blocks[0].ffn.weight(name)
        torch.testing.assert_close(padded.weights[name].dense(W), cut.weights[name].dense(W), rtol=0, atol=1e-12)
        assert (padded.weights[name].dense(W) - seen.weights[name].dense(W)).abs().max() > 1e-2


@torch.no_grad()
def test_a_cache_does_not_grow_with_what_is_written() -> None:
    """One matrix each, as large as W, and the states of the chunk that is not complete; of a context ΔW alone."""
    model = shared("fast-weights-chunk")
    sizes = []
    cache = model.decoder.new_cache(64)
    model.decoder(torch.zeros(3, 2, dtype=torch.long), cache=cache)
    for _ in range(40):
        model.decoder(torch.randint(8, (3, 1)), cache=cache)
        kept = cache[0]
        pending = sum(t.shape[1] for t in kept.pending)
        assert pending == (kept.tokens - 1) % 4 + 1
        shapes = {name: tuple(M.shape) for name, M in kept.memory.items()}
        assert shapes == {"gate": (3, 24, 16), "up": (3, 24, 16), "down": (3, 16, 24)}
        assert kept.patch is not None
        sizes.append(sum(delta.matrix.untyped_storage().nbytes() for delta in kept.patch.weights.values()))
    assert len(set(sizes[4:])) == 1


def test_reading_what_ones_own_chunk_wrote_is_seen(monkeypatch: pytest.MonkeyPatch) -> None:
    """The leak of this family: in a chunk, earlier tokens would see later ones."""
    forward = FastWeightsDelta.forward

    def early(self: Any, *args: Any, **options: Any) -> Patch:
        patch = forward(self, *args, **options)
        return replace(patch, weights={name: Full(delta.matrix.roll(-1, 1)) for name, delta in patch.weights.items()})

    monkeypatch.setattr(FastWeightsDelta, "forward", early)
    assert gradients(build(Case("", "fast_weights", "noise", {"chunk": 4}))).triu(1).any()


@torch.no_grad()
def test_keys_have_length_one_and_scales_do_not_depend_on_the_state() -> None:
    memory = shared("fast-weights-segment").decoder.context_to_delta.memories[0]["gate"]
    z_BnD = torch.randn(2, 5, 16).double()
    for scale in (1.0, 1e3):
        _, k_Bni = memory(z_BnD * scale)
        torch.testing.assert_close(k_Bni.norm(dim=-1), torch.ones(2, 5).double())
    assert torch.equal(F.normalize(memory.key(z_BnD), dim=-1), memory(z_BnD)[1])
