"""Models by name."""

from __future__ import annotations

import fnmatch
import inspect
from collections.abc import Callable
from dataclasses import dataclass, field

from torch import nn

from .._checks import UserError, require, unknown, words_of
from ._norm import Norm


@dataclass(frozen=True)
class _Variant:
    family: Callable[..., nn.Module]
    fixed: dict[str, object]
    defaults: dict[str, object] = field(default_factory=dict)

    def options(self) -> dict[str, object]:
        parameters = inspect.signature(self.family).parameters.values()
        own = {p.name: p.default for p in parameters if p.default is not p.empty} | self.defaults
        return {name: default for name, default in own.items() if name not in self.fixed}


_VARIANTS: dict[str, _Variant] = {}


def register(
    name: str, family: Callable[..., nn.Module], *, defaults: dict[str, object] | None = None, **fixed: object
) -> None:
    """Make `create(name)` call `family(norm=, num_classes=, in_channels=, **fixed, **options)`.

    The parameters of `family` that have a default, less those in `fixed`, are the options of the model; `defaults`
    are this variant's own. Every family has the option `image_size`, the side of its square inputs.
    """
    assert name not in _VARIANTS, name
    variant = _Variant(family, fixed, defaults or {})
    assert "image_size" in variant.options(), name
    _VARIANTS[name] = variant


def create(
    name: str, norm: Norm = "batch", num_classes: int = 1000, in_channels: int = 3, **options: object
) -> nn.Module:
    """Build the model called `name`, with freshly drawn weights.

    Args:
        name: One of `list()`.
        norm: `"none"`, `"batch"`, `"sync"`, `"ghost"`, `"frozen"`, `"renorm"`, `"group"`, `"layer"`, `"instance"`,
            or a function from the number of channels to a module that normalizes them.
        num_classes: Length of the output, (N, num_classes) logits.
        in_channels: Channels of the input (N, in_channels, H, W).
        **options: The model's own, see `options(name)`; `image_size` is one of all models.

    Raises:
        UserError: an unknown model, norm or option, or a value that the model can't take.
    """
    variant = _variant(name)
    valid = variant.options()
    for option in options:
        if option not in valid:
            raise UserError(f"model {name!r} has no option {option!r}: its options are {', '.join(sorted(valid))}.")
    for what, count in (("num_classes", num_classes), ("in_channels", in_channels)):
        require(
            isinstance(count, int) and count > 0, f"{what} must be a positive integer, got {count!r}: pass 1 or more."
        )
    given = variant.fixed | variant.defaults | options
    try:
        return variant.family(norm=norm, num_classes=num_classes, in_channels=in_channels, **given)
    except UserError:
        raise
    except Exception as error:  # what torch's layers say to sizes they can't have, a function to what it is called with
        raise UserError(
            f"model {name!r} can't be built with {_spelled(options) or 'this norm'} ({words_of(error)}): "
            f"see models.options({name!r})."
        ) from error


def list_models(pattern: str = "*") -> list[str]:
    """The names that `create` takes, sorted; those that match a shell `pattern` such as `"vgg*"`."""
    return fnmatch.filter(sorted(_VARIANTS), pattern)


def options(name: str) -> dict[str, object]:
    """The options of the model called `name`, with their defaults.

    Raises:
        UserError: an unknown model.
    """
    return _variant(name).options()


def _spelled(options: dict[str, object]) -> str:
    return ", ".join(f"{option}={value!r}" for option, value in options.items())


def _variant(name: str) -> _Variant:
    if name not in _VARIANTS:
        raise unknown("model", name, _VARIANTS)
    return _VARIANTS[name]
