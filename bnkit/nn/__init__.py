"""Normalization layers."""

from ._batch_norm import BatchNorm1d, BatchNorm2d, BatchNorm3d
from ._frozen import FrozenBatchNorm, FrozenBatchNorm1d, FrozenBatchNorm2d, FrozenBatchNorm3d
from ._ghost import GhostBatchNorm
from ._renorm import BatchRenorm

__all__ = [
    "BatchNorm1d",
    "BatchNorm2d",
    "BatchNorm3d",
    "BatchRenorm",
    "FrozenBatchNorm",
    "FrozenBatchNorm1d",
    "FrozenBatchNorm2d",
    "FrozenBatchNorm3d",
    "GhostBatchNorm",
]
