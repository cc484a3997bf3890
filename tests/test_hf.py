"""The law on foreign models, architecture by architecture: plain weights in a plain forward pass, and what users do."""

from __future__ import annotations

import sys
from pathlib import Path
from threading import Thread
from typing import Any
from unittest.mock import Mock

import pytest
import torch

pytest.importorskip("transformers")

import hf_families as hf
from hf_families import FAMILIES, POST_NORM, REFUSED, Kept64, build, family, ids, relative
from zoo.core.delta import LowRank
from zoo.core.patch import Patch
from zoo.hf import network, wrap
from zoo.hf.reading import Reading
from zoo.lens import routing, static, structure
from zoo.lens.exact import EXACT_FORMS, exact
from zoo.lens.patch_file import load_patch, save_patch

KINDS = ["Llama, tied, biases", "Gemma 3", "GPT-J", "Granite", "GPT-2", "Phi3", "Mixtral", "Qwen2-MoE", "GPT-OSS"]
KINDS += ["LFM2"]
"""Plain, behind a norm, parallel, scaled, Conv1D, fused gate and up, experts, shared ones, transposed ones, hybrid."""
pytestmark = pytest.mark.filterwarnings("ignore")


def check(name: str, queries: int) -> None:
    found = hf.residuals(name, queries)
    inner = name in POST_NORM or "MoE" in name or name in ("DeepSeek-V2", "DeepSeek-V3", "dots1")
    assert found.kept <= 1e-12
    assert found.as_it_is <= (2e-6 if inner else 1e-12)
    assert found.float32 <= (2e-5 if name in POST_NORM else 5e-6)
    assert found.control > 0.05
    assert found.top1 + found.flips >= (0.95 if queries == 100 else 0.9) * queries


@pytest.mark.parametrize("name", KINDS)
@pytest.mark.numeric
def test_a_plain_model_that_holds_the_patched_weights_answers_as_with_the_context(name: str) -> None:
    check(name, 10)


@pytest.mark.full
@pytest.mark.parametrize("name", FAMILIES)
def test_every_family(name: str) -> None:
    check(name, 100)


@pytest.mark.parametrize("name", KINDS)
@torch.no_grad()
def test_gaps_padding_and_unequal_prompts(name: str) -> None:
    model = wrap(family(name))
    before = hf.module_state(model.model)
    tokens = ids(rows=2)
    with Kept64():
        full = model(tokens)
        null = relative(model(tokens, patches=model.deltas(tokens, 0)), full)
        assert null <= 1e-12 if name in POST_NORM else null == 0
        kept = torch.tensor([0, 1, 2, 9, 10, 11, 20, 23])
        removed = torch.ones(24, dtype=torch.bool).index_fill(0, kept, False)
        patches = model.deltas(tokens, removed)
        goal = full[:, kept]
        assert relative(model(tokens[:, kept], patches=patches, positions=kept), goal) <= 1e-12
        assert relative(model(tokens[:, kept], positions=kept), goal) > 0.03
        other = model.deltas(tokens.flip(0), removed)
        assert relative(model(tokens[:, kept], patches=other, positions=kept), goal) > 0.03

        for side in ("left", "right"):  # a prompt of 24 tokens and one of 20, the last token of each kept
            mask = torch.ones_like(tokens)
            mask[1, slice(0, 4) if side == "left" else slice(20, 24)] = 0
            last = torch.tensor([[23], [23 if side == "left" else 19]])
            removed = torch.ones(2, 24, dtype=torch.bool).scatter(1, last, False)
            query, positions = tokens.gather(1, last), torch.tensor([[23], [19]])
            goal = model(tokens, attention_mask=mask)[torch.arange(2)[:, None], last]
            patches = model.deltas(tokens, removed, attention_mask=mask)
            assert relative(model(query, patches=patches, positions=positions), goal) <= 1e-12
            alone = model(tokens[1:, 4:] if side == "left" else tokens[1:, :20])[:, -1]
            assert relative(goal[1], alone) <= 1e-12
    assert hf.module_state(model.model) == before


@torch.no_grad()
@pytest.mark.parametrize("name", ["Mistral", "GPT-2", "Mixtral"])
def test_tokens_from_a_cache_of_what_was_kept(name: str) -> None:
    from transformers import DynamicCache

    model = wrap(family(name))
    tokens, kept = ids(), torch.tensor([0, 1, 9, 22, 23])
    removed = torch.ones(24, dtype=torch.bool).index_fill(0, kept, False)
    cache = DynamicCache(config=model.model.config)
    new, positions = tokens[:, kept], kept
    for _ in range(16):
        patches = model.deltas(tokens, removed)
        last = torch.arange(len(kept) - new.shape[1], len(kept))
        logits = model(new, patches=[p.per_token(last) for p in patches], positions=positions, past_key_values=cache)
        goal = model(tokens)
        assert relative(logits[:, -1], goal[:, -1]) <= 1e-12
        new = logits[:, -1:].argmax(-1)
        tokens, removed = torch.cat([tokens, new], 1), torch.cat([removed, torch.tensor([False])])
        kept, positions = torch.cat([kept, kept[-1:] + 1]), kept[-1:] + 1
    assert cache.get_seq_length() == 5 + 15


@pytest.mark.parametrize("error", [RuntimeError, KeyboardInterrupt])
def test_nothing_outlives_a_call_that_fails(error: type[BaseException], monkeypatch: pytest.MonkeyPatch) -> None:
    model = wrap(family("Gemma 3"))
    before, tokens = hf.module_state(model.model), ids()
    patches = model.deltas(tokens, 23)
    merged = model.patched(patches)

    def broken(*args: Any) -> None:
        raise error

    norm = model.decoder.layers[1].mlp.down_proj
    for call in (
        lambda: model.deltas(tokens, 23),
        lambda: model(tokens[:, 23:], patches=patches),
        lambda: merged.__enter__()(input_ids=tokens),
    ):
        with pytest.raises(error), norm.register_forward_pre_hook(broken):
            call()
    merged.__exit__(None, None, None)
    assert hf.module_state(model.model) == before


@pytest.mark.parametrize("name", REFUSED)
def test_what_is_not_understood_is_named(name: str) -> None:
    kind, options, words = REFUSED[name]
    with pytest.raises(ValueError, match=words):
        wrap(build(kind, options))


def test_refusals_of_the_state_of_a_model() -> None:
    with pytest.raises(ValueError, match=r"training mode.*eval\(\)"):
        wrap(family("Llama").train())
    model = family("Llama")
    model.hf_quantizer = object()
    with pytest.raises(ValueError, match="quantised"):
        wrap(model)

    model = family("Llama")
    plain = model.model.layers[1].forward
    states: list[Any] = []

    def leaking(x: Any, *args: Any, **named: Any) -> Any:  # a second way for the context
        states.append(x[:, :1] if x.shape[1] > 1 else states[-1])
        return plain(x, *args, **named) + (x.shape[1] > 1) * x.tanh().mean(1, keepdim=True) * x.shape[1] ** 2

    model.model.layers[1].forward = leaking
    wrap(model)  # what depends on the context is made up for: the layer is a black box
    model.model.layers[1].forward = lambda x, *a, **n: plain(x, *a, **n) * torch.rand(())
    with pytest.raises(ValueError, match="layer 1"):
        wrap(model)


@pytest.mark.parametrize("name", ["Llama, tied, biases", "OLMo 2", "GPT-J", "Qwen2-MoE", "GPT-OSS"])
@torch.no_grad()
def test_the_lens_reads_it_as_our_own(name: str, tmp_path: Path) -> None:
    model, tokens, positions = wrap(family(name)), ids(rows=2, tokens=12), torch.arange(10, 12)
    with Kept64():
        goal, query = model(tokens)[:, 10:], tokens[:, 10:]
        for form in EXACT_FORMS:
            for formed in (False, True):
                if formed and form == "shear" and "experts" in model.decoder.blocks[0].ffn.output_matrix:
                    continue  # matrices of several tokens do not go into a router
                patches = exact(model.decoder, tokens, 10, form, formed=formed)
                assert relative(model(query, patches=patches, positions=positions), goal) <= 1e-12, (form, formed)

        patches = model.deltas(tokens, 10)
        save_patch(tmp_path / "p.safetensors", patches, model)
        loaded = load_patch(tmp_path / "p.safetensors", model)
        assert torch.equal(model(query, patches=loaded), model(query, patches=patches))
        with pytest.raises(ValueError, match="another model"):
            load_patch(tmp_path / "p.safetensors", wrap(family("Phi")))

        norms = structure.relative_norms(model, tokens, 10)
        last = model.decoder.blocks[0].ffn.matrices.index(model.decoder.blocks[0].ffn.output_matrix)
        assert (norms[:, last] > 0.01).all()  # what reads a parallel block's input reads nothing of the context
        update = next(iter(structure.updates(model, tokens, 10)))
        for matrix in (*model.decoder.blocks[0].ffn.input_matrices, model.decoder.blocks[0].ffn.output_matrix):
            singular = torch.linalg.svdvals(update[matrix])
            assert (singular[..., 1:] <= 1e-12).all()

        tokens[:, :10] = tokens[:1, :10]
        goal = model(tokens)[:, 10:]
        for form in ("output",) if name == "GPT-OSS" else ("matrix", "output"):
            fitted = static.fit(model.decoder, tokens, 10, form, 0.0)
            answer = model(query, added=fitted, positions=positions)
            alone = model(query, positions=positions)
            assert relative(answer, goal) <= (0.5 * relative(alone, goal) if name == "OLMo 2" else 1e-12)


@torch.no_grad()
def test_experts_are_those_that_the_context_chose() -> None:
    model, tokens = wrap(family("Mixtral")), ids(rows=8)
    with_context = model.decoder(tokens)[1]
    for patch, used in zip(model.deltas(tokens, 20), with_context, strict=True):
        assert torch.equal(routing.expert_sets(patch).squeeze(2), routing.expert_sets(used)[:, 20:])
    reduced, sheared = routing.switched(model, tokens, 20)  # type: ignore[arg-type]
    assert (reduced > 0.1).all()
    assert not sheared.any()
    mixed = Reading(family("DeepSeek-V3", torch.float32)).about([*range(64)], "")  # its first layer has no experts
    assert routing.routed_layers(mixed) == [1, 2]  # type: ignore[arg-type]
    assert len(routing.usage(mixed, [mixed.task.batch("test", 0, 4)]).load()) == 2  # type: ignore[arg-type]
    norms = structure.relative_norms(mixed, tokens[:1], 20)
    assert structure.names(mixed)[2] == "down_proj"
    assert norms[:, 2].isnan().any(-1).flatten().tolist() == [False, True, True]


def test_the_sink_of_a_trained_model_is_said(capsys: pytest.CaptureFixture[str]) -> None:
    model, kept = wrap(family("Llama", torch.float32)), torch.arange(24) % 23 > 0
    model.deltas(ids(), 23)
    model.model.config.name_or_path = "a folder"
    model.deltas(ids(), kept)
    assert not capsys.readouterr().err
    for _ in range(2):
        model.deltas(ids(), 23)
    assert capsys.readouterr().err.count("a folder: the first token, where trained models rest") == 1


@pytest.mark.parametrize(("dtype", "bar"), [(torch.bfloat16, 0.02), (torch.float16, 0.003)])
@pytest.mark.parametrize("name", ["Llama", "Gemma 3", "GPT-2", "Mixtral"])
@torch.no_grad()
def test_low_precision_keeps_patches_in_float32(name: str, dtype: torch.dtype, bar: float) -> None:
    model, same = wrap(family(name, dtype)), 0
    for seed in range(20):
        tokens = ids(seed=100 + seed)
        goal, patches = model(tokens)[:, -1:], model.deltas(tokens, 23)
        assert patches[0].input.a.dtype == torch.float32  # type: ignore[union-attr]
        found = model(tokens[:, -1:], patches=patches, positions=torch.tensor([23]))
        formed = hf.plain(model, patches, tokens[:, -1:], 23)
        assert found.dtype == formed.dtype == dtype
        assert relative(found, goal) <= bar
        assert relative(formed, goal) <= 0.3
        same += int(formed.argmax() == goal.argmax())
        assert relative(model(tokens[:, -1:], positions=torch.tensor([23])), goal) > 0.05
    assert same >= 18


@torch.no_grad()
def test_the_model_itself_generates_under_patches() -> None:
    model, tokens = wrap(family("Llama", torch.float32)), ids(1, 6)
    update = [Patch(weights={"down_proj": LowRank(torch.randn(1, 32, 2) / 4, torch.randn(1, 48, 2) / 4)})] * 3
    options = {"max_new_tokens": 8, "do_sample": False, "attention_mask": torch.ones_like(tokens)}
    alone = model.model.generate(tokens, **options)
    for merged in (True, False):
        expected = tokens
        for _ in range(8):
            expected = torch.cat([expected, model(expected, patches=update)[:, -1:].argmax(-1)], 1)
        with model.patched(update, merged) as plain:
            found = plain.generate(tokens, **options)
        assert torch.equal(found, expected[:, : found.shape[1]])
        assert not torch.equal(found, alone[:, : found.shape[1]])
    assert torch.equal(model.model.generate(tokens, **options), alone)


@torch.no_grad()
def test_the_scale_of_a_norm_changes_by_a_bounded_factor(monkeypatch: pytest.MonkeyPatch) -> None:
    model = wrap(family("Gemma 3"))

    def largest() -> float:
        patches = [patch for seed in range(8) for patch in model.deltas(ids(seed=100 + seed), 23)]
        return max(float(patch.weights["post"].rows.abs().max()) for patch in patches)  # type: ignore[attr-defined]

    assert largest() < 15
    monkeypatch.setattr(network, "SMALLEST", 0.0)
    assert largest() > 30


def test_a_patch_of_another_model_is_refused() -> None:
    model = wrap(family("Llama"))
    for patch, what in ((Patch(biases={"gate": torch.zeros(48)}), "gate"), (Patch(routing=Mock()), "experts")):
        with pytest.raises(ValueError, match=f"layer 0 has no {what}: the patch is of another model"):
            model(ids(), patches=[patch] * len(model.decoder.blocks))


def test_threads_wait_for_each_other() -> None:
    model, tokens = wrap(family("Llama")), ids(1, 8)
    before, goal = hf.module_state(model.model), model(tokens)[:, 5:]
    wrong: list[Any] = []

    def work() -> None:
        try:
            for _ in range(10):
                found = model(tokens[:, 5:], patches=model.deltas(tokens, 5), positions=torch.arange(5, 8))
                wrong.extend(error for error in [relative(found, goal)] if error > 1e-12)
        except Exception as error:
            wrong.append(error)

    threads = [Thread(target=work) for _ in range(3)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not wrong
    assert hf.module_state(model.model) == before


def test_ctrl_c_at_any_line_leaves_the_model_as_it_was() -> None:
    model, tokens = wrap(family("Llama")), ids(1, 8)
    before, lines = hf.module_state(model.model), [0, 0]

    def trace(frame: Any, event: str, arg: Any) -> Any:
        lines[0] += event == "line" and frame.f_code.co_name == "run"
        if lines[0] == lines[1]:
            raise KeyboardInterrupt
        return trace

    for lines[1] in range(1, 40, 2):
        lines[0] = 0
        old = sys.gettrace()
        sys.settrace(trace)
        try:
            with pytest.raises(KeyboardInterrupt):
                model.deltas(tokens, 5)
        finally:
            sys.settrace(old)
        assert hf.module_state(model.model) == before


def test_shapes_that_do_not_fit_are_named() -> None:
    model, tokens = wrap(family("Llama")), ids(2, 8)
    patches, query = model.deltas(tokens, 5), tokens[:, 5:]
    first = (torch.arange(8) < 5)[None]
    for call, words in (
        (lambda: model.deltas(tokens[0], 5), r"tokens of shape \(8,\): pass \(B,T\)"),
        (lambda: model(tokens[:, :0]), r"tokens of shape \(2, 0\)"),
        (lambda: model.deltas(tokens, first), r"keeps \[3\] tokens by row, of 2 rows"),
        (lambda: model(tokens, attention_mask=first.long()), r"attention_mask of shape \(1, 8\) for 2 sequences of 8"),
        (lambda: model(query[:, :2], patches=patches), "a patch of 2 sequences of 3 tokens or chunks for 2 of 2"),
        (lambda: model(query[:1], patches=patches), "a patch of 2 sequences of 3 tokens or chunks for 1 of 3"),
        (lambda: model.model.train() and model.deltas(tokens, 5), "LlamaForCausalLM is in training mode"),
    ):
        with pytest.raises(ValueError, match=words):
            call()
