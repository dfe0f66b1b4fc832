"""What a model of the sweep is examined for beside folding: does the folded model pickle, does converting come back.

A check takes the model, the folded model, an example and how to run a model on it, and gives what is wrong, or "".
"""

from __future__ import annotations

import collections
import pickle
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from bnkit import surgery
from bnkit.graph import Forward, apart, apply, tensors_in

KINDS = ("batch", "sync", "ghost", "renorm", "frozen")
"""The kinds of batch norm that keep statistics, and which every layer can become."""


def pickles(model: nn.Module, folded: nn.Module, example: Any, forward: Forward | None) -> str:
    """Whether the folded model, pickled and read again, gives the same bits."""
    again = pickle.loads(pickle.dumps(folded))
    return _difference(_outputs(again, example, forward), _outputs(folded, example, forward))


def converts(model: nn.Module, folded: nn.Module, example: Any, forward: Forward | None) -> str:
    """Whether all batch norms become each kind, and again what they were: classes, `state_dict` and outputs to the bit.

    To plain torch.nn go those that apply no activation; those with one that bnkit's layers lack stay as they are.
    """
    expected = _outputs(model, example, forward)
    for kind in (*KINDS, "torch"):
        there = surgery.convert(model, kind)
        # Left alone by right: a layer with an activation of its own that bnkit's do not apply.
        left = collections.Counter(why for why in there.skipped.values() if not why.startswith("applies a "))
        if kind in KINDS and left:
            (reason, count), *_ = left.most_common(1)
            return f"{kind} leaves {count}: {reason}"
        if kind in KINDS and not there.changed:
            return f"{kind} changes nothing"
        if why := _not_as_it_was(_back(there, model), model) or _difference(
            _outputs(there.model, example, forward), expected
        ):
            return f"back from {kind} {why}"
    return ""


CHECKS: dict[str, Callable[..., str]] = {"pickles": pickles, "converts": converts}


def fault(check: Callable[..., str], *arguments: Any) -> str:
    """What is wrong; an error is."""
    try:
        with torch.no_grad():
            return check(*arguments)
    except Exception as error:  # any failure is the finding
        return " ".join(f"{type(error).__name__}: {error}".split())[:150]


def _back(there: surgery.Surgery, original: nn.Module) -> nn.Module:
    """Convert what was changed to the classes that the original has, in place."""
    names: dict[type[nn.Module], list[str]] = collections.defaultdict(list)
    for name in there.changed:
        names[type(original.get_submodule(name))].append(name)
    for kind, of_kind in names.items():
        to: Any = "torch" if kind.__module__.startswith("torch.nn.") else kind
        surgery.convert(there.model, to, of_kind, inplace=True)
    return there.model


def _not_as_it_was(model: nn.Module, original: nn.Module) -> str:
    for (name, found), (expected_name, expected) in zip(model.named_modules(), original.named_modules(), strict=True):
        if name != expected_name or type(found) is not type(expected):
            return f"{expected_name} is a {_path(found)}, not a {_path(expected)}"
    found, expected = model.state_dict(), original.state_dict()
    if list(found) != list(expected):
        return "the state_dict has other keys"
    return next((f"{key} differs" for key in found if not torch.equal(found[key], expected[key])), "")


def _path(module: nn.Module) -> str:
    return f"{type(module).__module__}.{type(module).__qualname__}"


def _outputs(model: nn.Module, example: Any, forward: Forward | None) -> list[Tensor]:
    return list(tensors_in(apply(model, apart(example), forward)))


def _difference(found: list[Tensor], expected: list[Tensor]) -> str:
    same = all(torch.equal(a, b) for a, b in zip(found, expected, strict=True))
    return "" if same else "the outputs differ"
