"""Modules that others hold besides registering them: in an attribute, or in containers that are one, however nested."""

from __future__ import annotations

import functools
from collections import defaultdict, deque
from collections.abc import Callable, Iterator
from typing import Any

from torch import nn

_MODULE_STATE = frozenset(vars(nn.Module()))
_CONTAINERS = (list, tuple, dict, set, frozenset, deque)  # and their subclasses, such as OrderedDict and namedtuples


def holders(model: nn.Module) -> dict[nn.Module, list[tuple[nn.Module, str]]]:
    """For each module held so, the modules that hold it and the names of their attributes."""
    found: dict[nn.Module, list[tuple[nn.Module, str]]] = defaultdict(list)
    for module in reachable(model):
        for name, held in _held(module):
            found[held].append((module, name))
    return dict(found)


def reachable(model: nn.Module) -> list[nn.Module]:
    """All modules that are registered or held so, with what is in the latter."""
    found: dict[nn.Module, None] = {}
    waiting = [model]
    while waiting:
        module = waiting.pop()
        if module not in found:
            found[module] = None
            waiting += module.children()
            waiting += [held for _, held in _held(module)]
    return list(found)


def _held(module: nn.Module) -> Iterator[tuple[str, nn.Module]]:
    for name, value in vars(module).items():
        if name not in _MODULE_STATE:
            for held in dict.fromkeys(_modules_in(value, frozenset())):
                yield name, held


def _modules_in(value: Any, around: frozenset[int]) -> Iterator[nn.Module]:
    if isinstance(value, nn.Module):
        yield value
    elif isinstance(value, _CONTAINERS) and id(value) not in around:
        for item in _items(value):
            yield from _modules_in(item, around | {id(value)})


def replaced(
    value: Any, old: nn.Module, new: nn.Module, undo: list[Callable[[], None]], around: frozenset[int] = frozenset()
) -> Any:
    """The attribute with `new` for `old`.

    Containers that can change are changed, so that they keep their class and all that it has, and so that others who
    hold them see it; `undo` gets what takes that back. Of tuples and frozensets there are others.
    """
    if value is old:
        return new
    if not isinstance(value, _CONTAINERS) or id(value) in around:
        return value
    before = _items(value)
    after = [replaced(item, old, new, undo, around | {id(value)}) for item in before]
    if all(a is b for a, b in zip(after, before, strict=True)):
        return value
    if isinstance(value, (tuple, frozenset)):
        return _another(value, after)
    _fill(value, after)
    undo.append(functools.partial(_fill, value, before))
    return value


def _items(container: Any) -> list[Any]:
    return list(container.items() if isinstance(container, dict) else container)


def _fill(container: Any, items: list[Any]) -> None:
    container.clear()
    if isinstance(container, (list, deque)):
        container.extend(items)
    else:
        container.update(dict(items) if isinstance(container, dict) else items)  # a Counter would count pairs


def _another(value: Any, items: list[Any]) -> Any:
    """Of the same class, whatever arguments that takes, and with the same attributes."""
    base: Any = tuple if isinstance(value, tuple) else frozenset
    twin = base.__new__(type(value), items)
    if hasattr(value, "__dict__"):
        vars(twin).update(vars(value))
    return twin
