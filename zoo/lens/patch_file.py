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
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import reduce
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from safetensors.torch import save
from torch import Tensor, nn

from zoo.config import VERSION, one_line, show
from zoo.core.delta import Delta, Full, InputShift, LowRank, Scale, Sum
from zoo.core.layers import FeedForward
from zoo.core.patch import Patch, Routing
from zoo.files import whole
from zoo.lens.updates import MATRICES, terms
from zoo.models import Model
from zoo.training import untrusted
from zoo.training.validate import like

SCHEMA = 1
DESCRIPTION = {"schema": 0, "version": "", "fingerprint": "", "layers": 0, "about": {}, "chunks": None}
HEADER = 1 << 23  # bytes of names, shapes and description
TERMS = 16  # of a sum
KINDS: dict[str, type[Any]] = {"LowRank": LowRank, "Scale": Scale, "Full": Full, "Shear": InputShift}
AXES = {
    "LowRank": {"u": "or", "v": "ir", "core": "tr"},
    "Scale": {"rows": "o", "columns": "i"},
    "Full": {"matrix": "oi"},
    "Shear": {"a": "i", "shift": "i"},
    "Routing": {"index": "tk", "weight": "tk", "logits": "te"},
}
FIELDS = {"core": "gate"}
"""Names in files stay what they were when the first file was written: KINDS and FIELDS are those of today."""


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
    left = {name: tensor.to(model.device) for name, tensor in tensors.items()}
    counts: dict[str, int] = {}
    try:
        if not description["layers"] == len(chunks) == len(blocks) or not all(map(_is_chunk, chunks)):
            raise ValueError(f"layers={description['layers']} and chunks={show(chunks)} for {len(blocks)} layers")
        layers = enumerate(zip(blocks, chunks, strict=True))
        patches = [_Layer(left, counts, index, block.ffn, chunk).patch() for index, (block, chunk) in layers]
        if left:
            raise ValueError(f"unknown tensors {show(sorted(left), 200)}")
    except Exception as error:  # no file ends in a traceback, whatever the checks let through
        raise ValueError(f"{path} does not hold patches of this zoo: {one_line(error, 300)}") from None
    return patches


def _is_chunk(chunk: Any) -> bool:
    return chunk is None or (type(chunk) is int and chunk > 0)


def _read(path: str | Path) -> tuple[dict[str, Any], dict[str, Tensor]]:
    file = untrusted.regular(path, "patch file")
    try:
        with file.open("rb") as stream:
            size = int.from_bytes(stream.read(8), "little")
        if size > HEADER:
            raise ValueError(f"a header of {size} bytes")
        with safe_open(file, "pt") as opened:
            header = (opened.metadata() or {}).get("zoo", "")
            tensors = {name: opened.get_tensor(name) for name in opened.keys()}  # noqa: SIM118
        description = untrusted.copied(json.loads(header), 0)
        like(description, DESCRIPTION, "")
    except Exception as error:  # damaged files fail in many ways
        raise ValueError(f"{path} is damaged or no patch file of this zoo: {one_line(error, 200)}") from None
    if description["schema"] != SCHEMA:
        raise ValueError(f"{path} has schema {description['schema']}, this zoo ({VERSION}) reads {SCHEMA}")
    return description, tensors


def _tensors(patches: Sequence[Patch]) -> dict[str, Tensor]:
    """All tensors of the patches by their name in a file."""
    tensors: dict[str, Tensor] = {}
    kinds = {cls: kind for kind, cls in KINDS.items()}
    for layer, patch in enumerate(patches):
        deltas: dict[str, Any] = {f"{layer}.weights.{name}": delta for name, delta in patch.weights.items()}
        records = {f"{name}.{place}": term for name, delta in deltas.items() for place, term in enumerate(terms(delta))}
        if patch.input:
            records[f"{layer}.input.0"] = patch.input
        for name, term in records.items():
            if type(term) not in kinds:
                kind = type(term).__name__
                raise ValueError(f"an update of kind {kind} has no place in a file; kinds: {', '.join(KINDS)}")
            tensors |= _fields(f"{name}.{kinds[type(term)]}", kinds[type(term)], term)
        tensors |= {f"{layer}.biases.{name}": bias for name, bias in patch.biases.items()}
        if patch.routing:
            tensors |= _fields(f"{layer}.routing", "Routing", patch.routing)
    return tensors


def _fields(prefix: str, kind: str, record: Any) -> dict[str, Tensor]:
    values = {f"{prefix}.{name}": getattr(record, FIELDS.get(name, name)) for name in AXES[kind]}
    return {name: value for name, value in values.items() if value is not None}


@dataclass(frozen=True)
class _Layer:
    """Takes the patch of one layer out of `tensors`; counts: of sequences, and of chunks of each layer, so far."""

    tensors: dict[str, Tensor]
    counts: dict[str, int]
    index: int
    ffn: FeedForward
    chunk: int | None

    def patch(self) -> Patch:
        weights: dict[str, Delta] = {}
        biases: dict[str, Tensor] = {}
        for name in MATRICES:
            W = self.ffn.weight(name)
            if found := self.delta(f"{self.index}.weights.{name}", W):
                weights[name] = found
            biases |= self.record(f"{self.index}.biases", {name: "o"}, W)
        shear = self.term(f"{self.index}.input.0", ["Shear"], self.ffn.gate)
        return Patch(shear, weights, biases, self.routing(), self.chunk)

    def delta(self, name: str, W: Tensor) -> Delta | None:
        """The sum of the terms 0, 1, …: one of any kind, then low-rank ones."""
        found: list[Delta] = []
        while len(found) < TERMS:
            term = self.term(f"{name}.{len(found)}", ["LowRank"] if found else KINDS, W)
            if not term:
                break
            found.append(term)
        return reduce(Sum, found) if found else None  # type: ignore[arg-type]

    def term(self, name: str, kinds: Iterable[str], W: Tensor) -> Any:
        for kind in kinds:
            if values := self.record(f"{name}.{kind}", AXES[kind], W):
                if kind == "Shear" and not values["a"].square().sum(-1).all():
                    raise ValueError(f"{name}.{kind}.a is zero, no shear starts there")
                return KINDS[kind](**{FIELDS.get(field, field): value for field, value in values.items()})
        return None

    def routing(self) -> Routing | None:
        values = self.record(f"{self.index}.routing", AXES["Routing"], self.ffn.gate)
        if not values:
            return None
        routing, E = Routing(**values), self.ffn.blocks
        chosen = routing.index
        if max(chosen.shape[-1], routing.logits.shape[-1]) > E or not 0 <= chosen.min() <= chosen.max() < E:
            raise ValueError(f"{self.index}.routing is one to others than the blocks 0 to {E - 1}")
        return routing

    def record(self, name: str, axes: Mapping[str, str], W: Tensor) -> dict[str, Tensor]:
        """The fields of what stands under `name`, {} if it is not there; raises ValueError where they do not fit."""
        values = {field: self.tensors.pop(f"{name}.{field}") for field in axes if f"{name}.{field}" in self.tensors}
        missing = axes.keys() - values.keys() - {"core"}
        if values and missing:
            raise ValueError(f"{name} lacks {', '.join(sorted(missing))}")
        sizes = {"o": W.shape[0], "i": W.shape[1]}
        wide = torch.promote_types(W.dtype, torch.float32)
        dtypes = {"index": [torch.int64], "weight": [W.dtype, wide], "logits": [W.dtype, wide]}
        for field, tensor in values.items():
            if tensor.dtype not in dtypes.get(field, [W.dtype]):
                raise ValueError(f"{name}.{field} is of {tensor.dtype}, the model of {W.dtype}")
            if not untrusted.finite(tensor):
                raise ValueError(f"{name}.{field} holds numbers that are not finite")
            one_gate = field == "core" and tensor.shape[-1:] == (1,)  # one number for all ranks
            self.shape(f"{name}.{field}", tensor, "t1" if one_gate else axes[field], sizes)
        return values

    def shape(self, name: str, tensor: Tensor, axes: str, sizes: dict[str, Any]) -> None:
        """Raises ValueError unless equal axes are of equal sizes, those of `sizes` where it has them, and leading dims
        (*) as in zoo.core.delta, or fewer, all 1."""
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
        for what, count in zip(("sequences", f"chunks in layer {self.index}"), lead, strict=False):
            if count > 1 and self.counts.setdefault(what, count) != count:
                raise ValueError(f"{name} is of {count} {what}, others of {self.counts[what]}")
