"""Networks of the literature with a choice of normalization: `create("vgg16", norm="batch")`, `list()`."""

from .._weights import load_weights
from ._costs import Costs, LayerCost, costs
from ._norm import Norm, norms
from ._registry import create, options
from ._registry import list_models as list
from .alexnet import AlexNet
from .densenet import CifarDenseNet, DenseNet
from .googlenet import GoogLeNet, GoogLeNetOutputs, Inception, NaiveInception
from .lenet import LeNet5
from .mlp import MLP
from .resnet import CifarResNet, PreactResNet, ResNet
from .senet import SENet154
from .squeezenet import SqueezeNet
from .vgg import VGG

__all__ = [
    "MLP",
    "VGG",
    "AlexNet",
    "CifarDenseNet",
    "CifarResNet",
    "Costs",
    "DenseNet",
    "GoogLeNet",
    "GoogLeNetOutputs",
    "Inception",
    "LayerCost",
    "LeNet5",
    "NaiveInception",
    "Norm",
    "PreactResNet",
    "ResNet",
    "SENet154",
    "SqueezeNet",
    "costs",
    "create",
    "list",
    "load_weights",
    "norms",
    "options",
]
