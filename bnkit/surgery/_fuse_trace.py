"""Traces a module's own forward by torch.fx, and refuses what the traced graph would do in another way."""

from __future__ import annotations

import contextlib
import copy
import inspect
import random
from collections.abc import Iterator
from typing import Any

import numpy as np
import torch
from torch import fx, nn
from torch.utils._python_dispatch import TorchDispatchMode

from .._modes import random_numbers_kept, training_flags_kept
from ._weighted import Refused

_PLAIN = (bool, int, float, str, type(None))
_OWN_TO_MODULES = frozenset(vars(nn.Module()))


def traced(block: nn.Module) -> tuple[fx.Graph, dict[str, Any]]:
    """The graph of a module's forward, with its children as they are, and the attributes that shaped it.

    These are numbers, strings and the like, by their names: in the graph they are what they are now.

    Raises:
        Refused: torch.fx can't follow the forward, or would lose something of it: a difference between the modes,
            a context manager, random numbers, attributes that it writes, tensors that it makes.
    """
    parameters = inspect.signature(block.forward).parameters.values()
    if any(p.default is not p.empty or p.kind in (p.VAR_POSITIONAL, p.VAR_KEYWORD) for p in parameters):
        raise Refused("the forward around it takes optional arguments")
    read: set[str] = set()
    graphs = []
    with training_flags_kept(block):
        for mode in (True, False):
            for module in block.modules():
                module.training = mode
            with _context_of(mode):
                graphs.append(_trace(block, read))
    if str(graphs[0]) != str(graphs[1]):
        raise Refused("the forward around it differs between training and eval mode")
    own = {name: value for name, value in vars(block).items() if name in read - _OWN_TO_MODULES}
    return graphs[0], {name: value for name, value in own.items() if type(value) in _PLAIN}


def _trace(block: nn.Module, read: set[str]) -> fx.Graph:
    try:
        with _untouched(block), _no_random_numbers(), _noting_reads(block, read), _NoTensors():
            return _OneLevel().trace(block)
    except Refused:
        raise
    except Exception as error:  # whatever the forward does with a stand-in for a tensor
        words = (str(error).splitlines() or [type(error).__name__])[0]
        raise Refused(f"the forward around it can't be traced ({words})") from None


class _OneLevel(fx.Tracer):
    """Traces a module's own forward and nothing below it, within one context."""

    def __init__(self) -> None:
        super().__init__()
        self._context = _context()

    def is_leaf_module(self, m: nn.Module, module_qualified_name: str) -> bool:
        return True

    def create_node(self, *args: Any, **kwargs: Any) -> fx.Node:
        if _context() != self._context:
            raise Refused("the forward around it enters a context, such as no_grad, autocast or checkpointing")
        return super().create_node(*args, **kwargs)


def _context() -> tuple[object, ...]:
    """What changes the meaning of an operation and is no part of it."""
    autocast = [(torch.is_autocast_enabled(d), torch.get_autocast_dtype(d)) for d in ("cpu", "cuda")]
    hooks = torch._C._autograd._top_saved_tensors_default_hooks(True)  # pyright: ignore[reportAttributeAccessIssue]
    stacks = torch._C._len_torch_function_stack(), torch._C._len_torch_dispatch_stack()
    return torch.is_grad_enabled(), torch.is_inference_mode_enabled(), *autocast, hooks, *stacks


@contextlib.contextmanager
def _context_of(mode: bool) -> Iterator[None]:
    """Gradients and autocast on or off: a forward that switches them on, or off, changes one of the two."""
    before = [(device, torch.is_autocast_enabled(device)) for device in ("cpu", "cuda")]
    try:
        for device, _ in before:
            torch.set_autocast_enabled(device, mode)
        with torch.set_grad_enabled(mode):
            yield
    finally:
        for device, enabled in before:
            torch.set_autocast_enabled(device, enabled)


class _NoTensors(TorchDispatchMode):
    """Refuses operations on tensors: in a trace their results would be constants, and what they write to changes."""

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        raise Refused("the forward around it computes with tensors that do not come from its input")


@contextlib.contextmanager
def _untouched(block: nn.Module) -> Iterator[None]:
    """Put the attributes of a module and of its children back, with what lists and dicts hold, and refuse a forward
    that wrote to them.
    """
    attributes = [vars(module) for module in block.modules()]
    inside = [held for own in attributes for held in own.values() if isinstance(held, (list, dict))]
    before = [(now, copy.copy(now)) for now in [*attributes, *inside]]
    try:
        yield
    finally:
        written = not all(_same(now, old) for now, old in before)
        for now, old in before:
            now.clear()
            now.extend(old) if isinstance(now, list) else now.update(old)
    if written:
        raise Refused("the forward around it writes attributes")


def _same(now: Any, old: Any) -> bool:
    pairs = zip(*([*x.keys(), *x.values()] if isinstance(x, dict) else x for x in (now, old)), strict=False)
    return len(now) == len(old) and all(a is b for a, b in pairs)


@contextlib.contextmanager
def _no_random_numbers() -> Iterator[None]:
    """Refuse a forward that draws them elsewhere than from torch: the graph would keep what was drawn."""
    python, numpy = random.getstate(), repr(np.random.get_state())
    with random_numbers_kept():
        yield
        drawn = random.getstate() != python or repr(np.random.get_state()) != numpy
    if drawn:
        raise Refused("the forward around it draws random numbers of Python or NumPy")


@contextlib.contextmanager
def _noting_reads(block: nn.Module, read: set[str]) -> Iterator[None]:
    """Add to `read` the names of the attributes that are asked of the module."""
    kind: Any = type(block)

    class Noting(kind):
        def __getattribute__(self, name: str) -> Any:
            read.add(name)
            return super().__getattribute__(name)

    block.__class__ = Noting
    try:
        yield
    finally:
        block.__class__ = kind
