"""The models that commands are given: by name and library, or by file and function."""

from __future__ import annotations

import ast
import importlib.util
import inspect
from collections.abc import Iterable
from functools import partial
from pathlib import Path
from typing import Annotated, Any

import typer
from torch import nn

from .._checks import UserError, require, unknown, words_of
from .._weights import load_weights

MODEL_HELP = "bnkit:vgg16, torchvision:resnet50, timm:seresnet50, or path/to/file.py:factory."
ModelName = Annotated[str, typer.Argument(metavar="MODEL", help=MODEL_HELP)]
ModelOptions = Annotated[
    list[str] | None,
    typer.Option("--option", "-o", metavar="NAME=VALUE", help="Given to the model's factory; may be repeated."),
]


def load_model(name: str, options: Iterable[str] | None = None, weights: Path | None = None) -> nn.Module:
    """Build the model called `name` and, if asked, load its weights.

    Args:
        name: `"bnkit:vgg16"`, `"torchvision:resnet50"`, `"timm:seresnet50"`, or `"path/to/file.py:factory"`; without a
            library, bnkit's.
        options: `"name=value"` each, for the factory; values are Python literals, or else strings.
        weights: A checkpoint, see `load_weights`.

    Raises:
        UserError: an unknown library or model, a factory that raises or gives no module, weights that don't fit.
    """
    library, _, model_name = name.rpartition(":")
    factory = _FACTORIES.get(library or "bnkit")
    arguments = dict(map(name_and_value, options or ()))
    if factory is not None:
        model = factory(model_name, arguments)
    elif library.endswith(".py"):
        model = _from_file(Path(library), model_name, arguments)
    else:
        raise unknown("model library", library, (*_FACTORIES, "path/to/file.py"))
    if weights is not None:
        load_weights(model, weights)
    return model


def is_own(name: str) -> bool:
    """Whether `name` is of one of bnkit's models."""
    return ":" not in name or name.startswith("bnkit:")


def name_and_value(text: str, what: str = "an option", example: str = "num_classes=10") -> tuple[str, Any]:
    """The two sides of `"name=value"`, the value as a Python literal or else a string.

    `what` and `example` are for the error of a text without them.
    """
    name, separator, value = text.partition("=")
    require(bool(separator and name), f"{what} is NAME=VALUE, got {text!r}: write it like {example}.")
    try:
        return name, ast.literal_eval(value)
    except (ValueError, SyntaxError):
        return name, value


def _from_bnkit(name: str, options: dict[str, Any]) -> nn.Module:
    from .. import models

    return _called(f"bnkit:{name}", partial(models.create, name), options)


def _from_torchvision(name: str, options: dict[str, Any]) -> nn.Module:
    from torchvision import models

    if name not in models.list_models():
        raise unknown("torchvision model", name, models.list_models())
    # Weights come from a file, never from the network.
    options = {"weights": None, **options}
    if "weights_backbone" in inspect.signature(models.get_model_builder(name)).parameters:
        options = {"weights_backbone": None, **options}
    return _called(f"torchvision:{name}", models.get_model_builder(name), options)


def _from_timm(name: str, options: dict[str, Any]) -> nn.Module:
    try:
        import timm
    except ImportError as error:
        raise UserError("timm is not installed: pip install 'bnkit[timm]'.") from error
    if name not in timm.list_models():
        raise unknown("timm model", name, timm.list_models())
    return _called(f"timm:{name}", timm.create_model, {"model_name": name, "pretrained": False, **options})


_FACTORIES = {"bnkit": _from_bnkit, "torchvision": _from_torchvision, "timm": _from_timm}


def _from_file(path: Path, name: str, options: dict[str, Any]) -> nn.Module:
    require(path.is_file(), f"there is no file {path}: name one that exists.")
    spec = importlib.util.spec_from_file_location(path.stem, path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    try:
        spec.loader.exec_module(module)
    except Exception as error:
        raise UserError(f"{path} can't be run ({words_of(error)}): mend it.") from error
    functions = [key for key, value in vars(module).items() if callable(value)]
    if name not in functions:
        raise unknown(f"function of {path}", name, functions)
    return _called(f"{path}:{name}", getattr(module, name), options)


def _called(what: str, factory: Any, options: dict[str, Any]) -> nn.Module:
    try:
        model = factory(**options)
    except UserError:
        raise
    except Exception as error:
        raise UserError(f"{what} failed ({words_of(error)}): see its options.") from error
    require(
        isinstance(model, nn.Module),
        f"{what} must give a torch.nn.Module, got {type(model).__name__}: name a function that builds the model.",
    )
    return model
