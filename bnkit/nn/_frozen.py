"""FrozenBatchNorm and its 1d, 2d and 3d: a fixed normalization, whatever the mode."""

from __future__ import annotations

from typing import Any, Unpack

import torch
from torch import Tensor

from .._checks import require
from ._any_dimension import AnyDimension, Options
from ._batch_norm import BatchNorm


class FrozenBatchNorm(AnyDimension):
    r"""Batch normalization with statistics that never change: a fixed scale and shift a channel. For (N, C, *).

        y = activation(weight · (x - running_mean) / √(running_var + eps) + bias + residual)

    in training and in eval mode. `model.train()` leaves it in eval mode, and no forward pass, `reset_running_stats` or
    `torch.optim.swa_utils.update_bn` changes its statistics. For fine-tuning on batches too small or too unlike the
    original data to measure statistics on, as in detection.

    weight and bias are parameters, and learn if their `requires_grad` says so: by default they do, with
    `trainable=False` they don't. (torchvision's layer of this name keeps them as buffers, which never learn.)

    Loads, strictly, the `state_dict` of any `torch.nn` batch norm, and of torchvision's and detectron2's
    FrozenBatchNorm2d, which lacks `num_batches_tracked`.

    References:
        He, Zhang, Ren and Sun, "Deep Residual Learning for Image Recognition", 2015,
        https://arxiv.org/abs/1512.03385, appendix A (BN fixed in detection).

    Args:
        num_features: C.
        eps: added to the variance.
        momentum: kept for conversion back; unused.
        affine: have weight and bias.
        track_running_stats: must be True.
        device, dtype: of parameters and buffers.
        trainable: learn weight and bias.
        bias, activation, skip_nonfinite, inplace: as in `BatchNorm2d`.

    Raises:
        ValueError: `track_running_stats=False`, or what `bnkit.functional.batch_norm` raises it for.
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
        trainable: bool = True,
        **options: Unpack[Options],
    ) -> None:
        require(
            track_running_stats,
            "a frozen batch norm normalizes with its running statistics, got track_running_stats=False: leave it True.",
        )
        super().__init__(num_features, eps, momentum, affine, True, device, dtype, **options)
        self.training = False
        if not trainable:
            self.requires_grad_(False)

    def train(self, mode: bool = True) -> Any:
        """Stay in eval mode."""
        return super().train(False)

    def forward(self, input: Tensor, residual: Tensor | None = None) -> Tensor:
        """activation(weight · (x - running_mean) / √(running_var + eps) + bias + residual), of the input's shape."""
        if isinstance(input, torch.fx.Proxy):
            return self._recorded_by_fx(input, residual)
        self._check_input_dim(input)
        return self._normalize(input, residual, self.running_mean, self.running_var, False, 0.0)

    def reset_running_stats(self) -> None:
        """Nothing: `torch.optim.swa_utils.update_bn` calls this on every batch norm, and could not refill them."""

    def reset_parameters(self) -> None:
        """Statistics 0 and 1, weight 1, bias 0: as after construction, or after `to_empty`."""
        BatchNorm.reset_running_stats(self)
        super().reset_parameters()

    def _load_from_state_dict(
        self,
        state_dict: dict[str, Any],
        prefix: str,
        local_metadata: dict[str, Any],
        strict: bool,
        missing_keys: list[str],
        unexpected_keys: list[str],
        error_msgs: list[str],
    ) -> None:
        mean, count = state_dict.get(prefix + "running_mean"), self.num_batches_tracked
        if isinstance(mean, Tensor) and isinstance(count, Tensor):  # `assign=True` takes the place of the layer's own
            count = torch.zeros_like(count, device=mean.device) if count.is_meta else count.to(mean.device)
        # torchvision's and detectron2's frozen layers keep no count.
        state_dict.setdefault(prefix + "num_batches_tracked", count)
        super()._load_from_state_dict(
            state_dict, prefix, local_metadata, strict, missing_keys, unexpected_keys, error_msgs
        )


class _OfOneDimension(FrozenBatchNorm):
    """A `FrozenBatchNorm` that looks at its input's dimensions as the class of `torch.nn` behind it does."""

    _check_input_dim = BatchNorm._check_input_dim


class FrozenBatchNorm1d(_OfOneDimension, torch.nn.BatchNorm1d):
    """`FrozenBatchNorm` of (N, C) or (N, C, L)."""


class FrozenBatchNorm2d(_OfOneDimension, torch.nn.BatchNorm2d):
    """`FrozenBatchNorm` of (N, C, H, W)."""


class FrozenBatchNorm3d(_OfOneDimension, torch.nn.BatchNorm3d):
    """`FrozenBatchNorm` of (N, C, D, H, W)."""
