"""Files of somebody else as plain data: a pickle is scanned, opcode by opcode, before torch.load(…, weights_only=True)
sees it, and what comes out is copied, so that nothing shared, subclassed or endless gets past here."""

from __future__ import annotations

import json
import math
import pickletools
import re
from contextlib import suppress
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from torch import Tensor

from zoo.config import show

CODES = 400_000  # opcodes of a pickle, beside one for each BYTES of the file; a tensor takes 35
BYTES = 200
DEPTH = 32
HEADER = 1 << 23  # bytes of names, shapes and description in a file of safetensors
ITEMS = 1_000_000  # values in all, a shared one at each place
TUPLE = 1000  # values in a tuple and the tuples in it: a dict hashes them all
GLOBALS = re.compile(r"collections OrderedDict|torch._utils _rebuild_(tensor_v2|parameter)|torch \w{1,20}Storage")


def regular(path: Any, what: str, advice: str = "") -> Path:
    """`path` if it is that of a file; raises ValueError, that there is no `what`, for all else that could be passed."""
    with suppress(TypeError, ValueError, OSError):
        if Path(path).is_file():
            return Path(path)
    raise ValueError(f"no {what} at {str(path)[:200]}{advice}")


def contents(path: Path) -> Any:
    """The contents of a file of torch.save as plain values and tensors; raises ValueError for every other file."""
    try:
        size = path.stat().st_size
        with path.open("rb") as file:
            if file.peek(4)[:4] != b"PK\3\4":
                raise ValueError("torch would read it as a file of older versions")
            archive: Any = torch._C.PyTorchFileReader(file)  # as torch.load does: no two readers differ
            if sum(map(archive.get_record_size, archive.get_all_records())) > size:
                raise ValueError("torch compresses no record")
            _scan(archive.get_record("data.pkl"), CODES + size // BYTES)
        content = torch.load(path, map_location="cpu", weights_only=True)
    except Exception:  # damaged files fail in many ways, none of which the user can tell apart
        raise ValueError("it is damaged or no checkpoint: torch.load(…, weights_only=True) cannot read it") from None
    return copied(content, size)


def described(path: Path) -> tuple[Any, dict[str, Tensor]]:
    """What a file of safetensors says of itself under the key `zoo`, JSON, and its tensors; raises for every other."""
    with path.open("rb") as stream:
        size = int.from_bytes(stream.read(8), "little")
    if size > HEADER:
        raise ValueError(f"a header of {size} bytes")
    with safe_open(path, "pt") as opened:
        header = (opened.metadata() or {}).get("zoo", "")
        tensors = {name: opened.get_tensor(name) for name in opened.keys()}  # noqa: SIM118
    return copied(json.loads(header), 0), tensors


def _scan(pickle: bytes, codes: int) -> None:
    """Raises ValueError for a pickle that torch.save cannot have written or that would take too long."""
    stack: list[int] = []  # of each object: how many values its tuple has, and the tuples in it
    marks: list[int] = []
    memo: dict[Any, int] = {}
    for count, (code, arg, _) in enumerate(pickletools.genops(pickle)):
        if count > codes or (code.name == "GLOBAL" and not GLOBALS.fullmatch(str(arg))):
            raise ValueError(f"{show(arg)} at opcode {count}")
        if code.name == "MARK":
            marks.append(len(stack))
            continue
        needs, weight = code.stack_before, 1
        if marked := pickletools.markobject in needs:
            needs = needs[: needs.index(pickletools.markobject)]
        first = marks.pop() if marked else len(stack) - len(needs)
        if code.name.startswith("TUPLE"):
            weight += sum(stack[first:])
        elif code.name in ("BINGET", "LONG_BINGET"):
            weight = memo[arg]
        elif code.name in ("BINPUT", "LONG_BINPUT"):
            memo[arg] = stack[-1]
        if weight > TUPLE or first < 0:
            raise ValueError("a tuple is too large")
        del stack[first - len(needs) if marked else first :]
        stack += [weight] * len(code.stack_after)


def copied(value: Any, size: int) -> Any:
    """A copy of `value`, read from a file of `size` bytes, in plain dicts, lists and tuples. Raises ValueError for
    other types, for more than DEPTH levels or ITEMS values, and for tensors that take more memory than the file has."""
    # torch saves a tied matrix once under two names; an expanded tensor says more than it holds
    left = {"values": ITEMS, "bytes": 2 * size}

    def copy(value: Any, levels: int) -> Any:
        left["values"] -= 1
        if left["values"] < 0 or levels < 0:
            raise ValueError(f"it holds more than {ITEMS} values, or {DEPTH} levels of them")
        if isinstance(value, dict) and all(type(key) in (str, int) for key in dict.keys(value)):
            return {key: copy(item, levels - 1) for key, item in dict.items(value)}
        if type(value) in (list, tuple):
            return type(value)(copy(item, levels - 1) for item in value)
        if isinstance(value, Tensor) and value.layout == torch.strided:
            left["bytes"] -= value.numel() * value.element_size()
            if left["bytes"] >= 0:
                return value
        elif value is None or type(value) in (str, float, bool, int):
            return value
        raise ValueError(f"it holds a value of type {type(value).__name__}, or more than the file has")

    return copy(value, DEPTH)


def finite(t: Tensor) -> bool:
    """Whether all numbers of a tensor are finite, found in no memory."""
    return not t.numel() or not t.is_floating_point() or all(math.isfinite(end) for end in t.detach().aminmax())
