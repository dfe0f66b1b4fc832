"""Batch normalization by the C kernels of `csrc/`: a backend of `dispatch`, at the memory's speed.

A tensor is taken as it lies: contiguous, channels_last or channels_last_3d, or any other layout in which the channel is
innermost; anything else is first copied to one of these.

`mean` and `invstd` are float64 for every type of x. Where the mean is large against the deviation, float32 would round
it by a good part of the deviation, and the backward pass would see other values before the activation than the forward
pass did; so it finds the same ones, to the bit.

Results are the same to the bit from run to run and for any number of threads. Instruction sets differ by rounding.
The environment variable `BNKIT_CPU` (avx512, avx2 or portable) asks for an instruction set, as far as the machine has
it; `BNKIT_CPU_LIBRARY` names another build of the library. Both are read once.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from ._cpu_library import library as _library
from ._cpu_library import pack_backward, pack_forward
from ._layout import is_rows, laid_out
from ._outputs import empty_cache as empty_cache
from ._outputs import empty_like
from ._transforms import is_stored

_CPU = torch.device("cpu")
_NO_MEMORY = "no memory for the partial sums of a batch norm"
_DTYPES = {torch.float32: 0, torch.bfloat16: 1, torch.float16: 2, torch.float64: 3}
_ACTIVATIONS = {
    None: 0,
    "relu": 1,
    "leaky_relu": 2,
    "silu": 3,
    "gelu": 4,
    "hardswish": 5,
    "sigmoid": 6,
    "tanh": 7,
}
_SHORTEST_PLANE = 16  # in_rows of csrc/batch_norm.h
_MASK_PADDING = 2  # bytes that may be read after a mask's last: bits_at of csrc/mask.h


def available() -> bool:
    """Whether the compiled kernels are installed and load. Without a C compiler at installation they are not."""
    return _library() is not None


def instruction_set() -> str | None:
    """`"avx512"`, `"avx2"` or `"portable"`: what the kernels run on here; None where they are not available."""
    library = _library()
    return None if library is None else library.bnkit_instruction_set().decode()


def supports(x: Tensor, parameters: Sequence[Tensor | None], residual: Tensor | None) -> bool:
    """Whether the kernels take the call: see `dispatch.Backend`. Parameters may be of any type."""
    if not (
        x.is_cpu
        and x.dtype in _DTYPES
        and x.layout is torch.strided
        and is_stored(x)
        and (residual is None or (residual.is_cpu and residual.dtype is x.dtype))
        and (residual is None or (residual.layout is torch.strided and is_stored(residual)))
    ):
        return False
    for parameter in parameters:
        if parameter is not None and (not parameter.is_cpu or parameter.is_neg()):
            return False
    return _library() is not None


def forward(
    x: Tensor,
    running_mean: Tensor | None,
    running_var: Tensor | None,
    weight: Tensor | None,
    bias: Tensor | None,
    training: bool,
    momentum: float,
    eps: float,
    activation: str | None,
    residual: Tensor | None,
    for_backward: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor | None]:
    """y, the mean and invstd (float64) it was normalized with, and what is kept: see `dispatch.Backend`."""
    x, (outer, channels, inner) = laid_out(x)
    y = empty_like(x)
    masked = residual is not None and activation == "relu" and for_backward
    mask = _mask_for(x, outer, channels, inner) if masked else None
    kept = None if activation is None else residual if mask is None else mask
    mean = torch.empty(channels, dtype=torch.float64, device=_CPU)
    invstd = torch.empty_like(mean)
    weight, bias, old_mean, old_var = _as_real(x, weight, bias, running_mean, running_var)
    if residual is not None:
        residual = _like(residual, x)
    library = _library()
    assert library is not None
    done = library.bnkit_batch_norm_forward(
        pack_forward(
            outer,
            channels,
            inner,
            _DTYPES[x.dtype],
            _ACTIVATIONS[activation],
            torch.get_num_threads(),
            training,
            False,
            *_pointers(x, residual, weight, bias, old_mean, old_var, mean, invstd, y, mask),
            momentum,
            eps,
        )
    )
    if not done:
        raise MemoryError(_NO_MEMORY)
    if training:
        _copy_back(old_mean, running_mean)
        _copy_back(old_var, running_var)
    return y, mean, invstd, kept


def backward(
    dy: Tensor,
    x: Tensor,
    mean: Tensor,
    invstd: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    training: bool,
    activation: str | None,
    kept: Tensor | None,
    needs: tuple[bool, bool, bool, bool],
) -> tuple[Tensor | None, Tensor | None, Tensor | None, Tensor | None]:
    """dx, dresidual, dweight, dbias, as far as needed: see `dispatch.Backend`."""
    mask = kept if kept is not None and kept.dtype is torch.uint8 else None
    if x.dtype is not dy.dtype:  # hooks have changed the type of what was saved
        x = x.to(dy.dtype)
    if mean.dtype is not torch.float64 or invstd.dtype is not torch.float64:
        mean, invstd = mean.double(), invstd.double()
    x, (outer, channels, inner) = laid_out(x)
    if mask is not None and x.is_contiguous() != (mask.dim() == 1):  # hooks have reordered what was saved
        x, (outer, channels, inner) = laid_out(_reordered(x))
    dx = empty_like(x) if needs[0] else None
    dresidual = empty_like(x) if needs[1] and activation is not None else None
    real_weight, real_bias = _as_real(x, weight, bias)
    dweight = torch.empty_like(real_weight) if needs[2] and real_weight is not None else None
    dbias = torch.empty_like(real_bias) if needs[3] and real_bias is not None else None
    dy = _like(dy, x)
    residual = None if kept is None or mask is not None else _like(kept, x)
    library = _library()
    assert library is not None
    done = library.bnkit_batch_norm_backward(
        pack_backward(
            outer,
            channels,
            inner,
            _DTYPES[x.dtype],
            _ACTIVATIONS[activation],
            torch.get_num_threads(),
            training,
            False,
            *_pointers(dy, x, residual, mask, real_weight, real_bias, mean, invstd, dx, dresidual, dweight, dbias),
        )
    )
    if not done:
        raise MemoryError(_NO_MEMORY)
    if needs[1] and activation is None:
        dresidual = dy
    return dx, dresidual, _as_type_of(dweight, weight), _as_type_of(dbias, bias)


def _mask_for(x: Tensor, outer: int, channels: int, inner: int) -> Tensor | None:
    """Memory for ReLU's mask (csrc/mask.h), 2-dimensional where x is in rows; None where they would share bytes."""
    if channels == 1:
        outer, inner = 1, outer * inner
    if inner >= _SHORTEST_PLANE:
        size = outer * channels * ((inner + 7) // 8)
    elif channels * inner % 8 == 0:
        size = outer * channels * inner // 8
    else:
        return None
    size += _MASK_PADDING
    return torch.empty(size if x.is_contiguous() else (size, 1), dtype=torch.uint8, device=x.device)


def _reordered(x: Tensor) -> Tensor:
    """From contiguous to rows, or back."""
    return x.movedim(1, -1).contiguous().movedim(-1, 1) if x.is_contiguous() else x.contiguous()


def _like(tensor: Tensor, x: Tensor) -> Tensor:
    """The tensor in the type and the order of x, which is one of the two that the kernels read."""
    if tensor.dtype is not x.dtype:
        tensor = tensor.to(x.dtype)
    if tensor.stride() == x.stride():
        return tensor
    # Strides of dimensions of size 1 tell nothing.
    contiguous, rows = tensor.is_contiguous(), is_rows(tensor)
    if contiguous if x.is_contiguous() else rows:
        return tensor
    found = empty_like(x)
    if contiguous or rows:
        return _transposed(tensor, found, to_rows=contiguous)
    return found.copy_(tensor)


def _transposed(tensor: Tensor, found: Tensor, to_rows: bool) -> Tensor:
    """Copied to the other order: PyTorch's own copy takes up to five times as long where planes are a power of two."""
    channels, inner = tensor.shape[1], tensor[0, 0].numel()
    library = _library()
    assert library is not None
    library.bnkit_transpose(
        _DTYPES[tensor.dtype],
        torch.get_num_threads(),
        tensor.shape[0],
        channels if to_rows else inner,
        inner if to_rows else channels,
        tensor.data_ptr(),
        found.data_ptr(),
    )
    return found


def _as_real(x: Tensor, *parameters: Tensor | None) -> list[Tensor | None]:
    """The parameters as the kernels read them beside x: in the statistics' type, each one's values side by side."""
    dtype, found = torch.float64 if x.dtype is torch.float64 else torch.float32, []
    for parameter in parameters:
        if parameter is not None and not (parameter.dtype is dtype and parameter.is_contiguous()):
            parameter = parameter.to(dtype).contiguous()
        found.append(parameter)
    return found


def _as_type_of(gradient: Tensor | None, parameter: Tensor | None) -> Tensor | None:
    if gradient is None or parameter is None or gradient.dtype is parameter.dtype:
        return gradient
    return gradient.to(parameter.dtype)


def _copy_back(updated: Tensor | None, original: Tensor | None) -> None:
    if updated is not None and original is not None and updated is not original:
        original.copy_(updated)


def _pointers(*tensors: Tensor | None) -> list[int]:
    return [0 if tensor is None else tensor.data_ptr() for tensor in tensors]
