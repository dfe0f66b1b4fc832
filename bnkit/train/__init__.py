"""Training: settings, the loop, evaluation, checkpoints, optimizer groups."""

from ._bn_inception import bn_inception_settings
from ._checkpoint import load_evaluated
from ._config import FitConfig
from ._evaluate import evaluate, labelled_probabilities, probabilities
from ._fit import Diverged, fit, iterate
from ._groups import parameter_groups
from ._history import Evaluation, History
from ._recipe import fast_precision
from ._schedule import learning_rate

__all__ = [
    "Diverged",
    "Evaluation",
    "FitConfig",
    "History",
    "bn_inception_settings",
    "evaluate",
    "fast_precision",
    "fit",
    "iterate",
    "labelled_probabilities",
    "learning_rate",
    "load_evaluated",
    "parameter_groups",
    "probabilities",
]
