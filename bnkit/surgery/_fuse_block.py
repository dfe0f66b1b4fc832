"""Rewrites the forward of one module, by torch.fx, so that its batch normalizations add and activate themselves."""

from __future__ import annotations

import operator
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import fx, nn

from ._fuse_follow import Following, activation_of_module
from ._fuse_forward import with_forward
from ._fuse_trace import traced
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


def rewritten(block: nn.Module, wanted: dict[nn.Module, Following]) -> tuple[type[nn.Module], dict[nn.Module, Refused]]:
    """The module's class, with a forward that calls each batch norm of `wanted` with its residual, and does not do
    what they then do themselves; and why not, for batch norms that it calls as before.
    """
    refused: dict[nn.Module, Refused] = {}
    try:
        if isinstance(block, nn.Sequential):  # others may index it
            raise Refused("the Sequential around it keeps its layers")
        graph, settled = traced(block)
    except Refused as refusal:
        return type(block), dict.fromkeys(wanted, refusal)
    for module, follows in wanted.items():
        try:
            _take_up(graph, block, module, follows)
        except Refused as refusal:
            refused[module] = refusal
    if len(refused) == len(wanted):
        return type(block), refused
    graph.lint()
    return with_forward(type(block), graph, settled), refused


def _take_up(graph: fx.Graph, block: nn.Module, norm: nn.Module, follows: Following) -> None:
    """Change the graph, or leave it as it is.

    Raises:
        Refused: it doesn't look as recorded.
    """
    nodes = [node for node in graph.nodes if node.op == "call_module" and block.get_submodule(node.target) is norm]
    if len(nodes) != 1 or len(nodes[0].args) != 1 or nodes[0].kwargs:
        raise Refused("the forward around it calls it in an unusual way")
    norm_node = last = added = nodes[0]
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
    # Where the addition was, or where it was itself: what it reads may be written to behind that.
    with graph.inserting_before(added):
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
