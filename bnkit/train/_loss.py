"""What training minimizes."""

from __future__ import annotations

from typing import Any

from torch import Tensor
from torch.nn import functional as F

from ..models import rbf_loss
from ._config import FitConfig

_AUXILIARY_WEIGHT = 0.3
_J = 0.1


def training_loss(outputs: Any, labels: Tensor, config: FitConfig) -> Tensor:
    """The loss that `config` names, of logits (N, classes).

    Of a tuple, such as GoogLeNet's with auxiliary heads, the losses of all but the first count 0.3 each (Szegedy et
    al. 2015, section 5).
    """
    if isinstance(outputs, Tensor):
        return _loss(outputs, labels, config)
    first, *others = (_loss(logits, labels, config) for logits in outputs if logits is not None)
    return first + _AUXILIARY_WEIGHT * sum(others)


def _loss(logits: Tensor, labels: Tensor, config: FitConfig) -> Tensor:
    if config.loss == "cross-entropy":
        return F.cross_entropy(logits, labels, label_smoothing=config.label_smoothing)
    return rbf_loss(logits, labels, None if config.loss == "rbf" else _J)
