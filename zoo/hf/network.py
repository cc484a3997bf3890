"""A causal language model of `transformers` as the decoder that the lens reads.

Two passes make a patch: one with all tokens records each layer's state and output; in one of the kept tokens alone
every layer is first watched, then run anew under the patch that makes up for the rest, so that each aims at what was
recorded and errors do not add up. A mask is always passed: without one, positions with gaps mean packed texts.
Axes: B batch, T tokens, K kept tokens, D model, V vocabulary.
"""

from __future__ import annotations

import copy
import inspect
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass, replace
from functools import partial
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor

from zoo.core.delta import Scale
from zoo.core.exact import LayerStates, kept_places, replace_context, shear_and_down
from zoo.core.layers import Layout
from zoo.core.patch import Patch, Routing
from zoo.hf.ffn import LOCK, POST, Seen, first, wide
from zoo.hf.probe import TRAINING, ffn_of, layers_of
from zoo.lens.exact import for_down, rescaled

SMALLEST = 0.1  # of a scale's change, which is then at most 1/SMALLEST of its usual size


class Done(Exception):
    """Ends a pass whose further layers nobody needs."""


@dataclass(frozen=True)
class ForeignStates(LayerStates):
    """The states of a layer in units of what it multiplies its network's output by; v: all of its output that does not
    come through the network."""

    ffn: Any

    def with_down(self, patch: Patch, missing_BTD: Tensor) -> Patch:
        down = super().with_down(patch, for_down(self, patch, missing_BTD))
        return down if self.ffn.post is None else rescaled(self, down, self.ffn(self.z, patch) + missing_BTD)


@for_down.register
def _(states: ForeignStates, patch: Patch, missing_BTD: Tensor) -> Tensor:
    """Behind a norm of scale m no sum gives what is missing: a direction is chosen from which another m, `rescaled`,
    does."""
    post = states.ffn.post
    if post is None:
        return missing_BTD
    y = wide(states.ffn.call(states.z, patch).y)
    n, m = _unit(y), wide(post.weight) + int(states.ffn.one_plus)
    size = m.square().mean()
    t = n + missing_BTD * m / (m.square() + 0.05 * size)
    least = SMALLEST * missing_BTD.abs() / size.sqrt()  # else the scale that is needed has no bound
    t = torch.where(t.abs() < least, torch.where(t < 0, -least, least), t)
    return y.square().mean(-1, keepdim=True).sqrt() * _unit(t) - y


@rescaled.register
def _(states: ForeignStates, patch: Patch, goal_BTD: Tensor) -> Patch:
    if states.ffn.post is None:
        return patch
    f = states.ffn(states.z, patch)
    if ((f == 0) & (goal_BTD != 0)).any():
        raise ValueError(f"layer {states.layer}: the norm behind the FFN has a scale of zero, no patch exists")
    rows = torch.where(f == 0, 1.0, goal_BTD / f)
    return replace(patch, weights={**patch.weights, POST: Scale(rows, torch.ones_like(rows))})


def _unit(x: Tensor) -> Tensor:
    return x * x.square().mean(-1, keepdim=True).rsqrt()


class Network:
    """The model as a decoder: layers with their networks, and calls that also return the patch each layer used."""

    context_to_delta = SimpleNamespace(reads_query=True)  # a router chooses for each token

    def __init__(self, model: Any):
        self.model = model
        self.layers = layers_of(model)
        self.accepts = {*inspect.signature(type(model).forward).parameters}
        self.blocks: list[Any] = []  # whose ffn is as that of zoo.core.layers.Block
        self.returns: list[int] = []  # the length of the tuple that a layer returns, 0 for a tensor
        embedding = self.model.get_input_embeddings().weight
        (self.vocabulary, self.width), self.device = embedding.shape, embedding.device

    def probe(self) -> None:
        """Finds the networks of all layers, one after the other, in passes over random tokens."""

        def visit(index: int, forward: Any, *args: Any, **named: Any) -> Any:
            z, layer = torch.randn(*tokens.shape, self.width).to(first(args)), self.layers[index]
            self.blocks.append(SimpleNamespace(ffn=ffn_of(index, layer, z, lambda: forward(*args, **named))))
            raw = forward(*args, **named)
            self.returns.append(0 if isinstance(raw, Tensor) else len(raw))
            return raw

        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)
            tokens = torch.randint(self.vocabulary, (2, 5)).to(self.device)
            self.run(tokens, visit)

    def parameters(self) -> Any:
        return self.model.parameters()

    def real(self, tokens: Tensor) -> None:
        """Which places hold a token: all do."""

    def layout(self, tokens: int, n_context: int = 0) -> Layout:
        return Layout(torch.arange(tokens, device=self.device), None)

    def emit(self, z_BTD: Tensor, layer: int, n_context: int = 0) -> Patch:
        """The choice of experts for states z, and no update."""
        ffn = self.blocks[layer].ffn
        return Patch(routing=ffn.routing(ffn.call(z_BTD, Patch())))

    def inputs(self, tokens: Tensor, mask: Tensor | None, positions: Tensor | None, past: int = 0) -> dict[str, Any]:
        """The model's arguments: a mask, of ones if there is none, and the places at which the tokens stand."""
        if tokens.dim() != 2 or not tokens.numel():
            raise ValueError(f"tokens of shape {tuple(tokens.shape)}: pass (B,T), at least one sequence of one token")
        B, T = tokens.shape
        if mask is None:
            mask = torch.ones(B, past + T, dtype=torch.int64, device=tokens.device)
        if len(mask) != B or (positions is None and mask.shape[1] != past + T):
            raise ValueError(f"attention_mask of shape {tuple(mask.shape)} for {B} sequences of {past + T} tokens")
        if positions is None:
            positions = (mask.cumsum(1) - 1).clamp(min=0)[:, past:]
        named = {"attention_mask": mask, "position_ids": positions.expand(B, T)}
        return {"input_ids": tokens, **{name: value for name, value in named.items() if name in self.accepts}}

    def run(
        self, tokens: Tensor, visit: Any, mask: Tensor | None = None, positions: Tensor | None = None, **named: Any
    ) -> None:
        """One pass through the layers, or until Done is raised; visit(index, forward, *args, **named), in the place of
        each, returns what its forward(*args, **named) would."""

        def visited(index: int, forward: Any, *args: Any, **named: Any) -> Any:
            out = visit(index, forward, *args, **named)
            if index == len(self.layers) - 1:
                raise Done
            return out

        if self.model.training:
            raise ValueError(f"{type(self.model).__name__} {TRAINING}")
        with LOCK, ExitStack() as stack:
            for index, layer in enumerate(self.layers):
                own, undo = vars(layer).get("forward"), vars(layer).pop
                stack.callback(*((undo, "forward", None) if own is None else (setattr, layer, "forward", own)))
                layer.forward = partial(visited, index, layer.forward)
            with suppress(Done):
                self.model(**{"use_cache": False, **self.inputs(tokens, mask, positions), **named})

    def __call__(
        self,
        tokens: Tensor,
        n_context: int = 0,
        patches: Sequence[Patch] | None = None,
        positions: Tensor | None = None,
        added: Sequence[Patch] | None = None,
        attention_mask: Tensor | None = None,
        **named: Any,
    ) -> tuple[Tensor, list[Patch]]:
        """Logits (B,T,V) for tokens (B,T), and the patch that each layer used; arguments as of Wrapped's call."""
        cache = named.get("past_key_values")
        past = cache.get_seq_length() if cache is not None else 0
        inputs = self.inputs(tokens, attention_mask, positions, past)
        with LOCK, self.patched(patches or added or []), ExitStack() as stack:
            seen = [stack.enter_context(block.ffn.observed()) for block in self.blocks if block.ffn.experts]
            logits = self.model(**{"use_cache": cache is not None, **inputs, **named}).logits
        if patches is not None:
            return logits, list(patches)
        calls = iter(seen)
        routings = [block.ffn.experts and block.ffn.routing(next(calls)) for block in self.blocks]
        return logits, [Patch(routing=routing) for routing in routings]

    def step(
        self, index: int, tokens: Tensor, x: Tensor | None, positions: Tensor, cache: Any
    ) -> tuple[Seen, Tensor, Tensor]:
        """One layer alone, on its input x (B,T,D), or what the layers before it give if None: what its network showed,
        and its output in units of the network's and as it is. cache: of the tokens before, left as it was."""

        def visit(at: int, forward: Any, *args: Any, **named: Any) -> Any:
            if at < index and x is not None:
                return args[0] if not self.returns[at] else (args[0], *[None] * (self.returns[at] - 1))
            if at < index:
                return forward(*args, **named)
            found[:] = self.watch(at, forward, args[0] if x is None else x.to(args[0]), *args[1:], **named)
            raise Done

        found: list[Any] = []
        own = {} if cache is None else {"past_key_values": _of_layer(cache, index, len(tokens)), "use_cache": True}
        past = 0 if cache is None else cache.get_seq_length()
        mask = torch.ones(len(tokens), past + tokens.shape[1], dtype=torch.int64, device=tokens.device)
        self.run(tokens, visit, mask, positions, **own)
        raw, seen, out = found
        return seen, out, first(raw)

    def check(self, patches: Sequence[Patch]) -> None:
        """Raises ValueError unless there is one patch for each layer, of matrices that it has."""
        if len(patches) != len(self.blocks):
            raise ValueError(f"{len(patches)} patches for {len(self.blocks)} layers: pass one patch per layer")
        for index, (block, patch) in enumerate(zip(self.blocks, patches, strict=True)):
            strange = sorted({*patch.weights, *patch.biases} - {*block.ffn.matrices})
            if strange or (patch.routing and block.ffn.experts is None):
                what = ", ".join(strange) or "experts"
                raise ValueError(f"layer {index} has no {what}: the patch is of another model")

    @contextmanager
    def patched(self, patches: Sequence[Patch], merged: bool = False) -> Iterator[None]:
        """The model under patches, one per layer or none, until the context ends; merged: with W + ΔW formed."""
        if patches:
            self.check(patches)  # before anything is changed
        with LOCK, ExitStack() as stack:
            for block, patch in zip(self.blocks, patches, strict=False):
                stack.enter_context(block.ffn.merged(patch) if merged else block.ffn.patched(patch))
            yield

    def watch(self, index: int, forward: Any, *args: Any, **named: Any) -> tuple[Any, Seen, Tensor]:
        """What one call of a layer returns, what its network showed, and its output in units of the network's."""
        ffn = self.blocks[index].ffn
        with ffn.observed() as seen:
            raw = forward(*args, **named)
        return raw, seen, wide(first(raw)) / ffn.unit


def _of_layer(cache: Any, index: int, rows: int) -> Any:
    """A cache (1,…) for `rows` rows whose layer `index` may be written to, and no other is used."""
    own = copy.copy(cache)
    own.layers = list(cache.layers)
    own.layers[index] = copy.deepcopy(cache.layers[index])
    own.layers[index].batch_repeat_interleave(rows)
    return own


@replace_context.register
def _(
    decoder: Network,
    tokens: Tensor,
    removed: Tensor | int,
    patch_of: Callable[[LayerStates], Patch] = shear_and_down,
    n_context: int | None = None,
    attention_mask: Tensor | None = None,
) -> list[Patch]:
    decoder.inputs(tokens, attention_mask, None)  # refuses other shapes
    kept_BK = _kept(tokens, removed)
    row_B1 = torch.arange(len(tokens), device=tokens.device)[:, None]
    mask = torch.ones_like(tokens) if attention_mask is None else attention_mask
    positions = (mask.cumsum(1) - 1).clamp(min=0)
    records: list[dict[str, Any]] = []
    patches: list[Patch] = []

    def record(index: int, forward: Any, *args: Any, **named: Any) -> Any:
        raw, seen, out = decoder.watch(index, forward, *args, **named)
        states = {"v_ctx": out - wide(seen.f), "z_ctx": wide(seen.z), "out_ctx": out}
        routing = decoder.blocks[index].ffn.routing(seen)
        if routing:
            routing = Routing(*(t[row_B1, kept_BK].unsqueeze(2) for t in vars(routing).values()))
        emitted = Patch(routing=routing, chunk=1)
        records.append({"emitted": emitted, **{name: t[row_B1, kept_BK] for name, t in states.items()}})
        return raw

    def reduced(index: int, forward: Any, *args: Any, **named: Any) -> Any:
        _, seen, out = decoder.watch(index, forward, *args, **named)
        ffn = decoder.blocks[index].ffn
        alone = Patch(routing=ffn.routing(seen))
        own = {"v": out - wide(seen.f), "z": wide(seen.z), **records[index]}
        patches.append(patch_of(ForeignStates(index, ffn, emit_without_context=lambda: alone, **own)))
        with ffn.patched(patches[-1]):
            return forward(*args, **named)

    with torch.no_grad():
        decoder.run(tokens, record, mask)
        decoder.run(tokens[row_B1, kept_BK], reduced, mask[row_B1, kept_BK], positions[row_B1, kept_BK])
    return patches


def _kept(tokens: Tensor, removed: Tensor | int) -> Tensor:
    """The places (B,K) of the tokens that are not marked in `removed`, (T,) or (B,T), or the first so many."""
    if isinstance(removed, int) or removed.dim() < 2:
        return kept_places(tokens, removed).expand(len(tokens), -1)
    places = [kept_places(tokens, row) for row in removed]
    counts = [len(row) for row in places]
    if len(places) != len(tokens) or len({*counts}) > 1:
        raise ValueError(f"removed keeps {counts} tokens by row, of {len(tokens)} rows: keep as many in each")
    return torch.stack(places)
