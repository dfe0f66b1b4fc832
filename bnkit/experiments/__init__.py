"""Experiments of the batch-normalization literature, each run by one function."""

from ._compare_files import save, to_dict
from ._compare_page import page_of
from ._record import Configuration, NetRecord
from .compare import CompareConfig, Comparison, compare

__all__ = [
    "CompareConfig",
    "Comparison",
    "Configuration",
    "NetRecord",
    "compare",
    "page_of",
    "save",
    "to_dict",
]
