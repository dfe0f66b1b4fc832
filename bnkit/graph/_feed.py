"""How a model is called on a batch."""

from __future__ import annotations

import inspect
import itertools
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_map

from .._checks import UserError

Forward = Callable[[nn.Module, Any], Any]


def feed(model: nn.Module, batch: Any, forward: Forward | None = None) -> Any:
    """The output of `model` on one batch of a data loader.

    A tensor is the input. Of a tuple or list the first element is the input and the rest are labels. A dict
    gives keyword arguments. Tensors move to the device of the model's parameters.

    Args:
        model: Called once.
        batch: From any loader.
        forward: `forward(model, batch)` calls the model in another way; the batch has been moved to the device.

    Raises:
        UserError: a batch of another type.
    """
    batch = moved(batch, device_of(model))
    if forward is not None:
        return forward(model, batch)
    if isinstance(batch, Tensor):
        return model(batch)
    if isinstance(batch, Mapping):
        return model(**batch)
    if isinstance(batch, (tuple, list)) and len(batch):
        return model(batch[0])
    raise UserError(
        f"a batch must be a tensor, an (input, label) pair or a dict of arguments, got {type(batch).__name__}: "
        "say with forward=lambda model, batch: ... how to call the model."
    )


def device_of(model: nn.Module) -> torch.device | None:
    """Where the model's first parameter or buffer lies; None if it has neither."""
    for tensor in itertools.chain(model.parameters(), model.buffers()):
        return tensor.device
    return None


def moved(batch: Any, device: torch.device | None) -> Any:
    """`batch` with the tensors in its dicts, lists and tuples on `device`."""
    if device is None:
        return batch
    if isinstance(batch, Tensor):
        # Outside of inference mode a tensor made in it can't be written to, which a model may want.
        made_in_it = batch.is_inference() and not torch.is_inference_mode_enabled()
        return (batch.clone() if made_in_it else batch).to(device)
    if isinstance(batch, Mapping):
        return {key: moved(value, device) for key, value in batch.items()}
    if isinstance(batch, tuple) and hasattr(batch, "_fields"):
        return type(batch)(*(moved(value, device) for value in batch))
    if isinstance(batch, (tuple, list)):
        return type(batch)(moved(value, device) for value in batch)
    return batch


def apart(example: Any) -> Any:
    """`example` with tensors of its own, for a model may write to its input. Any mapping becomes a dict."""
    own: dict[Tensor, Tensor] = {}

    def copied(part: Any) -> Any:
        if isinstance(part, Mapping):
            return {key: tree_map(copied, value) for key, value in part.items()}
        if not isinstance(part, Tensor):
            return part
        if part not in own:
            own[part] = part.detach().clone().requires_grad_(part.requires_grad)
        return own[part]

    return tree_map(copied, example)


def apply(model: nn.Module, example: Any, forward: Forward | None = None) -> Any:
    """The output of `model` on one example: like `feed`, except that a tuple is the positional arguments.

    A tuple that the model's `forward` can't take, such as an (input, label) pair, is a batch.
    """
    if forward is None and isinstance(example, tuple) and _takes(model, example):
        return model(*moved(example, device_of(model)))
    return feed(model, example, forward)


def _takes(model: nn.Module, arguments: tuple[Any, ...]) -> bool:
    try:
        inspect.signature(model.forward).bind(*arguments)
    except (TypeError, ValueError):
        return False
    return True
