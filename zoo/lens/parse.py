"""From the tensors of a patch file to patches that work in a model, or a ValueError that names the field.

Axes of a field after its leading dims: o outputs, i inputs, r rank, t tokens, k chosen blocks, e routed blocks.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import MISSING, fields
from functools import reduce
from typing import Any

import torch
from torch import Tensor

from zoo.config import lookup, show
from zoo.core.delta import Delta, Full, InputShift, LowRank, Scale, Sum
from zoo.core.layers import Block, FeedForward
from zoo.core.patch import Patch, Routing
from zoo.training.untrusted import finite

KINDS: dict[str, type] = {"LowRank": LowRank, "Scale": Scale, "Full": Full, "Shear": InputShift}
FIELDS = {"core": "gate"}
"""Names in files stay what they were when the first file was written: KINDS and FIELDS are those of today."""
AXES = {"u": "or", "v": "ir", "rows": "o", "columns": "i", "matrix": "oi", "a": "i", "shift": "i", "bias": "o"}
AXES |= {"index": "tk", "weight": "tk", "logits": "te", "gate": "tr"}
TERMS = 16  # of a sum


def read_patches(tensors: Mapping[str, Tensor], blocks: Sequence[Block], chunks: Sequence[Any]) -> list[Patch]:
    """The patches in `tensors`, one for each of `blocks`; raises ValueError where they could not be used."""
    tree: dict[str, Any] = {}
    for name, tensor in tensors.items():
        *path, last = name.split(".", 6)
        node = reduce(lambda node, key: _group(node, "a name").setdefault(key, {}), path, tree)
        _group(node, "a name")[last] = tensor
    layers = [Layer(str(i), block.ffn, chunks[i]) for i, block in enumerate(blocks)]
    patches = [layer.patch(_group(tree.get(layer.name, {}), layer.name)) for layer in layers]
    batches = {lead[0] for layer in layers for lead in layer.leads if lead} - {1}
    if len(batches) > 1:
        raise ValueError(f"layers are of batches of {show(sorted(batches))}")
    return patches


def _group(node: Any, name: str) -> dict[str, Any]:
    if not isinstance(node, dict):
        raise ValueError(f"{name} is a tensor where a group of them is expected")
    return node


class Layer:
    """Reads what a file holds of one layer; leads: the leading dims found so far, equal or 1 in the end."""

    def __init__(self, name: str, ffn: FeedForward, chunk: Any):
        if chunk is not None and not (type(chunk) is int and chunk > 0):
            raise ValueError(f"chunk {show(chunk)} of layer {name} is no number of tokens")
        self.name, self.ffn, self.chunk = name, ffn, chunk
        self.matrices = {matrix: ffn.weight(matrix) for matrix in (*ffn.input_matrices, "down")}
        self.leads: set[tuple[int, ...]] = set()

    def patch(self, node: dict[str, Any]) -> Patch:
        input_matrices: dict[str, Any] = {"weights": self.delta, "biases": self.bias}
        parts: dict[str, Any] = {part: {} for part in input_matrices}
        for part, read in input_matrices.items():
            for matrix, value in _group(node.get(part, {}), f"{self.name}.{part}").items():
                W = lookup(matrix, self.matrices, f"{self.name}.{part}: the matrix")
                parts[part][matrix] = read(f"{self.name}.{part}.{matrix}", value, W)
        shear: Any = None
        if "input" in node:
            shear = self.delta(f"{self.name}.input", node["input"], self.matrices["gate"])
            if not isinstance(shear, InputShift):
                raise ValueError(f"{self.name}.input is a {type(shear).__name__}; only a Shear acts on the input")
        routing = self.routing(f"{self.name}.routing", node["routing"]) if "routing" in node else None
        full = {lead for lead in self.leads if len(lead) == (1 if self.chunk is None else 2)}
        for dims in zip(*full, strict=True):
            if len(set(dims) - {1}) > 1:
                raise ValueError(f"layer {self.name} has leading dims that differ: {show(sorted(full))}")
        return Patch(shear, parts["weights"], parts["biases"], routing, self.chunk)

    def bias(self, name: str, bias: Any, W: Tensor) -> Tensor:
        return self.record(name, {"bias": bias}, {"o": W.shape[0]}, {"bias": (W.dtype,)})["bias"]

    def delta(self, name: str, terms: Any, W: Tensor) -> Delta:
        places = list(map(str, range(len(_group(terms, name)))))
        if not 0 < len(places) <= TERMS or terms.keys() != set(places):
            raise ValueError(f"{name} must hold the terms 0, 1, … of a sum, at most {TERMS}, got {show(list(terms))}")
        deltas = [self.term(f"{name}.{place}", terms[place], W) for place in places]
        if not all(isinstance(delta, LowRank) for delta in deltas[1:]):
            raise ValueError(f"{name} is a sum whose later terms are not low-rank")
        return reduce(Sum, deltas)

    def term(self, name: str, kinds: Any, W: Tensor) -> Any:
        if len(_group(kinds, name)) != 1:
            raise ValueError(f"{name} must be of one kind, got {show(list(kinds))}")
        ((kind, values),) = kinds.items()
        cls = lookup(kind, KINDS, f"{name}: the kind")
        values = {FIELDS.get(field, field): value for field, value in _group(values, name).items()}
        needed = {field.name for field in fields(cls) if field.default is MISSING}
        if needed - values.keys() or values.keys() - {field.name for field in fields(cls)}:
            raise ValueError(f"{name}.{kind} must hold {', '.join(sorted(needed))}, got {show(list(values))}")
        sizes = {"o": W.shape[0], "i": W.shape[1], **({} if cls is LowRank else {"r": 1})}
        values = self.record(f"{name}.{kind}", values, sizes, dict.fromkeys(values, (W.dtype,)))
        if cls is InputShift and not values["a"].square().sum(-1).all():
            raise ValueError(f"{name}.{kind}.a is zero, no shear starts there")
        return cls(**values)

    def routing(self, name: str, values: Any) -> Routing:
        if _group(values, name).keys() != {"index", "weight", "logits"}:
            raise ValueError(f"{name} must hold index, weight and logits, got {show(list(values))}")
        exact = self.ffn.gate.dtype
        wide = (exact, torch.promote_types(exact, torch.float32))
        values = self.record(name, values, {}, {"index": (torch.int64,), "weight": wide, "logits": wide})
        index, E = values["index"], self.ffn.blocks
        if max(index.shape[-1], values["logits"].shape[-1]) > E or not 0 <= index.min() <= index.max() < E:
            raise ValueError(f"{name} is one to others than the blocks 0 to {E - 1}")
        return Routing(**values)

    def record(
        self, name: str, values: dict[str, Any], sizes: dict[str, int], dtypes: dict[str, Any]
    ) -> dict[str, Tensor]:
        """`values` if each is a finite tensor of its dtype, if equal axes are of equal sizes, those of `sizes` where it
        has them, and if all have equal leading dims: as in zoo.core.delta, or fewer, all 1."""
        sizes, leads = dict(sizes), set()
        for field, tensor in values.items():
            axes, dims = AXES[field], 1 if self.chunk is None else 2
            where = name if field == "bias" else f"{name}.{field}"
            if not isinstance(tensor, Tensor) or tensor.dtype not in dtypes[field]:
                found = tensor.dtype if isinstance(tensor, Tensor) else "no tensor"
                raise ValueError(f"{where} must be of {' or '.join(map(str, dtypes[field]))}, got {found}")
            if field == "gate" and tensor.shape[-1:] == (1,):
                axes = "t1"  # one number for all ranks
            at = tensor.dim() - len(axes)
            lead, last = tuple(tensor.shape[: max(at, 0)]), tensor.shape[max(at, 0) :]
            if (
                at < 0
                or not tensor.numel()
                or at > dims
                or (at < dims and set(lead) - {1})
                or any(sizes.setdefault(axis, size) != size for axis, size in zip(axes, last, strict=True))
            ):
                wanted = f"({', '.join(str(sizes.get(axis, axis)) for axis in axes)})"
                raise ValueError(
                    f"{where} of shape {tuple(tensor.shape)} must have {dims} leading dims and end in {wanted}"
                )
            if not finite(tensor):
                raise ValueError(f"{where} holds numbers that are not finite")
            leads.add(lead)
        if len(leads) > 1:
            raise ValueError(f"{name} has fields of different leading dims: {show(sorted(leads))}")
        if self.chunk is not None and sizes.get("t", 1) not in (1, self.chunk):
            raise ValueError(f"{name} is of {sizes['t']} tokens in chunks of {self.chunk}")
        self.leads |= leads
        return values
