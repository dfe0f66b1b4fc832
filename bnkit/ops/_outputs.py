"""Where the C kernels' outputs lie: large ones in memory that is kept from one to the next (`csrc/outputs.c`)."""

from __future__ import annotations

import ctypes

import torch
from torch import Tensor
from torch.utils import deterministic
from torch.utils.dlpack import from_dlpack

from .._allocator import allocator_setting
from ._cpu_library import library

_KEPT_FROM = 16 << 20  # bytes; below, what the C library's allocator does costs little
_DLPACK_TYPES = {torch.float32: (2, 32), torch.bfloat16: (4, 16), torch.float16: (2, 16), torch.float64: (2, 64)}
# Not `ctypes.pythonapi.PyCapsule_New` itself, whose types are everyone's to set.
_capsule = ctypes.PYFUNCTYPE(ctypes.py_object, ctypes.c_void_p, ctypes.c_char_p, ctypes.c_void_p)(
    ("PyCapsule_New", ctypes.pythonapi)
)


def empty_like(x: Tensor) -> Tensor:
    """`torch.empty_like`, for a dense x on the CPU; a large output's memory was another's before, unless
    `tune_allocator` makes the C library keep it."""
    if x.nbytes < _KEPT_FROM or allocator_setting() == "tuned":
        return torch.empty_like(x)
    return _kept_empty_like(x)


def empty_cache() -> int:
    """Give the memory of released outputs back to the system, and say how many bytes that were."""
    loaded = library()
    return 0 if loaded is None else loaded.bnkit_give_back_outputs()


def _kept_empty_like(x: Tensor) -> Tensor:
    loaded = library()
    assert loaded is not None
    layout = (ctypes.c_int64 * (2 * x.dim()))(*x.shape, *x.stride())
    handle = loaded.bnkit_new_output(*_DLPACK_TYPES[x.dtype], x.dim(), layout, x.nbytes)
    if handle is None:
        return torch.empty_like(x)
    found = from_dlpack(_capsule(handle, b"dltensor", None))
    fills = deterministic.fill_uninitialized_memory  # pyright: ignore[reportAttributeAccessIssue] (made at run time)
    if fills and torch.are_deterministic_algorithms_enabled():
        found.fill_(torch.nan)
    return found
