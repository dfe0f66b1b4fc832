"""What a model costs: parameters, multiply-adds, activation memory, and the bytes that its normalization moves."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves, tree_map_only

from .._modes import training_flags_kept
from ._meter import Meter, without_values


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
      input, mean and 1/σ, and its residual where there is an activation (of which under ReLU a bit a value may do).
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
        inference = Meter(model)
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
    to_meta = tree_map_only(Tensor, without_values, input)
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
) -> Callable[[Callable[[Meter], int]], int]:
    """Run in training mode; the result reads one count of it."""

    def metered(copies: int) -> Meter:
        meter = Meter(model)
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


def _repeated(tensor: Tensor, copies: int) -> Tensor:
    return tensor if copies == 1 else torch.cat([tensor.detach()] * copies).requires_grad_(tensor.requires_grad)


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
