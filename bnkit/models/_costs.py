"""What a model costs: parameters, multiply-adds, activation memory, and the bytes that its normalization moves."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Mapping
from dataclasses import asdict, dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _NormBase
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves, tree_map_only
from torch.utils.flop_counter import flop_registry

from .._checks import UserError
from .._modes import hooked, training_flags_kept
from ..nn import BatchNorm2d

_NORMS = (_NormBase, nn.GroupNorm, nn.LayerNorm, nn.RMSNorm, nn.LocalResponseNorm)
_BNKIT_NORM = BatchNorm2d.__bases__[0]  # what all layers of bnkit.nn derive from
_BATCH_PASSES, _FIXED_PASSES, _RESIDUAL_PASSES = 8, 5, 2


@dataclass
class LayerCost:
    """The costs of one module, without those of the modules in it."""

    name: str
    kind: str
    output: tuple[int, ...] | None = None
    parameters: int = 0
    multiply_adds: int = 0
    activation_bytes: int = 0
    norm_bytes: int = 0

    def is_free(self) -> bool:
        """Whether every count is zero."""
        return not (self.parameters or self.multiply_adds or self.activation_bytes or self.norm_bytes)


@dataclass(frozen=True)
class Costs:
    """What `costs` found: totals as attributes, modules in `layers`; printed, it is a table.

    Attributes:
        layers: The modules that cost something, in the model's order.
        other_bytes: Bytes moved in a training step by everything but normalization.
    """

    layers: tuple[LayerCost, ...] = field(repr=False)
    other_bytes: int

    @property
    def parameters(self) -> int:
        """Elements of all parameters, a shared one counted once."""
        return sum(layer.parameters for layer in self.layers)

    @property
    def multiply_adds(self) -> int:
        """Multiply-adds of matrix products and convolutions, in one forward pass in eval mode."""
        return sum(layer.multiply_adds for layer in self.layers)

    @property
    def activation_bytes(self) -> int:
        """Bytes that autograd keeps of one forward pass in training mode."""
        return sum(layer.activation_bytes for layer in self.layers)

    @property
    def norm_bytes(self) -> int:
        """Bytes that normalization moves in a training step."""
        return sum(layer.norm_bytes for layer in self.layers)

    @property
    def norm_share(self) -> float:
        """Normalization's part of all bytes moved in a training step, from 0 to 1."""
        return self.norm_bytes / max(1, self.norm_bytes + self.other_bytes)

    def to_dict(self) -> dict[str, Any]:
        """Totals and layers, ready for JSON."""
        totals = ("parameters", "multiply_adds", "activation_bytes", "norm_bytes", "other_bytes", "norm_share")
        return {name: getattr(self, name) for name in totals} | {"layers": [asdict(layer) for layer in self.layers]}

    def __repr__(self) -> str:
        head = ("layer", "kind", "output", "parameters", "multiply-adds", "activations", "norm moves")
        rows = [_row(layer.name or "(the model)", layer.kind, layer.output, layer) for layer in self.layers]
        total = _row("total", "", None, self)
        widths = [max(map(len, column)) for column in zip(head, *rows, total, strict=True)]
        rule = "─" * (sum(widths) + 2 * len(widths) - 2)
        lines = [_justified(row, widths) for row in (head, *rows)]
        lines = [lines[0], rule, *lines[1:], rule, _justified(total, widths)]
        return "\n".join([*lines, f"Normalization moves {self.norm_share:.0%} of the bytes of a training step."])


def costs(model: nn.Module, input: Any) -> Costs:
    """Count what one batch costs, without computing it: the model runs on tensors that have shapes but no values.

    - **Multiply-adds** are those of matrix products and convolutions in eval mode, half of what
      `torch.utils.flop_counter` counts; biases, norms, activations and poolings are left out, as papers do.
    - **Activation memory** is the bytes of distinct tensors that autograd keeps for the backward pass in training
      mode, parameters and buffers left out; the input counts where a layer keeps it. A layer of `bnkit.nn` keeps its
      input, mean and 1/σ, and its residual where there is an activation.
    - **Bytes moved by normalization** in a training step are 8 times the size of its input: forward it reads x for
      the statistics, reads x and writes y; backward it reads x and dy for the sums, reads both and writes dx. A
      residual adds 2 (read r, write its gradient), an activation in the layer none. With fixed statistics it is 5:
      read x, write y; read x and dy, write dx. A layer that keeps its slab in cache between reads moves less.
    - **Bytes moved by the rest**, for `norm_share`: each operator of a training step but a view reads its inputs once
      and writes its outputs once.

    Nothing of the model changes. What a function outside of any module does is counted for the module that calls it.

    Args:
        model: Any module whose control flow does not depend on the values of tensors.
        input: What the model is called with: a tensor, a tuple or list of arguments, or a mapping of named arguments.
            Of tensors only shape and type matter.

    Raises:
        UserError: the model can't run so; the cause is attached.
    """
    arguments, named = _called_with(input)
    with training_flags_kept(model):
        model.eval()
        inference = _Meter(model)
        inference.run(arguments, named, training=False)
        model.train()
        training = _training_meters(model, arguments, named)
    layers = {name: LayerCost(name, type(module).__name__) for name, module in model.named_modules()}
    for name, count in _own_parameters(model).items():
        layers[name].parameters = count
    for name, layer in layers.items():
        layer.output = inference.outputs.get(name)
        layer.multiply_adds = inference.multiply_adds.get(name, 0)
        layer.activation_bytes = training(lambda meter, name=name: meter.kept.get(name, 0))
        layer.norm_bytes = training(lambda meter, name=name: meter.norm_bytes.get(name, 0))
    paying = tuple(layer for layer in layers.values() if not layer.is_free())
    return Costs(paying, training(lambda meter: meter.other_bytes))


def _called_with(input: Any) -> tuple[tuple[Any, ...], dict[str, Any]]:
    to_meta = tree_map_only(Tensor, _without_values, input)
    if isinstance(to_meta, Mapping):
        return (), dict(to_meta)
    return (tuple(to_meta) if isinstance(to_meta, (tuple, list)) else (to_meta,)), {}


def _own_parameters(model: nn.Module) -> dict[str, int]:
    counts: dict[str, int] = {}
    for name, parameter in model.named_parameters():
        owner = name.rpartition(".")[0]
        counts[owner] = counts.get(owner, 0) + parameter.numel()
    return counts


def _training_meters(
    model: nn.Module, arguments: tuple[Any, ...], named: dict[str, Any]
) -> Callable[[Callable[[_Meter], int]], int]:
    """Run in training mode; the result reads one count of it."""

    def metered(copies: int) -> _Meter:
        meter = _Meter(model)
        repeated = tree_map_only(Tensor, lambda t: _repeated(t, copies), (arguments, named))
        meter.run(*repeated, training=True)
        return meter

    tensors = [leaf for leaf in tree_leaves((arguments, named)) if isinstance(leaf, Tensor) and leaf.dim()]
    if not tensors or any(tensor.shape[0] != 1 for tensor in tensors):
        meter = metered(1)
        return lambda count: count(meter)
    # A batch norm can't train on one value a channel. All counts are affine in the size of the batch.
    two, three = metered(2), metered(3)
    return lambda count: 2 * count(two) - count(three)


class _Meter(TorchDispatchMode):
    """Counts by module what one pass does. Operators are seen below autograd, modules by their hooks."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model
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
        state = {name: _without_values(t) for name, t in [*self.model.named_parameters(), *self.model.named_buffers()]}
        for tensor in state.values():
            self._storages[tensor.untyped_storage()._cdata] = tensor
        try:
            with torch.device("meta"), hooked(self._hooks()), self._keeping(training):
                output = torch.func.functional_call(self.model, state, arguments, named)
                if training:
                    self._backward(output)
        except (RuntimeError, NotImplementedError, TypeError, ValueError) as error:
            raise UserError(
                f"costs runs a model on tensors without values, which {type(self.model).__name__} did not take "
                f"({str(error).splitlines()[0]}): give the input it expects, and a model that reads no values."
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
        formula = flop_registry.get(func._overloadpacket)
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


def _without_values(tensor: Tensor) -> Tensor:
    return tensor.detach().to("meta").requires_grad_(tensor.requires_grad)


def _repeated(tensor: Tensor, copies: int) -> Tensor:
    return tensor if copies == 1 else torch.cat([tensor.detach()] * copies).requires_grad_(tensor.requires_grad)


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


def _row(name: str, kind: str, output: tuple[int, ...] | None, costs: LayerCost | Costs) -> tuple[str, ...]:
    shape = "" if output is None else "×".join(map(str, output))
    sizes = (_scaled(costs.activation_bytes), _scaled(costs.norm_bytes))
    return (name, kind, shape, f"{costs.parameters:,}", f"{costs.multiply_adds:,}", *sizes)


def _scaled(number: int) -> str:
    power = min(3, (len(str(number)) - 1) // 3)
    return f"{number / 1000**power:.{1 if power else 0}f} {('B', 'kB', 'MB', 'GB')[power]}"


def _justified(row: tuple[str, ...], widths: list[int]) -> str:
    cells = zip(row, widths, strict=True)
    return "  ".join(cell.ljust(w) if i < 3 else cell.rjust(w) for i, (cell, w) in enumerate(cells)).rstrip()
