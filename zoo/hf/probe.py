"""Finds the feed-forward network of each layer of a causal language model by what its parts do, never by their names.

Every part is called, or watched while its layer runs, on a probe; what it does not do as the law needs it is named in
the ValueError that refuses the model.
Axes: B batch, T tokens, D model.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from zoo.hf.ffn import ForeignFFN, first, hooks, wide

TRAINING = "is in training mode, in which it draws at random: call eval() first"


def close(a: Tensor, b: Tensor) -> bool:
    """Whether two results of a model are the same but for rounding in its own type."""
    tolerance = {torch.float64: 1e-5, torch.float32: 2e-3}.get(a.dtype, 0.1)
    return a.shape == b.shape and bool((wide(a) - wide(b)).abs().max() <= tolerance * wide(b).abs().max())


def noise(like: Tensor, size_of: Tensor) -> Tensor:
    """Random numbers of the shape of `like` and the size of the other."""
    return (torch.randn_like(like) * wide(size_of).square().mean().sqrt()).to(size_of.dtype)


@contextmanager
def watched(parts: Mapping[str, nn.Module]) -> Iterator[dict[str, tuple[Any, Any]]]:
    """What each part that is called reads, and what it gives."""
    calls: dict[str, tuple[Any, Any]] = {}

    def note(name: str) -> Any:
        return lambda part, args, out: calls.update({name: (args[0] if args else None, out)})

    with hooks(part.register_forward_hook(note(name)) for name, part in parts.items()):
        yield calls


def layers_of(model: nn.Module) -> list[nn.Module]:
    """The layers of a causal language model; raises ValueError for other models, and for the state of this one."""
    config: Any = model.config
    count, parameters = config.get_text_config().num_hidden_layers, list(model.parameters())
    lists = [m for m in model.modules() if isinstance(m, nn.ModuleList) and len(set(m)) == count]
    quantised = getattr(model, "hf_quantizer", None) is not None or not all(p.is_floating_point() for p in parameters)
    wrong = {
        "has an encoder and a decoder: wrap takes decoders alone": getattr(config, "is_encoder_decoder", False),
        "is quantised: load it with whole weights, patches are relative to them": quantised,
        TRAINING: model.training,
        "lies on several devices: load it on one": len({p.device for p in parameters}) > 1,
        f"has no list of {count} different layers": not lists,
    }
    for what, there in wrong.items():
        if there:
            raise ValueError(f"{type(model).__name__} {what}")
    return list(lists[0])


def ffn_of(index: int, layer: nn.Module, z_BTD: Tensor, run: Callable[[], Any]) -> ForeignFFN:
    """The network of a layer; z: a probe; run: runs the layer within its model and returns what it does. Raises
    ValueError, naming the layer and the part that is not understood."""
    children = dict(layer.named_children())
    names = [name for name, child in children.items() if _is_ffn(child, z_BTD)]
    if len(names) != 1:
        found = ", ".join(names) or "no part"
        raise ValueError(f"layer {index}: {found} of {', '.join(children)} is a feed-forward network of one input")
    where = f"layer {index}, {names[0]}"
    ffn = _matrices(where, children[names[0]], z_BTD)
    _writes(where, ffn, z_BTD)
    return _output(where, ffn, children, run)


def _is_ffn(child: nn.Module, z_BTD: Tensor) -> bool:
    """Whether the part, called alone, gives each token something of its own state alone, by at least two matrices."""
    if sum(p.dim() in (2, 3) for p in child.parameters()) < 2:
        return False
    try:
        y, mixed, alone = (first(child(z)) for z in (z_BTD, z_BTD.flip(1), z_BTD[:, -1:]))
        return y.shape == z_BTD.shape and close(mixed.flip(1), y) and close(alone, y[:, -1:])
    except Exception:  # it wants more than a state
        return False


def _matrices(where: str, module: nn.Module, z_BTD: Tensor) -> ForeignFFN:
    """The network with its matrices told apart: what reads z, and what writes its output."""
    named = {name.replace(".", "/"): part for name, part in module.named_modules()}
    modules = {name: part for name, part in named.items() if getattr(part, "weight", z_BTD).dim() == 2}
    stacks = {name: part for name, part in named.items() if getattr(part, "down_proj", None).__class__ is nn.Parameter}
    with watched(modules) as calls:
        module(z_BTD)
    if missing := modules.keys() - calls.keys():
        raise ValueError(f"{where}: {', '.join(sorted(missing))} is not used as a part of its own")

    def gives(name: str, W_oi: Any) -> bool:
        """Whether a part gives W x + b."""
        x, out = calls[name]
        fits = isinstance(out, Tensor) and W_oi.shape[1] == x.shape[-1]
        return fits and close(F.linear(x, W_oi, modules[name]._parameters.get("bias")), out)

    turned = {name for name in calls if gives(name, modules[name].weight.mT)}
    plain = turned | {name for name in calls if gives(name, modules[name].weight)}
    rows = {name: x.reshape(-1, x.shape[-1]) for name, (x, _) in calls.items()}
    readers = [name for name, x in rows.items() if close(x, z_BTD.flatten(0, 1))]
    writers = [name for name in rows if name not in readers]
    own: dict[str, Any] = {}
    if stacks:
        (path, stack), *others = stacks.items()
        ups = [up for up in ("gate_up_proj", "up_proj") if getattr(stack, up, None) is not None]
        up, down = (f"{path}/{name}".lstrip("/") for name in (*ups[:1], "down_proj"))
        routers = [name for name in readers if len(modules[name].weight) == len(stack.down_proj)]
        if others or len(routers) > 1 or getattr(stack, "has_post_expert_norm", False):
            raise ValueError(f"{where}: one stack of experts and one router are understood, without further norms")
        own = {"experts": stack, "router": routers[0] if routers else None}
        modules |= {up: stack, down: stack}
        turned |= {up, down} if getattr(stack, "is_transposed", False) else set()
        readers, writers = [*(name for name in readers if name not in routers), up], [down]
    elif len(writers) != 1 or not readers or writers[0] not in plain:
        what = f"{', '.join(readers) or 'nothing'} reads its input, {', '.join(writers) or 'nothing'} its hidden units"
        raise ValueError(f"{where}: {what}; one or more plain matrices, and a single one, are understood")
    return ForeignFFN(module, modules, tuple(readers), writers[0], frozenset(turned), frozenset(plain), **own)


def _writes(where: str, ffn: ForeignFFN, z_BTD: Tensor) -> None:
    """Raises ValueError unless what the output matrix gives more, the network gives more."""
    with ffn.observed() as seen:
        ffn.module(z_BTD)
    more = noise(seen.y, seen.y)
    with ffn.modules[ffn.output_matrix].register_forward_hook(lambda m, args, y: y + more.reshape(y.shape)):
        wrong = not close(first(ffn.module(z_BTD)), seen.y + more)
    if ffn.experts is not None:
        y = F.linear(ffn.of_experts(seen.h, seen.index, seen.weight), ffn.weight(ffn.output_matrix))
        if (bias := getattr(ffn.experts, "down_proj_bias", None)) is not None:
            y = y + (bias[seen.index] * seen.weight[..., None].to(bias.dtype)).sum(1)
        wrong |= not close(y, first(ffn.experts(seen.h, seen.index, seen.weight)))
    if wrong:
        raise ValueError(f"{where}: its output is not that of {ffn.output_matrix} plus what does not depend on it")


def _output(where: str, ffn: ForeignFFN, children: dict[str, nn.Module], run: Callable[[], Any]) -> ForeignFFN:
    """The network with the norm that follows it and the factor at which the layer adds its output to the stream."""
    with ffn.observed() as seen, watched(children) as given:
        before = first(run())
    tensors = {name: pair for name, pair in given.items() if all(isinstance(t, Tensor) for t in pair)}
    behind = [name for name, (x, out) in tensors.items() if torch.equal(x, seen.y) and not torch.equal(x, out)]
    if len(behind) > 1:
        raise ValueError(f"{where}: {', '.join(behind)} all read its output; one norm behind it is understood")
    for name in behind:
        ffn = _with_norm(f"{where}: {name} behind it", ffn, children[name], seen.y)
    r, last = noise(seen.y, before), ffn.module if ffn.post is None else ffn.post
    with last.register_forward_hook(lambda m, args, y: y + r if isinstance(y, Tensor) else (y[0] + r, *y[1:])):
        more = wide(first(run())) - wide(before)
    unit = float((more * wide(r)).sum() / wide(r).square().sum())
    if not unit or not close((more / unit).to(before.dtype), r):
        raise ValueError(f"{where}: the layer's output is not a sum with {unit:.3g} times what this part gives")
    return replace(ffn, unit=1.0 if abs(unit - 1) < 4 * torch.finfo(before.dtype).eps else unit)


def _with_norm(where: str, ffn: ForeignFFN, norm: nn.Module, y: Tensor) -> ForeignFFN:
    weight = getattr(norm, "weight", None)
    if isinstance(weight, Tensor) and weight.shape == y.shape[-1:]:
        unit = wide(y) * wide(y).square().mean(-1, keepdim=True).rsqrt()
        for one_plus in (False, True):  # far above its epsilon
            if close((unit * (wide(weight) + int(one_plus))).to(y.dtype), norm(100 * unit.to(y.dtype))):
                return replace(ffn, post=norm, one_plus=one_plus)
    raise ValueError(f"{where} is no root-mean-square norm with a scale")
