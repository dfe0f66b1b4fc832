"""Compares two models in training mode: outputs, gradients, running statistics in float64, up to rounding; or how far
outputs are from each other.
"""

from __future__ import annotations

import math
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.utils._pytree import tree_map_only

from .._checks import FailedCheck, UserError
from .._modes import random_numbers_kept
from ..graph import Forward, apart, apply, device_of, moved, tensors_in
from ._operation import copied
from ._verify import relative_error

_TOLERANCE = 1e-6
_NUDGE = 2.0**-48  # of a parameter: 16 units of its last place
_MARGIN = 10.0  # of fused layers' rounding over the nudge's
_REMEDY = "nothing was changed. Leave modules out with where=, and please report it."


def trained(model: nn.Module, example: Any, forward: Forward | None, nudge: float = 0.0) -> dict[str, Tensor] | None:
    """Outputs, gradients and buffers after one forward and backward pass of a float64 copy in training mode, its
    parameters changed by a part of themselves as large as `nudge`, at random.

    None if the model can't be copied, or can't run so.
    """
    try:
        twin = copied(model).double().train()
        if nudge:
            _change(twin, nudge)
        example = moved(_in_double(apart(example)), device_of(twin))
        with torch.random.fork_rng(), torch.enable_grad():
            torch.manual_seed(0)
            outputs = [t for t in tensors_in(apply(twin, example, forward)) if t.requires_grad]
            # Now: activation checkpointing runs torch's batch norms again in the backward pass, and they count it.
            buffers = {f"buffer {name}": buffer.clone() for name, buffer in twin.named_buffers()}
            upstream = [torch.randn_like(t) for t in outputs]
            parameters = {name: p for name, p in twin.named_parameters() if p.requires_grad}
            gradients = torch.autograd.grad(outputs, list(parameters.values()), upstream, allow_unused=True)
    except Exception:  # a forward made for float32, a detector without targets, one value a channel
        return None
    found = {f"output {i}": t.detach() for i, t in enumerate(outputs)}
    found |= {f"gradient of {n}": g for n, g in zip(parameters, gradients, strict=True) if g is not None}
    return found | buffers


def check_training(
    model: nn.Module, example: Any, forward: Forward | None, expected: dict[str, Tensor] | None, verb: str = "fuse"
) -> None:
    """Refuse a model that trains in another way than expected.

    Raises:
        FailedCheck: it does.
    """
    if expected is None:
        return
    found = trained(model, example, forward)
    if found is None:
        raise FailedCheck(
            f"{verb} must leave training as it was, but the model can no longer be copied or run; {_REMEDY}"
        )
    if new := found.keys() - expected.keys():
        raise FailedCheck(f"{verb} must leave training as it was, but the model has a {min(new)} now; {_REMEDY}")
    errors = _errors(found, expected)
    if all(error <= _TOLERANCE for error in errors.values()):
        return
    limits = _rounding(model, example, forward, found)
    for name, error in errors.items():
        if not error <= max(_TOLERANCE, _MARGIN * limits.get(_kind(name, expected[name]), 0.0)):
            raise FailedCheck(f"{verb} must leave training as it was, but the {name} differs by {error:.1e}; {_REMEDY}")


def twin_of(model: nn.Module) -> nn.Module | None:
    """A copy to run in training mode, which may write to anything in it.

    None if it can't be made, and where there are other processes, for which layers in it would wait.
    """
    if dist.is_available() and dist.is_initialized() and dist.get_world_size() > 1:
        return None
    try:
        return copied(model)
    except UserError:
        return None


def difference_in_training(
    model: nn.Module | None, original: nn.Module | None, example: Any, forward: Forward
) -> float | None:
    """`relative_error` of two twins' outputs in training mode, without gradients, under the same random numbers.

    Modules that are in eval mode within a model in training mode stay so. None if a twin is missing, can't run so, as
    with one value a channel or a detector without targets, or gives no finite tensors.
    """
    if model is None or original is None:
        return None
    outputs = []
    for twin in (original, model):
        with torch.no_grad(), random_numbers_kept():
            if not twin.training:
                twin.train()
            try:
                outputs.append(list(tensors_in(apply(twin, apart(example), forward))))
            except Exception:
                return None
    error = relative_error(outputs[1], outputs[0])
    return error if outputs[0] and math.isfinite(error) else None


def _errors(found: dict[str, Tensor], expected: dict[str, Tensor]) -> dict[str, float]:
    """By name, relative to the largest value of the tensor's kind."""
    largest = _largest_of_each_kind(expected)
    errors = {}
    for name, tensor in expected.items():
        # A bias that a batch norm cancels has a gradient of rounding errors: compare with the largest of the kind.
        floor = largest[_kind(name, tensor)]
        errors[name] = relative_error(found.get(name), tensor, [floor] if math.isfinite(floor) else [])
    return errors


def _rounding(model: nn.Module, example: Any, forward: Forward | None, found: dict[str, Tensor]) -> dict[str, float]:
    """By kind, what a change of the parameters as small as rounding errors does: much where batch norms divide by the
    deviation of two values that are alike, one behind the other.
    """
    nudged = trained(model, example, forward, nudge=_NUDGE)
    limits: dict[str, float] = {}
    for name, error in (_errors(nudged, found) if nudged else {}).items():
        if math.isfinite(error):
            kind = _kind(name, found[name])
            limits[kind] = max(error, limits.get(kind, 0.0))
    return limits


@torch.no_grad()
def _change(model: nn.Module, nudge: float) -> None:
    generator = torch.Generator().manual_seed(0)
    for parameter in model.parameters():
        at_random = torch.rand(parameter.shape, generator=generator, dtype=torch.float64).to(parameter)
        parameter.mul_(1 + nudge * (2 * at_random - 1))


def _kind(name: str, tensor: Tensor) -> str:
    return name.split()[0] if tensor.is_floating_point() else name


def _largest_of_each_kind(tensors: dict[str, Tensor]) -> dict[str, float]:
    largest: dict[str, float] = {}
    for name, tensor in tensors.items():
        kind, size = _kind(name, tensor), float(tensor.abs().max()) if tensor.numel() else 0.0
        largest[kind] = max(size, largest.get(kind, 0.0))
    return largest


def _in_double(example: Any) -> Any:
    return tree_map_only(Tensor, lambda t: t.double() if t.is_floating_point() else t, example)
