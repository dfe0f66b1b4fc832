"""Networks of the literature with a choice of normalization: `create("vgg16", norm="batch")`, `list()`."""

from ._costs import Costs, LayerCost, costs
from ._norm import Norm, norms
from ._registry import create, options
from ._registry import list_models as list
from .lenet import LeNet5
from .mlp import MLP
from .vgg import VGG

__all__ = ["MLP", "VGG", "Costs", "LayerCost", "LeNet5", "Norm", "costs", "create", "list", "norms", "options"]
