"""One pass of a model without values, counted by module."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _NormBase
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from .._checks import UserError
from .._modes import hooked
from ..nn import BatchNorm2d

_NORMS = (_NormBase, nn.GroupNorm, nn.LayerNorm, nn.RMSNorm, nn.LocalResponseNorm)
_BNKIT_NORM = BatchNorm2d.__bases__[0]  # what all layers of bnkit.nn derive from
_BATCH_PASSES, _FIXED_PASSES, _RESIDUAL_PASSES = 8, 5, 2


class Meter(TorchDispatchMode):
    """Counts by module what one pass does. Operators are seen below autograd, modules by their hooks."""

    def __init__(self, model: nn.Module) -> None:
        from torch.utils.flop_counter import flop_registry  # which imports Triton

        super().__init__()
        self.model = model
        self._flops = flop_registry
        self.multiply_adds: dict[str, int] = {}
        self.kept: dict[str, int] = {}
        self.norm_bytes: dict[str, int] = {}
        self.other_bytes = 0
        self.outputs: dict[str, tuple[int, ...]] = {}
        self._running: list[str] = []
        self._norm: nn.Module | None = None
        self._norm_nodes: set[Any] = set()
        self._storages: dict[int, Any] = {}

    def run(self, arguments: tuple[Any, ...], named: dict[str, Any], *, training: bool) -> None:
        """One forward pass, and in training a backward pass."""
        state = {name: without_values(t) for name, t in [*self.model.named_parameters(), *self.model.named_buffers()]}
        for tensor in state.values():
            self._storages[tensor.untyped_storage()._cdata] = tensor
        try:
            with torch.device("meta"), hooked(self._hooks()), self._keeping(training):
                output = torch.func.functional_call(self.model, state, arguments, named)
                if training:
                    self._backward(output)
        except Exception as error:  # a model may raise anything at input that it doesn't expect
            reason = next(iter(str(error).splitlines()), type(error).__name__)
            raise UserError(
                f"costs runs a model on tensors without values, which {type(self.model).__name__} did not take "
                f"({reason}): give the input it expects, and a model that reads no values."
            ) from error

    @contextlib.contextmanager
    def _keeping(self, training: bool) -> Iterator[None]:
        with torch.set_grad_enabled(training), self:
            if training:
                with torch.autograd.graph.saved_tensors_hooks(self._keep, lambda tensor: tensor):
                    yield
            else:
                yield

    def _backward(self, output: Any) -> None:
        results = [leaf for leaf in tree_leaves(output) if isinstance(leaf, Tensor) and leaf.requires_grad]
        if results:
            torch.autograd.backward(results, [result.detach() for result in results])

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        out = func(*args, **kwargs)
        formula = self._flops.get(func._overloadpacket)
        if formula is not None and self._running:
            flops = formula(*args, **kwargs, out_val=out)
            self.multiply_adds[self._running[-1]] = self.multiply_adds.get(self._running[-1], 0) + flops // 2
        is_norm = self._norm is not None or torch._C._current_autograd_node() in self._norm_nodes
        if not is_norm and not func.is_view:
            self.other_bytes += _bytes((args, kwargs)) + _bytes(out)
        return out

    def _keep(self, tensor: Tensor) -> Tensor:
        # Of a layer of bnkit.nn, `_enter_norm` has counted what its kernels keep; what runs here is the reference.
        if not isinstance(self._norm, _BNKIT_NORM):
            self._charge(tensor)
        return tensor

    def _charge(self, tensor: Tensor) -> None:
        storage = tensor.untyped_storage()
        if storage._cdata not in self._storages:
            self._storages[storage._cdata] = tensor  # kept alive, so that no other takes its address
            self._add(self.kept, storage.nbytes())

    def _add(self, counts: dict[str, int], number: int) -> None:
        counts[self._running[-1]] = counts.get(self._running[-1], 0) + number

    def _hooks(self) -> Iterator[Any]:
        for name, module in self.model.named_modules():
            yield module.register_forward_pre_hook(self._before(name), with_kwargs=True)
            yield module.register_forward_hook(self._after(name), with_kwargs=True)

    def _before(self, name: str) -> Callable[..., None]:
        def hook(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            self._running.append(name)
            if isinstance(module, _NORMS) and self._norm is None:
                self._enter_norm(module, *_tensors((args, kwargs)))

        return hook

    def _enter_norm(self, module: Any, x: Tensor, *residual: Tensor) -> None:
        self._norm = module
        fixed = isinstance(module, _NormBase) and not module.training
        passes = (_FIXED_PASSES if fixed else _BATCH_PASSES) + _RESIDUAL_PASSES * len(residual)
        self._add(self.norm_bytes, passes * x.nbytes)
        if isinstance(module, _BNKIT_NORM) and torch.is_grad_enabled():
            for tensor in (x, *residual) if module.activation else (x,):
                self._charge(tensor)
            wide = torch.promote_types(x.dtype, torch.float32)
            self._add(self.kept, 2 * module.num_features * wide.itemsize)

    def _after(self, name: str) -> Callable[..., None]:
        def hook(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> None:
            if isinstance(output, Tensor):
                self.outputs[name] = tuple(output.shape)
            if module is self._norm:
                self._norm = None
                self._norm_nodes |= _nodes_between(_tensors((args, kwargs)), _tensors(output))
            self._running.pop()

        return hook


def without_values(tensor: Tensor) -> Tensor:
    return tensor.detach().to("meta").requires_grad_(tensor.requires_grad)


def _tensors(tree: Any) -> list[Tensor]:
    return [leaf for leaf in tree_leaves(tree) if isinstance(leaf, Tensor)]


def _bytes(tree: Any) -> int:
    return sum(tensor.nbytes for tensor in _tensors(tree))


def _nodes_between(inputs: list[Tensor], outputs: list[Tensor]) -> set[Any]:
    """The autograd nodes that lead from `outputs` back to `inputs`, and those of parameters on the way."""
    ends = {tensor.grad_fn for tensor in inputs}
    found: set[Any] = set()
    rest = [tensor.grad_fn for tensor in outputs]
    while rest:
        node = rest.pop()
        if node is not None and node not in ends and node not in found:
            found.add(node)
            rest += [following for following, _ in node.next_functions]
    return found
