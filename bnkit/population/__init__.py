"""Population statistics: measure them, adapt them, keep them, average them."""

from ._accumulate import accumulation
from ._adapt import adapt
from ._average import EMA, average
from ._callbacks import Callback, EMACallback, GuardCallback, RecalibrateCallback
from ._guard import guard_statistics
from ._preserve import preserve_statistics
from ._recalibrate import METHODS, recalibrate
from ._reduce import reduce_statistics
from ._result import Drift, Recalibration

__all__ = [
    "EMA",
    "METHODS",
    "Callback",
    "Drift",
    "EMACallback",
    "GuardCallback",
    "RecalibrateCallback",
    "Recalibration",
    "accumulation",
    "adapt",
    "average",
    "guard_statistics",
    "preserve_statistics",
    "recalibrate",
    "reduce_statistics",
]
