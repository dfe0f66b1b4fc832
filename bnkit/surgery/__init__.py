"""Surgery on finished networks: insert, fold, fuse."""

from ._fold import fold
from ._insert import insert
from ._result import Surgery

__all__ = ["Surgery", "fold", "insert"]
