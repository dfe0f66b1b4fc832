"""Convolutions and linear layers in a record, and how their weights take up a scale and a shift."""

from __future__ import annotations

import dataclasses
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .._modes import buffers_kept
from ..graph import Call, Operator, Record, Value
from ._operation import Operation

_CONVOLUTIONS = ("conv1d", "conv2d", "conv3d")
_TRANSPOSED = ("conv_transpose1d", "conv_transpose2d", "conv_transpose3d")


class Refused(Exception):
    """A site that can't be changed; the message is the reason the user reads."""


def is_weighted(operator: Operator) -> bool:
    """Whether it is a convolution, transposed or not, or a linear map."""
    return operator.name in (*_CONVOLUTIONS, *_TRANSPOSED, "linear")


@dataclasses.dataclass(frozen=True, eq=False)
class Weighted:
    """A module that applies its own weight once, by one operation.

    Attributes:
        module, name: the convolution or linear layer.
        operator: the operation, which ran directly in the module's forward.
        key: the name of the weight in the module.
    """

    module: nn.Module
    name: str
    operator: Operator
    key: str

    @property
    def transposed(self) -> bool:
        """Whether it is a transposed convolution."""
        return self.operator.name in _TRANSPOSED

    @property
    def linear(self) -> bool:
        """Whether it is a linear layer."""
        return self.operator.name == "linear"

    @property
    def input(self) -> Value:
        """What it is applied to."""
        return self.operator.argument(0, "input")

    @property
    def groups(self) -> int:
        """Groups of the convolution; 1 for a linear layer."""
        if self.linear:
            return 1
        return self.operator.argument(6, "groups", 1)

    @property
    def weight(self) -> nn.Parameter:
        """The weight."""
        return getattr(self.module, self.key)

    def scale_outputs(self, operation: Operation, scale: Tensor, shift: Tensor) -> None:
        """Make it compute scale · y + shift instead of y; float64 arguments, one value an output channel."""
        weight, bias = self.weight.detach().double(), self._bias()
        operation.fill(self.weight, self._by_output(weight, scale))
        self._set_bias(operation, bias * scale + shift)

    def scale_inputs(self, operation: Operation, scale: Tensor, shift: Tensor) -> None:
        """Make it compute of x what it computed of scale · x + shift; one value an input channel."""
        weight, bias = self.weight.detach().double(), self._bias()
        if bool(shift.any()):
            bias = bias + self._sum_of_inputs(weight, shift)
            self._set_bias(operation, bias)
        operation.fill(self.weight, self._by_input(weight, scale))

    def unpad(self, operation: Operation) -> tuple[int, ...]:
        """Take the zero padding off, and return it as `torch.nn.functional.pad` takes it."""
        module: Any = self.module
        amounts = tuple(module._reversed_padding_repeated_twice)
        operation.touch(module)
        module.padding = (0,) * len(module.kernel_size)
        module._reversed_padding_repeated_twice = [0] * len(amounts)
        return amounts

    def _by_output(self, weight: Tensor, scale: Tensor) -> Tensor:
        if not self.transposed:
            return weight * scale.view(-1, *[1] * (weight.dim() - 1))
        # (in, out/groups, *): the outputs of group g are scale[g·out/groups : (g+1)·out/groups].
        grouped = weight.unflatten(0, (self.groups, -1)) * scale.view(self.groups, 1, -1, *[1] * (weight.dim() - 2))
        return grouped.flatten(0, 1)

    def _by_input(self, weight: Tensor, scale: Tensor) -> Tensor:
        if self.transposed:
            return weight * scale.view(-1, *[1] * (weight.dim() - 1))
        # (out, in/groups, *): the outputs of group g read the inputs scale[g·in/groups : (g+1)·in/groups].
        grouped = weight.unflatten(0, (self.groups, -1)) * scale.view(self.groups, 1, -1, *[1] * (weight.dim() - 2))
        return grouped.flatten(0, 1)

    def _sum_of_inputs(self, weight: Tensor, shift: Tensor) -> Tensor:
        assert not self.transposed
        return self._by_input(weight, shift).flatten(1).sum(1)

    def _bias(self) -> Tensor:
        bias = getattr(self.module, "bias", None)
        if bias is not None:
            return bias.detach().double()
        return self.no_bias().double()

    def no_bias(self) -> Tensor:
        """A bias of zeros."""
        outputs = self.weight.shape[1] * self.groups if self.transposed else self.weight.shape[0]
        return self.weight.new_zeros(outputs)

    def _set_bias(self, operation: Operation, value: Tensor) -> None:
        if isinstance(self.module.bias, nn.Parameter):
            operation.fill(self.module.bias, value)
            return
        operation.touch(self.module)
        self.module._buffers.pop("bias", None)
        vars(self.module).pop("bias", None)  # a None that was never registered
        bias = nn.Parameter(value.to(self.weight.dtype), requires_grad=self.weight.requires_grad)
        self.module.register_parameter("bias", bias)


def weighted_by(operator: Operator, record: Record) -> Weighted:
    """The convolution or linear layer that an operation belongs to.

    Raises:
        Refused: the weight isn't the module's own, is used elsewhere too, or hooks watch the module.
    """
    weight, bias = operator.argument(1, "weight"), operator.argument(2, "bias")
    call = operator.call
    if call is None or not weight.name:
        where = f" in {call.name}" if call is not None and call.name else ""
        raise Refused(f"the weight of the {operator.name}{where} is computed in each forward pass")
    owner, _, key = weight.name.rpartition(".")
    if owner not in record.names[call.module]:
        raise Refused(f"{weight.name} is used outside of its module's forward")
    _check_sole_use(weight, record)
    weighted = Weighted(call.module, call.name, operator, key)
    if bias is not None:
        if bias.name not in {f"{name}.bias" if name else "bias" for name in record.names[call.module]}:
            raise Refused(f"the bias of {call.name} is computed in each forward pass")
        _check_sole_use(bias, record)
    elif not _can_have_bias(weighted, call, record):
        raise Refused(f"{call.name} has no place for a bias")
    if has_hooks(call.module):
        raise Refused(f"{call.name} has forward hooks, which would see other values")
    if not weight.dtype.is_floating_point:
        raise Refused(f"the weight of {call.name} is {weight.dtype}")
    return weighted


def _can_have_bias(weighted: Weighted, call: Call, record: Record) -> bool:
    """Whether a module that ran without a bias would use one; it may have got one since, from a fold into it."""
    name, bias = f"{call.name}.bias" if call.name else "bias", getattr(call.module, "bias", False)
    return _would_use_bias(weighted, call) if bias is None else bias is not False and name not in record.held


def _would_use_bias(weighted: Weighted, call: Call) -> bool:
    """Whether the forward of a module adds a bias where there is one, as those of torch do. Others are tried."""
    module, (args, kwargs) = call.module, call.arguments
    if type(module).forward.__module__.startswith("torch.nn.") or len(args) != 1 or kwargs:
        return True
    x = torch.zeros(args[0].shape, dtype=args[0].dtype, device=weighted.weight.device)
    registry: dict[str, Any] = module._parameters if "bias" in module._parameters else vars(module)
    try:
        with torch.no_grad(), buffers_kept(module), torch.random.fork_rng():
            without = module(x)
            registry["bias"] = nn.Parameter(weighted.no_bias() + 1)
            return not torch.equal(module(x), without)
    except Exception:  # it can't be tried: the outputs will tell
        return True
    finally:
        registry["bias"] = None


def has_hooks(module: nn.Module) -> bool:
    """Whether anyone listens to the module's forward or backward pass."""
    kinds = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks")
    return any(getattr(module, kind) for kind in kinds)


def _check_sole_use(parameter: Value, record: Record) -> None:
    assert parameter.name is not None
    module = parameter.name.rpartition(".")[0] or "the model"
    if len(parameter.readers) > 1:
        raise Refused(f"{module} runs {len(parameter.readers)} times, or its {parameter.name} is used elsewhere too")
    if parameter.name in record.tied:
        raise Refused(f"{parameter.name} shares memory with {record.tied[parameter.name]}")


def zero_padding(weighted: Weighted) -> bool:
    """Whether a convolution surrounds its input with zeros."""
    padding = weighted.operator.argument(4, "padding", 0)
    if isinstance(padding, str):
        return padding == "same" and any(size > 1 for size in weighted.weight.shape[2:])
    return any(padding) if isinstance(padding, (tuple, list)) else bool(padding)


def own_pad(operator: Operator) -> bool:
    """Whether it is a padding of the kind that repeats the input's own values."""
    return operator.function is F.pad and operator.argument(2, "mode") in ("reflect", "replicate", "circular")
