"""Finds the feed-forward network of each layer of a causal language model by what its parts do, never by their names.

Every part is called, or watched while its layer runs, on a probe; what it does not do as a law of the zoo needs it is
named in the ValueError that refuses the model.
Axes: B batch, T tokens, D model.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from zoo.hf.ffn import ForeignFFN, first, wide


@dataclass(frozen=True)
class Place:
    """One layer of the model and its network, as zoo.core.layers.Block has one."""

    layer: nn.Module
    ffn: ForeignFFN


def close(a: Tensor, b: Tensor) -> bool:
    """Whether two results of a model are the same but for rounding in its own type."""
    tolerance = {torch.float64: 1e-5, torch.float32: 2e-3}.get(a.dtype, 0.1)
    return a.shape == b.shape and bool((wide(a) - wide(b)).abs().max() <= tolerance * wide(b).abs().max())


def layers_of(model: nn.Module) -> list[nn.Module]:
    """The layers of a causal language model; raises ValueError for other models and quantised ones."""
    config: Any = model.config
    kind = type(model).__name__
    if getattr(config, "is_encoder_decoder", False):
        raise ValueError(f"{kind} has an encoder and a decoder: wrap takes decoders alone")
    if getattr(model, "hf_quantizer", None) is not None or not all(p.is_floating_point() for p in model.parameters()):
        raise ValueError(f"{kind} is quantised: load it with whole weights, patches are relative to them")
    if model.training:
        raise ValueError(f"{kind} is in training mode, in which it draws at random: call eval() first")
    if len({p.device for p in model.parameters()}) > 1:
        raise ValueError(f"{kind} lies on several devices: load it on one, as with device_map={{'': 0}}")
    count = config.get_text_config().num_hidden_layers
    lists = [m for m in model.modules() if isinstance(m, nn.ModuleList) and len(m) == count]
    if not lists or len(set(lists[0])) < count:
        raise ValueError(f"{kind} has no list of {count} different layers")
    return list(lists[0])


def ffn_of(index: int, layer: nn.Module, z_BTD: Tensor, run: Callable[[], Any]) -> ForeignFFN:
    """The network of a layer; z: a probe (2,T,D) of the size of the stream; run: runs the layer within its model and
    returns its output. Raises ValueError, naming the layer and the part that is not understood."""
    names = [name for name, child in layer.named_children() if _is_ffn(child, z_BTD)]
    if len(names) != 1:
        what = "no part" if not names else f"{len(names)} parts, {', '.join(names)},"
        parts = ", ".join(name for name, _ in layer.named_children())
        raise ValueError(f"layer {index}: {what} of {parts} is a feed-forward network of one input")
    where = f"layer {index}, {names[0]}"
    ffn = _matrices(where, layer.get_submodule(names[0]), z_BTD)
    return _output(where, ffn, layer, run)


def _is_ffn(child: nn.Module, z_BTD: Tensor) -> bool:
    """Whether the part, called alone, gives each token something of its own state alone, by at least two matrices."""
    if sum(p.dim() in (2, 3) for p in child.parameters()) < 2:
        return False
    try:
        y = first(child(z_BTD))
        mixed = first(child(z_BTD.flip(1)))
        alone = first(child(z_BTD[:, -1:]))
    except Exception:  # it wants more than a state
        return False
    if not isinstance(y, Tensor) or y.shape != z_BTD.shape:
        return False
    return close(mixed.flip(1), y) and close(alone, y[:, -1:])


def _matrices(where: str, module: nn.Module, z_BTD: Tensor) -> ForeignFFN:
    """The network with its matrices told apart: what reads z, and what writes its output."""
    modules: dict[str, nn.Module] = {}
    calls: dict[str, tuple[Tensor, Any]] = {}
    experts = [
        (name, m)
        for name, m in module.named_modules()
        if getattr(m, "down_proj", None) is not None
        and isinstance(m.down_proj, nn.Parameter)
        and m.down_proj.dim() == 3
    ]
    handles = []
    for name, part in module.named_modules():
        weight = getattr(part, "weight", None)
        if isinstance(weight, Tensor) and weight.dim() == 2:
            modules[name.replace(".", "/")] = part

            def note(m: nn.Module, args: Any, out: Any, name: str = name.replace(".", "/")) -> None:
                calls[name] = (args[0], out)

            handles.append(part.register_forward_hook(note))
    try:
        y = first(module(z_BTD))
    finally:
        for handle in handles:
            handle.remove()
    z = z_BTD.flatten(0, 1)
    read = {name: close(x.reshape(-1, x.shape[-1]), z) for name, (x, _) in calls.items()}
    if missing := modules.keys() - calls.keys():
        raise ValueError(f"{where}: {', '.join(sorted(missing))} is not used as a part of its own")
    turned, plain = set(), set()
    for name, (x, out) in calls.items():
        W, bias = modules[name]._parameters["weight"], modules[name]._parameters.get("bias")
        assert W is not None
        for way, matrix in (("plain", W), ("turned", W.mT)):
            if isinstance(out, Tensor) and matrix.shape[1] == x.shape[-1] and close(F.linear(x, matrix, bias), out):
                plain.add(name)
                turned |= {name} if way == "turned" else set()
                break
    readers = tuple(name for name, reads in read.items() if reads)
    writers = [name for name, reads in read.items() if not reads]
    if len(experts) > 1 or (experts and getattr(experts[0][1], "has_post_expert_norm", False)):
        raise ValueError(f"{where}: experts of {len(experts)} stacks, or with norms of their own, are not understood")
    if experts:
        path, stack = experts[0]
        up = "gate_up_proj" if getattr(stack, "gate_up_proj", None) is not None else "up_proj"
        up, down = (f"{path}.{own}".lstrip(".").replace(".", "/") for own in (up, "down_proj"))
        modules |= {up: stack, down: stack}
        turned |= {up, down} if getattr(stack, "is_transposed", False) else set()
        routers = [name for name in readers if len(modules[name].weight) == len(stack.down_proj)]  # type: ignore[arg-type]
        if len(routers) > 1:
            raise ValueError(f"{where}: {', '.join(routers)} all give one number for each expert: which routes?")
        readers = tuple(name for name in readers if name not in routers)
        known = frozenset(turned), frozenset(plain)
        ffn = ForeignFFN(module, modules, (*readers, up), down, *known, stack, routers[0] if routers else None)
    else:
        if len(writers) != 1 or not readers or writers[0] not in plain:
            raise ValueError(
                f"{where}: {', '.join(readers) or 'nothing'} reads its input and "
                f"{', '.join(writers) or 'nothing'} its hidden units; one of each kind at least, and one "
                "matrix alone for the output, are understood"
            )
        ffn = ForeignFFN(module, modules, readers, writers[0], frozenset(turned), frozenset(plain))
    _writes(where, ffn, z_BTD, y)
    return ffn


def _writes(where: str, ffn: ForeignFFN, z_BTD: Tensor, y_BTD: Tensor) -> None:
    """Raises ValueError unless what the output matrix gives more, the network gives more."""
    r_BTD = torch.randn_like(z_BTD) * wide(y_BTD).square().mean().sqrt().to(z_BTD.dtype)
    writer = ffn.modules[ffn.output_matrix]
    handle = writer.register_forward_hook(lambda m, args, out: out + r_BTD.reshape(out.shape))
    try:
        more = first(ffn.module(z_BTD))
    finally:
        handle.remove()
    if not close(more, y_BTD + r_BTD):
        raise ValueError(f"{where}: its output is not that of {ffn.output_matrix} plus what does not depend on it")
    if ffn.experts is not None:
        with ffn.observed() as seen:
            ffn.module(z_BTD)
        h = ffn.of_experts(seen.h, seen.index, seen.weight)
        bias = getattr(ffn.experts, "down_proj_bias", None)
        own = F.linear(h, ffn.weight(ffn.output_matrix))
        if bias is not None:
            own = own + (bias[seen.index] * seen.weight[..., None].to(bias.dtype)).sum(1)
        if not close(own, first(ffn.experts(seen.h, seen.index, seen.weight))):
            raise ValueError(f"{where}: what its experts give is not the weighted sum of their hidden units' maps")


def _output(where: str, ffn: ForeignFFN, layer: nn.Module, run: Callable[[], Any]) -> ForeignFFN:
    """The network with the norm that follows it and the factor at which the layer adds its output to the stream."""
    given: dict[str, tuple[Tensor, Tensor]] = {}
    handles = []
    for name, child in layer.named_children():

        def note(m: nn.Module, args: Any, out: Any, name: str = name) -> None:
            if args and isinstance(args[0], Tensor) and isinstance(out, Tensor):
                given[name] = (args[0], out)

        handles.append(child.register_forward_hook(note))
    try:
        with ffn.observed() as seen:
            before = first(run())
    finally:
        for handle in handles:
            handle.remove()
    behind = [
        name
        for name, (x, out) in given.items()
        if layer.get_submodule(name) is not ffn.module
        and x.shape == seen.y.shape
        and torch.equal(x, seen.y)
        and not torch.equal(x, out)
    ]
    if len(behind) > 1:
        raise ValueError(f"{where}: {', '.join(behind)} all read its output; one norm behind it is understood")
    if behind:
        ffn = _with_norm(where, ffn, behind[0], layer.get_submodule(behind[0]), seen.y)
    r = torch.randn_like(seen.y) * wide(before).square().mean().sqrt().to(before.dtype)
    last = ffn.post if ffn.post is not None else ffn.module
    handle = last.register_forward_hook(
        lambda m, args, out: out + r if isinstance(out, Tensor) else (out[0] + r, *out[1:])
    )
    try:
        more = wide(first(run())) - wide(before)
    finally:
        handle.remove()
    unit = float((more * wide(r)).sum() / wide(r).square().sum())
    if not unit or not close((more / unit).to(before.dtype), r):
        raise ValueError(f"{where}: the layer's output is not a sum with {unit:.3g} times what this part gives")
    rounding = 4 * torch.finfo(before.dtype).eps
    return replace(ffn, unit=1.0 if abs(unit - 1) < rounding else unit)


def _with_norm(where: str, ffn: ForeignFFN, name: str, norm: nn.Module, y: Tensor) -> ForeignFFN:
    weight = getattr(norm, "weight", None)
    if isinstance(weight, Tensor) and weight.shape == y.shape[-1:]:
        unit = 100 * wide(y) * wide(y).square().mean(-1, keepdim=True).rsqrt()  # its epsilon is nothing beside that
        for one_plus in (False, True):
            if close((unit / 100 * (wide(weight) + int(one_plus))).to(y.dtype), norm(unit.to(y.dtype))):
                return replace(ffn, post=norm, one_plus=one_plus)
    raise ValueError(f"{where}: {name} behind it is no root-mean-square norm with a scale")
