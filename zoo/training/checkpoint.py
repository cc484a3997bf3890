"""Checkpoints: how they are written and read back. They are somebody else's data: nothing in one is imported, and no
path that is written or removed comes out of it."""

from __future__ import annotations

import io
from collections.abc import Callable, Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any

import torch
from lightning.pytorch.plugins import TorchCheckpointIO

from zoo.config import VERSION, show
from zoo.console import describe
from zoo.files import home, whole
from zoo.models import Model
from zoo.records import shipped
from zoo.training import untrusted, validate

SCHEMA = 5


def _score_of_the_best(checkpoint: dict[str, Any]) -> dict[str, Any]:
    """The best validation loss was in the state of Lightning's ModelCheckpoint, beside paths."""
    states = [state for name, state in checkpoint.get("callbacks", {}).items() if name.startswith("ModelCheckpoint")]
    scores = [float(state["best_model_score"]) for state in states if state["best_model_score"] is not None]
    return {**checkpoint, "zoo": {**checkpoint["zoo"], "schema": 4, "best": scores[0] if scores else None}}


def _adamw(checkpoint: dict[str, Any]) -> dict[str, Any]:
    """AdamW updated all weights, and there was no choice."""
    options = checkpoint["hyper_parameters"]
    options = {**options, "optim": {"name": "adamw", **options.get("optim", {})}}
    return {**checkpoint, "hyper_parameters": options, "zoo": {**checkpoint["zoo"], "schema": 5}}


UPGRADES: dict[int, Callable[[dict[str, Any]], dict[str, Any]]] = {3: _score_of_the_best, 4: _adamw}
"""From schema n to a function that turns such a checkpoint into one of a later schema."""

ENTRIES: dict[str, Any] = {"zoo": {"schema": 0}, "hyper_parameters": {}, "state_dict": {}, "task": {}, "family": {}}


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
        """The contents that a run goes on with; raises ValueError where it could not, see read."""
        return read(Path(path), resume=True)


def find(path: str | Path | Mapping[str, Any], name: str) -> Path:
    """The checkpoint file `path`, or `name` (best, last) of a run, last for best where nothing was validated; raises
    ValueError if absent. A run is its folder, also below runs/, or what zoo.train returned; in a folder of several runs
    the best is that of the latest, and last is refused."""
    file: Any = path.get("checkpoint") if isinstance(path, Mapping) else path
    runs: list[Path] = []
    with suppress(TypeError, ValueError, OSError):  # a number, a NUL, too long a name
        file = home(file)
        if not file.exists():
            file = Path("runs", file) if Path("runs", file).exists() else shipped.find(path) or file
        file = file.parent if file.name == "checkpoints" else file
        if file.is_dir():
            runs = [file] if (file / "checkpoints").is_dir() else [found.parent for found in file.glob("*/checkpoints")]
            folder = max(runs, key=lambda run: run.stat().st_mtime, default=file) / "checkpoints"
            validated = (folder / f"{name}.ckpt").is_file() or not (folder / "last.ckpt").is_file()
            file = folder / f"{name if validated else 'last'}.ckpt"
    if name == "last" and runs[1:]:  # which of them goes on is not to be guessed
        raise ValueError(f"{path} holds {len(runs)} runs, name one: {show(sorted(run.name for run in runs), 300)}")
    return untrusted.regular(file, "checkpoint", shipped.advice(path, name))


def read(path: Path, resume: bool = False) -> dict[str, Any]:
    """The checkpoint's plain contents at today's schema, every option written down; resume: those a run goes on with.
    Raises ValueError for files that are not ours or damaged, or that hold options, names, weights or states unknown
    here."""
    try:
        checkpoint = _at_schema((shipped if path.suffix == ".safetensors" else untrusted).contents(path))
        model = validate.model(checkpoint)
        return validate.state(checkpoint, model) if resume else checkpoint
    except Exception as error:  # damaged files, and families of somebody else, fail in many ways
        best = path.with_name("best.ckpt")
        loadable = ""
        with suppress(ValueError):
            if path.name == "last.ckpt" and best.is_file() and read(best):
                loadable = f"; what can still be loaded: {best}"
        raise ValueError(f"{path} cannot be used: {describe(error)[:400]}{loadable}") from None


def _at_schema(content: Any) -> dict[str, Any]:
    content = {"task": {}, "family": {}, **content} if isinstance(content, dict) else {}
    validate.like(content, ENTRIES, "")
    while (schema := content["zoo"]["schema"]) != SCHEMA:
        if schema not in UPGRADES:
            known = ", ".join(map(str, [*UPGRADES, SCHEMA]))
            raise ValueError(f"it has schema {schema}, this zoo ({VERSION}) reads {known}")
        content = UPGRADES[schema](content)
    return content


def load(path: str | Path | Mapping[str, Any], base: str | Path | None = None) -> Model:
    """The model of a checkpoint file, or the best one of a run, in eval mode on the CPU; path: as of find, e.g.
    hypernet-regression for the latest run, or regression/hypernet, which comes with the package; base: the folder of
    its W0, where that is a pretrained model. Raises ValueError as find and read do."""
    checkpoint = read(find(path, "best"))
    model = validate.build(checkpoint["hyper_parameters"], base)
    model.on_load_checkpoint(checkpoint)
    model.load_state_dict(checkpoint["state_dict"])
    return model.eval()
