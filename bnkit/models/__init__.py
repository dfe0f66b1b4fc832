"""Networks of the literature with a choice of normalization: `create("vgg16", norm="batch")`, `list()`."""

from .._weights import load_weights
from ._costs import Costs, LayerCost, costs
from ._norm import Norm, norms
from ._registry import create, options
from ._registry import list_models as list
from .alexnet import AlexNet
from .bn_inception import BN_INCEPTION_RECIPES, BNInception, Recipe
from .darknet import Darknet53
from .densenet import CifarDenseNet, DenseNet
from .googlenet import GoogLeNet, GoogLeNetOutputs, Inception, NaiveInception
from .lenet import LeNet5, LeNet1998, rbf_loss
from .mlp import MLP
from .resnet import CifarResNet, PreactResNet, ResNet
from .senet import SENet154
from .squeezenet import SqueezeNet
from .unet import UNet
from .vgg import VGG

__all__ = [
    "BN_INCEPTION_RECIPES",
    "MLP",
    "VGG",
    "AlexNet",
    "BNInception",
    "CifarDenseNet",
    "CifarResNet",
    "Costs",
    "Darknet53",
    "DenseNet",
    "GoogLeNet",
    "GoogLeNetOutputs",
    "Inception",
    "LayerCost",
    "LeNet5",
    "LeNet1998",
    "NaiveInception",
    "Norm",
    "PreactResNet",
    "Recipe",
    "ResNet",
    "SENet154",
    "SqueezeNet",
    "UNet",
    "costs",
    "create",
    "list",
    "load_weights",
    "norms",
    "options",
    "rbf_loss",
]
