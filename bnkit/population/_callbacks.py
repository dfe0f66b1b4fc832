"""Callbacks of Lightning's form: a Trainer, or `fabric.call`, runs them. Importing them takes no Lightning."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterable
from typing import Any

from .._checks import require, unknown
from ._average import EMA
from ._guard import guard_statistics
from ._recalibrate import recalibrate
from ._result import Recalibration


class Callback:
    """Has every hook that Lightning calls; those that a subclass does not define do nothing.

    A Lightning `Trainer` asks its callbacks for each hook by name, whatever class they are of. It takes them in a list.
    """

    @property
    def state_key(self) -> str:
        """The name under which a checkpoint keeps the state."""
        return type(self).__qualname__

    @property
    def _legacy_state_key(self) -> str:
        """Where Lightning looks next, in old checkpoints: there are none of ours."""
        return self.state_key

    def setup(self, trainer: Any, pl_module: Any, stage: str | None = None) -> None:
        """Before anything else."""

    def teardown(self, trainer: Any, pl_module: Any, stage: str | None = None) -> None:
        """After everything else."""

    def state_dict(self) -> dict[str, Any]:
        """What a checkpoint keeps."""
        return {}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """What a checkpoint kept."""

    def __getattr__(self, name: str) -> Callable[..., None]:
        if name.startswith("on_"):
            return _nothing
        raise AttributeError(f"{type(self).__name__!r} object has no attribute {name!r}")


def _nothing(*args: Any, **kwargs: Any) -> None:
    """The hook of a callback that does not use it."""


def _checked(options: dict[str, Any]) -> dict[str, Any]:
    """Options of `recalibrate`, refused now rather than when training ends."""
    known = list(inspect.signature(recalibrate).parameters)[2:]
    for name in options:
        if name not in known:
            raise unknown("option", name, known)
    return options


class RecalibrateCallback(Callback):
    """Recalibrate the model when training ends.

    Args:
        data: batches, or a function that gives them; the trainer's `train_dataloader` if None.
        options: of `recalibrate`: `method=`, `num_batches=`, `forward=`.

    Attributes:
        result: the last report.
    """

    def __init__(self, data: Iterable[Any] | Callable[[], Iterable[Any]] | None = None, **options: Any) -> None:
        self._data, self._options = data, _checked(options)
        self.result: Recalibration | None = None

    def on_train_end(self, trainer: Any, pl_module: Any) -> None:
        """Recalibrate."""
        data: Any = self._data() if callable(self._data) else self._data
        self.result = recalibrate(pl_module, trainer.train_dataloader if data is None else data, **self._options)


class EMACallback(Callback):
    """Keep an `EMA` of the model; `.ema` is it once training has begun.

    Args:
        decay, buffers, device: as in `EMA`.
        data: batches to recalibrate the average on when training ends; None leaves its statistics as they are.
        options: of `recalibrate`.
    """

    ema: EMA

    def __init__(self, decay: Any = 0.999, data: Iterable[Any] | None = None, **options: Any) -> None:
        self._arguments = {name: options.pop(name) for name in ("buffers", "device") if name in options}
        self._decay, self._data, self._options = decay, data, _checked(options)
        require(
            data is not None or not options, f"without data nothing is measured, got {', '.join(options)}: pass data."
        )
        self._loaded: dict[str, Any] | None = None
        self._step: int | None = None

    def on_fit_start(self, trainer: Any, pl_module: Any) -> None:
        """Begin with a copy of the model, or go on from a checkpoint."""
        self.ema = EMA(pl_module, self._decay, **self._arguments)
        if self._loaded is not None:
            self.ema.load_state_dict(self._loaded)
            self._loaded = None  # the next fit begins anew

    def on_train_start(self, trainer: Any, pl_module: Any) -> None:
        """Note the steps so far; a checkpoint's are known only now."""
        self._step = trainer.global_step

    def on_train_batch_end(self, trainer: Any, pl_module: Any, outputs: Any, batch: Any, batch_idx: int) -> None:
        """Take in the model, if the optimizer has stepped: under accumulation that is not after every batch."""
        if trainer.global_step != self._step:
            self._step = trainer.global_step
            self.ema.update(pl_module)

    def on_train_end(self, trainer: Any, pl_module: Any) -> None:
        """Recalibrate the average."""
        if self._data is not None:
            self.ema.recalibrate(self._data, **self._options)

    def state_dict(self) -> dict[str, Any]:
        """The average."""
        return dict(self.ema.state_dict()) if "ema" in vars(self) else {}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """The average of a checkpoint."""
        self._loaded = state_dict or None


class GuardCallback(Callback):
    """Keep batches that overflowed out of the running statistics while training: `guard_statistics`."""

    _guard: guard_statistics | None = None

    def on_fit_start(self, trainer: Any, pl_module: Any) -> None:
        """Begin."""
        self._guard = guard_statistics(pl_module)

    def on_fit_end(self, trainer: Any, pl_module: Any) -> None:
        """End."""
        if self._guard is not None:
            self._guard.remove()

    def on_exception(self, trainer: Any, pl_module: Any, exception: BaseException) -> None:
        """End, too; the exception may have come before the beginning."""
        self.on_fit_end(trainer, pl_module)
