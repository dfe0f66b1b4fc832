"""A module's class with another forward, given as source, that copies and pickles as the class does."""

from __future__ import annotations

import functools
import importlib
import itertools
import linecache
from types import ModuleType
from typing import Any, cast

from torch import fx, nn

from .._checks import UserError

_COUNT = itertools.count()


def with_forward(kind: type[nn.Module], graph: fx.Graph, settled: dict[str, Any]) -> type[nn.Module]:
    """A subclass that runs the graph. Attributes, properties and methods stay those of `kind`.

    Args:
        kind: a module's class.
        graph: of one of its modules.
        settled: the attributes that shaped the graph. The forward refuses to run with other ones, which it can't heed.
    """
    code = graph.python_code("self")
    names = {name: _Imported(value) if isinstance(value, ModuleType) else value for name, value in code.globals.items()}
    return _made(getattr(kind, "_before_fusing", kind), code.src, names, settled)


class _Imported:
    """Stands for a Python module where it is pickled."""

    def __init__(self, module: ModuleType) -> None:
        self.name = module.__name__

    def module(self) -> ModuleType:
        return importlib.import_module(self.name)


def _made(kind: type[nn.Module], source: str, names: dict[str, Any], settled: dict[str, Any]) -> type[nn.Module]:
    file = f"<forward of fused {kind.__qualname__} {next(_COUNT)}>"
    linecache.cache[file] = (len(source), None, source.splitlines(keepends=True), file)  # for tracebacks
    space: dict[str, Any] = {
        name: value.module() if isinstance(value, _Imported) else value for name, value in names.items()
    }
    exec(compile(source, file, "exec"), space)
    run = space["forward"]

    @functools.wraps(run)
    def forward(self: nn.Module, *args: Any, **kwargs: Any) -> Any:
        for name, value in settled.items():
            if getattr(self, name) != value:
                _refuse(self, name, value)
        return run(self, *args, **kwargs)

    def reduce(self: nn.Module, protocol: Any) -> tuple[Any, ...]:
        how, _, *state = cast(tuple[Any, ...], super(made, self).__reduce_ex__(protocol))
        assert how.__name__ == "__newobj__", "a module is made by __new__ and filled"
        return _empty, (kind, source, names, settled), *state

    made: Any = type(
        kind.__name__,
        (kind,),
        {
            "forward": forward,
            "__reduce_ex__": reduce,
            "__module__": kind.__module__,
            "__qualname__": kind.__qualname__,
            "__doc__": kind.__doc__,
            "_before_fusing": kind,
        },
    )
    return made


def _empty(kind: type[nn.Module], source: str, names: dict[str, Any], settled: dict[str, Any]) -> nn.Module:
    made = _made(kind, source, names, settled)
    return made.__new__(made)


def _refuse(module: nn.Module, name: str, value: object) -> None:
    raise UserError(
        f"a fused {type(module).__name__} must keep the attributes its forward was rewritten for, but {name} was "
        f"{value!r} and is {getattr(module, name)!r}: set it before bnkit.fuse, or leave the block out with where=."
    )
