"""Rewrites the forward of one module, by torch.fx, so that its batch normalizations add and activate themselves."""

from __future__ import annotations

import inspect
import operator
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import fx, nn

from .._modes import training_flags_kept
from ._fuse_follow import Following, activation_of_module
from ._weighted import Refused, has_hooks

_FUNCTIONS: dict[Callable[..., Any], str] = {
    F.relu: "relu",
    torch.relu: "relu",
    F.leaky_relu: "leaky_relu",
    F.silu: "silu",
    F.gelu: "gelu",
    F.hardswish: "hardswish",
    torch.sigmoid: "sigmoid",
    F.sigmoid: "sigmoid",
    torch.tanh: "tanh",
    F.tanh: "tanh",
}
_METHODS = {"relu": "relu", "relu_": "relu", "sigmoid": "sigmoid", "tanh": "tanh"}
_ADDITIONS: set[Any] = {operator.add, operator.iadd, torch.add, "add", "add_"}


class _OneLevel(fx.Tracer):
    """Traces a module's own forward and nothing below it."""

    def is_leaf_module(self, m: nn.Module, module_qualified_name: str) -> bool:
        return True


def rewritten(block: nn.Module, wanted: dict[nn.Module, Following]) -> fx.GraphModule:
    """The module with each batch norm of `wanted` called with its residual, and without what it then does itself.

    Submodules, parameters, buffers and attributes are the block's own, under their names.

    Raises:
        Refused: the forward depends on its mode or on its input, or doesn't look as recorded.
    """
    if has_hooks(block):
        raise Refused("the module around it has hooks")
    if isinstance(block, nn.Sequential):  # others may index it
        raise Refused("the Sequential around it keeps its layers")
    graph = _traced(block)
    for module, follows in wanted.items():
        _take_up(graph, block, module, follows)
    graph.lint()
    made = fx.GraphModule(block, graph, type(block).__name__)
    for name, attribute in vars(block).items():
        if not name.startswith("_") and name not in vars(made):
            setattr(made, name, attribute)
    for registry in ("_modules", "_parameters", "_buffers", "_non_persistent_buffers_set"):
        setattr(made, registry, getattr(block, registry).copy())
    made.training = block.training
    return made


def _traced(block: nn.Module) -> fx.Graph:
    parameters = inspect.signature(block.forward).parameters.values()
    if any(p.default is not p.empty or p.kind in (p.VAR_POSITIONAL, p.VAR_KEYWORD) for p in parameters):
        raise Refused("the forward around it takes optional arguments")
    graphs = []
    with training_flags_kept(block):
        for mode in (True, False):
            for module in block.modules():
                module.training = mode
            try:
                graphs.append(_OneLevel().trace(block))
            except Exception as error:  # whatever the forward does with a stand-in for a tensor
                raise Refused(f"the forward around it can't be traced ({str(error).splitlines()[0]})") from None
    if str(graphs[0]) != str(graphs[1]):
        raise Refused("the forward around it differs between training and eval mode")
    return graphs[0]


def _take_up(graph: fx.Graph, block: nn.Module, norm: nn.Module, follows: Following) -> None:
    nodes = [node for node in graph.nodes if node.op == "call_module" and block.get_submodule(node.target) is norm]
    if len(nodes) != 1 or len(nodes[0].args) != 1 or nodes[0].kwargs:
        raise Refused("the forward around it calls it in an unusual way")
    norm_node = last = nodes[0]
    residual: tuple[Any, ...] = ()
    if follows.added is not None:
        added = _only_user(norm_node)
        if added.target not in _ADDITIONS or len(added.args) != 2 or added.kwargs:
            raise Refused("the addition is not in the forward around it")
        residual, last = tuple(arg for arg in added.args if arg is not norm_node), added
    if follows.activation is not None:
        last = _only_user(last)
        if _activation(last, block) != follows.activation:
            raise Refused("the activation is not in the forward around it")
    with graph.inserting_before(last):
        new = graph.call_module(str(norm_node.target), (norm_node.args[0], *residual))
    last.replace_all_uses_with(new)
    while last is not norm_node:
        before = next(arg for arg in last.all_input_nodes if arg not in residual)
        graph.erase_node(last)
        last = before
    graph.erase_node(norm_node)


def _only_user(node: fx.Node) -> fx.Node:
    if len(node.users) != 1:
        raise Refused("its output is used more than once in the forward around it")
    return next(iter(node.users))


def _activation(node: fx.Node, block: nn.Module) -> str | None:
    if node.op == "call_module":
        module = block.get_submodule(str(node.target))
        return None if has_hooks(module) else activation_of_module(module)
    function: Any = node.target
    return _FUNCTIONS.get(function) if node.op == "call_function" else _METHODS.get(str(function))
