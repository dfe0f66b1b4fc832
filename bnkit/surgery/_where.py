"""Which modules the user means: names, patterns, types or a predicate."""

from __future__ import annotations

import difflib
import fnmatch
from collections.abc import Callable, Iterable

from torch import nn

from .._checks import UserError

Where = str | type | Callable[[str, nn.Module], bool] | Iterable[str | type]


def selector(where: Where, names: Iterable[str]) -> Callable[[str, nn.Module], bool]:
    """A predicate on a module's name and the module.

    Args:
        where: A module's name, which stands for the modules in it too; a shell pattern such as `"features.*"`; a type;
            several of these, of which one must fit; or a predicate `(name, module) -> bool`.
        names: Of all modules, to check spelling.

    Raises:
        UserError: a name or pattern that fits none of `names`.
    """
    if callable(where) and not isinstance(where, type):
        return where
    entries = [where] if isinstance(where, (str, type)) else list(where)
    patterns = [entry for entry in entries if isinstance(entry, str)]
    types = tuple(entry for entry in entries if isinstance(entry, type))
    names = list(names)
    for pattern in patterns:
        _check_fits(pattern, names)

    def selects(name: str, module: nn.Module) -> bool:
        return isinstance(module, types) or any(_fits(name, pattern) for pattern in patterns)

    return selects


def _fits(name: str, pattern: str) -> bool:
    return fnmatch.fnmatchcase(name, pattern) or name.startswith(f"{pattern}.")


def _check_fits(pattern: str, names: list[str]) -> None:
    if not any(_fits(name, pattern) for name in names):
        near = difflib.get_close_matches(pattern, names, n=3, cutoff=0.5)
        hint = f"did you mean {' or '.join(near)}?" if near else "see model.named_modules()."
        raise UserError(f"where= must name modules of the model, got {pattern!r}, which fits none: {hint}")
