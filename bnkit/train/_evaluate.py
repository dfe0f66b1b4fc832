"""Loss and accuracy on the test images."""

from __future__ import annotations

import torch
from torch import nn
from torch.nn import functional as F

from .._checks import require
from .._modes import evaluating
from ..data import ImageSet
from ._batches import Batches
from ._config import FitConfig
from ._devices import Devices, place


def evaluate(model: nn.Module, data: ImageSet, config: FitConfig) -> tuple[float, float]:
    """Mean cross-entropy and accuracy of `model` on the test images, in evaluation mode.

    Args:
        model: From (N, C, H, W) to (N, num_classes) logits; moved to the device of `config`, its modes restored.
        data: Its test images are used, and its training images' mean and standard deviation.
        config: Normalization, precision, device and evaluation batch size are taken from it.

    Returns:
        The loss, and the fraction of images whose highest logit is their label's.

    Raises:
        UserError: the model has too few outputs, or the device is not there.
    """
    devices = place(model, config)
    return evaluate_placed(model, Batches(data, config, devices), devices, data.num_classes, config)


def evaluate_placed(
    model: nn.Module, batches: Batches, devices: Devices, num_classes: int, config: FitConfig
) -> tuple[float, float]:
    """As `evaluate`, with model and data on their device already."""
    loss, correct, count = 0.0, 0, 0
    with torch.inference_mode(), evaluating(model):
        for images, labels in batches.test(config.eval_batch_size):
            with devices.autocast():
                logits = model(images)
            require(
                logits.ndim == 2 and logits.shape[1] >= num_classes,
                f"the model must give one logit for each of {num_classes} classes, got outputs of shape "
                f"{tuple(logits.shape)}: build it with num_classes={num_classes}.",
            )
            logits = logits.to(devices.dtype)
            loss += F.cross_entropy(logits, labels, reduction="sum").item()
            correct += int((logits.argmax(1) == labels).sum())
            count += len(labels)
    return loss / count, correct / count
