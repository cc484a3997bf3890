"""Small trained models that come with the package, by name: regression/hypernet, text/transformer, and so on."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import Any

from safetensors.torch import save_file

from zoo.config import did_you_mean, show
from zoo.files import to_json, whole, write
from zoo.training import untrusted

WEIGHTS = Path(__file__).parents[1] / "weights"
SUMS = "SHA256.json"
"""The hashes of the files, by name."""
SHIPPED = ("zoo", "hyper_parameters", "task", "family")


def names() -> list[str]:
    """The names of the models that come with this package."""
    return sorted(f"{path.parent.name}/{path.stem}" for path in WEIGHTS.glob("*/*.safetensors"))


def find(name: Any) -> Path | None:
    """The file of a model that comes with this package, None for all other names."""
    return WEIGHTS / f"{name}.safetensors" if isinstance(name, str | Path) and str(name) in names() else None


def advice(path: Any, name: str) -> str:
    """What to do where `path` leads to no checkpoint `name` of a run."""
    close = did_you_mean(str(path), names())
    return close if close.endswith("?") else f": give a .ckpt file, or a run folder with checkpoints/{name}.ckpt"


def contents(path: Path) -> dict[str, Any]:
    """What a checkpoint of safetensors holds, under the names of all checkpoints; raises for every other file, and for
    one of this package that is not what was shipped."""
    if WEIGHTS in path.parents:
        name = path.relative_to(WEIGHTS).with_suffix("").as_posix()
        wanted = json.loads((WEIGHTS / SUMS).read_text(encoding="utf-8")).get(name)
        if (found := hashlib.sha256(path.read_bytes()).hexdigest()) != wanted:
            raise ValueError(f"its SHA256 is {found}, {show(wanted)} was shipped: install the package again")
    description, weights = untrusted.described(path)
    return {**description, "state_dict": weights}


def save(checkpoint: dict[str, Any], name: str, card: str, folder: Path = WEIGHTS) -> Path:
    """Writes what `load` needs of a checkpoint as FOLDER/name.safetensors, its card beside it, and their hashes."""
    path = folder / f"{name}.safetensors"
    path.parent.mkdir(parents=True, exist_ok=True)
    zoo = {"schema": checkpoint["zoo"]["schema"], "command": checkpoint["zoo"]["command"], "config": {}}
    description = {**{key: checkpoint[key] for key in SHIPPED}, "zoo": zoo}
    with whole(path) as temporary:
        save_file(checkpoint["state_dict"], temporary, {"zoo": to_json(description)})
        temporary.chmod(0o644)  # all who install the package read it
    write(path.with_suffix(".md"), card)
    files = sorted(folder.glob("*/*.safetensors"))
    sums = {f"{file.parent.name}/{file.stem}": hashlib.sha256(file.read_bytes()).hexdigest() for file in files}
    write(folder / SUMS, to_json(sums, 2) + "\n")
    return path
