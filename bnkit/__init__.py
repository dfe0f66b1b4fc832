"""Batch normalization for PyTorch, end to end."""

from . import data, experiments, functional, models, moments, nn, population, report, train
from ._allocator import tune_allocator
from ._checks import UserError
from .population import adapt, recalibrate

__all__ = [
    "UserError",
    "adapt",
    "data",
    "experiments",
    "functional",
    "models",
    "moments",
    "nn",
    "population",
    "recalibrate",
    "report",
    "train",
    "tune_allocator",
]
