"""Checkpoints that explain themselves: what is written beside the weights, and the one call that reads it back.

A checkpoint is somebody else's data: it loads with weights_only=True, names in it are looked up in dicts, nothing in it
is ever imported or instantiated, and no path that is written or removed comes out of it.
"""

from __future__ import annotations

import io
import math
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from lightning.pytorch.plugins import TorchCheckpointIO

from zoo.config import VERSION, show
from zoo.files import home, whole
from zoo.models import Model
from zoo.training import untrusted, validate

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
    place = {name: index - len(matrices) for index, name in enumerate(matrices)}
    for name, t in checkpoint["state_dict"].items():
        old = re.fullmatch(r"(decoder\.context_to_delta\.generator\.heads\.\w+)\.0\.weight", name)
        if old and old[1].endswith(("_u", "_v")):
            t = transposed(t)
            for optimizer in checkpoint.get("optimizer_states", ()):
                # counted from the end: a matrix of two names, as tied embeddings have, is one parameter
                index = optimizer["param_groups"][0]["params"][place[name]]
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

FIELDS: dict[str, tuple[type, ...]] = {
    "zoo.config": (dict,),
    "zoo.command": (str,),
    "zoo.seconds": (int, float),
    "zoo.zoo": (str,),
    "zoo.torch": (str,),
    "callbacks": (dict,),
    "loops": (dict,),
    "optimizer_states": (list,),
    "lr_schedulers": (list,),
    "global_step": (int,),
    "pytorch-lightning_version": (str,),
}
"""What a run that goes on needs; zoo.load does without, but takes none of another type."""

NOT_NEEDED: dict[str, tuple[type, ...]] = {
    "zoo.trainer": (dict, type(None)),
    "zoo.logger": (dict, type(None)),
    "family": (dict,),
}


class AtomicCheckpointIO(TorchCheckpointIO):
    """How the trainer writes and reads checkpoints: whole or not at all, and at today's schema."""

    def save_checkpoint(self, checkpoint: dict[str, Any], path: Any, storage_options: Any = None) -> None:
        # Lightning's own way goes through $TMPDIR; torch's own file hides why it could not be written
        content = io.BytesIO()
        torch.save(checkpoint, content)
        Path(path).parent.mkdir(parents=True, exist_ok=True)
        with whole(path) as temporary:
            temporary.write_bytes(content.getbuffer())

    def load_checkpoint(self, path: Any, map_location: Any = None, weights_only: bool | None = None) -> dict[str, Any]:
        """What a run goes on with; raises ValueError where it could not, see read."""
        return read(Path(path), resume=True)

    def remove_checkpoint(self, path: Any) -> None:
        """Nothing: best.ckpt and last.ckpt are replaced, a run has no others."""


def find(path: str | Path, name: str) -> Path:
    """The checkpoint file `path`, or `name` (best, last) in the run folder `path`, last for best where nothing was
    validated; raises ValueError if absent."""
    try:
        path = home(path)
        path = path.parent if path.name == "checkpoints" else path
        file = path / "checkpoints" / f"{name}.ckpt" if path.is_dir() else path
        if path.is_dir() and name == "best" and not file.exists() and file.with_name("last.ckpt").is_file():
            file = file.with_name("last.ckpt")  # nothing was validated
        found = file.is_file()
    except (TypeError, ValueError, OSError):  # a number, a NUL, too long a name, an unknown user
        found, file = False, path  # type: ignore[assignment]
    if not found:
        at = str(file) if isinstance(file, Path) else show(file)
        raise ValueError(
            f"no checkpoint at {at[:200]}: give a .ckpt file, or a run folder with checkpoints/{name}.ckpt"
        )
    return file


def read(path: Path, resume: bool = False) -> dict[str, Any]:
    """The checkpoint's plain contents at today's schema, every option written down.

    resume: also what a run goes on with, for the folder that the file lies in. Raises ValueError for files that are not
    ours or damaged, or that hold options, names, weights or states unknown here.
    """
    try:
        checkpoint = _at_schema(untrusted.contents(path), path)
        _check_fields(checkpoint, path, resume)
        model = validate.model(checkpoint, path)
        if not resume:
            return checkpoint
        return {**validate.progress(checkpoint, model, path), "callbacks": _callbacks(checkpoint, path)}
    except ValueError as error:
        raise ValueError(f"{error}{_still_loadable(path)}") from None


def _still_loadable(path: Path) -> str:
    best = path.with_name("best.ckpt")
    try:
        if path.name == "last.ckpt" and best.is_file() and read(best):
            return f"; what can still be loaded: {best}"
    except ValueError:
        pass
    return ""


def _at_schema(checkpoint: Any, path: Path) -> dict[str, Any]:
    entries = ("zoo", "hyper_parameters", "state_dict")
    if not isinstance(checkpoint, dict) or not all(isinstance(checkpoint.get(name), dict) for name in entries):
        raise ValueError(f"{path} is no checkpoint of this zoo: it lacks the entries {', '.join(entries)}")
    while type(schema := checkpoint["zoo"].get("schema")) is not int or schema != SCHEMA:
        if type(schema) is not int or schema not in UPGRADES:
            known = ", ".join(map(str, [*sorted(UPGRADES), SCHEMA]))
            raise ValueError(f"{path} has schema {show(schema, 40)}, this zoo ({VERSION}) reads {known}")
        try:
            checkpoint = UPGRADES[schema](checkpoint)
        except Exception:  # damaged files fail in many ways, as in zoo.training.untrusted
            raise ValueError(f"{path} is damaged: its contents are not those of schema {schema}") from None
    if not isinstance(checkpoint.get("task", {}), dict):
        raise ValueError(f"{path} must hold the state of its task as a dict, got {show(checkpoint['task'], 40)}")
    return checkpoint


def _check_fields(checkpoint: dict[str, Any], path: Path, resume: bool) -> None:
    for name, types in (FIELDS | NOT_NEEDED).items():
        group, _, key = name.rpartition(".")
        holder = checkpoint[group] if group else checkpoint
        if key not in holder and not (resume and name in FIELDS):
            continue
        if type(value := holder.get(key)) not in types:
            kinds = " or ".join(kind.__name__ for kind in types)
            raise ValueError(f"{path} must hold {name} as {kinds}, got {show(value, 40)}")
    if not 0 <= checkpoint["zoo"].get("seconds", 0) < math.inf:
        raise ValueError(f"{path} must hold zoo.seconds as a number from 0 on, got {checkpoint['zoo']['seconds']}")


def _callbacks(checkpoint: dict[str, Any], path: Path) -> dict[str, Any]:
    """The states of callbacks; of the saver's the score alone: its paths are those of the folder that `path` is in."""
    callbacks = {}
    for name, state in checkpoint["callbacks"].items():
        if not isinstance(state, dict):
            raise ValueError(f"{path} must hold the state of callbacks as dicts, got {show(state, 40)}")
        callbacks[name] = _saver(state, checkpoint, path) if str(name).startswith("ModelCheckpoint") else state
    return callbacks


def _saver(state: dict[str, Any], checkpoint: dict[str, Any], path: Path) -> dict[str, Any]:
    folder = path.absolute().parent.resolve()
    best, score = folder / "best.ckpt", state.get("best_model_score")
    if score is not None:
        score = validate.like(score, torch.zeros(()), f"{path}: best_model_score")
    if score is None or not best.is_file():  # the next validation writes one
        return {"dirpath": str(folder), "best_model_score": None, "best_model_path": ""}
    try:
        same = path.samefile(best) or read(best)["hyper_parameters"] == checkpoint["hyper_parameters"]
    except ValueError as error:
        raise ValueError(f"{error}; move it away to go on with {path}") from None
    if not same:
        raise ValueError(f"{best} is of another run: move it away to go on with {path}")
    paths = dict.fromkeys(("best_model_path", "kth_best_model_path"), str(best))
    scores = dict.fromkeys(("best_model_score", "current_score", "kth_value"), score)
    return {"dirpath": str(folder), "best_k_models": {str(best): score}, **paths, **scores}


def load(path: str | Path) -> Model:
    """The model of a checkpoint file, or the best one of a run folder, in eval mode on the CPU.

    Raises ValueError if the file is missing, damaged or foreign, or holds options, names or weights unknown here.
    """
    file = find(path, "best")
    checkpoint = read(file)
    model = validate.build(checkpoint["hyper_parameters"])
    model.on_load_checkpoint(checkpoint)
    model.load_state_dict(checkpoint["state_dict"])
    return model.eval()
