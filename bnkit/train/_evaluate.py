"""Loss and accuracy on the test images."""

from __future__ import annotations

from collections.abc import Callable, Generator
from contextlib import closing

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from .._checks import require
from .._modes import evaluating
from ..data import ImageSet, Photographs
from ._batches import Batches, batches_of
from ._config import FitConfig
from ._devices import Devices, place


def evaluate(model: nn.Module, data: ImageSet | Photographs, config: FitConfig) -> tuple[float, float]:
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
    return evaluate_placed(model, batches_of(data, config, devices), devices, data.num_classes, config)


def probabilities(model: nn.Module, data: ImageSet | Photographs, config: FitConfig) -> Tensor:
    """Each test image's probability of each class: the softmax of the logits, in evaluation mode.

    The mean of several models' is their ensemble (Ioffe and Szegedy 2015, section 4.2.3).

    Args, raises: as `evaluate`.

    Returns:
        (N, outputs), float32 on the CPU. Photographs that are skipped, since they can't be read, have no row.
    """
    return labelled_probabilities(model, data, config)[0]


def labelled_probabilities(
    model: nn.Module, data: ImageSet | Photographs, config: FitConfig, progress: Callable[[int], None] | None = None
) -> tuple[Tensor, Tensor]:
    """`probabilities`, and the labels (N,) of the images they are of, on the CPU.

    `progress` is called with the number of images of each batch that is done.
    """
    found = []
    devices = place(model, config)
    batches = batches_of(data, config, devices)
    with closing(_logits(model, batches, devices, data.num_classes, config.eval_batch_size)) as parts:
        for logits, labels in parts:
            found.append((logits.softmax(1).float().cpu(), labels.cpu()))
            if progress is not None:
                progress(len(labels))
    probabilities, labels = zip(*found, strict=True)
    return torch.cat(probabilities), torch.cat(labels)


def evaluate_placed(
    model: nn.Module, batches: Batches, devices: Devices, num_classes: int, config: FitConfig
) -> tuple[float, float]:
    """As `evaluate`, with model and data on their device already."""
    loss, correct, count = 0.0, 0, 0
    with closing(_logits(model, batches, devices, num_classes, config.eval_batch_size)) as parts:
        for logits, labels in parts:
            loss += F.cross_entropy(logits, labels, reduction="sum").item()
            correct += int((logits.argmax(1) == labels).sum())
            count += len(labels)
    return loss / count, correct / count


def _logits(
    model: nn.Module, batches: Batches, devices: Devices, num_classes: int, batch_size: int
) -> Generator[tuple[Tensor, Tensor], None, None]:
    """Logits and labels of the test images, batch by batch; inference mode lasts until it ends or is closed."""
    with torch.inference_mode(), evaluating(model):
        for images, labels in batches.test(batch_size):
            with devices.autocast():
                logits = model(images)
            require(
                logits.ndim == 2 and logits.shape[1] >= num_classes,
                f"the model must give one logit for each of {num_classes} classes, got outputs of shape "
                f"{tuple(logits.shape)}: build it with num_classes={num_classes}.",
            )
            yield logits.to(devices.dtype), labels
