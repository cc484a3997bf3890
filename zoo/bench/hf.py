"""Benchmarks of the bridge: a patch of one query, and a token under patches, of a model of `transformers`.

Axes: T tokens.
"""

from __future__ import annotations

import copy
from collections.abc import Iterator
from functools import partial
from typing import Any

import torch

from zoo.bench import peers
from zoo.bench.generation import of_family
from zoo.bench.timing import Case, Row, Setting, measure
from zoo.hf import Wrapped, commands, wrap

SIZE = {"dim": 256, "layers": 8, "heads": 8, "hidden": 704}
FORWARD, PLAIN, HOOKS, FORMED = "contextual forward", "plain token", "by hooks", "W + ΔW formed before"


def hf(setting: Setting) -> Iterator[Row]:
    """The bridge to `transformers`, on a random Llama or --model DIR: a patch, and tokens under it, against plain."""
    if setting.model is not None:
        loaded = commands.load(setting.model).model
    elif peers.installed():
        loaded = peers.llama(of_family("transformer", SIZE, torch.device("cpu"))).eval()
    else:
        return
    model = wrap(loaded.to(setting.device))
    for T in (128,) if setting.quick else (128, 512):
        yield from measure(extraction(model, T), setting)
    yield from measure(token(model), setting)


def _name_of(model: Wrapped) -> str:
    return f"{type(model.model).__name__}, d={model.decoder.width}, {len(model.decoder.blocks)} layers"


def _sequence(model: Wrapped, T: int) -> torch.Tensor:
    ids = torch.randint(model.decoder.vocabulary, (1, T), generator=torch.Generator().manual_seed(0))
    return ids.to(model.device)


def extraction(model: Wrapped, T: int) -> Case:
    """The patch of the last of T tokens against their own pass, which gives the logits of that token alone."""
    tokens = _sequence(model, T)
    named = {"logits_to_keep": 1} if "logits_to_keep" in model.decoder.accepts else {}
    variants: Any = {FORWARD: partial(model, tokens, **named), "deltas": partial(model.deltas, tokens, T - 1)}
    return Case(f"{_name_of(model)}, patch of T={T}", FORWARD, variants, {("deltas", FORWARD): 1.6})


def token(model: Wrapped) -> Case:
    """One token under stored weights, under patches by hooks, and in a copy that holds W + ΔW."""
    tokens = _sequence(model, 32)
    patches, one = model.deltas(tokens, 31), tokens[:, 31:]
    with model.patched(patches) as plain:
        formed = wrap(copy.deepcopy(plain))
    variants = {PLAIN: partial(model, one), HOOKS: partial(model, one, patches=patches), FORMED: partial(formed, one)}
    return Case(f"{_name_of(model)}, a token", PLAIN, variants, {(HOOKS, PLAIN): 1.2, (FORMED, PLAIN): 1.05})
