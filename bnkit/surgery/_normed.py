"""A convolution or linear layer with a batch normalization of its output as a child, `bn`."""

from __future__ import annotations

import functools
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.utils.parametrize import is_parametrized


class Normed(nn.Module):
    """What an inserted layer's class puts before its own: forward(x) = bn(layer(x)).

    Keys of the layer stay and `bn.*` are new. A bias taken up by `bn` stays as a buffer of zeros. A `state_dict` from
    before the insertion loads, strictly too, and makes the layer compute what it did there.
    """

    bn: nn.Module

    def forward(self, *args: Any, **kwargs: Any) -> Tensor:
        """The layer's output, normalized along dimension 1."""
        return self.bn(super().forward(*args, **kwargs))

    def __reduce_ex__(self, protocol: Any) -> Any:
        if is_parametrized(self):  # which torch refuses to pickle
            return super().__reduce_ex__(protocol)
        return _blank, (type(self).__bases__[0], type(self).__bases__[1]), self.__dict__

    def _load_from_state_dict(self, state_dict: dict[str, Any], prefix: str, *rest: Any, **more: Any) -> None:
        holds_bn = any(key.startswith(f"{prefix}bn.") for key in state_dict)
        may_lack_bn = isinstance(getattr(self.bn, "running_var", None), Tensor)  # it may have been folded or converted
        if may_lack_bn and not holds_bn and any(key.startswith(prefix) for key in state_dict):
            self._add_identity(state_dict, prefix)
        super()._load_from_state_dict(state_dict, prefix, *rest, **more)

    def _add_identity(self, state_dict: dict[str, Any], prefix: str) -> None:
        """Complete the layer's own entries by those with which `bn` gives back its input, plus the absorbed bias."""
        entries = self.bn.state_dict()
        shift = entries["running_mean"]
        if "bias" in self._buffers and f"{prefix}bias" in state_dict:
            old = state_dict[f"{prefix}bias"]
            shift, state_dict[f"{prefix}bias"] = shift + old.to(shift), torch.zeros_like(old)
        eps: Any = self.bn.eps
        entries |= {"weight": (entries["running_var"] + eps).sqrt(), "bias": shift}
        state_dict.update({f"{prefix}bn.{key}": value for key, value in entries.items()})


class NormedLast(Normed):
    """As `Normed`, along the last dimension, where linear layers have their features."""

    def forward(self, *args: Any, **kwargs: Any) -> Tensor:
        """The layer's output, normalized along its last dimension."""
        y = super(Normed, self).forward(*args, **kwargs)
        return self.bn(y.reshape(-1, y.shape[-1])).reshape(y.shape)


def normed_like(kind: type[Normed], layer: nn.Module) -> type[nn.Module]:
    """The class of a layer that shall normalize its output."""
    own = type(layer)
    if not is_parametrized(layer):
        return normed_class(kind, own)
    # torch made a class for this one layer, and takes parametrizations off by going back to its base.
    body = {name: value for name, value in vars(own).items() if name not in ("__dict__", "__weakref__")}
    return type(own.__name__, (normed_class(kind, own.__bases__[0]),), body)


@functools.cache
def normed_class(kind: type[Normed], layer: type[nn.Module]) -> type[nn.Module]:
    """The subclass of a layer's class that normalizes its output; one for each, so that instances pickle."""
    return type(f"Normed{layer.__name__}", (kind, layer), {"__module__": __name__})


def _blank(kind: type[Normed], layer: type[nn.Module]) -> nn.Module:
    made = normed_class(kind, layer)
    return made.__new__(made)
