"""Optimizer groups: what weight decay is for, and what it spares."""

from __future__ import annotations

from typing import Any

from torch import nn
from torch.nn.modules.batchnorm import _NormBase

_NORM_LAYERS = (_NormBase, nn.GroupNorm, nn.LayerNorm, nn.RMSNorm)


def parameter_groups(model: nn.Module, weight_decay: float, *, norm_weight_decay: float = 0.0) -> list[dict[str, Any]]:
    """The trainable parameters of `model` in groups for a `torch.optim` optimizer.

    Weights get `weight_decay`. The γ and β of normalization layers (torch.nn's, bnkit's and their subclasses) get
    `norm_weight_decay`, and so do all biases: decaying them is not part of the usual recipe (Goyal et al. 2017,
    section 5.1; He et al. 2019, section 3.1) and whether it helps depends on the architecture (Summers and Dinneen
    2020, section 3.3, https://arxiv.org/abs/1906.03548). A parameter that several modules share comes once, and
    counts as a norm's if any of them is a norm. Frozen parameters are left out.

    Args:
        model: Any module.
        weight_decay: Of weights.
        norm_weight_decay: Of norms' parameters and biases.

    Returns:
        `[{"params": [...], "weight_decay": ...}, ...]`: weights, then the rest, without empty groups; one group where
        both decays are the same.
    """
    spared = _spared(model)
    parameters = [parameter for parameter in model.parameters() if parameter.requires_grad]
    if weight_decay == norm_weight_decay:
        groups = [(parameters, weight_decay)]
    else:
        weights = [parameter for parameter in parameters if id(parameter) not in spared]
        rest = [parameter for parameter in parameters if id(parameter) in spared]
        groups = [(weights, weight_decay), (rest, norm_weight_decay)]
    return [{"params": group, "weight_decay": decay} for group, decay in groups if group]


def _spared(model: nn.Module) -> set[int]:
    """The ids of norms' parameters and of biases."""
    return {
        id(parameter)
        for module in model.modules()
        for name, parameter in module.named_parameters(recurse=False)
        if isinstance(module, _NORM_LAYERS) or name.endswith("bias")
    }
