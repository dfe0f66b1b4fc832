"""Surgery on finished networks: insert, fold, fuse."""

from ._result import Surgery

__all__ = ["Surgery"]
