"""Run folders: one run in each, and one process at a time that writes to it."""

from __future__ import annotations

import errno
import itertools
import os
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, suppress
from datetime import datetime
from pathlib import Path

from filelock import FileLock, Timeout
from lightning.pytorch.utilities import rank_zero_only

from zoo.files import home

LOCK = ".lock"
RESULTS = ("checkpoints/*", "metrics.jsonl", "metrics.json", "curve.png")
"""Files of a run: a folder with any of them holds one."""


@contextmanager
def taken(out: str | Path | None, family: str, resumed: bool) -> Iterator[Path]:
    """The run folder, held by this process until the end: `out`, else runs/`family`/ID, the id from $ZOO_RUN_ID or
    the time; other processes than the first take its folder, see Keeper.

    What was made and stayed empty goes. Raises ValueError if the folder cannot be made or written, if another process
    holds it, or if it holds a run and is not `resumed`.
    """
    name = os.environ.get("ZOO_RUN_ID") or f"{datetime.now():%Y-%m-%d_%H-%M-%S.%f}"  # scripts start several at once
    folder = home(out or Path("runs", family, name)).absolute()
    if rank_zero_only.rank:  # type: ignore[attr-defined]
        yield folder  # which the first process holds
        return
    with ExitStack() as stack:
        try:
            for path in reversed([*itertools.takewhile(lambda path: not path.exists(), (folder, *folder.parents))]):
                stack.callback(_remove, path)
            folder.mkdir(parents=True, exist_ok=True)
            stack.enter_context(FileLock(folder / LOCK, blocking=False))
        except Timeout:
            advice = "wait for it, or choose another out="
            raise ValueError(f"{folder} is in use by a run that has not ended: {advice}") from None
        except OSError as error:
            if error.errno not in (errno.ENOLCK, errno.ENOSYS, errno.ENOTSUP):  # some file systems have no locks
                raise ValueError(f"cannot use {folder} as run folder: {error.strerror}; choose another out=") from None
        stack.callback(_remove, folder / LOCK)
        if not resumed and any(any(folder.glob(pattern)) for pattern in RESULTS):
            raise ValueError(f"{folder} holds a run already: continue it with resume={folder}, or choose another out=")
        yield folder


def _remove(path: Path) -> None:
    """Removes the lock, or a folder that was made here and stayed empty."""
    with suppress(OSError):
        path.unlink() if path.name == LOCK else path.rmdir()
