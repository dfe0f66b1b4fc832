"""Writes down what runs: values by the tensors that hold them, operations, and the stack of module calls."""

from __future__ import annotations

import contextlib
import gc
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_flatten, tree_map_only
from torch.utils.weak import WeakTensorKeyDictionary

from ._facts import Call, Operator, Value
from ._tensors import tensors_in

# Functions that return no tensor and don't read the content of the one they are given.
_METADATA = frozenset({
    "size", "dim", "ndimension", "numel", "nelement", "stride", "storage_offset", "is_contiguous", "is_floating_point",
    "is_complex", "is_signed", "element_size", "get_device", "type", "len", "hash", "is_inference", "has_names",
    "is_same_size", "is_neg", "is_conj", "is_coalesced", "data_ptr", "is_pinned", "is_shared", "is_set_to", "dim_order",
    "result_type", "can_cast", "promote_types", "get_default_dtype", "requires_grad_", "register_hook", "retain_grad",
    "repr", "format",
})  # fmt: skip


# Functions that read only the shape, type or device of all tensors but the first, or of all of them.
_LIKE_THE_SECOND = frozenset({"reshape_as", "view_as", "expand_as", "type_as"})
_LIKE_THE_FIRST = frozenset({
    "zeros_like", "ones_like", "empty_like", "full_like", "rand_like", "randn_like", "randint_like",
    "new", "new_zeros", "new_ones", "new_empty", "new_empty_strided", "new_full",
})  # fmt: skip


class Tape:
    """What has run so far. Holds tensors weakly, so that recording needs no more memory than running.

    Attributes:
        calls, operators: in the order they began.
        held: the model's parameters and buffers.
        quiet: whether what runs now is part of an operation that is being written down.
    """

    def __init__(self, model: nn.Module) -> None:
        self.calls: list[Call] = []
        self.operators: list[Operator] = []
        self.quiet = False
        self._stack: list[Call] = []
        self._values: Any = WeakTensorKeyDictionary()  # tensor -> (value, the tensor's version)
        self.held: dict[str, Value] = {}
        for name, tensor in (*model.named_parameters(), *model.named_buffers()):
            self.held[name] = _value_of(tensor, name=name)
            self._hold(tensor, self.held[name])

    def begin(self, module: nn.Module, name: str, args: Any, kwargs: Any) -> None:
        """A module starts."""
        arguments = self._with_values((tuple(args), dict(kwargs)))
        inputs = tuple(map(self.value, tensors_in((args, kwargs))))
        parent = self._stack[-1] if self._stack else None
        call = Call(module, name, parent, module.training, arguments, inputs)
        self.calls.append(call)
        self._stack.append(call)

    def end(self, module: nn.Module, output: Any) -> None:
        """A module returns, or fails."""
        while self._stack:  # a call that failed before its hooks ran may lie above
            call = self._stack.pop()
            if call.module is module:
                call.outputs = tuple(map(self.value, tensors_in(output)))
                return

    def run(self, function: Callable[..., Any], args: Any, kwargs: dict[str, Any]) -> Any:
        """Run a function on tensors, and write it down."""
        given = [leaf for leaf in tree_flatten((args, kwargs))[0] if isinstance(leaf, Tensor)]
        inputs = [self.value(tensor) for tensor in _read(function, given)]
        versions = [_version(tensor) for tensor in given]
        arguments = self._with_values((args, kwargs))
        memories = {_storage(tensor): self.value(tensor).memory for tensor in given}
        self.quiet = True
        try:
            result = function(*args, **kwargs)
        finally:
            self.quiet = False
        written = [t for t, version in zip(given, versions, strict=True) if _version(t) != version]
        results = [leaf for leaf in tree_flatten(result)[0] if isinstance(leaf, Tensor)]
        new = [t for t in (*written, *results) if not self._knows(t)]
        if not new and (results or _reads_nothing(function)):
            for value in inputs if results else ():
                value.handed_on.append(_name(function))
            return result  # its input as it was, or something about it that is not its content
        operator = self._write_down(function, arguments, inputs)
        operator.writes = frozenset(memories.get(_storage(tensor)) for tensor in written)
        for tensor in new:
            if not self._knows(tensor):  # a result that is also an argument comes twice
                memory = memories.setdefault(_storage(tensor), object())
                self._hold(tensor, _value_of(tensor, maker=operator, memory=memory))
        operator.outputs = tuple(dict.fromkeys(map(self.value, new)))
        return result

    def _write_down(self, function: Callable[..., Any], arguments: Any, inputs: list[Value]) -> Operator:
        call, index = self._stack[-1] if self._stack else None, len(self.operators)
        operator = Operator(function, _name(function), arguments, tuple(inputs), (), frozenset(), call, index)
        self.operators.append(operator)
        for value in dict.fromkeys(inputs):
            value.readers.append(operator)
        return operator

    def value(self, tensor: Tensor) -> Value:
        """What the tensor holds now."""
        if not self._knows(tensor):  # from outside, or written through another tensor with the same memory
            before = self._values.get(tensor)
            memory = before[0].memory if before else object()
            self._hold(tensor, _value_of(tensor, memory=memory))
        return self._values[tensor][0]

    def finish(self, output: Any) -> None:
        """The model has returned: note which values can still be seen."""
        returned = {self.value(tensor) for tensor in tensors_in(output)}
        for value in returned:
            value.returned = True
        alive = [value for value, _ in self._values.values() if self._is_left(value)]
        if alive:
            gc.collect()  # garbage that waits in a cycle is not kept
            for value in [value for value, _ in self._values.values() if self._is_left(value)]:
                value.kept = True

    @staticmethod
    def _is_left(value: Value) -> bool:
        return value.maker is not None and not value.returned

    def _knows(self, tensor: Tensor) -> bool:
        entry = self._values.get(tensor)
        return entry is not None and entry[1] == _version(tensor)

    def _hold(self, tensor: Tensor, value: Value) -> None:
        self._values[tensor] = (value, _version(tensor))

    def _with_values(self, arguments: Any) -> Any:
        return tree_map_only(Tensor, self.value, arguments)


def _value_of(tensor: Tensor, **facts: Any) -> Value:
    strides = tensor.stride() if tensor.layout is torch.strided else ()
    return Value(tensor.shape, tensor.dtype, strides, **facts)


def _version(tensor: Tensor) -> int:
    return 0 if tensor.is_inference() else tensor._version


def _storage(tensor: Tensor) -> int:
    """A number that living tensors share if they lie in one memory."""
    try:
        return tensor.untyped_storage()._cdata
    except RuntimeError:  # a sparse tensor has none
        return id(tensor)


def _name(function: Callable[..., Any]) -> str:
    name = getattr(function, "__name__", type(function).__name__)
    if name == "__get__":  # an attribute, such as Tensor.T
        name = getattr(getattr(function, "__self__", None), "__name__", name)
    return name.strip("_").removesuffix(".default").removesuffix(".Tensor")


def _read(function: Callable[..., Any], given: list[Tensor]) -> list[Tensor]:
    """Those of a function's arguments whose content it reads."""
    name = _name(function)
    return [] if name in _LIKE_THE_FIRST else given[:1] if name in _LIKE_THE_SECOND else given


def _reads_nothing(function: Callable[..., Any]) -> bool:
    return getattr(function, "__name__", "") in ("__get__", "__set__") or _name(function) in _METADATA


class _InPython(TorchFunctionMode):
    def __init__(self, tape: Tape) -> None:
        super().__init__()
        self._tape = tape

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return self._tape.run(func, args, kwargs or {})


class _BelowPython(TorchDispatchMode):
    def __init__(self, tape: Tape) -> None:
        super().__init__()
        self._tape = tape

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if self._tape.quiet:
            return func(*args, **(kwargs or {}))
        return self._tape.run(func, args, kwargs or {})


@contextlib.contextmanager
def seen_in_python(tape: Tape) -> Iterator[None]:
    """Write down the functions that Python code calls on tensors."""
    with _InPython(tape):
        yield


@contextlib.contextmanager
def seen_below_python(tape: Tape) -> Iterator[None]:
    """Write down the kernels that run outside of any such function, as those of a scripted module do."""
    with _BelowPython(tape):
        yield
