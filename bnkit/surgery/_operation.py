"""A model under surgery: every change goes through here, so that all of them can be taken back."""

from __future__ import annotations

import copy
import itertools
from collections.abc import Callable, Mapping
from types import TracebackType
from typing import Self

import torch
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel
from torch.nn.parameter import is_lazy

from .._checks import UserError
from ._references import holders, reachable, replaced
from ._result import Surgery

_REGISTRIES = ("_parameters", "_buffers", "_modules", "_non_persistent_buffers_set")


class Operation:
    """The changes one call makes to a model; leaving the `with` block by an exception takes all of them back.

        with Operation(model, inplace=inplace) as operation:
            operation.swap(old, new)
            verify(operation.model)
        return operation.result(changed, skipped, max_error)

    Args:
        model: The model given.
        inplace: Work on `model` itself; otherwise on a copy.

    Attributes:
        model: The model being changed; after the root itself was swapped, its replacement.

    Raises:
        UserError: the model can't be copied, or has lazy layers that never ran.
    """

    def __init__(self, model: nn.Module, *, inplace: bool) -> None:
        check_initialized(model)
        self.model = model if inplace else copied(model)
        # Both list their parameters in one order, and a shared parameter once.
        self._heirs = dict(zip(model.parameters(), self.model.parameters(), strict=True))
        self._undo: list[Callable[[], None]] = []
        self._touched: set[nn.Module] = set()
        self._holders, registered = holders(self.model), set(self.model.modules())
        self._unregistered = [module for module in reachable(self.model) if module not in registered]

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        if error is not None:
            self.undo()

    def undo(self) -> None:
        """Take every change back, the last one first."""
        while self._undo:
            self._undo.pop()()
        self._touched.clear()

    def swap(self, old: nn.Module, new: nn.Module) -> None:
        """Put `new` wherever `old` is registered, under every name, or in a list, dict or other container that is an
        attribute; if `old` is the model, `new` becomes the model.
        """
        for parent in [*self.model.modules(), *self._unregistered]:
            for name, child in parent._modules.items():
                if child is old:
                    self.touch(parent)
                    parent._modules[name] = new
        for parent, name in self._holders.get(old, ()):
            self.touch(parent)
            vars(parent)[name] = replaced(vars(parent)[name], old, new, self._undo)
        self._holders[new] = self._holders.get(old, [])
        if old is self.model:
            self._undo.append(lambda: setattr(self, "model", old))
            self.model = new

    def touch(self, module: nn.Module) -> None:
        """Remember the class, attributes and registries of `module`; call it before changing any of them."""
        if module in self._touched:
            return
        self._touched.add(module)
        kind, attributes = type(module), dict(vars(module))
        registries = {name: copy.copy(attributes[name]) for name in _REGISTRIES}

        def put_back() -> None:
            module.__class__ = kind
            vars(module).clear()
            vars(module).update(attributes | registries)

        self._undo.append(put_back)

    def fill(self, tensor: Tensor, value: Tensor) -> None:
        """Write `value` into `tensor`, rounded to its type."""
        before = tensor.detach().clone()

        def write(new: Tensor) -> None:
            with torch.no_grad():
                tensor.copy_(new)
            torch.clear_autocast_cache()  # of casts of the old value

        self._undo.append(lambda: write(before))
        write(value)

    def result(
        self,
        changed: Mapping[str, str],
        skipped: Mapping[str, str],
        max_error: float | None,
        training_error: float | None = None,
    ) -> Surgery:
        """What the call returns. Changes made so far can no longer be taken back."""
        self._undo.clear()
        return Surgery(self.model, dict(changed), dict(skipped), max_error, self._heirs, training_error)


def check_initialized(model: nn.Module) -> None:
    """Refuse a model that can't be copied or looked at.

    Raises:
        UserError: a parameter or buffer of a lazy layer has no shape yet, or the model is scripted or traced.
    """
    if isinstance(model, torch.jit.ScriptModule):
        raise UserError(f"a model must be of Python modules, got a {type(model).__name__}: change it, then script it.")
    for name, tensor in itertools.chain(model.named_parameters(), model.named_buffers()):
        if is_lazy(tensor):
            raise UserError(f"a model's tensors must have shapes, but {name} has none yet: run it once on an example.")


def check_unwrapped(model: nn.Module) -> None:
    """Refuse a model inside DistributedDataParallel.

    Raises:
        UserError: it is: parameters that come, go or freeze would not be averaged as it has planned.
    """
    if any(isinstance(module, DistributedDataParallel) for module in model.modules()):
        raise UserError(
            "a model must be changed before DistributedDataParallel takes note of its parameters, got one inside it: "
            "pass model.module, and wrap the result."
        )


def copied(model: nn.Module) -> nn.Module:
    """A deep copy.

    Raises:
        UserError: some part of the model can't be copied.
    """
    try:
        return copy.deepcopy(model)
    except (RuntimeError, TypeError, NotImplementedError) as error:
        raise UserError(
            f"the model must be copied to leave it untouched, but can't be ({str(error).splitlines()[0]}): "
            "pass inplace=True, or remove what hinders, such as weight_norm's old form."
        ) from error
