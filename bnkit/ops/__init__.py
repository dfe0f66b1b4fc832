"""Batch normalization, one contract and several backends."""

from .dispatch import batch_norm
from .reference import ACTIVATIONS

__all__ = ["ACTIVATIONS", "batch_norm"]
