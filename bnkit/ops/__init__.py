"""Batch normalization, one contract and several backends."""

from . import operators
from ._backend import COMPOSED
from ._inplace import INVERTIBLE
from .dispatch import batch_norm
from .reference import ACTIVATIONS

__all__ = ["ACTIVATIONS", "COMPOSED", "INVERTIBLE", "batch_norm", "operators"]
