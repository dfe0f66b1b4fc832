"""One forward pass of a model, as facts: which function made which tensor, who read it, how often each module ran.

Nothing is traced symbolically: the model runs once, as it is, so control flow, shared modules and writes in place are
seen as they happen. What another input would do is not seen.
"""

from __future__ import annotations

import contextlib
import dataclasses
from collections import defaultdict
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor, nn

from .._modes import buffers_kept, hooked
from ._facts import Call, Operator, Value
from ._feed import Forward, apart, apply
from ._tape import Tape, seen_below_python, seen_in_python


@dataclasses.dataclass(eq=False)
class Record:
    """One forward pass of a model.

    Attributes:
        calls: the runs of its modules, in the order they began.
        operators: the functions that ran on tensors, in order.
        output: what the model returned.
        held: its parameters and buffers, by their first names.
        names: every name of each module; two for one registered twice.
        tied: the names of parameters and buffers that share memory with one of another name, and of that one.
    """

    calls: list[Call]
    operators: list[Operator]
    output: Any
    held: dict[str, Value]
    names: dict[nn.Module, list[str]]
    tied: dict[str, str]

    def calls_of(self, module: nn.Module) -> list[Call]:
        """The runs of one module."""
        return [call for call in self.calls if call.module is module]

    def overwriting(self, value: Value, since: Value, before: Operator) -> Operator | None:
        """The first operation that writes to `value`'s memory in place, from the maker of `since` up to `before`."""
        start = since.maker.index if since.maker is not None else 0
        return next((found for found in self.operators[start : before.index] if value.memory in found.writes), None)


def record(model: nn.Module, example: Any, forward: Forward | None = None) -> Record:
    """Run `model` once on `example`, without gradients and in the mode it is in, and tell what happened.

    Buffers, hooks and modes are put back, whatever happens. Parts compiled by `torch.compile` run uncompiled.

    Args:
        model: Run as it is.
        example: An input: a tensor, a tuple of positional arguments, a dict of keyword arguments, or a batch.
        forward: `forward(model, example)` runs the model in another way.
    """
    names: dict[nn.Module, list[str]] = defaultdict(list)
    for name, module in model.named_modules(remove_duplicate=False):
        names[module].append(name)
    tape = Tape(model)
    with _undisturbed(model):
        example = apart(example)
        with hooked(_watching(tape, names)), seen_below_python(tape), seen_in_python(tape):
            output = apply(model, example, forward)
    tape.finish(output)
    return Record(tape.calls, tape.operators, output, tape.held, dict(names), _tied(model))


@contextlib.contextmanager
def _undisturbed(model: nn.Module) -> Iterator[None]:
    compiled = torch.compiler.set_stance("force_eager")
    # In inference mode tensors have no versions, and writes would go unseen.
    with torch.inference_mode(False), torch.no_grad(), torch.random.fork_rng(), buffers_kept(model), compiled:
        yield


def _watching(tape: Tape, names: dict[nn.Module, list[str]]) -> Iterator[Any]:
    for module, (name, *_) in names.items():
        if isinstance(module, torch.jit.ScriptModule):  # takes no hooks; its kernels are seen, as its caller's
            continue

        def begin(module: nn.Module, args: Any, kwargs: Any, name: str = name) -> None:
            tape.begin(module, name, args, kwargs)

        def end(module: nn.Module, args: Any, kwargs: Any, output: Any) -> None:
            tape.end(module, output)

        yield module.register_forward_pre_hook(begin, with_kwargs=True, prepend=True)
        yield module.register_forward_hook(end, with_kwargs=True, always_call=True)


def _tied(model: nn.Module) -> dict[str, str]:
    first: dict[Callable[..., Any] | int, tuple[str, Tensor]] = {}
    tied: dict[str, str] = {}
    for kind in (model.named_parameters, model.named_buffers):
        for name, tensor in kind(remove_duplicate=False):
            if tensor.numel() == 0 or tensor.device.type == "meta":
                continue
            other = first.setdefault(tensor.untyped_storage().data_ptr(), (name, tensor))[0]
            if other != name and not _same_module(model, name, other):
                tied[name], tied[other] = other, name
    return tied


def _same_module(model: nn.Module, name: str, other: str) -> bool:
    """Whether two names lead to one entry of one module, which is registered twice."""
    (path, _, last), (other_path, _, other_last) = name.rpartition("."), other.rpartition(".")
    return last == other_last and model.get_submodule(path) is model.get_submodule(other_path)
