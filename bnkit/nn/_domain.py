"""DomainBatchNorm: statistics for each domain."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence
from typing import Any, Unpack

import torch
from torch import Tensor, nn

from .._checks import UserError, require
from ._any_dimension import AnyDimension, Options

_STATISTICS = {"running_mean": "running_means", "running_var": "running_vars", "num_batches_tracked": "batches_tracked"}


class DomainBatchNorm(AnyDimension):
    r"""Batch normalization that keeps statistics of its own for each domain, for data from several sources.

        y = activation(weight_k · (x - mean) / √(var + eps) + bias_k + residual),      k the current domain

    In training mean and var are the batch's, and update the running statistics of domain k; in eval mode they are
    those. weight and bias are common to all domains, or with `shared_affine=False` one pair a domain. A batch is of one
    domain. With the domains "clean" and "adversarial" it is the auxiliary batch norm of AdvProp.

    `running_mean`, `running_var`, `num_batches_tracked`, `weight` and `bias` are those of the current domain, so that
    whatever measures, copies or resets the statistics of a batch norm does so for this domain. To begin with the
    current one is the first. It is chosen by `layer.domain = name`, for all layers of a model by
    `with use_domain(model, name):`, or for one call by `layer(x, domain=name)`. Activation checkpointing runs the
    forward pass again in the backward pass: with it, call `backward()` under the same domain.

    The `state_dict` has `running_means` and `running_vars`, (domains, C), `batches_tracked`, (domains,), and weight and
    bias, or weight_0, bias_0, weight_1 and so on. That of a plain batch norm loads too, into every domain.

    References:
        Chang, You, Seo, Kwak and Han, "Domain-Specific Batch Normalization for Unsupervised Domain Adaptation", 2019,
        https://arxiv.org/abs/1906.03950, section 3 (own affine). Xie, Tan, Gong, Wang, Yuille and Le, "Adversarial
        Examples Improve Image Recognition", 2020, https://arxiv.org/abs/1911.09665, section 4.

    Args:
        num_features: C of (N, C) or (N, C, *).
        domains: their number, to be called 0, 1, ..., or their names.
        eps, momentum, affine, track_running_stats, device, dtype: as in `BatchNorm2d`.
        shared_affine: one weight and bias for all domains.
        bias, activation, skip_nonfinite, inplace: as in `BatchNorm2d`.

    Raises:
        ValueError: no domains or two of one name, an unknown domain, or what `bnkit.functional.batch_norm` raises it
            for.
    """

    def __init__(
        self,
        num_features: int,
        domains: int | Sequence[str] = 2,
        eps: float = 1e-5,
        momentum: float | None = 0.1,
        affine: bool = True,
        track_running_stats: bool = True,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
        *,
        shared_affine: bool = True,
        **options: Unpack[Options],
    ) -> None:
        names = tuple(range(domains)) if isinstance(domains, int) else tuple(domains)
        require(
            len(names) > 0 and len(set(names)) == len(names) and not isinstance(domains, str),
            f"domains must be a positive number or different names, got {domains!r}: "
            "try 2, or ('clean', 'adversarial').",
        )
        super().__init__(num_features, eps, momentum, affine and shared_affine, False, device, dtype, **options)
        # The properties below take the place of these; torch.export miscounts buffers that are None.
        for name in _STATISTICS:
            del self._buffers[name]
        self.affine = affine
        self.track_running_stats = track_running_stats
        self.domains = names
        self.shared_affine = shared_affine
        self._index = 0
        with torch.device(device) if device is not None else contextlib.nullcontext():
            if not shared_affine:
                self._register_affine({"weight": affine, "bias": affine and options.get("bias", True)}, dtype)
            if track_running_stats:
                self._register_statistics(dtype)
        self.reset_parameters()

    def _register_affine(self, learned: dict[str, bool], dtype: torch.dtype | None) -> None:
        for name in learned:
            del self._parameters[name]
        for index in range(len(self.domains)):
            for name, exists in learned.items():
                values = nn.Parameter(torch.empty(self.num_features, dtype=dtype)) if exists else None
                self.register_parameter(f"{name}_{index}", values)

    def _register_statistics(self, dtype: torch.dtype | None) -> None:
        for name in ("running_means", "running_vars"):
            self.register_buffer(name, torch.empty(len(self.domains), self.num_features, dtype=dtype))
        self.register_buffer("batches_tracked", torch.zeros(len(self.domains), dtype=torch.long))

    # `weight` and `bias` are no properties, which would be in the way of what takes the place of common ones:
    # parametrizations, pruning, the replicas of `torch.nn.DataParallel`.

    def _of_domain(self, name: str) -> str:
        own = name in ("weight", "bias") and not self.__dict__.get("shared_affine", True)
        return f"{name}_{self._index}" if own else name

    def __getattr__(self, name: str) -> Any:
        """Called for what Python does not find, so for `weight` and `bias` of the current domain, (C,)."""
        found = self._of_domain(name)
        return super().__getattr__(name) if found == name else getattr(self, found)

    def __setattr__(self, name: str, value: Any) -> None:
        super().__setattr__(self._of_domain(name), value)

    # While the constructors of the base classes run, these raise AttributeError, and Python asks `__getattr__` for the
    # buffers that they register.

    @property
    def running_mean(self) -> Tensor | None:  # pyright: ignore[reportIncompatibleVariableOverride]
        """That of the current domain, (C,): writing to it writes to `running_means`."""
        return self._statistic("running_means")

    @property
    def running_var(self) -> Tensor | None:  # pyright: ignore[reportIncompatibleVariableOverride]
        """That of the current domain, (C,): writing to it writes to `running_vars`."""
        return self._statistic("running_vars")

    @property
    def num_batches_tracked(self) -> Tensor | None:  # pyright: ignore[reportIncompatibleVariableOverride]
        """That of the current domain, without dimensions: writing to it writes to `batches_tracked`."""
        return self._statistic("batches_tracked")

    def _statistic(self, name: str) -> Tensor | None:
        index, statistics = self._index, getattr(self, name, None)
        return None if statistics is None else statistics[index]

    @property
    def domain(self) -> int | str:
        """The current domain."""
        return self.domains[self._index]

    @domain.setter
    def domain(self, domain: int | str) -> None:
        self._index = self._index_of(domain)

    def _index_of(self, domain: int | str) -> int:
        if domain in self.domains:
            return self.domains.index(domain)
        raise UserError(f"unknown domain {domain!r}: choose one of {', '.join(map(repr, self.domains))}.")

    def forward(self, input: Tensor, residual: Tensor | None = None, *, domain: int | str | None = None) -> Tensor:
        """activation(batch_norm(input) + residual), of the input's shape.

        Args:
            input: the batch to normalize, of one domain.
            residual: of the same shape; None adds nothing.
            domain: for this call; None for the current one.
        """
        if isinstance(input, torch.fx.Proxy):
            return self._recorded(input, residual, domain=domain)
        if domain is None:
            return super().forward(input, residual)
        before, self._index = self._index, self._index_of(domain)
        try:
            return super().forward(input, residual)
        finally:
            self._index = before

    def reset_parameters(self) -> None:
        """Statistics 0 and 1, weight 1, bias 0, in all domains. (`reset_running_stats` resets the current domain.)"""
        with torch.no_grad():
            for name, tensor in (*self._parameters.items(), *self._buffers.items()):
                if tensor is not None:
                    tensor.fill_(float(name.startswith(("weight", "running_var"))))

    def _load_from_state_dict(
        self,
        state_dict: dict[str, Any],
        prefix: str,
        local_metadata: dict[str, Any],
        strict: bool,
        missing_keys: list[str],
        unexpected_keys: list[str],
        error_msgs: list[str],
    ) -> None:
        self._expand_plain(state_dict, prefix)
        # Not torch's _NormBase, which would ask for num_batches_tracked.
        nn.Module._load_from_state_dict(
            self, state_dict, prefix, local_metadata, strict, missing_keys, unexpected_keys, error_msgs
        )

    def _expand_plain(self, state_dict: dict[str, Any], prefix: str) -> None:
        """Turn the entries of a plain batch norm into those of each domain, which share no memory."""
        mean = state_dict.get(prefix + "running_mean")
        if mean is not None and self.track_running_stats:
            state_dict.setdefault(prefix + "num_batches_tracked", torch.tensor(0, device=mean.device))
        for plain, name in _STATISTICS.items():
            if self.track_running_stats and prefix + plain in state_dict:
                value = state_dict.pop(prefix + plain).detach()
                state_dict[prefix + name] = value.expand(len(self.domains), *value.shape).clone()
        for name in ("weight", "bias"):
            if not self.shared_affine and prefix + name in state_dict:
                value = state_dict.pop(prefix + name).detach()
                state_dict |= {f"{prefix}{name}_{index}": value.clone() for index in range(len(self.domains))}

    def extra_repr(self) -> str:
        """torch.nn's, and the options that differ from it."""
        return super().extra_repr() + f", domains={self.domains}, shared_affine={self.shared_affine}"


@contextlib.contextmanager
def use_domain(model: nn.Module, domain: int | str) -> Iterator[None]:
    """Make `domain` the current one of every `DomainBatchNorm` in the model for the time being.

    Args:
        model: one that has at least one such layer, or is one.
        domain: one that every such layer has.

    Raises:
        ValueError: no such layer, or one that does not know the domain; then nothing has changed.
    """
    layers = [module for module in model.modules() if isinstance(module, DomainBatchNorm)]
    require(
        bool(layers), f"use_domain needs a model with DomainBatchNorm layers, got {type(model).__name__}: convert it."
    )
    chosen = [layer._index_of(domain) for layer in layers]
    before = [layer._index for layer in layers]
    try:
        for layer, index in zip(layers, chosen, strict=True):
            layer._index = index
        yield
    finally:
        for layer, index in zip(layers, before, strict=True):
            layer._index = index
