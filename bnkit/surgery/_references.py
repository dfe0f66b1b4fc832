"""Modules that others hold besides registering them: in an attribute that is a list, tuple or dict of modules."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator
from typing import Any

from torch import nn

_MODULE_STATE = frozenset(vars(nn.Module()))


def holders(model: nn.Module) -> dict[nn.Module, list[tuple[nn.Module, str]]]:
    """For each module held so, the modules that hold it and the names of their attributes."""
    found: dict[nn.Module, list[tuple[nn.Module, str]]] = defaultdict(list)
    for module in model.modules():
        for name, value in vars(module).items():
            if name not in _MODULE_STATE:
                for held in dict.fromkeys(_modules_in(value, set())):
                    found[held].append((module, name))
    return dict(found)


def _modules_in(value: Any, around: set[int]) -> Iterator[nn.Module]:
    if isinstance(value, nn.Module):
        yield value
    elif type(value) in (list, tuple, dict) and id(value) not in around:
        for item in value.values() if isinstance(value, dict) else value:
            yield from _modules_in(item, around | {id(value)})


def replaced(value: Any, old: nn.Module, new: nn.Module, around: frozenset[int] = frozenset()) -> Any:
    """The attribute with `new` for `old`: another list, so that the one before can come back."""
    if value is old:
        return new
    if type(value) not in (list, tuple, dict) or id(value) in around:
        return value
    around |= {id(value)}
    if isinstance(value, dict):
        return {key: replaced(item, old, new, around) for key, item in value.items()}
    return type(value)(replaced(item, old, new, around) for item in value)
