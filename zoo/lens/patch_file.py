"""Patches as files: safetensors with a description, which only the model that they were made for takes back.

A file is somebody else's data: kinds of updates are looked up in a dict, nothing in it is imported or unpickled, and
what would not work in the model is refused when it is read.
Names of tensors: LAYER.input.PLACE.KIND.FIELD, LAYER.weights.MATRIX.PLACE.KIND.FIELD (the places are the terms of a
sum), LAYER.biases.MATRIX, LAYER.routing.FIELD; FIELD as in zoo.core.delta.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from dataclasses import fields
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from safetensors.torch import save
from torch import Tensor, nn

from zoo.config import VERSION, one_line, show
from zoo.core.delta import Delta, Sum
from zoo.core.patch import Patch
from zoo.files import whole
from zoo.lens.parse import FIELDS, KINDS, read_patches
from zoo.models import Model
from zoo.training import untrusted

SCHEMA = 1
DESCRIPTION = {"schema": int, "version": str, "fingerprint": str, "layers": int, "chunks": list, "about": dict}
HEADER = 1 << 23  # bytes of names, shapes and description


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
        "version": VERSION,
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
            f"{path} was made for another model: its fingerprint is {show(description['fingerprint'])}, this model's "
            f"is {here}; a patch is relative to the weights it was made for"
        )
    blocks, chunks = model.decoder.blocks, description["chunks"]
    try:
        if not description["layers"] == len(chunks) == len(blocks):
            raise ValueError(f"layers={description['layers']} and {len(chunks)} chunks for {len(blocks)} layers")
        patches = read_patches({name: tensor.to(model.device) for name, tensor in tensors.items()}, blocks, chunks)
        unknown = sorted(tensors.keys() - _tensors(patches).keys())
        if unknown:
            raise ValueError(f"unknown tensors {show(unknown, 200)}")
    except Exception as error:  # no file ends in a traceback, whatever the checks let through
        raise ValueError(f"{path} does not hold patches of this zoo: {one_line(error, 300)}") from None
    return patches


def _read(path: str | Path) -> tuple[dict[str, Any], dict[str, Tensor]]:
    file = untrusted.regular(path, "patch file")
    try:
        with file.open("rb") as stream:
            size = int.from_bytes(stream.read(8), "little")
        if size > HEADER:
            raise ValueError(f"a header of {size} bytes")
        with safe_open(file, "pt") as opened:
            header = (opened.metadata() or {}).get("zoo")
            tensors = {name: opened.get_tensor(name) for name in opened.keys()}  # noqa: SIM118
    except Exception as error:  # damaged files fail in many ways
        raise ValueError(f"{path} is damaged or no patch file: {one_line(error, 200)}") from None
    try:
        description = untrusted.copied(json.loads(header or ""), 0)
        schema = description["schema"]
    except (ValueError, TypeError, KeyError, RecursionError):
        raise ValueError(
            f"{path} is no patch file of this zoo: it lacks the description that save_patch writes"
        ) from None
    if schema != SCHEMA:
        raise ValueError(f"{path} has schema {show(schema, 40)}, this zoo ({VERSION}) reads {SCHEMA}")
    missing = DESCRIPTION.keys() - description.keys()
    if missing:
        raise ValueError(f"{path} lacks {', '.join(sorted(missing))} in its description")
    for name, kind in DESCRIPTION.items():
        if type(description[name]) is not kind:
            found = show(description[name], 40)
            raise ValueError(
                f"{path} does not hold patches of this zoo: {name} is {found}, not of type {kind.__name__}"
            )
    return description, tensors


def _tensors(patches: Sequence[Patch]) -> dict[str, Tensor]:
    """All tensors of the patches by their name in a file."""
    tensors: dict[str, Tensor] = {}
    kinds = {kind: name for name, kind in KINDS.items()}
    for layer, patch in enumerate(patches):
        deltas = {f"{layer}.weights.{name}": delta for name, delta in patch.weights.items()}
        if patch.input:
            deltas[f"{layer}.input"] = patch.input
        for name, delta in deltas.items():
            for place, term in enumerate(_terms(delta)):
                tensors |= _fields(f"{name}.{place}.{kinds[type(term)]}", term)
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
    stored = {field: name for name, field in FIELDS.items()}
    values = {stored.get(field.name, field.name): getattr(record, field.name) for field in fields(record)}
    return {f"{prefix}.{name}": value for name, value in values.items() if value is not None}
