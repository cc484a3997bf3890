"""Run folders: one run in each, and one process at a time that writes to it."""

from __future__ import annotations

import itertools
import os
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from zoo.config import show

try:
    import fcntl
except ImportError:  # Windows
    fcntl = None  # type: ignore[assignment]

LOCK = ".lock"
RESULTS = ("checkpoints/*", "metrics.jsonl", "metrics.json", "curve.png")
"""Files of a run: a folder with any of them holds one."""


def fresh(path: str | Path) -> Path:
    """The new folder `path`, or `path`-2, `path`-3, …: made in one step, so no two processes get the same."""
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    for number in itertools.count(1):
        folder = path if number == 1 else path.with_name(f"{path.name}-{number}")
        with suppress(FileExistsError):
            folder.mkdir()
            return folder
    raise AssertionError


def run_id() -> str | None:
    """$ZOO_RUN_ID; raises ValueError if that is no name of a folder."""
    name = os.environ.get("ZOO_RUN_ID") or None
    if name and (name in (".", "..") or "/" in name or os.sep in name or not name.isprintable()):
        raise ValueError(f"ZOO_RUN_ID={show(name)} must be the name of one folder, without {os.sep}")
    return name


@contextmanager
def taken(out: Path | None, family: str, resumed: bool) -> Iterator[Path]:
    """The run folder, held by this process until the end: `out`, else what `default(family)` says.

    What was made and stayed empty goes. Raises ValueError if the folder cannot be made or written, if another process
    holds it, or if it holds a run and is not `resumed`.
    """
    from lightning.pytorch.utilities import rank_zero_only  # not at the top: python train.py --help needs no Lightning

    folder = (out or default(family)).absolute()
    if "::" in str(folder) or "://" in str(folder):
        raise ValueError(f"cannot use {folder} as run folder: Lightning takes :: and :// for other places")
    if rank_zero_only.rank:  # type: ignore[attr-defined]
        yield folder  # which the first process holds
        return
    made = list(itertools.takewhile(lambda path: not path.exists(), (folder, *folder.parents)))
    try:
        try:
            if out or run_id():
                folder.mkdir(parents=True, exist_ok=True)
            else:
                folder = fresh(folder)
                made = [folder, *made[1:]]
            lock = _lock(folder)
        except OSError as error:
            raise ValueError(f"cannot use {folder} as run folder: {error.strerror}; choose another out=") from None
        try:
            if not resumed and any(any(folder.glob(pattern)) for pattern in RESULTS):
                last = (folder / "checkpoints" / "last.ckpt").exists()
                advice = f"continue it with resume={folder}, or" if last else "one that stopped before its last.ckpt;"
                raise ValueError(f"{folder} holds a run already: {advice} choose another out=")
            yield folder
        finally:
            with suppress(OSError):
                (folder / LOCK).unlink()
            os.close(lock)
    finally:
        for path in made:
            with suppress(OSError):
                path.rmdir()


def default(family: str) -> Path:
    """runs/`family`/ID, the id from $ZOO_RUN_ID, which all processes of a run share, else the time."""
    return Path("runs", family, run_id() or time.strftime("%Y-%m-%d_%H-%M-%S"))


def _lock(folder: Path) -> int:
    """The open file folder/.lock, which the system gives back when this process ends, however it ends."""
    path = folder / LOCK
    while True:
        file = os.open(path, os.O_RDWR | os.O_CREAT | getattr(os, "O_NOFOLLOW", 0))
        try:
            if fcntl:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            os.close(file)
            raise ValueError(
                f"{folder} is in use by a run that has not ended: wait for it, or choose another out="
            ) from None
        except OSError:  # some network file systems have no locks: there, two resumes of one run go unnoticed
            return file
        with suppress(FileNotFoundError):
            if os.path.samestat(os.fstat(file), path.stat()):
                return file
        os.close(file)  # its last owner removed it between our two lines
