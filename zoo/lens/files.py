"""Patches as files: safetensors with a description, which only the model that they were made for takes back.

A file is somebody else's data: kinds of updates are looked up in a dict, and nothing in it is imported or unpickled.
Names of tensors: LAYER.input.PLACE.KIND.FIELD, LAYER.weights.MATRIX.PLACE.KIND.FIELD (the places are the terms of a
sum), LAYER.biases.MATRIX, LAYER.routing.FIELD; FIELD as in zoo.delta.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import fields
from functools import reduce
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save
from torch import Tensor, nn

from zoo import __version__
from zoo.delta import Delta, Full, LowRank, Patch, Routing, Scale, Shear, Sum
from zoo.files import whole
from zoo.layers import FeedForward
from zoo.models import Model

SCHEMA = 1
KINDS: dict[str, type] = {kind.__name__: kind for kind in (LowRank, Scale, Full, Shear)}
AXES = {"u": "or", "v": "ir", "rows": "o", "columns": "i", "matrix": "oi", "a": "i", "shift": "i", "core": ""}
"""The last axes of each field: o outputs, i inputs, r rank."""


def fingerprint(model: nn.Module) -> str:
    """SHA-256 over names, shapes, types and bytes of a model's parameters and persistent buffers, sorted by name."""
    digest = hashlib.sha256()
    for name, tensor in sorted(model.state_dict().items()):
        digest.update(f"{name} {tuple(tensor.shape)} {tensor.dtype}\n".encode())
        digest.update(tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()


def save_patch(path: str | Path, patches: Sequence[Patch], model: Model, **about: Any) -> None:
    """Writes the patches of all layers, made for `model`, and what is to be known `about` them: form, context, …

    about: anything that JSON can hold. The file appears whole or not at all. Raises ValueError for a wrong number of
    patches or an update or description that has no place in a file.
    """
    if len(patches) != len(model.decoder.blocks):
        raise ValueError(f"{len(patches)} patches for {len(model.decoder.blocks)} layers: pass one patch per layer")
    description = {
        "schema": SCHEMA,
        "version": __version__,
        "fingerprint": fingerprint(model),
        "layers": len(patches),
        "chunks": [patch.chunk for patch in patches],
        "about": about,
    }
    try:
        header = {"zoo": json.dumps(description)}
    except TypeError as error:
        raise ValueError(f"the description of a patch must be plain JSON values: {error}") from None
    # a copy each: gate and up share factors, and a file holds no views
    tensors = {name: tensor.detach().cpu().clone().contiguous() for name, tensor in _tensors(patches).items()}
    Path(path).parent.mkdir(parents=True, exist_ok=True)
    with whole(path) as temporary:
        temporary.write_bytes(save(tensors, header))


def describe(path: str | Path) -> dict[str, Any]:
    """schema, version, fingerprint, layers, chunks and about of a patch file; raises ValueError if it is none."""
    return _read(path)[0]


def load_patch(path: str | Path, model: Model) -> list[Patch]:
    """The patches of a file, one per layer, on the device of `model`.

    Raises ValueError if the file is missing, damaged or foreign, or was made for another model.
    """
    description, tensors = _read(path)
    here = fingerprint(model)
    if description["fingerprint"] != here:
        raise ValueError(
            f"{path} was made for another model: its fingerprint is {description['fingerprint']}, this model's is "
            f"{here}; a patch is relative to the weights it was made for"
        )
    try:
        tree = _tree({name: tensor.to(model.device) for name, tensor in tensors.items()})
        layers = zip(model.decoder.blocks, description["chunks"], strict=True)
        patches = [_patch(tree.get(str(i), {}), block.ffn, chunk) for i, (block, chunk) in enumerate(layers)]
        unknown = tensors.keys() - _tensors(patches).keys()
        if unknown:
            raise ValueError(f"unknown tensors {', '.join(sorted(unknown))}")
    except (KeyError, TypeError, AttributeError, ValueError) as error:
        raise ValueError(f"{path} does not hold patches of this zoo: {error!r:.300}") from None
    return patches


def _read(path: str | Path) -> tuple[dict[str, Any], dict[str, Tensor]]:
    if not Path(path).is_file():
        raise ValueError(f"no patch file at {path}")
    try:
        with safe_open(path, "pt") as file:
            header = (file.metadata() or {}).get("zoo")
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    except SafetensorError as error:
        raise ValueError(f"{path} is damaged or no patch file: {error}") from None
    try:
        description = json.loads(header or "")
        schema = description["schema"]
    except (ValueError, TypeError, KeyError):
        raise ValueError(
            f"{path} is no patch file of this zoo: it lacks the description that save_patch writes"
        ) from None
    if schema != SCHEMA:
        raise ValueError(f"{path} has schema {schema!r:.40}, this zoo ({__version__}) reads {SCHEMA}")
    missing = {"version", "fingerprint", "layers", "chunks", "about"} - set(description)
    if missing:
        raise ValueError(f"{path} lacks {', '.join(sorted(missing))} in its description")
    return description, tensors


def _tensors(patches: Sequence[Patch]) -> dict[str, Tensor]:
    """All tensors of the patches by their name in a file."""
    tensors: dict[str, Tensor] = {}
    for layer, patch in enumerate(patches):
        deltas = {f"{layer}.weights.{name}": delta for name, delta in patch.weights.items()}
        if patch.input:
            deltas[f"{layer}.input"] = patch.input
        for name, delta in deltas.items():
            for place, term in enumerate(_terms(delta)):
                tensors |= _fields(f"{name}.{place}.{type(term).__name__}", term)
        tensors |= {f"{layer}.biases.{name}": bias for name, bias in patch.biases.items()}
        if patch.routing:
            tensors |= _fields(f"{layer}.routing", patch.routing)
    return tensors


def _terms(delta: Delta) -> list[Delta]:
    if isinstance(delta, Sum):
        return [*_terms(delta.first), delta.second]
    if type(delta) not in KINDS.values():
        raise ValueError(f"an update of kind {type(delta).__name__} has no place in a file; kinds: {', '.join(KINDS)}")
    return [delta]


def _fields(prefix: str, record: Any) -> dict[str, Tensor]:
    values = {field.name: getattr(record, field.name) for field in fields(record)}
    return {f"{prefix}.{name}": value for name, value in values.items() if value is not None}


def _tree(tensors: Mapping[str, Tensor]) -> dict[str, Any]:
    """Dotted names as nested dicts."""
    tree: dict[str, Any] = {}
    for name, tensor in tensors.items():
        *path, last = name.split(".")
        reduce(lambda node, key: node.setdefault(key, {}), path, tree)[last] = tensor
    return tree


def _patch(node: dict[str, Any], ffn: FeedForward, chunk: int | None) -> Patch:
    matrices = {name: ffn.weight(name) for name in (*ffn.readers, "down")}
    for name, bias in node.get("biases", {}).items():
        _check(name, bias, "o", matrices[name])
    if chunk is not None and not (isinstance(chunk, int) and chunk > 0):
        raise ValueError(f"chunk {chunk!r} is no number of tokens")
    routing = Routing(**node["routing"]) if "routing" in node else None
    if routing:
        blocks = torch.arange(ffn.blocks, device=routing.index.device)
        if routing.index.dtype != torch.int64 or not torch.isin(routing.index, blocks).all():
            raise ValueError(f"a routing to others than the blocks 0 to {ffn.blocks - 1}")
    return Patch(
        input=_delta("input", node["input"], matrices["gate"]) if "input" in node else None,  # type: ignore[arg-type]
        weights={name: _delta(name, terms, matrices[name]) for name, terms in node.get("weights", {}).items()},
        biases=node.get("biases", {}),
        routing=routing,
        chunk=chunk,
    )


def _delta(name: str, terms: dict[str, Any], W: Tensor) -> Delta:
    deltas = []
    for place in map(str, range(len(terms))):
        ((kind, values),) = terms[place].items()
        for field, tensor in values.items():
            _check(name, tensor, AXES[field], W, values)
        deltas.append(KINDS[kind](**values))
    if not all(isinstance(delta, LowRank) for delta in deltas[1:]):
        raise ValueError(f"a sum in {name} whose later terms are not low-rank")
    return reduce(Sum, deltas)


def _check(name: str, tensor: Tensor, axes: str, W: Tensor, values: Mapping[str, Tensor] | None = None) -> None:
    size = {"o": W.shape[0], "i": W.shape[1], "r": values["u"].shape[-1] if values and "u" in values else 0}
    expected = tuple(size[axis] for axis in axes)
    if tuple(tensor.shape[tensor.dim() - len(axes) :]) != expected:
        raise ValueError(f"a tensor of {name} of shape {tuple(tensor.shape)}, which must end in {expected}")
