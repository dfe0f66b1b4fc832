"""What surgery returns: the model, what changed, what did not and why."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Mapping
from typing import Any, TypeVar

import torch
from torch import nn
from torch.optim import Optimizer

from .._checks import UserError

_Optimizer = TypeVar("_Optimizer", bound=Optimizer)


@dataclasses.dataclass(eq=False, repr=False)
class Surgery:
    """The outcome of `insert`, `fold`, `fuse`, `convert` or `freeze`; its repr is the report.

    Attributes:
        model: the changed model: a copy, or with `inplace=True` the one given.
        changed: what became of each module changed, by its name.
        skipped: why each module was left alone, by its name.
        max_error: largest difference from the original model's outputs on the example and the batches given, relative
            to the largest output; None where nothing was run.
        heirs: the counterpart of each parameter of the model given, in `model` or dropped from it.
        training_error: the like of `max_error` in training mode, for `insert`, whose norms then use the batch's own
            statistics; None where copies of the two can't run so on the first batch, and among several processes.
    """

    model: nn.Module
    changed: dict[str, str]
    skipped: dict[str, str]
    max_error: float | None = None
    heirs: Mapping[Any, nn.Parameter] = dataclasses.field(default_factory=dict)
    training_error: float | None = None

    def rebind(self, optimizer: _Optimizer) -> _Optimizer:
        """Point an optimizer of the original model at the changed one, in place, and return it.

        Surviving parameters keep their group and their state (momentum buffers, moments, step counts). Dropped ones
        leave the optimizer. New ones that need a gradient join the group of the old one directly ahead of them in the
        model (of an inserted norm, its layer's weight), with no state yet (in fused SGD with momenta of zero). If that
        one is in no group, as in a frozen backbone, or there is none, they stay out. Parameters of other models stay.
        LBFGS, whose state is one for all parameters together, starts anew unless their shapes are as before.

        Raises:
            UserError: the optimizer holds none of the original model's parameters.
        """
        _check_knows(optimizer, self.heirs)
        alive = set(self.model.parameters())
        shapes = _shapes(optimizer)
        names = {self._heir(p, alive): name for group in optimizer.param_groups for p, name in _named(group)}
        for group in optimizer.param_groups:
            # The list stays the same one, since an optimizer may hold it under another name (LBFGS does).
            group["params"][:] = [p for old in group["params"] if (p := self._heir(old, alive)) is not None]
        for old in [p for p in optimizer.state if p in self.heirs]:
            state, new = optimizer.state.pop(old), self._heir(old, alive)
            if new is not None:
                optimizer.state[new] = state
        self._add_new(optimizer)
        own_names = {parameter: name for name, parameter in self.model.named_parameters()}
        for group in optimizer.param_groups:
            if "param_names" in group:
                group["param_names"][:] = [names.get(p) or own_names[p] for p in group["params"]]
        if isinstance(optimizer, torch.optim.LBFGS) and _shapes(optimizer) != shapes:
            _forget_history(optimizer)
        return optimizer

    def _heir(self, old: Any, alive: set[nn.Parameter]) -> nn.Parameter | None:
        new = self.heirs.get(old, old)
        return new if new in alive or old not in self.heirs else None

    def _add_new(self, optimizer: Optimizer) -> None:
        group_of = {p: group for group in optimizer.param_groups for p in group["params"]}
        known = {*self.heirs.values(), *group_of}
        group: dict[str, Any] | None = None
        # With duplicates: what is directly ahead may be a weight that has come before, in a layer that shares it.
        for _, parameter in self.model.named_parameters(remove_duplicate=False):
            if parameter in known:
                group = group_of.get(parameter)
            elif group is not None and parameter.requires_grad:
                known.add(parameter)
                group_of[parameter] = group
                group["params"].append(parameter)
                _start_momentum(optimizer, group, parameter)

    def __repr__(self) -> str:
        error = "" if self.max_error is None else f", max_error {self.max_error:.1e}"
        error += "" if self.training_error is None else f", training_error {self.training_error:.1e}"
        lines = [f"Surgery: {len(self.changed)} changed, {len(self.skipped)} skipped{error}"]
        for title, entries in (("changed", self.changed), ("skipped", self.skipped)):
            rows = [(name or "(the model)", text) for name, text in entries.items()]
            width = max((len(name) for name, _ in rows), default=0)
            lines += [f"  {title}"] * bool(rows)
            lines += [f"    {name:{width}}  {text}" for name, text in rows]
        return "\n".join(lines)


def _start_momentum(optimizer: Optimizer, group: Mapping[str, Any], new: nn.Parameter) -> None:
    """Fused SGD takes momenta of all parameters of a group or of none: where there are some, give a new one zeros."""
    if group.get("fused") and any("momentum_buffer" in optimizer.state.get(p, ()) for p in group["params"]):
        optimizer.state[new]["momentum_buffer"] = torch.zeros_like(new)


def _named(group: Mapping[str, Any]) -> Iterable[tuple[Any, str]]:
    """A group's parameters and their names, if it has them: it was made from `named_parameters()`."""
    return zip(group["params"], group.get("param_names", ()), strict="param_names" in group)


def _shapes(optimizer: Optimizer) -> list[list[torch.Size]]:
    return [[p.shape for p in group["params"]] for group in optimizer.param_groups]


def _forget_history(optimizer: torch.optim.LBFGS) -> None:
    optimizer.state.clear()
    optimizer._numel_cache = None


def _check_knows(optimizer: Optimizer, heirs: Mapping[Any, nn.Parameter]) -> None:
    held = {p for group in optimizer.param_groups for p in group["params"]}
    if not held & (set(heirs) | set(heirs.values())):
        raise UserError(
            "the optimizer must hold parameters of the model given to surgery, got one that holds none of them: "
            "pass the optimizer made for that model."
        )
