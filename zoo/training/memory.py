"""The allocator of the C library: a process that trains keeps what it freed, for the next step needs the same again."""

from __future__ import annotations

import ctypes
import os
import sys

# <malloc.h> of glibc
M_TRIM_THRESHOLD, M_MMAP_MAX = -1, -4


def keep_freed_memory() -> bool:
    """Makes glibc reuse freed buffers; False where nothing was changed: another C library, or the user's own choice.

    By default it gives freed buffers of some megabytes back to the system, and the next ones cost a page fault for
    every 4 kB, in which the kernel fills it with zeros. The price: the process never shrinks. It is for programs that
    train, once they start; a library must not decide this for its host. The user's choice are the environment
    variables MALLOC_..._ and GLIBC_TUNABLES, which glibc reads itself (mallopt(3)).
    """
    chosen = "glibc.malloc" in os.environ.get("GLIBC_TUNABLES", "")
    if not sys.platform.startswith("linux") or chosen or any(name.startswith("MALLOC_") for name in os.environ):
        return False
    try:
        library = ctypes.CDLL(None)
        _, mallopt = library.gnu_get_libc_version, library.mallopt  # musl has neither
    except (OSError, AttributeError):
        return False
    return bool(mallopt(M_MMAP_MAX, 0) and mallopt(M_TRIM_THRESHOLD, -1))
