"""Labelled images, whole in memory or in files, the order to visit them in, and random changes of them."""

from ._augment import Augmentation
from ._decoding import collated, usual_workers
from ._image_set import ImageSet
from ._imagenet import IMAGENET_MEAN, IMAGENET_STD
from ._load import load, names
from ._order import SHUFFLES, BatchOrder
from ._photographs import Example, Examples, Photographs, photographs, usual_side

__all__ = [
    "IMAGENET_MEAN",
    "IMAGENET_STD",
    "SHUFFLES",
    "Augmentation",
    "BatchOrder",
    "Example",
    "Examples",
    "ImageSet",
    "Photographs",
    "collated",
    "load",
    "names",
    "photographs",
    "usual_side",
    "usual_workers",
]
