"""Batch normalization for PyTorch, end to end."""

from . import data, experiments, functional, models, moments, nn, report, train
from ._allocator import tune_allocator
from ._checks import UserError

__all__ = [
    "UserError",
    "data",
    "experiments",
    "functional",
    "models",
    "moments",
    "nn",
    "report",
    "train",
    "tune_allocator",
]
