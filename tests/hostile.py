"""Hostile files, made systematically from genuine ones: each field with values of other types, sizes and depths.

Every maker yields (what, file); a file is written just before it is yielded, at the same path.
"""

from __future__ import annotations

import copy
import io
import json
import pickle
import struct
import zipfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from safetensors.torch import save_file

File = tuple[str, Path]
INFINITE, NAN = float("inf"), float("nan")


def nested(times: int, last: Any = None) -> Any:
    """A list that holds the one before it twice: 2**times values in a few bytes."""
    value = [last]
    for _ in range(times):
        value = [value, value]
    return value


def junk() -> dict[str, Any]:
    """Values that hardly any field may have."""
    return {
        "nothing": None,
        "true": True,
        "minus one": -1,
        "a billion": 10**9,
        "2**63": 2**63,
        "2**70": 2**70,
        "nan": NAN,
        "a word": "junk",
        "long": "x" * 5000,
        "a list": [1, "a"],
        "shared lists": nested(40),
        "a dict": {"a": {"b": 1}},
        "a key of tuples": {(1, (2, 3)): 1},
        "a tensor": torch.tensor([3, 3]),
        "a complex tensor": torch.tensor(1j),
    }


def paths(value: Any, at: tuple[Any, ...] = ()) -> Iterator[tuple[Any, ...]]:
    """The places of all values in dicts and lists, of equal items of a list or state the first alone."""
    items = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    seen: set[str] = set()
    for key, item in items:
        alike = repr(item)[:8] if isinstance(key, int) else str(key)
        if alike not in seen:
            seen.add(alike)
            yield (*at, key)
            yield from paths(item, (*at, key))


def changed(content: Any, at: tuple[Any, ...], value: Any) -> Any:
    """A copy of `content` with another value at one place; tensors are shared."""
    if not at:
        return value
    new = copy.copy(content)
    new[at[0]] = changed(new[at[0]], at[1:], value)
    return new


def without(content: Any, at: tuple[Any, ...]) -> Any:
    inner = content
    for key in at[:-1]:
        inner = inner[key]
    inner = {key: item for key, item in inner.items() if key != at[-1]} if isinstance(inner, dict) else inner[:-1]
    return changed(content, at[:-1], inner)


def rewritten(content: Any, path: Path, change: Callable[[bytes], bytes], **options: Any) -> Path:
    """Saved with another pickle; options: of zipfile, such as a compression."""
    torch.save(content, buffer := io.BytesIO())
    with zipfile.ZipFile(buffer) as old, zipfile.ZipFile(path, "w", **options) as new:
        for name in old.namelist():
            data = old.read(name)
            new.writestr(name, change(data) if name.endswith("/data.pkl") else data)
    return path


MARKER = "@hostile@"
MARKED = b"X" + struct.pack("<I", len(MARKER)) + MARKER.encode()
DEEP = 100_000


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
    }


def damaged(genuine: bytes, path: Path) -> Iterator[File]:
    """Files that are none: cut, flipped, foreign."""
    for share in (0.0, 0.1, 0.5, 0.9, 0.99, 0.9999):
        path.write_bytes(genuine[: int(share * len(genuine))])
        yield f"cut at {share}", path
    for place in range(50, len(genuine), len(genuine) // 12):
        path.write_bytes(genuine[:place] + bytes([genuine[place] ^ 255]) + genuine[place + 1 :])
        yield f"flipped at {place}", path
    foreign = {"text": b"step,loss\n1,2\n", "zeros": bytes(1000), "pickle": pickle.dumps({"zoo": 1})}
    for what, data in {**foreign, "two": genuine * 2, "ahead": b"x" * 100 + genuine}.items():
        path.write_bytes(data)
        yield what, path


def archives(content: Any, path: Path, proof: Path) -> Iterator[File]:
    """Pickles and archives that torch.save does not write."""
    places = (("zoo", "schema"), ("hyper_parameters", "model", "dim"), ("task",))
    for turn, (what, code) in enumerate(codes(proof).items()):
        marked = changed(content, at := places[turn % 3], MARKER)
        yield f"{what} at {at[-1]}", rewritten(marked, path, lambda old, code=code: old.replace(MARKED, code))
    yield "compressed", rewritten(content, path, lambda old: old, compression=zipfile.ZIP_DEFLATED)
    big = {**content, "state_dict": {"zeros": torch.zeros(1 << 24)}}
    yield "64 MB in 64 kB", rewritten(big, path, lambda old: old, compression=zipfile.ZIP_DEFLATED)
    with zipfile.ZipFile(path, "a") as archive:
        archive.writestr("archive/DATA.pkl", b"")
    yield "two pickles", path
    torch.save([torch.zeros(3) for _ in range(16_000)], path)
    yield "a long directory", path


SOME = torch.ones(2, 2)
TENSORS: dict[str, Callable[[torch.Tensor], Any]] = {
    "complex": lambda t: t.to(torch.complex64),
    "integer": lambda t: t.long(),
    "bool": lambda t: t.bool(),
    "float8": lambda t: t.to(torch.float8_e5m2),
    "double": lambda t: t.double(),
    "nan": lambda t: t * NAN,
    "infinite": lambda t: t + INFINITE,
    "one nan": lambda t: torch.cat([t.flatten()[:-1], torch.tensor([NAN])]).view(t.shape),
    "other shape": lambda t: t[None],
    "empty": lambda t: t.flatten()[:0],
    "expanded": lambda t: t.flatten()[:1].expand(10**12),
    "sparse": lambda t: t.to_sparse(),
    "meta": lambda t: t.to("meta"),
    "no tensor": lambda t: t.tolist(),
    "parameter": torch.nn.Parameter,  # the only one that is as good as a tensor
}


def weights(content: Any, path: Path) -> Iterator[File]:
    """State dicts with other names, dtypes, numbers and shapes."""
    names = list(content["state_dict"])
    for what, change in TENSORS.items():
        for name in (names[0], names[-1]):
            torch.save(changed(content, ("state_dict", name), change(content["state_dict"][name])), path)
            yield f"{name} {what}", path
    for key in (5, None, (1, 2), True, "x" * 5000, ""):
        torch.save({**content, "state_dict": {**content["state_dict"], key: SOME}}, path)
        yield f"a weight named {key!r:.20}", path
    for dtype in (torch.complex64, torch.int32, torch.bool):
        torch.save({**content, "state_dict": {n: t.to(dtype) for n, t in content["state_dict"].items()}}, path)
        yield f"all {dtype}", path
    named = b"X\x09\x00\x00\x00_metadata"
    for attribute in ("_metadata", "items", "keys", "get", "__len__"):
        state = copy.copy(content["state_dict"])
        state._metadata = 5
        other = b"X" + struct.pack("<I", len(attribute)) + attribute.encode()
        changes = (named, other)
        yield (
            f"state_dict.{attribute} = 5",
            rewritten({**content, "state_dict": state}, path, lambda old, c=changes: old.replace(*c)),
        )
    torch.save({**content, "state_dict": {f"w{i}": torch.zeros(1) for i in range(13_000)}}, path)
    yield "13,000 weights", path


def fields(content: Any, path: Path, tops: tuple[str, ...], share: int = 1) -> Iterator[File]:
    """Each value below the entries `tops` left out, or of another type, size and depth; share: one of so many alone."""
    for turn, at in enumerate(at for at in paths(content) if at[0] in tops):
        if turn % share == 0:
            torch.save(without(content, at), path)
            yield f"{at} left out", path
        for place, (what, value) in enumerate(junk().items()):
            if (turn + place) % share == 0:
                torch.save(changed(content, at, value), path)
                yield f"{at} is {what}", path


def sizes(content: Any, path: Path) -> Iterator[File]:
    """Sizes that are not those of the weights, alone and together."""
    model = content["hyper_parameters"]["model"]
    for name, value in model.items():
        if isinstance(value, int) and not isinstance(value, bool):
            for size in (0, 10**6, 2**31, 2**40, 2**62):
                torch.save(changed(content, ("hyper_parameters", "model", name), size), path)
                yield f"{name}={size}", path
    for size in (2**20, 2**40, 2**61):
        options = {**model, "dim": size, "hidden": size, "layers": 10**6}
        torch.save(changed(content, ("hyper_parameters", "model"), options), path)
        yield f"everything is {size}", path
    for family in ({"name": "moe", "experts": 10**6, "top_k": 1}, {"name": "hypernet", "code_dim": 10**9}):
        torch.save(changed(content, ("hyper_parameters", "model"), {**model, **family}), path)
        yield f"a {family['name']}", path


def patches(genuine: Path, path: Path) -> Iterator[File]:
    """Patch files with other tensors and descriptions, right in everything else."""
    with safe_open(genuine, "pt") as file:
        tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
        about = json.loads(file.metadata()["zoo"])

    def save(new: dict[str, Any], description: Any) -> Path:
        text = description if isinstance(description, str) else json.dumps(description)
        save_file({name: t.clone().contiguous() for name, t in new.items()}, path, {"zoo": text})
        return path

    for name, t in list(tensors.items())[:: len(tensors) // 5]:
        yield f"without {name}", save({n: v for n, v in tensors.items() if n != name}, about)
        changes = {
            "float32": t.float(), "integer": t.long(), "bool": t.bool(), "nan": t * NAN, "infinite": t + INFINITE,
            "scalar": t.flatten()[0], "empty": t.flatten()[:0], "no lead": t[0], "two leads": t[None],
            "another batch": t.expand(7, *t.shape[1:]), "short": t[..., :-1] if t.shape[-1] > 1 else t[:, :-1],
            "half": t.half(),
        }  # fmt: skip
        for what, value in changes.items():
            yield f"{name} {what}", save({**tensors, name: value}, about)
        yield f"{name} a group", save({**tensors, f"{name}.u": t}, about)
    D, F = 16, 24
    one = torch.ones(1, F, 1).double()
    pair = {"u": torch.ones(1, F, 1).double(), "v": torch.ones(1, D, 1).double()}
    shear = {"a": torch.ones(1, D).double(), "shift": torch.ones(1, D).double()}
    routing = {
        "index": torch.zeros(1, 4, 1).long(),
        "weight": torch.ones(1, 4, 1).double(),
        "logits": torch.ones(1, 4, 1).double(),
    }
    extra: dict[str, dict[str, Any]] = {
        "an input that is no shear": {f"0.input.0.LowRank.{f}": t for f, t in pair.items()},
        "a sum as an input": {f"0.input.{i}.Shear.{f}": t for i in (0, 1) for f, t in shear.items()},
        "a shear from zero": {"0.input.0.Shear.a": shear["a"] * 0, "0.input.0.Shear.shift": shear["shift"]},
        "5000 terms": {f"0.weights.up.{i}.LowRank.{f}": t[:, :1] * 0 for i in range(5000) for f, t in pair.items()},
        "a scalar factor": {f"0.weights.up.0.LowRank.{f}": torch.tensor(1.0).double() for f in pair},
        "an unknown kind": {"0.weights.up.0.Module.u": one},
        "a name without end": {".".join(["0"] * 100_000): one},
        "a routing of other shapes": {f"0.routing.{f}": t[:, : len(f) - 3] for f, t in routing.items()},
        "a routing of floats": {f"0.routing.{f}": t.double() for f, t in routing.items()},
        "a negative choice": {f"0.routing.{f}": t - 1 for f, t in routing.items()},
        "a far choice": {f"0.routing.{f}": t + 10**9 for f, t in routing.items()},
        "half a routing": {"0.routing.index": routing["index"]},
        "an empty routing": {f"0.routing.{f}": t[:, :0] for f, t in routing.items()},
        "a core of another length": {"0.weights.down.0.LowRank.core": torch.ones(1, 3, 5).double()},
    }  # fmt: skip
    for what, more in extra.items():
        base = {n: t for n, t in tensors.items() if not what.startswith(("5000", "a scalar")) or ".up." not in n}
        yield what, save({**base, **more}, about)
    for name in about:
        yield f"no {name}", save(tensors, {n: v for n, v in about.items() if n != name})
        for value in (
            None,
            -1,
            10**9,
            2**70,
            NAN,
            "x",
            [],
            [None, 1],
            {},
            [0, None],
            [True, None],
            [1, 1],
            [10**9] * 2,
        ):
            if name != "about" or not isinstance(value, dict):
                yield f"{name} is {value}", save(tensors, {**about, name: value})
    for what, text in {
        "deep JSON": "[" * DEEP + "]" * DEEP,
        "deep about": json.dumps(about).replace('"form"', '"x": ' + "[" * 5000 + "]" * 5000 + ', "form"'),
        "a list": "[]", "a number": "5", "empty": "", "digits": "9" * 100_000, "null": "null",
    }.items():  # fmt: skip
        yield what, save(tensors, text)
    yield "wrong chunks", save(tensors, {**about, "chunks": [4, 4]})
    data = genuine.read_bytes()
    for size in (0, 7, 2**31, 2**40, 2**63):
        path.write_bytes(struct.pack("<Q", size) + data[8:])
        yield f"a header of {size} bytes", path
    header = data[8 : 8 + int.from_bytes(data[:8], "little")]
    for what, old, new in (
        ("offsets", b'"data_offsets":[0,', b'"data_offsets":[9,'),
        ("dtype", b'"F64"', b'"F4"'),
        ("shape", b'"shape":[1,', b'"shape":[9223372036854775807,'),
    ):
        other = header.replace(old, new)
        path.write_bytes(struct.pack("<Q", len(other)) + other + data[8 + len(header) :])
        yield f"wrong {what}", path
