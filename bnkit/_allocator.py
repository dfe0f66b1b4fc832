"""The C library's allocator, told to keep large blocks."""

from __future__ import annotations

import ctypes
import platform

_M_TRIM_THRESHOLD = -1
_M_MMAP_THRESHOLD = -3
_KEEP_UP_TO = 2**31 - 1
_state = {"tuned": False}


def tune_allocator() -> bool:
    """Make glibc keep freed activations for reuse instead of returning them to the kernel.

    By default glibc serves every block above 32 MiB (often less) with a fresh `mmap` and unmaps it on release, so
    each training step pays page faults for every large activation again. This raises `M_MMAP_THRESHOLD` and
    `M_TRIM_THRESHOLD` for the whole process.

    Warning:
        It is a process-wide setting that can't be taken back, and resident memory can double where shapes keep
        changing. bnkit's own commands call it at start; as a library user you opt in.

    Returns:
        True if the setting is in force; False where the C library is not glibc, and nothing was changed.
    """
    if not _state["tuned"] and platform.libc_ver()[0] == "glibc":
        mallopt = ctypes.CDLL(None).mallopt
        _state["tuned"] = bool(mallopt(_M_MMAP_THRESHOLD, _KEEP_UP_TO)) and bool(
            mallopt(_M_TRIM_THRESHOLD, _KEEP_UP_TO)
        )
    return _state["tuned"]


def allocator_setting() -> str:
    """`"tuned"` after a successful `tune_allocator()`, else `"default"`."""
    return "tuned" if _state["tuned"] else "default"
