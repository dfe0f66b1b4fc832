"""Which modules the user means: names, patterns, types or a predicate."""

from __future__ import annotations

import difflib
import fnmatch
from collections import defaultdict
from collections.abc import Callable, Iterable, Mapping
from typing import Any

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
        UserError: a name or pattern that fits none of `names`, or something else than the above.
    """
    if callable(where) and not isinstance(where, (type, nn.Module)):
        return where
    entries = _entries(where)
    patterns = [entry for entry in entries if isinstance(entry, str)]
    types = tuple(entry for entry in entries if isinstance(entry, type))
    names = list(names)
    for pattern in patterns:
        _check_fits(pattern, names)

    def selects(name: str, module: nn.Module) -> bool:
        return isinstance(module, types) or any(_fits(name, pattern) for pattern in patterns)

    return selects


def names_of(model: nn.Module) -> dict[nn.Module, list[str]]:
    """Each module's names: several for one that is registered in several places."""
    names: dict[nn.Module, list[str]] = defaultdict(list)
    for name, module in model.named_modules(remove_duplicate=False):
        names[module].append(name)
    return dict(names)


def selected(
    where: Where | None, names: Mapping[nn.Module, list[str]], kind: Callable[[nn.Module], bool]
) -> dict[nn.Module, str]:
    """The modules of a kind that `where` means, by any of their names, and their first names; all if None."""
    found = {module: several for module, several in names.items() if kind(module)}
    if where is None:
        return {module: name for module, (name, *_) in found.items()}
    selects = selector(where, (name for several in names.values() for name in several))
    return {m: several[0] for m, several in found.items() if any(selects(name, m) for name in several)}


def _entries(where: Any) -> list[Any]:
    several = isinstance(where, Iterable) and not isinstance(where, (str, type, nn.Module))
    entries = list(where) if several else [where]
    for entry in entries:
        if not isinstance(entry, (str, type)):
            shown = f"a {type(entry).__name__} itself" if isinstance(entry, nn.Module) else repr(entry)
            raise UserError(
                "where= must be a module's name, a shell pattern, a type, several of these, or one predicate "
                f"(name, module) -> bool, got {shown}: see model.named_modules() for the names."
            )
    return entries


def _fits(name: str, pattern: str) -> bool:
    return fnmatch.fnmatchcase(name, pattern) or name.startswith(f"{pattern}.")


def _check_fits(pattern: str, names: list[str]) -> None:
    if not any(_fits(name, pattern) for name in names):
        near = difflib.get_close_matches(pattern, names, n=3, cutoff=0.5)
        hint = f"did you mean {' or '.join(near)}?" if near else "see model.named_modules()."
        raise UserError(f"where= must name modules of the model, got {pattern!r}, which fits none: {hint}")
