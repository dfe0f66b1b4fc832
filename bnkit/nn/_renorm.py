"""BatchRenorm: batch statistics, corrected towards the running ones."""

from __future__ import annotations

import dataclasses
from collections import deque
from collections.abc import Callable
from typing import Any, Unpack
from weakref import WeakKeyDictionary

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import is_fake
from torch._subclasses.functional_tensor import FunctionalTensor
from torch.fx.experimental.proxy_tensor import get_proxy_mode
from torch.utils.checkpoint import CheckpointPolicy

from .. import functional
from .._checks import require
from ..moments import Moments, statistics_dtype
from ..ops.dispatch import is_recorded
from ._any_dimension import AnyDimension, Options
from ._batch_norm import is_recomputation

Schedule = float | tuple[int, int, float] | Callable[[Tensor], Tensor | float]
"""A bound: a number, a ramp (first step, last step, final value), or a function of the count of batches (a tensor)."""

_REMEMBERED = 64
"""How many passes through a layer activation checkpointing may repeat, of each region that it checkpoints."""


class BatchRenorm(AnyDimension):
    r"""Batch renormalization: training normalizes nearly as inference will. For small or dependent batches.

        r  = clip(σ_B / σ, 1/r_max, r_max)       d = clip((μ_B - μ) / σ, -d_max, d_max)
        x̂  = (x - μ_B) / σ_B · r + d
        y  = activation(weight · x̂ + bias + residual)

    with the batch's μ_B and σ_B = √(var_B + eps) and the running μ = running_mean and σ = √(running_var + eps) as they
    were before this batch. r and d are constants to the backward pass. Unclipped, x̂ is (x - μ) / σ; with r_max = 1 and
    d_max = 0 it is batch normalization. `eval()` is that of batch normalization.

    The paper averages σ_B, the biased standard deviation with eps inside. This layer averages the unbiased variance,
    as all batch norms in PyTorch do, so that its `state_dict` is theirs. The square root of a mean is not the mean of
    square roots: with batches of two the running σ is larger here, and is a better estimate of the population's.

    Activation checkpointing repeats a pass when the statistics have moved on, so the layer remembers r and d, by the
    batch's own statistics: of the last 64 passes of each checkpointed region until its backward pass is over, with
    `use_reentrant=True` of the last 64 in all. Refused are a pass that is not among them, or not repeated to the bit,
    and one of several with the same batch before one `backward()`. Compile around the checkpoint, not inside of it.

    References:
        Ioffe, "Batch Renormalization: Towards Reducing Minibatch Dependence in Batch-Normalized Models", 2017,
        https://arxiv.org/abs/1702.03275, algorithm 1 and section 4.

    Args:
        num_features: C of (N, C) or (N, C, *).
        eps, affine, device, dtype: as in `BatchNorm2d`.
        momentum: as in `BatchNorm2d`. The paper's is 0.01: statistics that normalize the training should be steady.
        track_running_stats: must be True.
        r_max: bound of r, at least 1: a number, a tuple (first, last, final) for a straight line from 1 at
            `num_batches_tracked` = first to final at last, or a function of `num_batches_tracked`, a tensor.
            Default, the paper's: (5000, 40000, 3.0).
        d_max: bound of d, at least 0, likewise, a tuple's line starting at 0. Default, the paper's: (5000, 25000, 5.0).
        bias, activation, skip_nonfinite, inplace: as in `BatchNorm2d`.

    Raises:
        ValueError: `track_running_stats=False`, a bound out of range, a checkpointed pass that cannot be told from the
            others, or what `bnkit.functional.batch_norm` raises it for.
    """

    def __init__(
        self,
        num_features: int,
        eps: float = 1e-5,
        momentum: float | None = 0.1,
        affine: bool = True,
        track_running_stats: bool = True,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
        *,
        r_max: Schedule = (5_000, 40_000, 3.0),
        d_max: Schedule = (5_000, 25_000, 5.0),
        **options: Unpack[Options],
    ) -> None:
        require(
            track_running_stats,
            "batch renormalization corrects towards its running statistics, got track_running_stats=False: "
            "leave it True.",
        )
        _check_schedule("r_max", r_max, 1.0)
        _check_schedule("d_max", d_max, 0.0)
        super().__init__(num_features, eps, momentum, affine, True, device, dtype, **options)
        self.r_max = r_max
        self.d_max = d_max
        self._passes = _Passes()

    def _normalize(
        self,
        input: Tensor,
        residual: Tensor | None,
        mean: Tensor | None,
        var: Tensor | None,
        training: bool,
        momentum: float | Tensor,
    ) -> Tensor:
        if not training or input.numel() == 0 or input.dim() < 2:
            return super()._normalize(input, residual, mean, var, training, momentum)
        one = self._pass_of(input)
        weight = one.r if self.weight is None else self.weight * one.r
        bias = one.d if self.weight is None else self.weight * one.d
        y = functional.batch_norm(
            input,
            mean,
            var,
            weight,
            bias if self.bias is None else bias + self.bias,
            True,
            momentum,
            self.eps,
            activation=self.activation,
            residual=residual,
            inplace=self.inplace,
        )
        if not torch.compiler.is_compiling():
            self._passes.remember(one, in_graph=y.requires_grad)
        return y

    @torch.no_grad()
    def _pass_of(self, input: Tensor) -> _Pass:
        batch = Moments.of(input, (0, *range(2, input.dim())))
        if is_recomputation() and _has_values(batch.mean):
            return self._passes.find(batch)
        r, d = self._correction_of(batch)
        if torch.compiler.is_compiling() and not is_recorded():
            r, d = torch.ops.bnkit.saved(r), torch.ops.bnkit.saved(d)
        return _Pass(batch.mean, batch.m2, r, d)

    def _correction_of(self, batch: Moments) -> tuple[Tensor, Tensor]:
        assert self.running_mean is not None
        assert self.running_var is not None
        assert self.num_batches_tracked is not None
        dtype = statistics_dtype(batch.mean.dtype)
        sigma = torch.sqrt(self.running_var.to(dtype) + self.eps)
        r_max = torch.as_tensor(_bound(self.r_max, 1.0, self.num_batches_tracked), dtype=dtype, device=sigma.device)
        d_max = torch.as_tensor(_bound(self.d_max, 0.0, self.num_batches_tracked), dtype=dtype, device=sigma.device)
        r = (torch.sqrt(batch.variance() + self.eps) / sigma).clamp(1 / r_max, r_max)
        d = ((batch.mean - self.running_mean) / sigma).clamp(-d_max, d_max)
        return r, d

    def extra_repr(self) -> str:
        """torch.nn's, and the options that differ from it."""
        return super().extra_repr() + f", r_max={self.r_max}, d_max={self.d_max}"


@dataclasses.dataclass(eq=False)
class _Pass:
    """A forward pass: the batch's statistics, and the correction that they got."""

    mean: Tensor
    m2: Tensor
    r: Tensor
    d: Tensor
    repeated: bool = False

    def is_of(self, batch: Moments) -> bool:
        return _equal(self.mean, batch.mean) and _equal(self.m2, batch.m2)

    def agrees(self, other: _Pass) -> bool:
        return _equal(self.r, other.r) and _equal(self.d, other.d)


class _Passes:
    """The passes that activation checkpointing may repeat."""

    def __init__(self) -> None:
        self._of_regions: WeakKeyDictionary[Any, deque[_Pass]] = WeakKeyDictionary()
        self._without_graph: deque[_Pass] = deque(maxlen=_REMEMBERED)

    def __reduce__(self) -> tuple[type[_Passes], tuple[()]]:
        """A copy of the layer has run no passes."""
        return _Passes, ()

    def remember(self, one: _Pass, *, in_graph: bool) -> None:
        if is_recomputation() or not all(map(_has_values, (one.mean, one.r, one.d))):
            return
        autograd = torch._C._autograd  # pyright: ignore[reportAttributeAccessIssue]
        hooks = autograd._top_saved_tensors_default_hooks(True)
        if hooks is not None and in_graph:
            # A checkpointed region puts hooks of its own on what is saved in it; they live as long as its graph.
            self._of_regions.setdefault(hooks[1], deque(maxlen=_REMEMBERED)).append(one)
        elif hooks is not None or not torch.is_grad_enabled():  # as with use_reentrant=True, which makes it later
            self._without_graph.append(one)

    def find(self, batch: Moments) -> _Pass:
        """The pass with this batch."""
        everything = [one for passes in (self._without_graph, *self._of_regions.values()) for one in passes]
        same = [one for one in everything if one.is_of(batch)]
        require(
            bool(same),
            "activation checkpointing repeats a pass through batch renormalization with a batch that was not among the "
            f"last {_REMEMBERED}: make the model deterministic, or checkpoint fewer passes before each backward().",
        )
        # A pass is repeated again by nested checkpoints, and for another backward pass through the same graph.
        fresh = [one for one in same if not one.repeated] or same[-1:]
        require(
            all(one.agrees(fresh[-1]) for one in fresh),
            "activation checkpointing repeats one of several passes of the same batch through batch renormalization, "
            "which got different corrections: call backward() after each, or leave the layer out of the checkpoint.",
        )
        fresh[-1].repeated = True
        return fresh[-1]


def _equal(a: Tensor, b: Tensor) -> bool:
    """Whether these are the same values, an overflow's NaN included."""
    return a.dtype == b.dtype and a.device == b.device and torch.allclose(a, b, rtol=0.0, atol=0.0, equal_nan=True)


def _has_values(x: Tensor) -> bool:
    """Whether x outlives this call, and can be compared: neither fake nor a transform's."""
    functorch = torch._C._functorch  # pyright: ignore[reportAttributeAccessIssue]
    return not (x.is_meta or functorch.is_functorch_wrapped_tensor(x) or is_fake(x))


def _saved(x: Tensor) -> Tensor:
    """x, which a compiled graph keeps for its backward pass.

    Activation checkpointing would compute it again, from running statistics that the end of the graph has updated.
    """
    mode = get_proxy_mode()
    if mode is not None:
        plain = torch._from_functional_tensor(x.elem) if isinstance(x, FunctionalTensor) else x  # pyright: ignore
        proxy = mode.tracer.unwrap_proxy(plain)
        if isinstance(proxy, torch.fx.Proxy):
            proxy.node.meta["recompute"] = CheckpointPolicy.MUST_SAVE
    return x


# An operator, since the graph is not there yet when the layer's own code is traced.
_library = torch.library.Library("bnkit", "FRAGMENT")
_library.define("saved(Tensor(a) x) -> Tensor(a)")
_library.impl("saved", _saved, "CompositeImplicitAutograd")
torch.library.register_vmap(
    "bnkit::saved", lambda info, in_dims, x: (torch.ops.bnkit.saved(x), in_dims[0]), lib=_library
)


def _check_schedule(name: str, schedule: Schedule, least: float) -> None:
    if callable(schedule):
        return
    ramp = schedule if isinstance(schedule, tuple) else (0, 1, schedule)
    require(
        len(ramp) == 3 and ramp[0] < ramp[1] and ramp[2] >= least,
        f"{name} must be a number of at least {least:g}, a tuple (first step, last step, final value) with "
        f"first < last, or a function, got {schedule!r}: see BatchRenorm.",
    )


def _bound(schedule: Schedule, start: float, count: Tensor) -> Tensor | float:
    if callable(schedule):
        return schedule(count)
    if not isinstance(schedule, tuple):
        return schedule
    first, last, final = schedule
    return start + (final - start) * ((count - first) / (last - first)).clamp(0, 1)
