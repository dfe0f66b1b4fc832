"""Networks of the literature with a choice of normalization: `create("vgg16", norm="batch")`, `list()`."""

from .._weights import load_weights
from ._costs import Costs, LayerCost, costs
from ._norm import Norm, norms
from ._registry import create, options
from ._registry import list_models as list
from .densenet import CifarDenseNet, DenseNet
from .lenet import LeNet5
from .mlp import MLP
from .resnet import CifarResNet, PreactResNet, ResNet
from .senet import SENet154
from .vgg import VGG

__all__ = [
    "MLP",
    "VGG",
    "CifarDenseNet",
    "CifarResNet",
    "Costs",
    "DenseNet",
    "LayerCost",
    "LeNet5",
    "Norm",
    "PreactResNet",
    "ResNet",
    "SENet154",
    "costs",
    "create",
    "list",
    "load_weights",
    "norms",
    "options",
]
