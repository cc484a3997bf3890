"""The frame of every command: files it reads, output that nothing stops, and one line on stderr for mistakes."""

from __future__ import annotations

import argparse
import io
import logging
import os
import re
import shlex
import signal
import sys
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from functools import wraps
from pathlib import Path
from threading import current_thread, main_thread
from types import FrameType
from typing import Any, NoReturn, ParamSpec, TextIO

from zoo.config import one_line

P = ParamSpec("P")


class Interrupted(BaseException):
    """A signal stopped a run; what its message says is complete. code: the exit code that shells expect.

    As KeyboardInterrupt it is no Exception: it may come at any line, also where every Exception is a broken file."""

    def __init__(self, message: str, number: int):
        super().__init__(message)
        self.code = 128 + number


class Untested(RuntimeError):
    """Training is complete and saved, what comes after it failed."""


@contextmanager
def terminable() -> Iterator[None]:
    """Within, SIGTERM is an Interrupted, as Ctrl-C is, so that no half file stays, unless something else handles it."""

    def stop(number: int, frame: FrameType | None) -> None:
        raise Interrupted(f"stopped by {signal.Signals(number).name}", number)

    ours = current_thread() is main_thread() and signal.getsignal(signal.SIGTERM) is signal.SIG_DFL
    if ours:
        signal.signal(signal.SIGTERM, stop)
    try:
        yield
    finally:
        if ours:
            signal.signal(signal.SIGTERM, signal.SIG_DFL)


def command_line() -> str:
    """The command line of this process, shell-quoted; not where a pretrained model lies, it goes by its hash."""
    words = (re.sub(r"^(\W*model\.base=)(?!null).*", r"\1DIR", word) for word in sys.orig_argv[1:])
    return shlex.join([Path(sys.executable).name, *words])


def tolerant() -> None:
    """From here on no character stops the output of this process: what its encoding lacks becomes a question mark."""
    if isinstance(sys.stdout, io.TextIOWrapper) and sys.stdout.errors in ("strict", "surrogateescape"):
        sys.stdout.reconfigure(errors="replace")  # stderr writes such characters as \\xNN anyway


def say(text: str, file: TextIO | None = None, end: str = "\n") -> None:
    """Prints `text` at once; a closed or full output is no reason to end what took hours."""
    tolerant()
    try:
        print(text, file=file, end=end, flush=True)
    except (OSError, ValueError):  # ValueError: the stream was closed in Python
        _discard(file or sys.stdout)


def warn(text: str) -> None:
    say(f"warning: {text}", sys.stderr)


def describe(error: BaseException) -> str:
    """The message of a mistake in one line; that of any other error with its kind before it."""
    text = one_line(error)
    return text if isinstance(error, ValueError | OSError | Untested) and text else f"{type(error).__name__}: {text}"


def _expected(error: Exception) -> bool:
    """Whether one line says it all: of a user's mistake, and of what the machine refuses. A character that could not be
    written is none, though Python makes it a ValueError."""
    if isinstance(error, RuntimeError) and re.search("(allocate|out of) memory", str(error)):
        return True
    mistakes = (ValueError, OSError, MemoryError, OverflowError, Untested)
    return isinstance(error, mistakes) and not isinstance(error, UnicodeEncodeError)


class Parser(argparse.ArgumentParser):
    """Says what is wrong in one line, as options do."""

    def error(self, message: str) -> NoReturn:
        raise ValueError(f"{message}; {self.prog} --help shows all options")


def command(
    main: Callable[P, Any], kinds: tuple[type[BaseException], ...] = (), reason: Callable[..., str] = describe
) -> Callable[P, int]:
    """`main` as a command: its result is the exit code, 2, with one line on stderr, for what is expected to go wrong,
    that of the signal if one stopped it, 141 if nobody reads its output any more."""

    @wraps(main)
    def run(*args: P.args, **kwargs: P.kwargs) -> int:
        tolerant()
        try:
            with terminable():
                code = main(*args, **kwargs)
            if sys.stdout:
                sys.stdout.flush()
        except BrokenPipeError:
            _discard(sys.stdout)
            return 141
        except (KeyboardInterrupt, Interrupted) as stop:
            say(f"\n{str(stop) or 'stopped by SIGINT'}", sys.stderr)
            return getattr(stop, "code", 130)
        except Exception as error:
            if os.environ.get("HYDRA_FULL_ERROR", "0") != "0" or not (isinstance(error, kinds) or _expected(error)):
                raise
            say(f"error: {reason(error)}", sys.stderr)
            say("", end="")  # where it was the output that is full, the rest of it goes
            return 1 if isinstance(error, Untested) else 2
        return code if isinstance(code, int) else 0

    return run


def read(path: str | Path) -> str:
    """The text of a file; raises ValueError for one that is empty or not UTF-8."""
    try:
        text = Path(path).read_text(encoding="utf-8")
    except UnicodeDecodeError as error:
        raise ValueError(f"{path} is no UTF-8 text: {error.reason} at byte {error.start}") from None
    if not text.strip():
        raise ValueError(f"{path} is empty")
    return text


def _discard(stream: Any) -> None:
    """Sends the rest of `stream` nowhere; else Python would try again, and fail, at its exit."""
    with suppress(OSError, ValueError, AttributeError):
        nowhere = os.open(os.devnull, os.O_WRONLY)
        os.dup2(nowhere, stream.fileno())
        os.close(nowhere)


NOISE = (
    "Tip:|💡|GPU available:|TPU available:|`Trainer.fit` stopped|Restor|`weights_only`|does not have many workers|"
    "dataloader is not resumable|returned a view tensor|isinstance.treespec, LeafSpec|No .*logger.* configured|"
    "Experiment logs directory"
)
"""What others say of matters that this project has decided, or that the opening lines of a run say better."""


def quiet() -> None:
    """Silences NOISE."""
    warnings.filterwarnings("ignore", f".*({NOISE})")
    for name in ("utilities.rank_zero", "trainer.connectors.checkpoint_connector"):
        logging.getLogger(f"lightning.pytorch.{name}").addFilter(_is_news)


def _is_news(record: logging.LogRecord) -> bool:
    return not re.search(NOISE, record.getMessage())
