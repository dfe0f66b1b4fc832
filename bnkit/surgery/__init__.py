"""Surgery on finished networks: insert, fold, fuse, convert, freeze and unfreeze."""

from ._convert import convert
from ._fold import fold
from ._freeze import freeze, unfreeze
from ._fuse import fuse
from ._insert import insert
from ._result import Surgery

__all__ = ["Surgery", "convert", "fold", "freeze", "fuse", "insert", "unfreeze"]
