"""Processes of one run that end or hang: the others end too, and one of them says why in a line."""

from __future__ import annotations

import os
import re
import signal
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from subprocess import TimeoutExpired
from threading import Event, Thread
from typing import Any

import torch.distributed as dist
from lightning.fabric.utilities.distributed import _set_num_threads_if_needed
from lightning.pytorch.strategies.launchers import _SubprocessScriptLauncher

from zoo.console import Untested, say

GRACE = 3.0
"""Seconds in which a process ends by itself, or finds out that another is gone, and says so."""

STARTER = "ZOO_STARTED_BY"
"""Tells the processes that a Launcher starts its id: under Slurm a parent is no process of the run."""


OTHER = "another process of this run ended"


class Lost(Untested):
    """Another process of this run is gone; what was written is complete."""


class Launcher(_SubprocessScriptLauncher):
    """Starts the other processes of this node; where one fails, Lightning's own would kill all without a word."""

    def launch(self, function: Callable[..., Any], *args: Any, trainer: Any = None, **options: Any) -> Any:
        if not self.procs:
            self.cluster_environment.validate_settings(num_devices=self.num_processes, num_nodes=self.num_nodes)
            os.environ[STARTER] = str(os.getpid())
            self._call_children_scripts()
        _set_num_threads_if_needed(num_processes=self.num_processes)
        return function(*args, **options)

    def gone(self) -> str:
        """Which process failed, empty if none has."""
        for rank, process in enumerate(self.procs, 1):
            if (code := process.poll() or 0) and code < 128:  # else it stopped by a signal as it should
                how = f"was killed by {signal.Signals(-code).name}" if code < 0 else f"ended with code {code}"
                return f"rank {rank} of {self.num_processes} {how}"
        return ""

    def end(self, patience: float = 0.0) -> None:
        """Leaves no other process behind, not even one that is stopped; patience: seconds in which they may end."""
        until = time.monotonic() + patience
        for process in self.procs:
            with suppress(TimeoutExpired):
                process.wait(max(until - time.monotonic(), 0))
        for process in self.procs:
            process.kill()
            with suppress(TimeoutExpired):  # a driver may hold it
                process.wait(10)


@contextmanager
def explained(strategy: Any, left: Callable[[], str]) -> Iterator[None]:
    """Raises Lost, with what is left of the run, in place of errors of collectives; silent in a process whose parent
    says it, and in all but the first of those that have lost theirs. Ends a process that waits for one that is gone in
    a collective that does not notice, and, in the process that has started the others, these, however the run fails."""
    launcher = strategy.launcher if isinstance(strategy.launcher, Launcher) else None
    parent = int(os.environ.get(STARTER, 0)) if strategy.local_rank and not launcher else 0
    silent, over = bool(parent) and strategy.local_rank > 1, Event()

    def gone() -> str:
        if launcher:
            return launcher.gone()
        return OTHER if parent not in (0, os.getppid()) else ""

    def watch() -> None:
        while not over.wait(0.5):
            if gone() and not over.wait(GRACE):
                if not silent:
                    say(f"error: {gone()}; {left()}", sys.stderr)
                if launcher:
                    launcher.end()
                os._exit(1)

    if launcher or parent:
        Thread(target=watch, daemon=True).start()
    try:
        yield
    except BaseException as error:
        over.set()
        text = _of_collective(error)
        if text is None:
            if launcher:
                launcher.end(GRACE)
            raise
        late = bool(re.search("[Tt]imed? ?out", text))
        # it may be a moment until it is known, and said by others; who says it is the first to end a parent that hangs
        time.sleep(1 + 2 * GRACE * bool(late and parent) + silent)
        what = gone() or ("a process of this run does not answer" if late or launcher else OTHER)
        if parent and parent == os.getppid():
            if not late:
                raise SystemExit(1) from None
            os.kill(parent, signal.SIGKILL)  # it hangs, and would stay
        if launcher:
            launcher.end()
        raise SystemExit(1) if silent else Lost(f"{what}; {left()}") from None
    finally:
        over.set()
        settle()


def settle() -> None:
    """Lets threads of gloo take their leave of the last collective: at Python's end that would abort the process."""
    time.sleep(0.1 * dist.is_initialized())


def _of_collective(error: BaseException | None) -> str | None:
    """The message of the failed collective that led to this error, None if none did."""
    while error is not None:
        ours = isinstance(error, dist.DistError) or (isinstance(error, RuntimeError) and dist.is_initialized())
        if ours and re.search("onnection (closed|reset)|Broken pipe|[Tt]imed? ?out|remote process|recv", str(error)):
            return str(error)
        error = error.__cause__ or error.__context__
    return None
