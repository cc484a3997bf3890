"""Hostile files, made systematically from genuine ones: tables of places and of values that they may not have.

Every maker yields (what, file); a file is written just before it is yielded, at the same path.
"""

from __future__ import annotations

import copy
import io
import json
import pickle
import struct
import zipfile
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any
from unittest import mock

import torch
from safetensors import safe_open
from safetensors.torch import save_file

from zoo.config import show

File = tuple[str, Path]
At = tuple[Any, ...]
INFINITE, NAN = float("inf"), float("nan")
GONE = "left out"
DEEP = 100_000


def nested(times: int) -> Any:
    """A list that holds the one before it twice: 2**times values in a few bytes."""
    value: Any = [None]
    for _ in range(times):
        value = [value, value]
    return value


JUNK = [
    *(GONE, None, True, -1, 10**9, 2**63, 2**70, NAN, "junk", "x" * 5000, [1, "a"], nested(40), {"a": {"b": 1}}),
    *({(1, (2, 3)): 1}, torch.tensor([3, 3]), torch.tensor(1j)),
]
"""Values that hardly any field may have."""


def paths(value: Any, at: At = ()) -> Iterator[At]:
    """The places of all values in dicts and lists, of equal items of a list or state the first alone."""
    items = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    seen: set[str] = set()
    for key, item in items:
        alike = repr(item)[:8] if isinstance(key, int) else str(key)
        if alike not in seen:
            seen.add(alike)
            yield (*at, key)
            yield from paths(item, (*at, key))


def changed(content: Any, at: At, value: Any) -> Any:
    """A copy of `content` with another value at one place, or without that place; tensors are shared."""
    new = copy.copy(content)
    if at[1:]:
        new[at[0]] = changed(new[at[0]], at[1:], value)
    elif value is GONE:
        del new[at[0]]
    else:
        new[at[0]] = value
    return new


def edited(content: Any, edits: Iterable[tuple[At, Any]], save: Callable[[Any], Path]) -> Iterator[File]:
    """Files that differ from `content` at one place each."""
    for at, value in edits:
        yield f"{at} is {show(value)}", save(changed(content, at, value))


def checkpoints(content: Any, path: Path, edits: Iterable[tuple[At, Any]]) -> Iterator[File]:
    def save(new: Any) -> Path:
        torch.save(new, path)
        return path

    return edited(content, edits, save)


def fields(content: Any, tops: tuple[str, ...], share: int = 1) -> Iterator[tuple[At, Any]]:
    """Each value below the entries `tops` left out, or of another type, size and depth; share: one of so many alone."""
    for turn, at in enumerate(at for at in paths(content) if at[0] in tops):
        yield from ((at, value) for place, value in enumerate(JUNK) if (turn + place) % share == 0)


def sizes(content: Any) -> Iterator[tuple[At, Any]]:
    """Sizes that are not those of the weights, alone and together."""
    at, model = ("hyper_parameters", "model"), content["hyper_parameters"]["model"]
    names = [name for name, value in model.items() if isinstance(value, int) and not isinstance(value, bool)]
    yield from (((*at, name), size) for name in names for size in (0, 10**6, 2**31, 2**40, 2**62))
    for more in (
        *({"dim": size, "hidden": size, "layers": 10**6} for size in (2**20, 2**40, 2**61)),
        {"name": "moe", "experts": 10**6, "top_k": 1},
        {"name": "hypernet", "code_dim": 10**9},
    ):
        yield at, {**model, **more}


def tensors(t: torch.Tensor) -> list[Any]:
    """What no weight `t` may be; a Parameter and other kinds of floats are as good as it."""
    one_nan = torch.cat([t.flatten()[:-1], torch.tensor([NAN])]).view(t.shape)
    kinds = [t.to(kind) for kind in (torch.complex64, torch.long, torch.bool, torch.float8_e5m2, torch.double)]
    expanded = t.flatten()[:1].expand(10**12)
    values = [t * NAN, t + INFINITE, one_nan, t[None], t.flatten()[:0], expanded, t.to_sparse(), t.to("meta")]
    return [GONE, t.tolist(), torch.nn.Parameter(t), *kinds, *values]


def weights(content: Any) -> Iterator[tuple[At, Any]]:
    """State dicts with other names, dtypes, numbers and shapes."""
    state = content["state_dict"]
    for name in (min(state), max(state)):
        yield from ((("state_dict", name), value) for value in tensors(state[name]))
    for key in (5, None, (1, 2), True, "x" * 5000, ""):
        yield ("state_dict", key), torch.ones(2, 2)
    for dtype in (torch.complex64, torch.int32, torch.bool):
        yield ("state_dict",), {name: t.to(dtype) for name, t in state.items()}
    yield ("state_dict",), {f"w{i}": torch.zeros(1) for i in range(13_000)}


MARKER = "@hostile@"
MARKED = b"X" + struct.pack("<I", len(MARKER)) + MARKER.encode()


def codes(proof: Path) -> dict[str, bytes]:
    """Pickled values that no torch.save writes; the first ones make the folder `proof` where they are executed."""
    name = pickle.dumps(str(proof), 2)[2:-1].split(b"q\x00")[0]
    tuples = b"".join([b")", *[b"q\x90h\x90\x86"] * 40])
    return {
        "posix.mkdir": b"cposix\nmkdir\n" + name + b"\x85R",
        "builtins.eval": b"cbuiltins\neval\nX\x12\x00\x00\x00__import__('os')+1\x85R",
        "os.makedirs": b"cos\nmakedirs\n" + name + b"\x85R",
        "torch.load": b"ctorch\nload\n" + name + b"\x85R",
        "four gigabytes": b"cbuiltins\nbytearray\n\x8a\x05\x00\x00\x00\x00\x01\x85R",
        "deep lists": b"]" * DEEP + b"a" * (DEEP - 1),
        "deep tuples": b")" + b"\x85" * DEEP,
        "shared tuples": tuples,
        "a key of shared tuples": b"}" + tuples + b"K\x01s",
        "a million lists": b"](" + b"]" * 450_000 + b"e",
        "a far memo": b"]r\xff\xff\xff\x7f",
        "no memo": b"j\xfe\xff\xff\x7f",
        "nothing on the stack": b"0000000",
        "a broken tensor": b"ctorch._utils\n_rebuild_tensor_v2\n)R",
        "a dict with attributes": b"ccollections\nOrderedDict\n)R}X\x05\x00\x00\x00itemsK\x05sb",
    }


def rewritten(content: Any, path: Path, change: Callable[[bytes], bytes], **options: Any) -> Path:
    """Saved with another pickle; options: of zipfile, such as a compression."""
    torch.save(content, buffer := io.BytesIO())
    ends_as_torch = mock.patch("zipfile.ZIP_FILECOUNT_LIMIT", 0)
    with ends_as_torch, zipfile.ZipFile(buffer) as old, zipfile.ZipFile(path, "w", **options) as new:
        for name in old.namelist():
            data = old.read(name)
            new.writestr(name, change(data) if name.endswith("/data.pkl") else data)
    return path


def archives(content: Any, path: Path, proof: Path) -> Iterator[File]:
    """Pickles and archives that torch.save does not write."""
    places = (("zoo", "schema"), ("hyper_parameters", "model", "dim"), ("task",))
    for turn, (what, code) in enumerate(codes(proof).items()):
        marked = changed(content, at := places[turn % 3], MARKER)
        yield f"{what} at {at[-1]}", rewritten(marked, path, lambda old, code=code: old.replace(MARKED, code))
    rewritten(content, path, lambda old: old)
    with mock.patch("zipfile.ZIP_FILECOUNT_LIMIT", 0), zipfile.ZipFile(path, "a") as archive:
        archive.writestr("archive/DATA.pkl", b"")
    yield "two pickles", path
    torch.save([torch.zeros(3) for _ in range(16_000)], path)
    yield "a long directory", path


def damaged(genuine: bytes, path: Path) -> Iterator[File]:
    """Files that are none: cut, flipped, foreign."""
    size = len(genuine)
    files = {f"cut at {share}": genuine[: int(share * size)] for share in (0.0, 0.1, 0.5, 0.9, 0.99, 0.9999)}
    for place in range(50, size, size // 12):
        files[f"flipped at {place}"] = genuine[:place] + bytes([genuine[place] ^ 255]) + genuine[place + 1 :]
    files |= {"text": b"step,loss\n1,2\n", "zeros": bytes(1000), "pickle": pickle.dumps({"zoo": 1})}
    for what, data in {**files, "two": genuine * 2, "ahead": b"x" * 100 + genuine}.items():
        path.write_bytes(data)
        yield what, path


def patches(genuine: Path, path: Path) -> Iterator[File]:
    """Patch files with other tensors and descriptions, right in everything else, and other headers."""
    with safe_open(genuine, "pt") as file:
        stored = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
        about = json.loads(file.metadata()["zoo"])

    def save(new: Any) -> Path:
        text = new["about"] if isinstance(new["about"], str) else json.dumps(new["about"])
        save_file({name: t.clone().contiguous() for name, t in new["tensors"].items()}, path, {"zoo": text})
        return path

    edits = [*_tensors(stored), *_descriptions(about)]
    yield from edited({"tensors": stored, "about": about}, edits, save)
    data = genuine.read_bytes()
    header = data[8 : 8 + int.from_bytes(data[:8], "little")]
    for old, new in (
        *((b'"data_offsets":[0,', b'"data_offsets":[9,'), (b'"F64"', b'"F4"')),
        (b'"shape":[1,', b'"shape":[9223372036854775807,'),
    ):
        other = header.replace(old, new)
        path.write_bytes(struct.pack("<Q", len(other)) + other + data[8 + len(header) :])
        yield f"header with {new!r}", path
    for size in (0, 7, 2**31, 2**40, 2**63):
        path.write_bytes(struct.pack("<Q", size) + data[8:])
        yield f"a header of {size} bytes", path


def _tensors(stored: dict[str, torch.Tensor]) -> Iterator[tuple[At, Any]]:
    for name, t in list(stored.items())[:: len(stored) // 5]:
        kinds = [t.to(kind) for kind in (torch.float32, torch.float16, torch.long, torch.bool)]
        shapes = [t.flatten()[0], t.flatten()[:0], t[0], t[None], t.expand(7, *t.shape[1:])]
        short = t[..., :-1] if t.shape[-1] > 1 else t[:, :-1]
        for value in (GONE, *kinds, *shapes, short, t * NAN, t + INFINITE):
            yield ("tensors", name), value
        yield ("tensors", f"{name}.u"), t
    D, F = 16, 24
    one, row = torch.ones(1, F, 1).double(), torch.ones(1, D).double()
    pair, shear = {"u": one, "v": torch.ones(1, D, 1).double()}, {"a": row, "shift": row}
    index, weight = torch.zeros(1, 4, 1).long(), torch.ones(1, 4, 1).double()
    routings = [(index - 1, weight), (index + 10**9, weight), (index.double(), weight), (index[:, :2], weight[:, :3])]
    names = [f"0.routing.{name}" for name in ("index", "weight", "logits")]
    for more in (
        {f"0.input.0.LowRank.{name}": t for name, t in pair.items()},
        {f"0.input.{i}.Shear.{name}": t for i in (0, 1) for name, t in shear.items()},
        {"0.input.0.Shear.a": row * 0, "0.input.0.Shear.shift": row},
        {"0.weights.up.0.Module.u": one},
        {".".join(["0"] * DEEP): one},
        {"0.weights.down.0.LowRank.core": torch.ones(1, 3, 5).double()},
        {names[0]: index},
        *(dict(zip(names, (i, w, w), strict=True)) for i, w in [*routings, (index[:, :0], weight[:, :0])]),
    ):
        yield ("tensors",), {**stored, **more}
    without_up = {name: t for name, t in stored.items() if ".up." not in name}
    many = {f"0.weights.up.{i}.LowRank.{name}": t[:, :1] * 0 for i in range(5000) for name, t in pair.items()}
    for more in (many, {f"0.weights.up.0.LowRank.{name}": torch.tensor(1.0).double() for name in pair}):
        yield ("tensors",), {**without_up, **more}


def _descriptions(about: dict[str, Any]) -> Iterator[tuple[At, Any]]:
    values = [GONE, None, -1, 10**9, 2**70, NAN, "x", [], [None, 1], {}, [0, None], [True, None], [1, 1], [10**9] * 2]
    for name in about:
        yield from ((("about", name), value) for value in values if name != "about" or not isinstance(value, dict))
    yield ("about", "chunks"), [4, 4]
    deep = json.dumps(about).replace('"form"', '"x": ' + "[" * 5000 + "]" * 5000 + ', "form"')
    for text in ("[" * DEEP + "]" * DEEP, deep, "[]", "5", "", "9" * DEEP, "null"):
        yield ("about",), text
