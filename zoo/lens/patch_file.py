"""Patches as files: safetensors with a description, which only the model that they were made for takes back.

A file is somebody else's data: it is asked for tensors by name, whatever else it holds is refused, nothing in it is
imported or unpickled, and what would not work in the model is refused when it is read.
Names of tensors: LAYER.input.0.Shear.FIELD, LAYER.weights.MATRIX.PLACE.KIND.FIELD (the places are the terms of a sum),
LAYER.biases.MATRIX, LAYER.routing.FIELD; FIELD as in zoo.core.delta.
Axes of a field after its leading dims: o outputs, i inputs, r rank, t tokens, k chosen blocks, e routed blocks.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save
from torch import Tensor

from zoo.config import VERSION, lookup, one_line, show
from zoo.core.delta import Delta, Full, InputShift, LowRank, Scale, Sum
from zoo.core.layers import FeedForward
from zoo.core.patch import Patch, Routing
from zoo.files import named, whole
from zoo.lens.protocol import Subject
from zoo.training import untrusted
from zoo.training.validate import like

SCHEMA = 1
DESCRIPTION = {"schema": 0, "version": "", "fingerprint": "", "layers": 0, "about": {}, "chunks": None}
PLACES = [str(place) for place in range(16)]  # of the terms of a sum
KINDS: dict[str, tuple[type[Any], dict[str, str]]] = {
    "LowRank": (LowRank, {"u": "or", "v": "ir", "core": "tr"}),
    "Scale": (Scale, {"rows": "o", "columns": "i"}),
    "Full": (Full, {"matrix": "oi"}),
    "Shear": (InputShift, {"a": "i", "shift": "i"}),
    "Routing": (Routing, {"index": "tk", "weight": "tk", "logits": "te"}),
}
"""Kinds and their fields, in order, with axes; names are those of the first file that was written."""


def fingerprint(model: Any) -> str:
    """SHA-256 over names, shapes, types and bytes of a model's parameters and persistent buffers, sorted by name."""
    digest = hashlib.sha256()
    for name, tensor in sorted(model.state_dict().items()):
        digest.update(f"{name} {tuple(tensor.shape)} {tensor.dtype}\n".encode())
        digest.update(tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()


def save_patch(path: str | Path, patches: Sequence[Patch], model: Subject, **about: Any) -> None:
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
    with whole(named(path)) as temporary:
        temporary.write_bytes(save(tensors, header))


def describe(path: str | Path) -> dict[str, Any]:
    """schema, version, fingerprint, layers, chunks and about of a patch file; raises ValueError if it is none."""
    return _read(path)[0]


def load_patch(path: str | Path, model: Subject) -> list[Patch]:
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
    records: dict[str, dict[str, Any]] = {str(layer): {} for layer in range(len(blocks))}
    counts: dict[str, int] = {}
    try:
        if not description["layers"] == len(chunks) == len(blocks) or not all(map(_is_chunk, chunks)):
            raise ValueError(f"layers={description['layers']} and chunks={show(chunks)} for {len(blocks)} layers")
        for name, tensor in tensors.items():
            layer, _, rest = name.partition(".")
            place, _, field = rest.rpartition(".")
            lookup(layer, records, "layer").setdefault(place, {})[field] = tensor.to(model.device)
        dtype = next(iter(blocks[0].ffn.dense(Patch()).values())).dtype
        layers = zip(records.items(), blocks, chunks, strict=True)
        return [_Layer(layer, block.ffn, dtype, chunk, counts).patch(own) for (layer, own), block, chunk in layers]
    except Exception as error:  # no file ends in a traceback, whatever the checks let through
        raise ValueError(f"{path} does not hold patches of this zoo: {one_line(error, 300)}") from None


def _is_chunk(chunk: Any) -> bool:
    return chunk is None or (type(chunk) is int and chunk > 0)


def _read(path: str | Path) -> tuple[dict[str, Any], dict[str, Tensor]]:
    file = untrusted.regular(path, "patch file")
    try:
        description, tensors = untrusted.described(file)
        like(description, DESCRIPTION, "")
    except Exception as error:  # damaged files fail in many ways
        raise ValueError(f"{path} is damaged or no patch file of this zoo: {one_line(error, 200)}") from None
    if description["schema"] != SCHEMA:
        raise ValueError(f"{path} has schema {description['schema']}, this zoo ({VERSION}) reads {SCHEMA}")
    return description, tensors


def _terms(delta: Delta) -> list[Delta]:
    """The terms of a sum from the first to the last, any other update alone."""
    return [*_terms(delta.first), delta.second] if isinstance(delta, Sum) else [delta]


def _tensors(patches: Sequence[Patch]) -> dict[str, Tensor]:
    """All tensors of the patches by their name in a file."""
    tensors: dict[str, Tensor | None] = {}
    kinds = {cls: kind for kind, (cls, _) in KINDS.items()}
    for layer, patch in enumerate(patches):
        records: dict[str, Any] = {"input.0": patch.input, "routing": patch.routing}
        for name, delta in patch.weights.items():
            records |= {f"weights.{name}.{place}": term for place, term in enumerate(_terms(delta))}
        for place, record in records.items():
            if record is None:
                continue
            if type(record) not in kinds:
                raise ValueError(
                    f"{place}, a {type(record).__name__}, has no place in a file; kinds: {', '.join(KINDS)}"
                )
            kind = kinds[type(record)]
            prefix = f"{layer}.{place}" if kind == "Routing" else f"{layer}.{place}.{kind}"
            values = zip(KINDS[kind][1], vars(record).values(), strict=True)
            tensors |= {f"{prefix}.{field}": value for field, value in values}
        tensors |= {f"{layer}.biases.{name}": bias for name, bias in patch.biases.items()}
    return {name: tensor for name, tensor in tensors.items() if tensor is not None}


@dataclass(frozen=True)
class _Layer:
    """Makes the patch of one layer, of type dtype; counts: of sequences, and of chunks of each layer, so far."""

    layer: str
    ffn: FeedForward
    dtype: torch.dtype
    chunk: int | None
    counts: dict[str, int]

    def patch(self, records: Mapping[str, dict[str, Tensor]]) -> Patch:
        """The patch of the records {place: {field: tensor}}; raises ValueError for one that has no place in it."""
        weights: dict[str, Delta] = {}
        biases: dict[str, Tensor] = {}
        shear = routing = None
        W = self.ffn.weight(self.ffn.input_matrices[0])
        for place in sorted(records, key=lambda place: (len(place), place)):  # the terms of a sum in their order
            values = records[place]
            match place.split("."):
                case ["input", "0", "Shear"]:
                    shear = self.record(place, "Shear", values, W)
                case ["routing"]:
                    routing = self.record(place, "Routing", values, W)
                case ["biases"] if values.keys() <= set(self.ffn.matrices):
                    for name, bias in values.items():
                        self.check(f"biases.{name}", bias, "o", {"o": len(self.ffn.weight(name))})
                    biases = values
                case ["weights", name, k, kind] if (
                    name in self.ffn.matrices and k in PLACES and kind in KINDS.keys() - {"Routing"}
                ):
                    delta = self.record(place, kind, values, self.ffn.weight(name))
                    if name in weights and kind != "LowRank":
                        raise ValueError(f"{self.layer}.{place}: only low-rank updates are added to another")
                    weights[name] = Sum(weights[name], delta) if name in weights else delta
                case _:
                    raise ValueError(f"unknown tensors at {self.layer}.{place}")
        return Patch(shear, weights, biases, routing, self.chunk)

    def record(self, place: str, kind: str, values: dict[str, Tensor], W: Tensor) -> Any:
        """An update of W, or a routing; raises ValueError for other fields, and where they do not fit."""
        cls, axes = KINDS[kind]
        if not axes.keys() - {"core"} <= values.keys() <= axes.keys():
            raise ValueError(f"{self.layer}.{place} must hold {', '.join(axes)}, got {show(sorted(values))}")
        sizes = {"o": W.shape[0], "i": W.shape[1]}
        for field in [field for field in axes if field in values]:
            one_gate = field == "core" and values[field].shape[-1:] == (1,)  # one number for all ranks
            self.check(f"{place}.{field}", values[field], "t1" if one_gate else axes[field], sizes)
        made = cls(*(values.get(field) for field in axes))
        if kind == "Shear" and not made.a.square().sum(-1).all():
            raise ValueError(f"{self.layer}.{place}.a is zero, no shear starts there")
        if kind == "Routing" and not 0 <= made.index.min() <= made.index.max() < self.ffn.blocks:
            raise ValueError(f"{self.layer}.routing is one to others than the blocks 0 to {self.ffn.blocks - 1}")
        return made

    def check(self, name: str, tensor: Tensor, axes: str, sizes: dict[str, Any]) -> None:
        """Raises ValueError for other types than the model's, numbers that are not finite, sizes of axes other than
        those of `sizes`, which gains what is new, and leading dims (*) that are not as in zoo.core.delta, nor all 1."""
        name, own = f"{self.layer}.{name}", self.dtype
        wide = [own, torch.promote_types(own, torch.float32)]
        dtypes = {"index": [torch.int64], "weight": wide, "logits": wide}
        if tensor.dtype not in dtypes.get(name.rpartition(".")[2], [own]):
            raise ValueError(f"{name} is of {tensor.dtype}, the model of {own}")
        if not untrusted.finite(tensor):
            raise ValueError(f"{name} holds numbers that are not finite")
        dims, at = 1 if self.chunk is None else 2, tensor.dim() - len(axes)
        lead, last = tuple(tensor.shape[: max(at, 0)]), tensor.shape[max(at, 0) :]
        if (
            not 0 <= at <= dims
            or not tensor.numel()
            or (at < dims and set(lead) - {1})
            or any(sizes.setdefault(axis, size) != size for axis, size in zip("*" + axes, (lead, *last), strict=True))
            or (self.chunk is not None and sizes.get("t", 1) not in (1, self.chunk))
        ):
            wanted = ", ".join(str(sizes.get(axis, axis)) for axis in axes)
            raise ValueError(
                f"{name} of shape {tuple(tensor.shape)} must have {dims} leading dims, those of the other "
                f"fields, and end in ({wanted})"
            )
        for what, count in zip(("sequences", f"chunks in layer {self.layer}"), lead, strict=False):
            if count > 1 and self.counts.setdefault(what, count) != count:
                raise ValueError(f"{name} is of {count} {what}, others of {self.counts[what]}")
