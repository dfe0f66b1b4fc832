"""Batch normalization for PyTorch, end to end."""

from . import data, experiments, functional, models, moments, nn, population, report, surgery, train
from ._allocator import tune_allocator
from ._checks import FailedCheck, UserError
from .population import adapt, average, preserve_statistics, recalibrate
from .surgery import convert, fold, freeze, fuse, insert, unfreeze

__all__ = [
    "FailedCheck",
    "UserError",
    "adapt",
    "average",
    "convert",
    "data",
    "experiments",
    "fold",
    "freeze",
    "functional",
    "fuse",
    "insert",
    "models",
    "moments",
    "nn",
    "population",
    "preserve_statistics",
    "recalibrate",
    "report",
    "surgery",
    "train",
    "tune_allocator",
    "unfreeze",
]
