"""Surgery on finished networks: insert, fold, fuse."""

from ._fold import fold
from ._result import Surgery

__all__ = ["Surgery", "fold"]
