"""A prompt as one patch for all queries: fitted on samples, its form chosen on others, judged on yet others.

Samples pass in batches, layer by layer: what is kept of each query token are four states of the stream, of a layer sums
of products. The first tokens of the prompt stay in front of every query, since trained models use them as a sink of
attention (Xiao et al. 2023, arXiv 2309.17453): without them, patches have to make up for its loss too.
Axes: N query tokens, B queries of one length, T tokens of a query, n tokens of the prompt, D model, V vocabulary.
"""

from __future__ import annotations

import copy
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any, NamedTuple

import torch
from torch import Tensor

from zoo.config import lookup
from zoo.core.patch import Patch
from zoo.hf.ffn import wide
from zoo.hf.network import ForeignStates
from zoo.hf.wrapped import Wrapped
from zoo.lens.exact import for_down
from zoo.lens.static import STATIC_FORMS, Moments, update_of

FORMS = STATIC_FORMS | {"sink-null": STATIC_FORMS["matrix"]}
"""Of a patch of a prompt; sink-null: a matrix that maps the states of the kept tokens to zero: plain weights leave them
alone."""
RIDGES = (0.03, 0.3)
ROWS = 64


def batches(queries: Iterable[Sequence[int]]) -> list[Tensor]:
    """Queries of equal length as tokens (B,T), ROWS at most in each."""
    lengths: dict[int, list[Sequence[int]]] = {}
    for query in queries:
        lengths.setdefault(len(query), []).append(query)
    return [part for _, same in sorted(lengths.items()) for part in torch.tensor(same).split(ROWS)]


def prefilled(model: Wrapped, tokens: Tensor) -> Any:
    """A key/value cache of tokens (B,T), or None of none; raises ValueError where the model has no such cache."""
    from transformers import DynamicCache

    if not tokens.shape[1]:
        return None
    cache = DynamicCache(config=model.model.config)
    model(tokens, past_key_values=cache)
    if strange := [type(own).__name__ for own in cache.layers if not hasattr(own, "batch_repeat_interleave")]:
        raise ValueError(f"prompts need keys and values in the cache of every layer, this model has {strange[0]}")
    return cache


@dataclass
class Prompt:
    """The caches of a prompt (n) and of its first tokens, `keep` of them, after which queries run."""

    model: Wrapped
    tokens: Tensor
    keep: int = 1

    def __post_init__(self) -> None:
        n = len(self.tokens)
        if not 0 <= self.keep < n:
            raise ValueError(f"keep_first={self.keep} must lie between 0 and the {n} tokens of the prompt, less one")
        self.kept = prefilled(self.model, self.tokens[None, : self.keep])

    @cached_property
    def full(self) -> Any:
        return prefilled(self.model, self.tokens[None])

    def places(self, queries_BT: Tensor) -> Tensor:
        """Where the tokens of queries stand, (T); raises ValueError where the model has no such places."""
        n, T = len(self.tokens), queries_BT.shape[1]
        limit = getattr(self.model.model.config.get_text_config(), "max_position_embeddings", None)
        if limit and n + T > limit:
            raise ValueError(f"a prompt of {n} tokens and a query of {T}: the model has {limit} places")
        return torch.arange(queries_BT.shape[1], device=queries_BT.device) + len(self.tokens)

    def after_kept(self, queries_BT: Tensor) -> tuple[Tensor, Tensor]:
        """The kept tokens and queries as one pass takes them, and where each stands."""
        kept = self.tokens[: self.keep]
        positions = torch.cat([torch.arange(self.keep, device=kept.device), self.places(queries_BT)])
        return torch.cat([kept.expand(len(queries_BT), -1), queries_BT], 1), positions

    @torch.no_grad()
    def logits(self, queries_BT: Tensor, patches: Sequence[Patch] | None = None, plain: bool = False) -> Tensor:
        """Of the token after each query, (B,V): after the whole prompt, or after its kept tokens under patches, which
        plain weights apply to these too."""
        if plain:
            tokens, positions = self.after_kept(queries_BT)
            return self.model(tokens, added=patches, positions=positions)[:, -1]
        places = self.places(queries_BT)
        cache = copy.deepcopy(self.full if patches is None else self.kept)
        if cache is not None:
            cache.batch_repeat_interleave(len(queries_BT))
        return self.model(queries_BT, added=patches, positions=places, past_key_values=cache)[:, -1]

    def sink(self, index: int) -> tuple[Tensor, Tensor]:
        """What the network of a layer, and its output matrix, read at the kept tokens: (k,D) and (k,F)."""
        places = torch.arange(self.keep, device=self.tokens.device)
        z = wide(self.model.decoder.step(index, self.tokens[None, : self.keep], None, places, None)[0].z)
        return z[0], self.model.decoder.blocks[index].ffn.hidden(z, Patch())[0]

    @torch.no_grad()
    def fit(self, samples: Sequence[Tensor], form: str = "sink-null", ridge: float = 0.1) -> list[Patch]:
        """One static patch per layer that stands for the prompt on sample queries, batches of tokens (B,T), all of
        whose tokens count alike. Raises ValueError for an unknown form, a ridge that is not positive, or no samples."""
        what, network = lookup(form, FORMS, "form of a patch of a prompt"), self.model.decoder
        if not 0 < ridge < float("inf"):
            raise ValueError(f"ridge={ridge} must be above 0, and finite")
        if not samples:
            raise ValueError("no sample queries to fit a patch on")
        x_ctx: list[Any] = [None] * len(samples)
        x: list[Any] = [None] * len(samples)
        patches = []
        for index, block in enumerate(network.blocks):
            ffn: Any = block.ffn
            null = self.sink(index) if form == "sink-null" and self.keep else (None, None)
            states, into, out_of, patch = [], Moments(), Moments(), Patch()
            for b, tokens in enumerate(samples):
                places = self.places(tokens)
                seen_ctx, out_ctx, x_ctx[b] = network.step(index, tokens, x_ctx[b], places, self.full)
                seen, out, _ = network.step(index, tokens, x[b], places, self.kept)
                z_ctx, z = wide(seen_ctx.z), wide(seen.z)
                if what.input:
                    into.add(z, z_ctx - z)
                states.append((out - wide(seen.f), z, out_ctx))
            if what.input:
                patch = update_of(ffn, ffn.input_matrices, what, *into.solve(what, ridge, null[0]))
            with ffn.merged(patch):
                for v, z, out_ctx in states:
                    here = ForeignStates(index, ffn, Patch(), Patch, v_ctx=v, z_ctx=z, out_ctx=out_ctx, v=v, z=z)
                    seen = ffn.call(z, Patch())
                    out_of.add(ffn.units(seen), for_down(here, Patch(), out_ctx - v - wide(seen.f)))
            patch = patch.merged_with(update_of(ffn, (ffn.output_matrix,), what, *out_of.solve(what, ridge, null[1])))
            with ffn.merged(patch):
                for b, (v, z, _) in enumerate(states):
                    x[b] = ((v + ffn(z)) * ffn.unit).to(x_ctx[b].dtype)
            patches.append(patch)
        return patches


class Score(NamedTuple):
    """Mean KL in nats from the prompted model to another at the token after a query, and how often both name the same
    token first."""

    kl: float
    top1: float


def kl_of(goal: Tensor, other: Tensor) -> Tensor:
    """KL in nats from one distribution to another, by their logits (B,V): (B)."""
    p, q = (wide(logits).log_softmax(-1) for logits in (goal, other))
    return (p.exp() * (p - q)).sum(-1)


def score(goals: Sequence[Tensor], logits: Iterable[Tensor]) -> Score:
    """Of logits against those of the prompted model, both by batch."""
    kl, same = [], []
    for goal, other in zip(goals, logits, strict=True):
        kl.append(kl_of(goal, other))
        same.append((goal.argmax(-1) == other.argmax(-1)).double())
    return Score(float(torch.cat(kl).mean()), float(torch.cat(same).mean()))


def judged(prompt: Prompt, queries: Sequence[Tensor], patches: Sequence[Patch], form: str = "") -> Score:
    """A patch against the prompt; as plain weights, which the kept tokens meet too, where the form spares these."""
    goals = [prompt.logits(tokens) for tokens in queries]
    return score(goals, [prompt.logits(tokens, patches, form == "sink-null") for tokens in queries])


def choose(
    prompt: Prompt, samples: Sequence[Tensor], others: Sequence[Tensor], forms: Iterable[str], ridges: Iterable[float]
) -> tuple[str, float, list[Patch]]:
    """The form and the ridge, of these, whose patch, fitted on the samples, has the least KL on other queries."""
    which = {form: lookup(form, FORMS, "form of a patch of a prompt") for form in forms}
    tried = [(form, ridge) for form, what in which.items() for ridge in (ridges if what.matrix else (1.0,))]
    fitted = ((form, ridge, prompt.fit(samples, form, ridge)) for form, ridge in tried)
    return min(fitted, key=lambda found: judged(prompt, others, found[2], found[0]).kl)
