"""Derivatives of a batch norm served by a backend.

The first ones are the backend's own; the second, and those of a batched or dual cotangent, the reference's.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch._C._autograd import _top_saved_tensors_default_hooks
from torch._functorch.pyfunctorch import temporarily_clear_interpreter_stack
from torch.utils import checkpoint as checkpointing

from . import reference
from ._backend import Gradients
from ._transforms import is_stored, transforms_active


class _BatchNorm(torch.autograd.Function):
    """Keeps x, mean, invstd and, under an activation, the residual or a mask: mostly what exists anyway."""

    @staticmethod
    def forward(  # pyright: ignore[reportIncompatibleMethodOverride]
        ctx: Any, x: Tensor, residual: Tensor | None, weight: Tensor | None, bias: Tensor | None, call: tuple[Any, ...]
    ) -> Tensor:
        backend, running_mean, running_var, training, momentum, eps, activation = ctx.call = call
        may_mask = residual is not None and not _is_checkpointed()
        y, mean, invstd, kept = backend.forward(
            x, running_mean, running_var, weight, bias, training, momentum, eps, activation, residual, may_mask
        )
        ctx.save_for_backward(x, mean, invstd, weight, bias, kept)
        return y

    @staticmethod
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:  # pyright: ignore[reportIncompatibleMethodOverride]
        needs = ctx.needs_input_grad[:4]
        if torch.is_grad_enabled() or transforms_active() or not is_stored(dy):
            return *_differentiable_gradients(ctx, dy, needs), None
        x, mean, invstd, weight, bias, kept = ctx.saved_tensors
        if kept is not None:
            kept = _as_kept(kept, x)
        backend, _, _, training, _, _, activation = ctx.call
        return *backend.backward(dy, x, mean, invstd, weight, bias, training, activation, kept, needs), None


# Function.apply looks for torch.func transforms, in each argument; who calls this has looked.
differentiable: Callable[[Tensor, Tensor | None, Tensor | None, Tensor | None, tuple[Any, ...]], Tensor]
differentiable = super(torch.autograd.Function, _BatchNorm).apply  # pyright: ignore
"""A backend's y in autograd's graph, not within a transform of `torch.func`, of x, residual, weight, bias and

    (backend, running_mean, running_var, training, momentum, eps, activation)

in one argument, since autograd handles each one by itself, and these have no gradient.
"""


def _is_checkpointed() -> bool:
    """Whether activation checkpointing takes note of what is saved, to compare it when the pass is repeated.

    One of the two passes may be seen by a dispatch mode, under which there are no masks.
    """
    hooks = _top_saved_tensors_default_hooks(False)
    return hooks is not None and getattr(hooks[0], "__module__", None) == checkpointing.__name__


def _as_kept(kept: Tensor, x: Tensor) -> Tensor:
    """What was saved besides x: a mask, of another shape than a residual, as bytes again where hooks have saved all in
    another type.
    """
    return kept if kept.dtype is torch.uint8 or kept.shape == x.shape else kept.to(torch.uint8)


def _differentiable_gradients(ctx: Any, dy: Tensor, needs: tuple[bool, bool, bool, bool]) -> Gradients:
    """The gradients as functions of dy and of the inputs that autograd and transforms can follow: the reference's."""
    x, mean, invstd, weight, bias, kept = ctx.saved_tensors  # once: checkpointing allows no more
    _, _, _, training, _, eps, activation = ctx.call
    residual = None if kept is None else _as_kept(kept, x)
    if residual is not None and residual.dtype is torch.uint8:  # a mask: relu's second derivative is 0
        passed = _passed(ctx, x, mean, invstd, weight, bias, residual)
        dy, activation, residual = dy.masked_fill(passed == 0, 0), None, None
    saved = {"x": x, "residual": residual, "weight": weight, "bias": bias}

    def forward(inputs: dict[str, Tensor]) -> Tensor:
        x, residual, weight, bias = (saved | inputs).values()
        if training:
            return reference.batch_norm(x, None, None, weight, bias, True, 0.0, eps, activation, residual)
        return reference.normalize(x, mean, invstd, weight, bias, activation, residual)

    named = zip(saved.items(), needs, strict=True)
    inputs = {name: tensor for (name, tensor), needed in named if needed and tensor is not None}
    found = _gradients(forward, inputs, dy) if inputs else {}
    dresidual = dy if needs[1] and residual is None else found.get("residual")
    return found.get("x"), dresidual, found.get("weight"), found.get("bias")


def _passed(
    ctx: Any, x: Tensor, mean: Tensor, invstd: Tensor, weight: Tensor | None, bias: Tensor | None, mask: Tensor
) -> Tensor:
    """1 where relu passed z, else 0: the residual's gradient for a dy of 1, which the backend reads off the mask."""
    backend, _, _, training, _, _, activation = ctx.call
    needs = (False, True, False, False)
    with torch.no_grad(), temporarily_clear_interpreter_stack():
        dy = torch.ones_like(x)
        found = backend.backward(dy, x, mean, invstd, weight, bias, training, activation, mask, needs)[1]
    assert found is not None
    return found


def _gradients(
    forward: Callable[[dict[str, Tensor]], Tensor], inputs: dict[str, Tensor], dy: Tensor
) -> dict[str, Tensor]:
    """Those of `forward(inputs)`, by name."""
    if torch._C._are_functorch_transforms_active():  # where autograd.grad sees no input from outside
        return torch.func.vjp(forward, inputs)[1](dy)[0]
    # Not everywhere, since that refuses hooks on saved tensors, as activation checkpointing has them.
    create_graph = torch.is_grad_enabled()
    with torch.enable_grad():
        # Views, so that an input computed from another (a weight made from x, say) counts as an input of its own.
        inputs = {name: tensor.view_as(tensor) for name, tensor in inputs.items()}
        y = forward(inputs)
    found = torch.autograd.grad(y, tuple(inputs.values()), dy, create_graph=create_graph)
    return dict(zip(inputs, found, strict=True))
