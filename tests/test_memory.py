"""Memory of a training step: activation checkpointing keeps less and changes nothing else; the allocator is told to
keep what was freed, by programs alone."""

from __future__ import annotations

import ctypes
import os
import platform
import runpy
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from cases import CASES, FAMILIES, Case, build, taking_turns
from runs import small
from zoo import memory
from zoo.bench.timing import saved_bytes
from zoo.core.layers import Attention
from zoo.models import MODELS, Model
from zoo.training import run as training_module


def training(case: Case, activation_checkpointing: bool) -> Model:
    """The case's model in float32, all parameters drawn, in train mode and with no trainer to log to."""
    options = {**case.options, **FAMILIES[case.family].busy}
    model = build(case._replace(options=options)).float().train()
    model.decoder.activation_checkpointing = activation_checkpointing
    return model


def after_two_parts(model: Model, precision: torch.dtype) -> dict[str, Any]:
    """The gradients that two parts of a batch add up to, with the family's losses, and the buffers after a step."""
    for k in range(2):
        with torch.autocast("cpu", torch.bfloat16, enabled=precision == torch.bfloat16):
            loss = model.training_step(model.task.batch("train", k, 8), k)
        loss.backward()
    if model.decoder.context_to_delta:
        model.decoder.context_to_delta.after_step()
    gradients = {name: parameter.grad for name, parameter in model.named_parameters()}
    return gradients | dict(model.named_buffers())


@taking_turns("case, precision", CASES, [torch.float32, torch.bfloat16])
def test_gradients_and_router_biases_are_bit_equal(case: Case, precision: torch.dtype) -> None:
    plain, again = (after_two_parts(training(case, choice), precision) for choice in (False, True))
    assert list(plain) == list(again)
    assert [name for name, value in plain.items() if not torch.equal(value, again[name])] == []
    even = case.options.get("router") == "uniform"  # nothing to balance
    assert all(value.any() != even for name, value in plain.items() if name.endswith("bias"))


@pytest.mark.parametrize("family", MODELS)
def test_a_further_layer_keeps_its_input_alone(family: str) -> None:
    """Without it a layer keeps ten times its input or more. The losses of the router keep its logits besides."""
    growth = []
    for choice in (False, True):
        kept = []
        for layers in (2, 3):
            model = training(Case("", family, "noise", {"layers": layers}), choice)
            batch = model.task.batch("train", 0, 8)
            kept.append(saved_bytes(lambda model=model, batch=batch: model.training_step(batch, 0)))
        growth.append(kept[1] - kept[0])
    state = batch.tokens.numel() * model.config.dim * 4
    assert state <= growth[1] <= state + batch.tokens.numel() * FAMILIES[family].keeps * 4
    assert growth[0] > 10 * state


def test_layers_run_twice_in_training_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    runs: list[None] = []
    forward = Attention.forward
    monkeypatch.setattr(Attention, "forward", lambda *args: runs.append(None) or forward(*args))
    case = Case("", "moe", "noise", {})
    model, ids = training(case, True), torch.randint(8, (2, 12))
    layers = len(model.decoder.blocks)

    def count(work: Any) -> int:
        runs.clear()
        work()
        return len(runs)

    assert count(lambda: model(ids).sum().backward()) == 2 * layers
    with torch.no_grad():
        assert count(lambda: model(ids)) == layers
    # a cache is extended in place, and must be once
    cache = model.decoder.new_cache()
    assert count(lambda: model.decoder(ids, cache=cache)[0].sum().backward()) == layers
    assert cache[0].tokens == ids.shape[1]
    model.eval()
    assert count(lambda: model(ids).sum().backward()) == layers
    model.decoder.activation_checkpointing = False
    assert count(lambda: model.train()(ids).sum().backward()) == layers


FAULTS = """
import itertools, resource, statistics, torch
from torch import nn
from zoo.core.layers import FeedForward
from zoo.memory import keep_freed_memory

torch.set_num_threads(1)
torch.manual_seed(0)
ffn, z = FeedForward(64, 64, blocks=64), torch.randn(4, 64, 64)
nn.init.normal_(ffn.gate), nn.init.normal_(ffn.up), nn.init.normal_(ffn.down)


def faults():
    counts = []
    for _ in range(8):
        ffn.zero_grad()
        ffn(z).sum().backward()
        torch.ones(1 << 24)  # 64 MB: no size is too large to be kept
        counts.append(resource.getrusage(resource.RUSAGE_SELF).ru_minflt)
    return statistics.median(after - before for before, after in itertools.pairwise(counts))


print(faults(), keep_freed_memory(), faults())
"""
GLIBC = platform.libc_ver()[0] == "glibc"


@pytest.mark.skipif(not GLIBC, reason="another C library")
@pytest.mark.slow
def test_freed_memory_is_used_again() -> None:
    """Without the call each step gets its pages anew, with it none."""
    environment = {name: value for name, value in os.environ.items() if not name.startswith(("MALLOC_", "GLIBC"))}
    answer = subprocess.run([sys.executable, "-c", FAULTS], env=environment, capture_output=True, text=True, timeout=99)
    assert answer.returncode == 0, answer.stderr
    before, kept, after = answer.stdout.split()
    assert kept == "True"
    assert float(before) > 10_000
    assert float(after) < 100


@pytest.mark.parametrize("reason", ["MALLOC_MMAP_MAX_", "GLIBC_TUNABLES", "musl"])
def test_the_choice_of_the_user_and_another_c_library_stay(reason: str, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in [name for name in os.environ if name.startswith(("MALLOC_", "GLIBC"))]:
        monkeypatch.delenv(name)
    monkeypatch.setenv(reason, "glibc.malloc.mmap_max=7")
    monkeypatch.setattr(platform, "libc_ver", lambda: ("" if reason == "musl" else "glibc", "2"))
    monkeypatch.setattr(ctypes, "CDLL", lambda name: pytest.fail("the C library was asked"))
    assert not memory.keep_freed_memory()


def test_the_program_asks_for_it_and_the_library_does_not(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    calls = []
    monkeypatch.setattr(memory, "keep_freed_memory", lambda: calls.append(True))
    small(tmp_path / "run")
    assert not calls
    monkeypatch.setattr(training_module, "train", lambda **options: {"test": {}, "main_metric": "nmse"})
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "argv", ["train.py"])
    with pytest.raises(SystemExit, match="0"):
        runpy.run_path(str(Path(__file__).parents[1] / "train.py"), run_name="__main__")
    assert calls == [True]
