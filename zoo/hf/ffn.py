"""The feed-forward part of one layer of a foreign model, read and patched as zoo.core.layers.FeedForward is.

Its output is all that passes through it into the stream: taken behind a norm that follows, and in units of what the
layer multiplies it by. Names of matrices are the paths of modules, or of experts' parameters, with "/" for ".".
Axes: B batch, T tokens, N = B·T, D model, F hidden units of an expert, E experts, K chosen; `*` see zoo.core.delta.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from threading import RLock
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from zoo.core.delta import LowRank, Scale
from zoo.core.layers import join_chunks, split_chunks
from zoo.core.patch import Patch, Routing

POST = "post"
"""The name of the scale of a norm behind the network: a diagonal matrix."""
LOCK = RLock()
"""Of whoever changes a model or reads what may be changed: other threads wait for its end."""


@dataclass
class Seen:
    """One call: z, the input; h, what the output matrix read; y, the output, f the same behind the norm that follows;
    index and weight (N,K): the experts chosen."""

    z: Any = None
    h: Any = None
    y: Any = None
    f: Any = None
    index: Any = None
    weight: Any = None


@dataclass(frozen=True)
class ForeignFFN:
    """modules: those that hold a matrix, by name; output_matrix: of the experts, where there are any; turned: names of
    matrices stored as (i,o); plain: names of modules that give W x + b alone; router: the name of what gives one logit
    for each expert; post: the norm behind, and one_plus, whether its scale is 1 + its parameter; unit: what the layer
    multiplies the output by."""

    module: nn.Module
    modules: Mapping[str, nn.Module]
    input_matrices: tuple[str, ...]
    output_matrix: str
    turned: frozenset[str] = frozenset()
    plain: frozenset[str] = frozenset()
    experts: Any = None
    router: str | None = None
    post: Any = None
    one_plus: bool = False
    unit: float = 1.0

    @property
    def matrices(self) -> tuple[str, ...]:
        """All names; a router is patched by an input shift alone."""
        router, post = ([name] if there else [] for name, there in ((self.router, self.router), (POST, self.post)))
        return (*self.input_matrices, self.output_matrix, *router, *post)  # type: ignore[arg-type]

    @property
    def blocks(self) -> int:
        return 1 if self.experts is None else len(self.stored(self.output_matrix))

    @property
    def dtype(self) -> torch.dtype:
        return self.stored(self.output_matrix).dtype

    def reads(self, name: str) -> bool:
        """Whether a matrix reads the input."""
        return name not in (self.output_matrix, POST)

    def slot(self, name: str) -> tuple[nn.Module, str]:
        """The module of a matrix, and the name of its parameter there."""
        if name == POST:
            return self.post, "weight"
        module = self.modules[name]
        return module, name.rpartition("/")[2] if module is self.experts else "weight"

    def stored(self, name: str) -> Tensor:
        """The parameter of a matrix as the model stores it."""
        module, own = self.slot(name)
        return getattr(module, own)

    def weight(self, name: str) -> Tensor:
        """The matrix `name` as a map, (o,i), those of experts above or beside each other: (E·o,i), (o,E·i)."""
        W = self.stored(name)
        if name == POST:
            return torch.diag(W + int(self.one_plus))
        W = W.mT if name in self.turned else W
        if W.dim() == 3:
            W = W.transpose(0, 1).flatten(1) if name == self.output_matrix else W.flatten(0, 1)
        return W

    def as_stored(self, name: str, W: Tensor) -> Tensor:
        """The map (o,i) in the form in which the model stores it, of its type."""
        old = self.stored(name)
        if name == POST:
            W = W.diagonal() - int(self.one_plus)
        elif old.dim() == 3:
            by_input = name == self.output_matrix
            W = W.unflatten(1, (len(old), -1)).transpose(0, 1) if by_input else W.unflatten(0, (len(old), -1))
        return (W.mT if name in self.turned else W).to(old.dtype).contiguous()

    def dense(self, patch: Patch, names: Iterable[str] | None = None) -> dict[str, Tensor]:
        """The patched weights, {name: (*,o,i)}, in at least float32."""
        weights = {}
        for name in self.matrices if names is None else names:
            W = wide(self.weight(name))
            total = W + patch.weights[name].dense(W) if name in patch.weights else W
            if patch.input and self.reads(name):
                total = total + patch.input.dense(total)
            weights[name] = total
        return weights

    def hidden(self, z_BTD: Tensor, patch: Patch) -> Tensor:
        """What the output matrix reads under `patch`; of experts (B,T,E·F), times the weights of the chosen."""
        with self.patched(patch):
            return self.units(self.call(z_BTD, Patch()))

    def units(self, seen: Seen) -> Tensor:
        """The same of a call, while its weights stand."""
        h = seen.h if self.experts is None else self.of_experts(seen.h, seen.index, seen.weight)
        return wide(h).reshape(*seen.z.shape[:2], -1)

    def __call__(self, z_BTD: Tensor, patch: Patch | None = None) -> Tensor:
        """The output for z (B,T,D) with the weights patched, in at least float32."""
        return wide(self.call(z_BTD, patch or Patch()).f)

    def call(self, z_BTD: Tensor, patch: Patch) -> Seen:
        with self.patched(patch), self.observed() as seen:
            y = first(self.module(z_BTD.to(self.dtype)))
            if self.post is not None:
                self.post(y)
        return seen

    def routing(self, seen: Seen) -> Routing | None:
        """The choice of experts in a call, (B,T,K), and the router's logits, without a bias, or what there is in their
        place: the weights."""
        if self.experts is None:
            return None
        B, T = seen.z.shape[:2]
        index, weight = seen.index.view(B, T, -1), seen.weight.view(B, T, -1)
        if self.router is None:
            return Routing(index, weight, Routing(index, weight, weight).scales(self.blocks))
        return Routing(index, weight, F.linear(seen.z, self.weight(self.router)))

    def of_experts(self, x_ND: Tensor, index_NK: Tensor, weight_NK: Tensor) -> Tensor:
        """The hidden units of all experts times their weights, zero for those that were not chosen: (N,E·F)."""
        experts, E = self.experts, self.blocks
        name = next(name for name in self.input_matrices if self.modules[name] is experts)
        W_EoD = self.weight(name).unflatten(0, (E, -1))
        bias = getattr(experts, f"{name.rpartition('/')[2]}_bias", None)
        h_NEF = x_ND.new_zeros(len(x_ND), E, self.weight(self.output_matrix).shape[1] // E)
        for e in index_NK[index_NK < E].unique().tolist():
            row, k = torch.where(index_NK == e)
            a = F.linear(x_ND[row], W_EoD[e], None if bias is None else bias[e])
            a = experts._apply_gate(a) if getattr(experts, "has_gate", True) else experts.act_fn(a)
            h_NEF[row, e] = a * weight_NK[row, k, None].to(a.dtype)
        return h_NEF.flatten(1)

    @contextmanager
    def observed(self) -> Iterator[Seen]:
        """What the next call of the network shows, whoever calls it."""
        seen = Seen()

        def chosen(module: nn.Module, args: tuple[Any, ...], named: dict[str, Any]) -> None:
            seen.h, seen.index, seen.weight = (*args, *named.values())

        def output(module: nn.Module, args: Any, out: Any) -> None:
            seen.y = seen.f = first(out).clone()  # layers may add to it in place

        def registered() -> Iterator[Any]:
            yield self.module.register_forward_pre_hook(lambda module, args: setattr(seen, "z", args[0]))
            yield self.module.register_forward_hook(output)
            if self.post is not None:
                yield self.post.register_forward_hook(lambda module, args, out: setattr(seen, "f", out.clone()))
            if self.experts is not None:
                yield self.experts.register_forward_pre_hook(chosen, with_kwargs=True)
            else:
                read = self.modules[self.output_matrix].register_forward_pre_hook
                yield read(lambda module, args: setattr(seen, "h", args[0]))

        with hooks(registered()):
            yield seen

    @contextmanager
    def patched(self, patch: Patch) -> Iterator[None]:
        """The network under `patch`, nothing of which outlives the context: by hooks, and by other weights where a
        matrix cannot be hooked, those that all experts or a router read with."""
        shape: list[int] = []

        def split(x: Tensor) -> Tensor:
            return split_chunks(wide(x).reshape(*shape, -1), patch.chunk)

        def joined(x: Tensor, like: Tensor) -> Tensor:
            return join_chunks(x, shape[1], patch.chunk).reshape(like.shape).to(like.dtype)

        def enter(module: nn.Module, args: Any) -> Any:
            shape[:] = args[0].shape[:2]
            if patch.input and patch.chunk:
                own, here = patch.input.a.shape[:2], split(args[0]).shape[:2]
                if any(n not in (1, m) for n, m in zip(own, here, strict=True)):
                    what = f"a patch of {own[0]} sequences of {own[1]} tokens or chunks for {here[0]} of {here[1]}"
                    raise ValueError(f"{what}: pass those that it is of")
            z = joined(patch.input.apply(split(args[0])), args[0]) if patch.input else args[0]
            return (z, *args[1:])

        def choose(module: nn.Module, args: tuple[Any, ...], named: dict[str, Any]) -> Any:
            x, _, own = (*args, *named.values())
            chosen = patch.routing.index, patch.routing.weight.to(own.dtype)  # type: ignore[union-attr]
            return (x, *(t.flatten(0, -2).expand(len(x), -1) for t in chosen)), {}

        def gain(name: str) -> Any:
            def hook(module: Any, args: Any, named: Any, y: Tensor) -> Tensor:
                delta, bias = patch.weights.get(name), patch.biases.get(name)
                x = split(args[0] if module is not self.experts else self.of_experts(*args, *named.values()))
                total = split(y)
                if isinstance(delta, LowRank):
                    total = total + delta.extra(x)
                elif delta is not None:
                    W = wide(self.weight(name))
                    total = total + delta.linear(W, x) - F.linear(x, W)
                return joined(total if bias is None else total + bias.unsqueeze(-2), y)

            return hook

        def scale(module: nn.Module, args: Any, y: Tensor) -> Tensor:
            delta, W = patch.weights[POST], wide(self.weight(POST))
            if isinstance(delta, Scale):
                return joined(split(y) * delta.rows.unsqueeze(-2), y)
            change = delta.dense(W).diagonal(dim1=-2, dim2=-1) / W.diagonal()
            return joined(split(y) * (1 + change.unsqueeze(-2)), y)

        def registered() -> Iterator[Any]:
            yield self.module.register_forward_pre_hook(enter)
            for name in hooked:
                yield self.modules[name].register_forward_hook(gain(name), with_kwargs=True)
            if patch.routing:
                yield self.experts.register_forward_pre_hook(choose, with_kwargs=True)
            if POST in patch.weights:
                yield self.post.register_forward_hook(scale)

        hooked = {*patch.weights, *patch.biases} & {*self.plain, self.output_matrix}
        if unplaced := patch.biases.keys() - hooked:
            raise ValueError(f"{', '.join(unplaced)} has no bias in this model: take the form matrix or output")
        others = {name: delta for name, delta in patch.weights.items() if name not in {*hooked, POST}}
        with self.merged(Patch(weights=others)), hooks(registered()):
            yield

    @contextmanager
    def merged(self, patch: Patch) -> Iterator[None]:
        """The network with W + ΔW and its biases in the place of its own; raises ValueError for a patch of several
        tokens, or a bias that the model has no place for."""
        new: list[tuple[nn.Module, str, Tensor]] = []
        with LOCK, ExitStack() as stack:
            changed = [name for name in self.matrices if name in patch.weights or (patch.input and self.reads(name))]
            for name, W in self.dense(patch, changed).items():
                if (count := W.shape[:-2].numel()) != 1:
                    raise ValueError(f"{name}: updates of {count} tokens or sequences are no one matrix")
                new.append((*self.slot(name), self.as_stored(name, W.reshape(W.shape[-2:]))))
            for name, bias in patch.biases.items():
                if name not in self.plain or "bias" not in self.modules[name]._parameters:
                    raise ValueError(f"{name} has no bias in this model: take the form matrix or output")
                stored: Any = self.modules[name]._parameters["bias"]
                total = bias.reshape(-1) if stored is None else wide(stored) + bias.reshape(-1)
                new.append((self.modules[name], "bias", total.to(self.dtype)))
            for module, own, value in new:
                stack.callback(module._parameters.update, {own: module._parameters[own]})
                module._parameters[own] = nn.Parameter(value, requires_grad=False)
            yield


@contextmanager
def hooks(registered: Iterable[Any]) -> Iterator[None]:
    """Hooks, registered as the handles are asked for, that are removed at its end, also if that fails halfway."""
    with LOCK, ExitStack() as stack:
        for handle in registered:
            stack.enter_context(handle)
        yield


def wide(x: Tensor) -> Tensor:
    """x in at least float32."""
    return x.to(torch.promote_types(x.dtype, torch.float32))


def first(out: Any) -> Any:
    """The states among what a module returns."""
    return out if isinstance(out, Tensor) else out[0]
