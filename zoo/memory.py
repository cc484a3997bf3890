"""The allocator of the C library: a process that trains keeps what it freed, for the next step needs the same again."""

from __future__ import annotations

import ctypes
import os
import platform

# <malloc.h> of glibc
M_TRIM_THRESHOLD, M_MMAP_MAX = -1, -4


def keep_freed_memory() -> bool:
    """Makes glibc reuse freed buffers, else each new one of some megabytes costs a page fault for every 4 kB; the
    process never shrinks then, so programs that train call this, the library does not. False where nothing was changed:
    another C library, or a choice of the user's, MALLOC_..._ or GLIBC_TUNABLES."""
    chosen = any(name.startswith(("MALLOC_", "GLIBC_TUNABLES")) for name in os.environ)
    if chosen or platform.libc_ver()[0] != "glibc":
        return False
    library = ctypes.CDLL(None)
    return bool(library.mallopt(M_MMAP_MAX, 0) and library.mallopt(M_TRIM_THRESHOLD, -1))
