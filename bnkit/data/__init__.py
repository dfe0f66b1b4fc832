"""Labelled image sets, whole in memory, and the order to visit them in."""

from ._image_set import ImageSet
from ._load import load, names
from ._order import BatchOrder

__all__ = ["BatchOrder", "ImageSet", "load", "names"]
