"""A training run's folder: what it was told, in `run.json`, beside what came of it."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Any

from .._checks import UserError, require, words_of
from ._models import is_own, load_model

if TYPE_CHECKING:
    from torch import nn

    from ..data import ImageSet, Photographs

RUN, CHECKPOINT, WEIGHTS = "run.json", "checkpoint.pt", "weights.safetensors"


def read_run(folder: Path) -> dict[str, Any]:
    """What `run.json` in a folder holds.

    Raises:
        UserError: there is none, or it is damaged.
    """
    path = folder / RUN
    require(path.is_file(), f"there is no run in {folder}: name a folder that `bnkit train` wrote.")
    try:
        run = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise UserError(f"{path} is damaged ({error}): name another run.") from error
    complete = isinstance(run, dict) and {"recipe", "config"} <= run.keys()
    require(complete, f"{path} is not of `bnkit train`, it lacks recipe and config: name another run.")
    return run


def build_model(recipe: dict[str, Any], images: ImageSet | Photographs) -> nn.Module:
    """The model of a recipe, with as many classes and channels as the images have where it is one of bnkit's."""
    from .. import models

    name, options = recipe["model"], list(recipe["options"])
    if is_own(name):
        taken = {option.partition("=")[0] for option in options}
        channels, side, _ = images.shape
        num_classes = images.num_classes if images.num_classes > 1 else None  # one class stands for no labels
        given = {"num_classes": num_classes, "in_channels": channels, "norm": recipe["norm"]}
        if "image_size" in models.options(name.removeprefix("bnkit:")):
            given["image_size"] = side
        options += [f"{key}={value}" for key, value in given.items() if value is not None and key not in taken]
    else:
        require(
            recipe["norm"] is None, f"--norm is for bnkit's models, got {name}: leave it out, or convert the model."
        )
    model = load_model(name, options)
    _check_takes(model, images.shape, name)
    return model


def _check_takes(model: nn.Module, shape: tuple[int, int, int], name: str) -> None:
    """Raise unless the model can be called on images (C, H, W) of this shape; nothing in it changes."""
    import torch

    from .._modes import evaluating

    with torch.no_grad(), torch.random.fork_rng(devices=[]), evaluating(model):
        try:
            model(torch.zeros(2, *shape))
        except UserError:
            raise
        except Exception as error:
            raise UserError(
                f"{name} can't take images of shape {shape} ({words_of(error)}): build it for them, or choose others."
            ) from error
