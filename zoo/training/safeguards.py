"""After training, a failing test, figure or table takes nothing away."""

from __future__ import annotations

import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import FrameType

from zoo.console import Interrupted, Untested, describe, warn


@contextmanager
def trained(folder: Path) -> Iterator[None]:
    """Turns a failure inside into Untested, a signal into Interrupted: both say how to test again."""
    safe = f"training is complete and saved in {folder}/checkpoints; test again with: python train.py resume={folder}"

    def stop(number: int, frame: FrameType | None) -> None:
        raise Interrupted(f"stopped by {signal.Signals(number).name}; {safe}", number)

    main = threading.current_thread() is threading.main_thread()  # no other may do this
    before = {number: signal.signal(number, stop) for number in (signal.SIGINT, signal.SIGTERM) if main}
    try:
        yield
    except Exception as error:
        failed = Untested(f"the test failed, {describe(error)}; {safe}")
        failed.code = 2 if isinstance(error, OSError) else 1
        raise failed from error
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


@contextmanager
def optional(what: str) -> Iterator[None]:
    """A warning in place of an error: the run is worth more."""
    try:
        yield
    except Exception as error:
        warn(f"{what} failed: {describe(error)}")
