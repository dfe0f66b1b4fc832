"""What a record is made of: values, the operations that made and read them, the modules that ran."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import nn


@dataclasses.dataclass(eq=False)
class Value:
    """The content of a tensor between two writes: writing in place makes another value.

    Attributes:
        shape, dtype, strides: of the tensor; a sparse one has no strides.
        memory: stands for the memory in which it lies: views, and what is written in place, have one in common.
        maker: the operation whose result it is; None for inputs, parameters, buffers and constants.
        name: of the parameter or buffer it is; None for others.
        readers: the operations that took it as an argument, in the order they ran.
        returned: whether it is part of the model's output.
        handed_on: the names of functions that gave it back as it was, as dropout does in eval mode.
        kept: whether something outside the forward pass still held it afterwards, as an attribute does.
    """

    shape: torch.Size
    dtype: torch.dtype
    strides: tuple[int, ...] = ()
    maker: Operator | None = None
    memory: object = dataclasses.field(default_factory=object)
    name: str | None = None
    readers: list[Operator] = dataclasses.field(default_factory=list)
    handed_on: list[str] = dataclasses.field(default_factory=list)
    returned: bool = False
    kept: bool = False

    @property
    def escapes(self) -> bool:
        """Whether it can be seen from outside the forward pass."""
        return self.returned or self.kept


@dataclasses.dataclass(eq=False)
class Call:
    """One run of a module.

    Attributes:
        module, name: what ran, under its first name.
        parent: the call in which it ran; None for the model itself.
        training: the module's flag at that time.
        arguments: positional and keyword arguments, with a `Value` for each tensor.
        inputs, outputs: the values among its arguments and results.
    """

    module: nn.Module
    name: str
    parent: Call | None
    training: bool
    arguments: tuple[tuple[Any, ...], dict[str, Any]]
    inputs: tuple[Value, ...]
    outputs: tuple[Value, ...] = ()

    def contains(self, operator: Operator) -> bool:
        """Whether the operation ran during this call."""
        return any(call is self for call in operator.calls())


@dataclasses.dataclass(eq=False)
class Operator:
    """One function or method that ran on tensors: `torch.conv2d`, `F.relu`, `Tensor.add_`, `torch.cat`.

    Attributes:
        function: what was called.
        name: its name, without underscores around it: "conv2d", "relu", "iadd", "cat".
        arguments: positional and keyword arguments, with a `Value` for each tensor.
        inputs, outputs: the values among arguments and results. A tensor written in place is an input by its old
            value and an output by its new one.
        writes: the `memory` of each tensor that it wrote in place.
        call: the innermost module call it belongs to; None if it ran outside of all.
        index: its place in the order of operations.
    """

    function: Callable[..., Any]
    name: str
    arguments: tuple[tuple[Any, ...], dict[str, Any]]
    inputs: tuple[Value, ...]
    outputs: tuple[Value, ...]
    writes: frozenset[object]
    call: Call | None
    index: int

    def calls(self) -> Iterator[Call]:
        """The module calls it ran in, from the innermost out."""
        call = self.call
        while call is not None:
            yield call
            call = call.parent

    def argument(self, position: int, name: str, default: Any = None) -> Any:
        """An argument given by position or by name."""
        args, kwargs = self.arguments
        return args[position] if position < len(args) else kwargs.get(name, default)
