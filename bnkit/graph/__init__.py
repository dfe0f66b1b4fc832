"""What happens in one forward pass of a model."""

from ._facts import Call, Operator, Value
from ._feed import Forward, apart, apply, device_of, feed, moved
from ._record import Record, record
from ._tensors import tensors_in

__all__ = [
    "Call",
    "Forward",
    "Operator",
    "Record",
    "Value",
    "apart",
    "apply",
    "device_of",
    "feed",
    "moved",
    "record",
    "tensors_in",
]
