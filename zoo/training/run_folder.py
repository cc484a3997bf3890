"""Run folders: one run in each, and one process at a time that writes to it."""

from __future__ import annotations

import errno
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


def place(out: str | None, family: str) -> Path:
    """The run folder: `out`, else runs/`family`/ID, the id from $ZOO_RUN_ID or the time."""
    name = os.environ.get("ZOO_RUN_ID") or f"{datetime.now():%Y-%m-%d_%H-%M-%S.%f}"  # scripts start several at once
    return home(out or Path("runs", family, name)).absolute()


def emptied(folders: list[Path]) -> None:
    """Removes the first of these folders that are empty."""
    with suppress(OSError):
        for folder in folders:
            folder.rmdir()


@contextmanager
def taken(folder: Path, resumed: bool) -> Iterator[None]:
    """Makes a run folder, which the first process of a run holds until the end; the others take its, see Keeper. What
    was made goes where it stays empty. Raises ValueError if it cannot be made or written, if another run holds it, or
    if it holds a run and is not `resumed`."""
    with ExitStack() as stack:
        if not rank_zero_only.rank:  # type: ignore[attr-defined]
            stack.callback(emptied, [one for one in (folder, *folder.parents) if not os.path.exists(one)])
            try:
                folder.mkdir(parents=True, exist_ok=True)
                stack.enter_context(FileLock(folder / LOCK, blocking=False))
                for half in folder.glob("checkpoints/.*.[0-9]*.ckpt"):  # of a process that was killed as it wrote
                    half.unlink()
            except Timeout:
                advice = "wait for it, or choose another out="
                raise ValueError(f"{folder} is in use by a run that has not ended: {advice}") from None
            except OSError as error:
                if error.errno not in (errno.ENOLCK, errno.ENOSYS, errno.ENOTSUP):  # some file systems have no locks
                    reason = f"{error.strerror}; choose another out="
                    raise ValueError(f"cannot use {folder} as run folder: {reason}") from None
            stack.callback((folder / LOCK).unlink, missing_ok=True)
            if not resumed and any(any(folder.glob(pattern)) for pattern in RESULTS):
                advice = f"continue it with resume={folder}, or choose another out="
                raise ValueError(f"{folder} holds a run already: {advice}")
        yield
