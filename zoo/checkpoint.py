"""Checkpoints that explain themselves: what is written beside the weights, and the one call that reads it back.

A checkpoint is somebody else's data: it loads with weights_only=True, names in it are looked up in dicts, and nothing
in it is ever imported or instantiated.
"""

from __future__ import annotations

import io
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from lightning.pytorch.plugins import TorchCheckpointIO

from zoo import __version__
from zoo.config import lookup
from zoo.files import whole
from zoo.models import MODELS, Model

SCHEMA = 3


def _text_of_four_domains(checkpoint: dict[str, Any]) -> dict[str, Any]:
    """Text had no source but its domains, and no tokens but bytes."""
    new = dict.fromkeys(("files", "hub", "subset", "documents", "column", "vocabulary"))
    for options in (checkpoint["hyper_parameters"], checkpoint["zoo"].get("config")):
        task = options.get("task") if isinstance(options, dict) else None
        if isinstance(task, dict) and task.get("name") == "text":
            task.update({**new, "tokenizer": "bytes", **task})
    checkpoint["zoo"]["schema"] = 2
    return checkpoint


def _factors_as_they_are_used(checkpoint: dict[str, Any]) -> dict[str, Any]:
    """Heads of factors gave (o,R) and (i,R), and each head was the first of two modules."""
    rank, weights = checkpoint["hyper_parameters"]["model"].get("rank"), {}

    def transposed(t: Any) -> Any:
        return t.unflatten(0, (-1, rank)).transpose(0, 1).flatten(0, 1)

    matrices = [name for name, t in checkpoint["state_dict"].items() if t.dim() > 1]
    for name, t in checkpoint["state_dict"].items():
        old = re.fullmatch(r"(decoder\.context_to_delta\.generator\.heads\.\w+_(\w+))\.0\.weight", name)
        if old and old[2] in "uv":
            t = transposed(t)
            for optimizer in checkpoint.get("optimizer_states", ()):
                # counted from the end: a matrix of two names, as tied embeddings have, is one parameter
                index = optimizer["param_groups"][0]["params"][matrices.index(name) - len(matrices)]
                state = optimizer["state"][index]
                state.update({key: transposed(m) for key, m in state.items() if m.dim() > 1})
        weights[f"{old[1]}.weight" if old else name] = t
    checkpoint["zoo"]["schema"] = 3
    return {**checkpoint, "state_dict": weights}


UPGRADES: dict[int, Callable[[dict[str, Any]], dict[str, Any]]] = {
    1: _text_of_four_domains,
    2: _factors_as_they_are_used,
}
"""From schema n to a function that turns such a checkpoint into one of schema n + 1."""

OPTIONS = {"model": dict, "task": dict, "optim": dict, "seed": int}


class Files(TorchCheckpointIO):
    """How the trainer writes and reads checkpoints: whole or not at all, and at today's schema."""

    def save_checkpoint(self, checkpoint: dict[str, Any], path: Any, storage_options: Any = None) -> None:
        # Lightning's own way goes through $TMPDIR; torch's own file hides why it could not be written
        content = io.BytesIO()
        torch.save(checkpoint, content)
        Path(path).parent.mkdir(parents=True, exist_ok=True)
        with whole(path) as temporary:
            temporary.write_bytes(content.getbuffer())

    def load_checkpoint(self, path: Any, map_location: Any = None, weights_only: bool | None = None) -> dict[str, Any]:
        checkpoint, here = read(Path(path)), str(Path(path).resolve().parent)
        for name, state in checkpoint.get("callbacks", {}).items():
            if "dirpath" in state:  # of a run folder that was moved, Lightning would forget the best score
                checkpoint["callbacks"][name] = _moved(state, state["dirpath"], here)
        return checkpoint


def _moved(value: Any, old: str, new: str) -> Any:
    if isinstance(value, dict):
        return {_moved(key, old, new): _moved(item, old, new) for key, item in value.items()}
    return value.replace(old, new, 1) if isinstance(value, str) else value


def find(path: str | Path, name: str) -> Path:
    """The checkpoint file `path`, or `name` (best, last) in the run folder `path`, last for best where nothing was
    validated; raises ValueError if absent."""
    path = Path(path)
    file = path / "checkpoints" / f"{name}.ckpt" if path.is_dir() else path
    if path.is_dir() and name == "best" and not file.exists() and file.with_name("last.ckpt").is_file():
        return file.with_name("last.ckpt")  # nothing was validated
    if not file.is_file():
        raise ValueError(f"no checkpoint at {file}: give a .ckpt file, or a run folder with checkpoints/{name}.ckpt")
    return file


def read(path: Path) -> dict[str, Any]:
    """The checkpoint's plain contents at today's schema; raises ValueError for files that are not ours or damaged."""
    try:
        checkpoint = torch.load(path, map_location="cpu", weights_only=True)
    except Exception:  # damaged files fail in many ways, none of which the user can tell apart
        raise ValueError(
            f"{path} is damaged or no checkpoint: torch.load(…, weights_only=True) cannot read it"
        ) from None
    entries = ("zoo", "hyper_parameters", "state_dict")
    if not isinstance(checkpoint, dict) or not all(isinstance(checkpoint.get(name), dict) for name in entries):
        raise ValueError(f"{path} is no checkpoint of this zoo: it lacks the entries {', '.join(entries)}")
    while (schema := checkpoint["zoo"].get("schema")) != SCHEMA:
        if not isinstance(schema, int) or schema not in UPGRADES:
            known = ", ".join(map(str, [*sorted(UPGRADES), SCHEMA]))
            raise ValueError(f"{path} has schema {schema!r:.40}, this zoo ({__version__}) reads {known}")
        try:
            checkpoint = UPGRADES[schema](checkpoint)
        except Exception:  # as above
            raise ValueError(f"{path} is damaged: its contents are not those of schema {schema}") from None
    if not isinstance(checkpoint.get("task", {}), dict):
        raise ValueError(f"{path} must hold the state of its task as a dict, got {checkpoint['task']!r:.40}")
    options = checkpoint["hyper_parameters"]
    if {key: type(value) for key, value in options.items()} != OPTIONS:
        raise ValueError(f"{path} must hold the options {', '.join(OPTIONS)}, got {options!r:.200}")
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
        model.on_load_checkpoint(checkpoint)
        model.load_state_dict(checkpoint["state_dict"])
    except (ValueError, RuntimeError) as error:
        raise ValueError(f"{file} does not fit this zoo: {' '.join(str(error).split())[:400]}") from None
    return model.eval()


def differences(saved: dict[str, Any], asked: dict[str, Any], where: str = "") -> list[str]:
    """One line for each value of `asked` that `saved` lacks or holds differently."""
    lines = []
    for key, value in asked.items():
        old = saved.get(key)
        if key not in saved:
            lines.append(f"{where}{key}={value!r} is not in the checkpoint")
        elif isinstance(value, dict) and isinstance(old, dict):
            lines += differences(old, value, f"{where}{key}.")
        elif old != value:
            lines.append(f"{where}{key} is {old!r} in the checkpoint, {value!r} asked")
    return lines
