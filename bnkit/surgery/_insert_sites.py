"""Where a batch normalization can be inserted: behind which layers, and what follows them."""

from __future__ import annotations

import contextlib
import dataclasses
from collections.abc import Iterator
from typing import Any

from torch import Tensor, nn
from torch.nn.modules import activation, dropout
from torch.nn.modules.batchnorm import _NormBase
from torch.nn.modules.conv import _ConvNd

from .._modes import hooked
from ..graph import Operator, Record, Value
from ._axis import axis_after
from ._normed import Normed
from ._weighted import Refused, is_weighted

_NORMS = (_NormBase, nn.GroupNorm, nn.LayerNorm, nn.RMSNorm, nn.LocalResponseNorm)
_NORM_FUNCTIONS = frozenset({"batch_norm", "layer_norm", "group_norm", "instance_norm", "rms_norm"})
# Functions are named as their modules are: "leaky_relu" and "LeakyReLU". Poolings are told by the word in their name.
_ACTIVATIONS = frozenset(name.lower() for name in (*activation.__all__, *dropout.__all__))
_SUMS = frozenset({"add", "iadd", "cat"})


@dataclasses.dataclass(frozen=True, eq=False)
class Site:
    """A layer behind which a norm goes.

    Attributes:
        module, name: the layer.
        channels: of its output.
        dims: spatial dimensions of a convolution; 0 for a linear layer, whose channels come last.
        absorbs: whether its bias serves nothing else.
    """

    module: nn.Module
    name: str
    channels: int
    dims: int
    absorbs: bool

    @property
    def linear(self) -> bool:
        """Whether it is a linear layer."""
        return self.dims == 0


def is_layer(module: nn.Module) -> bool:
    """Whether it is a convolution or linear layer."""
    return isinstance(module, (_ConvNd, nn.Linear))


@contextlib.contextmanager
def returning_no_tensor(model: nn.Module) -> Iterator[set[nn.Module]]:
    """Gathers the layers whose forward returns something else than a tensor, such as a tuple, as they run."""
    found: set[nn.Module] = set()

    def look(module: nn.Module, args: Any, output: Any) -> None:
        if not isinstance(output, Tensor):
            found.add(module)

    layers = filter(is_layer, model.modules())
    # Ahead of others' hooks, which may replace the output: the norm comes before them too.
    with hooked(layer.register_forward_hook(look, prepend=True) for layer in layers):
        yield found


def site_of(module: nn.Module, name: str, facts: Record, *, last_too: bool) -> Site:
    """The site behind a layer.

    Args:
        last_too: Whether a layer that nothing but the model's output follows counts.

    Raises:
        Refused: it isn't one.
    """
    if isinstance(module, Normed):
        raise Refused("bn, inserted before, already normalizes it")
    if "forward" in vars(module):
        raise Refused("its forward was replaced, and would not call a batch norm")
    calls = facts.calls_of(module)
    if not calls:
        raise Refused("it did not run on the example")
    if any(call.parent is not None and isinstance(call.parent.module, nn.TransformerEncoderLayer) for call in calls):
        raise Refused("TransformerEncoderLayer reads its weight in eval mode without running it")
    operators = [op for op in facts.operators if op.call is not None and op.call.module is module and is_weighted(op)]
    outputs = {value for call in calls for value in call.outputs}
    if len(operators) != len(calls) or outputs != {value for op in operators for value in op.outputs}:
        raise Refused(f"{type(module).__name__} does more than one convolution or linear map")
    if norm := next((found for op in operators if (found := _norm_behind(op.outputs[0]))), None):
        raise Refused(f"{norm} already normalizes it")
    if not last_too and not any(_feeds_a_layer(value) for value in outputs):
        raise Refused("it makes the model's output")
    linear = isinstance(module, nn.Linear)
    dims = 0 if linear else len(operators[0].inputs[1].shape) - 2
    if not linear and len(operators[0].outputs[0].shape) != dims + 2:
        raise Refused("its input has no batch dimension")
    channels = operators[0].outputs[0].shape[-1 if linear else 1]
    return Site(module, name, channels, dims, _absorbs(module, name, facts))


def _absorbs(module: nn.Module, name: str, facts: Record) -> bool:
    bias = f"{name}.bias" if name else "bias"
    if not isinstance(getattr(module, "bias", None), nn.Parameter) or bias in facts.tied or bias not in facts.held:
        return False
    owners = [m for m in facts.names if any(p is module.bias for p in m._parameters.values())]
    readers = facts.held[bias].readers
    return owners == [module] and all(op.call is not None and op.call.module is module for op in readers)


def _norm_behind(value: Value) -> str | None:
    """The norm that reads the value, if need be behind an activation, a pooling, a sum, or a change of layout."""
    waiting, seen = [value], {value}
    while waiting:
        for reader in waiting.pop().readers:
            if norm := _norm_of(reader, value):
                return norm
            if _is_transparent(reader):
                waiting += [output for output in reader.outputs if output not in seen]
                seen.update(reader.outputs)
    return None


def _is_transparent(reader: Operator) -> bool:
    known = reader.name in _SUMS or "pool" in reader.name or reader.name.replace("_", "") in _ACTIVATIONS
    return known or axis_after(reader, 0) is not None


def _norm_of(reader: Operator, source: Value) -> str | None:
    if reader.name in _NORM_FUNCTIONS and reader.call is not None:
        return reader.call.name or reader.name
    for call in reader.calls():
        named_so = "norm" in type(call.module).__name__.lower() and not list(call.module.children())
        if (isinstance(call.module, _NORMS) or named_so) and source.maker and not call.contains(source.maker):
            return call.name
    return None


def _feeds_a_layer(value: Value) -> bool:
    waiting, seen = [value], {value}
    while waiting:
        for reader in waiting.pop().readers:
            if is_weighted(reader):
                return True
            waiting += [output for output in reader.outputs if output not in seen]
            seen.update(reader.outputs)
    return False
