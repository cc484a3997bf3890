"""Processes of one run that end or hang: the others end too, and one of them says why in a line."""

from __future__ import annotations

import os
import re
import signal
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from threading import Thread
from typing import Any

import torch.distributed as dist
from lightning.fabric.utilities.distributed import _set_num_threads_if_needed
from lightning.pytorch.strategies.launchers import _SubprocessScriptLauncher

from zoo.console import Untested, say

PARENT = os.getppid()
GRACE = 3.0
"""Seconds in which the first process finds out by itself that another is gone, and says so."""


class Lost(Untested):
    """Another process of this run is gone; what was written is complete."""


class Launcher(_SubprocessScriptLauncher):
    """Starts the other processes of this node; where one fails, Lightning's own would kill all without a word."""

    left: Callable[[], str] = staticmethod(lambda: "")

    def launch(self, function: Callable[..., Any], *args: Any, trainer: Any = None, **options: Any) -> Any:
        if not self.procs:
            self.cluster_environment.validate_settings(num_devices=self.num_processes, num_nodes=self.num_nodes)
            self._call_children_scripts()
            Thread(target=self._watch, daemon=True).start()
        _set_num_threads_if_needed(num_processes=self.num_processes)
        return function(*args, **options)

    def _watch(self) -> None:
        """Ends this process too where it waits for one that has failed, in a collective that does not notice."""
        while not any(process.poll() for process in self.procs):
            time.sleep(0.5)
        time.sleep(GRACE)
        say(f"error: {self.gone()}; {self.left()}", sys.stderr)
        self.end()
        os._exit(1)

    def gone(self) -> str:
        """Which process failed, as far as can be seen."""
        for _ in range(10):  # it may be a moment until it is known
            for rank, process in enumerate(self.procs, 1):
                if code := process.poll():
                    how = f"was killed by {signal.Signals(-code).name}" if code < 0 else f"ended with code {code}"
                    return f"process {rank} of {self.num_processes} {how}"
            time.sleep(0.1)
        return "a process of this run does not answer"

    def end(self) -> None:
        """Leaves no other process behind, not even one that is stopped."""
        for process in self.procs:
            process.kill()
        for process in self.procs:
            process.wait(10)


@contextmanager
def explained(strategy: Any, left: Callable[[], str]) -> Iterator[None]:
    """Raises Lost, with what is left of the run, in place of errors of collectives; silent in a process whose parent
    says it."""
    launcher = strategy.launcher
    if isinstance(launcher, Launcher):
        launcher.left = left
    try:
        yield
    except Exception as error:
        text = _of_collective(error)
        if text is None:
            raise
        late = bool(re.search("[Tt]imed? ?out", text))
        if isinstance(launcher, Launcher):
            gone = launcher.gone()
            launcher.end()
        else:
            ours = os.getppid() == PARENT and strategy.local_rank and not dist.is_torchelastic_launched()
            if ours and not late:
                raise SystemExit(1) from None
            if ours:  # it hangs, and would stay
                os.kill(PARENT, signal.SIGKILL)
            gone = "a process of this run does not answer" if late else "another process of this run ended"
        raise Lost(f"{gone}; {left()}") from None


def _of_collective(error: BaseException | None) -> str | None:
    """The message of the failed collective that led to this error, None if none did."""
    while error is not None:
        if isinstance(error, dist.DistError) or re.search("gloo|NCCL|onnection (closed|reset)", str(error)):
            return str(error)
        error = error.__cause__ or error.__context__
    return None
