"""Labelled image sets, whole in memory, the order to visit them in, and random changes of them."""

from ._augment import Augmentation
from ._image_set import ImageSet
from ._load import load, names
from ._order import BatchOrder

__all__ = ["Augmentation", "BatchOrder", "ImageSet", "load", "names"]
