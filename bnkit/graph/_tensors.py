"""The tensors in whatever a model takes or returns."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

from torch import Tensor


def tensors_in(tree: Any) -> Iterator[Tensor]:
    """The tensors in a tensor, dict, list, tuple, or object with attributes, in a fixed order."""
    return _tensors_in(tree, set())


def _tensors_in(tree: Any, seen: set[int]) -> Iterator[Tensor]:
    if isinstance(tree, Tensor):
        yield tree
        return
    if isinstance(tree, (str, bytes, int, float, type)) or tree is None or id(tree) in seen:
        return
    seen.add(id(tree))
    if isinstance(tree, Mapping):
        items = list(tree.values())
    elif isinstance(tree, (list, tuple, set, frozenset)):
        items = list(tree)
    else:
        items = list(_attributes(tree))
    for item in items:
        yield from _tensors_in(item, seen)


def _attributes(tree: Any) -> Iterator[Any]:
    yield from vars(tree).values() if hasattr(tree, "__dict__") else ()
    for kind in type(tree).__mro__:
        slots = vars(kind).get("__slots__", ())
        for name in [slots] if isinstance(slots, str) else slots:
            if not name.startswith("__"):
                yield getattr(tree, name, None)
