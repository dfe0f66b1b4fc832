"""Normalization layers."""

from ._batch_norm import BatchNorm1d, BatchNorm2d, BatchNorm3d
from ._bn_lstm import BNLSTM
from ._domain import DomainBatchNorm, use_domain
from ._frozen import FrozenBatchNorm, FrozenBatchNorm1d, FrozenBatchNorm2d, FrozenBatchNorm3d
from ._fused import ACTIVATION_MODULES, Fused, activation_name
from ._ghost import GhostBatchNorm
from ._masked import MaskedBatchNorm
from ._recurrent import RecurrentBatchNorm
from ._renorm import BatchRenorm
from ._sync import SyncBatchNorm
from ._sync_exchange import SyncError

__all__ = [
    "ACTIVATION_MODULES",
    "BNLSTM",
    "BatchNorm1d",
    "BatchNorm2d",
    "BatchNorm3d",
    "BatchRenorm",
    "DomainBatchNorm",
    "FrozenBatchNorm",
    "FrozenBatchNorm1d",
    "FrozenBatchNorm2d",
    "FrozenBatchNorm3d",
    "Fused",
    "GhostBatchNorm",
    "MaskedBatchNorm",
    "RecurrentBatchNorm",
    "SyncBatchNorm",
    "SyncError",
    "activation_name",
    "use_domain",
]
