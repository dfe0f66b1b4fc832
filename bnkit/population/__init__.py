"""Population statistics: measure them, adapt them, keep them, average them."""

from ._adapt import adapt
from ._recalibrate import METHODS, recalibrate
from ._result import Drift, Recalibration

__all__ = ["METHODS", "Drift", "Recalibration", "adapt", "recalibrate"]
