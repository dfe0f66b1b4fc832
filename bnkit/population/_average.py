"""Averages of models over time or over runs, with batch norms that fit the averaged weights."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from .._checks import UserError, require, unknown
from ._layers import unwrapped
from ._recalibrate import recalibrate
from ._result import Recalibration

POLICIES = ("average", "copy", "recalibrate")


def average(
    models: nn.Module | Sequence[nn.Module],
    data: Iterable[Any] | None = None,
    *,
    weights: Sequence[float] | None = None,
    buffers: str | None = None,
    **options: Any,
) -> nn.Module:
    """A new model whose parameters are the mean of those of several: SWA over checkpoints, or a model soup.

    Averaged weights give activations that no single model had, so that no model's running statistics fit them; only
    measuring them anew does. Floating-point buffers follow `buffers`:

    - `"recalibrate"`: measured on `data`; the default if there are data;
    - `"average"`: their mean, as torch's `AveragedModel(use_buffers=True)`; the default without data;
    - `"copy"`: the last model's.

    Integer buffers such as `num_batches_tracked`, and everything else, are the last model's.

    References:
        Izmailov, Podoprikhin, Garipov, Vetrov and Wilson, "Averaging Weights Leads to Wider Optima and Better
        Generalization", 2018, https://arxiv.org/abs/1803.05407, section 3.2 (SWA and its batch norms).

    Args:
        models: models of one architecture. A single one, such as one that averages already (torch's `AveragedModel`),
            is copied and recalibrated.
        data: batches for `recalibrate`.
        weights: the weight of each model; they are divided by their sum. Equal if None.
        buffers: see above.
        options: passed on to `recalibrate`: `method="layerwise"`, `num_batches=100`.

    Raises:
        UserError: no models, models of different parameters, weights that don't fit, unknown `buffers`,
            `"recalibrate"` without data, or options without `"recalibrate"`.
    """
    given = [unwrapped(model) for model in ([models] if isinstance(models, nn.Module) else models)]
    policy = buffers if buffers is not None else ("average" if data is None else "recalibrate")
    _check(given, policy, data)
    require(
        policy == "recalibrate" or not options,
        f"options are recalibrate's, which measures nothing with buffers={policy!r}, got {', '.join(options)}: "
        "leave them out, or pass data.",
    )
    shares = _shares(weights, len(given))
    result = copy.deepcopy(given[-1])
    with torch.no_grad():
        for name, tensor in _averaged(result, policy):
            wide = torch.complex128 if tensor.is_complex() else torch.float64
            parts = [(share, _tensor(model, name, tensor).to(wide)) for model, share in zip(given, shares, strict=True)]
            tensor.copy_(torch.stack([share * part for share, part in parts if share]).sum(0))
    if policy == "recalibrate":
        assert data is not None
        recalibrate(result, data, **options)
    return result


def _check(models: Sequence[nn.Module], policy: str, data: object) -> None:
    require(len(models) > 0, "average needs at least one model, got none: pass a list of models.")
    if policy not in POLICIES:
        raise unknown("policy for buffers", policy, POLICIES)
    require(policy != "recalibrate" or data is not None, "buffers='recalibrate' needs data: pass batches.")
    names = [{name for name, _ in model.named_parameters()} for model in models]
    for other in names[1:]:
        odd = sorted(names[0] ^ other)
        require(not odd, f"models to average must have the same parameters, {odd[:1]} is in one only: check them.")


def _shares(weights: Sequence[float] | None, count: int) -> list[float]:
    weights = [1.0] * count if weights is None else list(weights)
    require(
        len(weights) == count and min(weights) >= 0 and sum(weights) > 0,
        f"weights must be one number a model, none negative and not all 0, got {weights} for {count} models.",
    )
    return [weight / sum(weights) for weight in weights]


def _averaged(model: nn.Module, policy: str) -> Iterator[tuple[str, Tensor]]:
    """The tensors of a model to average: parameters and, if the policy says so, buffers, of a floating type."""
    yield from ((name, p) for name, p in model.named_parameters() if p.is_floating_point() or p.is_complex())
    if policy == "average":
        yield from ((name, b) for name, b in model.named_buffers() if b.is_floating_point())


def _tensor(model: nn.Module, name: str, like: Tensor) -> Tensor:
    path, _, attribute = name.rpartition(".")
    found = getattr(model.get_submodule(path), attribute)
    require(found.shape == like.shape, f"{name} must have one shape, got {tuple(found.shape)} and {tuple(like.shape)}.")
    return found.detach().to(like.device)


class EMA(nn.Module):
    """An exponential moving average of a model's parameters, with batch norms that fit them.

        average = decay · average + (1 - decay) · model,    at each `update(model)`

    With `decay=None` the mean over all updates (SWA). The average is `.module`, in eval mode and without gradients;
    calling the EMA calls it. `state_dict` is that of `torch.optim.swa_utils.AveragedModel`: `module.*`, `n_averaged`.

    Running statistics that are the model's latest ("copy") belong to other weights than the averaged ones, and those
    averaged likewise ("average") to no weights at all, though usually nearer; `recalibrate(data)` measures them.

    Args:
        model: the model; the average starts as a copy of it.
        decay: between 0 and 1; or a function of the number of updates before this one, for a warm-up.
        buffers: "average" treats floating-point buffers as parameters, "copy" takes the model's latest, "recalibrate"
            leaves them to `recalibrate` and refuses eval-mode calls until then. Integer buffers are always the latest.
        device: where to keep the average; that of the model if None.

    Raises:
        UserError: `decay` out of range, or unknown `buffers`.
    """

    n_averaged: Tensor

    def __init__(
        self,
        model: nn.Module,
        decay: float | Callable[[int], float] | None = 0.999,
        *,
        buffers: str = "average",
        device: torch.device | str | None = None,
    ) -> None:
        super().__init__()
        require(
            decay is None or callable(decay) or 0 <= decay <= 1,
            f"decay must be between 0 and 1, got {decay}: 0.999 is usual.",
        )
        if buffers not in POLICIES:
            raise unknown("policy for buffers", buffers, POLICIES)
        self.module = copy.deepcopy(unwrapped(model)).to(device).requires_grad_(False).eval()
        self.register_buffer("n_averaged", torch.tensor(0, dtype=torch.long))
        self.decay, self.buffer_policy, self.stale = decay, buffers, False

    @torch.no_grad()
    def update(self, model: nn.Module) -> None:
        """Take in the model as it is now; call it after each optimizer step."""
        model = unwrapped(model)
        decay = self._decay_now(int(self.n_averaged))
        averaged = dict(_averaged(self.module, self.buffer_policy))
        for name, tensor in averaged.items():
            new = _tensor(model, name, tensor).to(tensor.dtype)
            if isinstance(tensor, nn.Parameter):
                tensor.lerp_(new, 1 - decay)
            else:  # What is equal stays: between two infinities, as in the mask of an attention, lerp gives NaN.
                tensor.copy_(torch.where(tensor == new, tensor, tensor.lerp(new, 1 - decay)))
        for name, buffer in self.module.named_buffers():
            if name not in averaged and (self.buffer_policy != "recalibrate" or not buffer.is_floating_point()):
                buffer.copy_(_tensor(model, name, buffer))
        self.n_averaged += 1
        self.stale = self.buffer_policy == "recalibrate"

    def _decay_now(self, updates: int) -> float:
        if callable(self.decay):
            return self.decay(updates)
        return updates / (updates + 1) if self.decay is None else self.decay

    def recalibrate(self, data: Iterable[Any], **options: Any) -> Recalibration:
        """Measure the average's own statistics; arguments as `bnkit.recalibrate`'s."""
        result = recalibrate(self.module, data, **options)
        self.stale = False
        return result

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """Call the average."""
        if self.stale and not self.module.training:
            raise UserError(
                "the average's batch norms have not been measured since its update: call recalibrate(data)."
            )
        return self.module(*args, **kwargs)

    def train(self, mode: bool = True) -> EMA:
        """Stay in eval mode: training updates would spoil the average's statistics."""
        self.training = False
        return self
