"""Checkpoints that explain themselves: what is written beside the weights, and the one call that reads it back.

A checkpoint is somebody else's data: it loads with weights_only=True, names in it are looked up in dicts, and nothing
in it is ever imported or instantiated.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from zoo.config import lookup
from zoo.models import MODELS, Model

SCHEMA = 1
UPGRADES: dict[int, Callable[[dict[str, Any]], dict[str, Any]]] = {}
"""From schema n to a function that turns such a checkpoint into one of schema n + 1."""

OPTIONS = {"model", "task", "optim", "seed"}


def find(path: str | Path, name: str) -> Path:
    """The checkpoint file `path`, or `name` (best, last) in the run folder `path`; raises ValueError if absent."""
    path = Path(path)
    file = path / "checkpoints" / f"{name}.ckpt" if path.is_dir() else path
    if not file.is_file():
        raise ValueError(f"no checkpoint at {file}: give a .ckpt file, or a run folder with checkpoints/{name}.ckpt")
    return file


def read(path: Path) -> dict[str, Any]:
    """The checkpoint's plain contents at today's schema; raises ValueError for files that are not ours or damaged."""
    try:
        checkpoint = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # damaged files fail in many ways, none of which the user can tell apart
        reason = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        raise ValueError(f"{path} is damaged or no checkpoint of this zoo ({reason[:120]})") from None
    mark = checkpoint.get("zoo") if isinstance(checkpoint, dict) else None
    if not isinstance(mark, dict) or not {"hyper_parameters", "state_dict"} <= set(checkpoint):
        raise ValueError(f"{path} is no checkpoint of this zoo: it lacks the entries zoo, hyper_parameters, state_dict")
    schema = mark.get("schema")
    while schema != SCHEMA:
        if schema not in UPGRADES:
            raise ValueError(f"{path} has schema {schema!r}; this zoo reads {sorted(UPGRADES)} and {SCHEMA}")
        checkpoint = UPGRADES[schema](checkpoint)
        schema = checkpoint["zoo"]["schema"]
    options = checkpoint["hyper_parameters"]
    if not isinstance(options, dict) or set(options) != OPTIONS or not isinstance(options["model"], dict):
        raise ValueError(f"{path} must hold the options {sorted(OPTIONS)}, got {options!r:.200}")
    return checkpoint


def load(path: str | Path) -> Model:
    """The model of a checkpoint file, or the best one of a run folder, in eval mode on the CPU.

    Raises ValueError if the file is missing, damaged or foreign, or holds options, names or weights unknown here.
    """
    file = find(path, "best")
    checkpoint = read(file)
    options = checkpoint["hyper_parameters"]
    try:
        model = lookup(options["model"].get("name"), MODELS, "model")(**options)
        if dict(model.hparams) != options:
            raise ValueError("; ".join(differences(options, dict(model.hparams))))
        model.load_state_dict(checkpoint["state_dict"])
    except (ValueError, RuntimeError) as error:
        raise ValueError(f"{file} does not fit this zoo: {' '.join(str(error).split())[:400]}") from None
    return model.eval()


def differences(saved: dict[str, Any], asked: dict[str, Any], where: str = "") -> list[str]:
    """One line for each value of `asked` that `saved` lacks or holds differently."""
    lines = []
    for key, value in asked.items():
        old = saved.get(key)
        if isinstance(value, dict) and isinstance(old, dict):
            lines += differences(old, value, f"{where}{key}.")
        elif old != value:
            lines.append(f"{where}{key} is {old!r} in the checkpoint, {value!r} asked")
    return lines
