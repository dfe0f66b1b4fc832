"""Checkpoints: everything a run needs to go on as if it had never stopped."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Collection, Iterable, Iterator, Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from .._checks import UserError, require
from .._files import damaged_entry, written_aside
from ..data import ImageSet, Photographs
from ._config import FitConfig
from ._history import Evaluation
from ._run import Run

_FORMAT = 2
_KEYS = ("format", "config", "data", "step", "evaluations", "model", "average", "optimizer", "order", "random")
# What neither the weights nor their course depends on.
_FREE_SETTINGS = frozenset({"eval_every", "eval_batch_size", "checkpoint_every", "device", "workers"})


def save(path: str | os.PathLike[str], run: Run) -> None:
    """Write a checkpoint, whole or not at all; the first process does.

    Raises:
        UserError: the folder can't be written.
    """
    random = run.devices.gather(run.random.state_dict())
    if run.devices.rank > 0:
        return
    content = {
        "format": _FORMAT,
        "config": run.config.to_dict(),
        "data": _describe(run.data),
        "step": run.step,
        "evaluations": [asdict(evaluation) for evaluation in run.evaluations],
        "model": run.model.state_dict(),
        "average": None if run.average is None else run.average.state_dict(),
        "optimizer": run.optimizer.state_dict(),
        "order": run.order.state_dict(),
        "random": random,
    }
    with written_aside(path) as temporary:
        torch.save(content, temporary)


def load(path: str | os.PathLike[str], run: Run) -> None:
    """Bring `run` to where the checkpoint was written. Everything is checked before the model is changed.

    Raises:
        UserError: no file, not a whole checkpoint, or one of another configuration, data set or model.
    """
    content = _read(Path(path))
    with _reading(path, "config"):
        _require_same(path, "settings", content["config"], run.config.to_dict(), _free_settings(run.config))
    with _reading(path, "data"):
        _require_same(path, "data", content["data"], _describe(run.data), ())
    with _reading(path, "model"):
        _require_fits(path, content["model"], run.model.state_dict())
    with _reading(path, "optimizer"):
        _load_optimizer(path, content["optimizer"], run.optimizer)
    if run.average is not None:
        with _reading(path, "average"):
            run.average.load_state_dict(content["average"])
    with _reading(path, "order"):
        run.order.load_state_dict(content["order"])
    with _reading(path, "random"):
        run.random.load_state_dict(content["random"][run.devices.rank])
    with _reading(path, "evaluations"):
        run.evaluations = [_evaluation(numbers) for numbers in content["evaluations"]]
        run.seconds = run.evaluations[-1].seconds
    with _reading(path, "step"):
        run.step = _whole(content["step"])
    run.model.load_state_dict(content["model"])


def load_evaluated(path: str | os.PathLike[str], model: nn.Module) -> None:
    """Give `model` the weights that a checkpoint's last evaluation was of: the average's, where the run keeps one.

    Raises:
        UserError: no file, not a whole checkpoint, or one of another model.
    """
    content = _read(Path(path))
    with _reading(path, "model"):
        state = content["model"]
        if content["average"] is not None:
            state = {name.removeprefix("module."): value for name, value in content["average"].items()}
            del state["n_averaged"]
        _require_fits(path, state, model.state_dict())
    model.load_state_dict(state)


@contextlib.contextmanager
def _reading(path: str | os.PathLike[str], key: str) -> Iterator[None]:
    """What is under `key` may be anything."""
    try:
        yield
    except UserError:
        raise
    except Exception as error:
        raise UserError(
            f"{path} is not a whole checkpoint, what it has as {key!r} is none: name another, or start without."
        ) from error


def _load_optimizer(path: str | os.PathLike[str], saved: Any, optimizer: torch.optim.Optimizer) -> None:
    try:
        optimizer.load_state_dict(saved)
    except ValueError as error:
        raise UserError(f"the optimizer in {path} is for other parameters: freeze those that were frozen.") from error
    for parameter, state in optimizer.state.items():
        momentum = state.get("momentum_buffer")
        if momentum is not None and momentum.shape != parameter.shape:
            raise TypeError(f"a momentum of shape {momentum.shape}")


def _evaluation(numbers: dict[str, Any]) -> Evaluation:
    evaluation = Evaluation(**numbers)
    _whole(evaluation.step)
    for name, value in asdict(evaluation).items():
        if not isinstance(value, int | float) and not (name == "train_loss" and value is None):
            raise TypeError(f"{name} is {value!r}")
    return evaluation


def _whole(number: Any) -> int:
    if not isinstance(number, int) or number < 0:
        raise TypeError(f"{number!r} for a number of steps")
    return number


def _read(path: Path) -> dict[str, Any]:
    require(path.is_file(), f"there is no checkpoint {path}: name one that exists, or start without.")
    damaged = damaged_entry(path)
    require(damaged is None, f"{path} is damaged, the checksum of {damaged} differs: name another, or start without.")
    try:
        content = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # Damaged bytes make the unpickler raise whatever they happen to spell.
        raise UserError(f"{path} is not a whole checkpoint: name another, or start without.") from error
    missing = [key for key in _KEYS if not isinstance(content, dict) or key not in content]
    require(not missing, f"{path} is not a checkpoint of a run, it lacks {_some(missing)}: name another.")
    require(
        content["format"] == _FORMAT,
        f"{path} has format {content['format']}, this version reads {_FORMAT}: use the version that wrote it.",
    )
    return content


def _describe(data: ImageSet | Photographs) -> dict[str, Any]:
    return {
        "name": data.name,
        "train": len(data.train_labels),
        "test": len(data.test_labels),
        "shape": list(data.shape),
        "classes": list(data.classes),
    }


def _free_settings(config: FitConfig) -> frozenset[str]:
    # A longer run at a constant rate starts like a shorter one.
    return _FREE_SETTINGS | {"steps"} if config.schedule == "constant" else _FREE_SETTINGS


def _require_same(
    path: str | os.PathLike[str], what: str, saved: Mapping[str, Any], given: Mapping[str, Any], free: Collection[str]
) -> None:
    differing = [
        f"{key}={saved.get(key)!r}, not {given.get(key)!r}"
        for key in {**saved, **given}
        if key not in free and saved.get(key) != given.get(key)
    ]
    require(
        not differing,
        f"{path} was made with other {what}: {_some(differing)}; give the same, or start without.",
    )


def _require_fits(path: str | os.PathLike[str], saved: Mapping[str, Any], model: Mapping[str, Any]) -> None:
    faults = {
        "it lacks": [key for key in model if key not in saved],
        "it has also": [key for key in saved if key not in model],
        "of another shape are": [key for key in model if key in saved and _shape(saved[key]) != _shape(model[key])],
    }
    said = [f"{words} {_some(keys)}" for words, keys in faults.items() if keys]
    require(not said, f"{path} does not fit the model: {'; '.join(said)}. Build the model that was saved.")


def _shape(value: object) -> torch.Size | None:
    return value.shape if isinstance(value, Tensor) else None


def _some(names: Iterable[str]) -> str:
    names = list(names)
    return ", ".join(names[:3]) + (f" and {len(names) - 3} more" if len(names) > 3 else "")
