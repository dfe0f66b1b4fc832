"""The library of the C kernels of `csrc/`: where it lies, how it is called, and whether it is this version's."""

from __future__ import annotations

import ctypes
import os
import struct
import sys
import warnings
from functools import cache
from pathlib import Path

import torch  # noqa: F401 (brings along the OpenMP that the library has to find)

from .._checks import UserError

_FILE = "_bnkit_cpu.so"
# bnkit_forward and bnkit_backward of csrc/batch_norm.h. As arguments of their own ctypes would convert values one by
# one, which takes half as long as the arithmetic of a small batch.
_FORWARD, _BACKWARD = "3q3i??10P2d", "3q3i??12P"
_INTERFACE = f"2 {_FORWARD} {_BACKWARD}"
pack_forward = struct.Struct(_FORWARD).pack
pack_backward = struct.Struct(_BACKWARD).pack


@cache
def library() -> ctypes.CDLL | None:
    """The library, if one is installed that fits.

    Raises:
        UserError: the one that `BNKIT_CPU_LIBRARY` names does not load, or does not fit.
    """
    named = os.environ.get("BNKIT_CPU_LIBRARY")
    for path in [Path(named)] if named else _installed():
        try:
            return load(path)
        except OSError as error:
            if named:
                raise UserError(
                    f"BNKIT_CPU_LIBRARY must name a library of this bnkit, got {error}: unset it."
                ) from error
            if path.exists():
                warnings.warn(f"the C kernels are left out, {error}: install bnkit again.", stacklevel=2)
    return None


def load(path: Path) -> ctypes.CDLL:
    """The library of this file, ready to be called. Its OpenMP is torch's.

    Raises:
        OSError: it does not load, or its functions take other arguments than are packed here.
    """
    loaded = ctypes.CDLL(str(path))
    if _interface(loaded) != _INTERFACE:
        raise OSError(f"{path}, built from other sources")
    integer, long, pointer = ctypes.c_int, ctypes.c_int64, ctypes.c_void_p
    loaded.bnkit_batch_norm_forward.argtypes = [ctypes.c_char_p]
    loaded.bnkit_batch_norm_backward.argtypes = [ctypes.c_char_p]
    loaded.bnkit_transpose.argtypes = [integer, integer, long, long, long, pointer, pointer]
    loaded.bnkit_transpose.restype = None
    loaded.bnkit_instruction_set.restype = ctypes.c_char_p
    loaded.bnkit_new_output.argtypes = [ctypes.c_uint8, ctypes.c_uint8, ctypes.c_int32, pointer, ctypes.c_size_t]
    loaded.bnkit_new_output.restype = pointer
    loaded.bnkit_give_back_outputs.restype = ctypes.c_size_t
    return loaded


def _installed() -> list[Path]:
    # In an editable install the package lies in two folders, its sources and what was built from them.
    return [Path(folder) / _FILE for folder in sys.modules[__name__.rpartition(".")[0]].__path__]


def _interface(loaded: ctypes.CDLL) -> str | None:
    """What the library says of its arguments. An old one says nothing, another program's neither."""
    try:
        function = loaded.bnkit_interface
    except AttributeError:
        return None
    function.restype = ctypes.c_char_p
    return function().decode()
