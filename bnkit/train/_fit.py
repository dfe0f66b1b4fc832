"""The training loop."""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Generator, Iterator

import torch
from torch import Tensor, nn

from .._checks import UserError
from ..data import ImageSet, Photographs
from ..population import EMA
from ._checkpoint import load, save
from ._config import FitConfig
from ._evaluate import evaluate_placed
from ._history import Evaluation, History
from ._loss import training_loss
from ._run import Run, start
from ._schedule import learning_rate

_CALIBRATION_IMAGES = 10_000


class Diverged(UserError):
    """The training loss of update number `step` (from 0) was not finite, at rate `learning_rate`."""

    def __init__(self, step: int, learning_rate: float) -> None:
        super().__init__(
            f"the training loss is not finite at step {step} with learning rate {learning_rate:g}: "
            "lower the rate, warm it up, or add normalization."
        )
        self.step = step
        self.learning_rate = learning_rate


def fit(
    model: nn.Module,
    data: ImageSet | Photographs,
    config: FitConfig,
    *,
    on_evaluation: Callable[[Evaluation], object] | None = None,
    resume: str | os.PathLike[str] | None = None,
    checkpoint: str | os.PathLike[str] | None = None,
) -> History:
    """Train `model` in place. See `iterate`, which this runs to its end.

    Args:
        on_evaluation: Called with each evaluation as it is made.

    Returns:
        All evaluations.
    """
    history = History(config)
    for evaluation in iterate(model, data, config, resume=resume, checkpoint=checkpoint):
        history.evaluations.append(evaluation)
        if on_evaluation is not None:
            on_evaluation(evaluation)
    return history


def iterate(
    model: nn.Module,
    data: ImageSet | Photographs,
    config: FitConfig,
    *,
    resume: str | os.PathLike[str] | None = None,
    checkpoint: str | os.PathLike[str] | None = None,
) -> Generator[Evaluation, None, None]:
    """Train `model` in place by SGD on the loss, pausing at each evaluation.

    Evaluations are made before the first update, after every `eval_every`, and after the last one. Between them the
    caller may do anything, such as train another model in turns: the runs don't disturb each other, as each keeps its
    own order of batches and its own random states, and `seconds` counts a run's own training only.

    With `config.ema`, evaluations are of the average of the weights over the steps so far, the batch norms of which are
    measured on 10,000 training images each time; the model itself takes the average's state after the last of them.

    Args:
        model: From (N, C, H, W) to (N, num_classes) logits. It is moved to the device and put into training mode.
        data: All of it is kept on the device.
        config: Everything else that the result depends on.
        resume: A checkpoint to go on from. Its evaluations are yielded again, then training goes on to the same
            weights, to the bit, as those of a run that was not interrupted (on the same machine and thread count).
        checkpoint: A file to write after each evaluation that `checkpoint_every` selects and after the last.

    Yields:
        An `Evaluation` of the model as it then is.

    Raises:
        UserError: a model, data set or checkpoint that does not fit the rest; a device that is not there.
        Diverged: the training loss stopped being finite; the model is left as it is.
    """
    run = start(model, data, config)
    if resume is not None:
        load(resume, run)
    model.train()
    yield from tuple(run.evaluations)
    if not run.evaluations:
        yield _record(run, None, checkpoint)
    batches = run.batches.stream(run.order)
    while run.step < config.steps:
        train_loss = _advance(run, batches)
        yield _record(run, train_loss, checkpoint)
    if run.average is not None:
        model.load_state_dict(run.average.module.state_dict())


def _advance(run: Run, batches: Iterator[tuple[Tensor, Tensor]]) -> float:
    """Train up to the next evaluation; the mean loss on the way there."""
    config, optimizer, first = run.config, run.optimizer, run.step
    end = min(config.steps, (first // config.eval_every + 1) * config.eval_every)
    losses: list[Tensor] = []
    started = time.perf_counter()
    with run.random.active():
        for step in range(first, end):
            for group in optimizer.param_groups:
                group["lr"] = learning_rate(config, step)
            images, labels = next(batches)
            loss = training_loss(_logits(run, images), labels, config)
            optimizer.zero_grad()
            run.devices.backward(loss)
            optimizer.step()
            if run.average is not None:
                run.average.update(run.model)
            losses.append(loss.detach())
    run.devices.synchronize()
    run.seconds += time.perf_counter() - started
    run.step = end
    return _mean(losses, run, first)


def _logits(run: Run, images: Tensor) -> Tensor:
    try:
        return run.devices.forward(images)
    except ValueError as error:
        if isinstance(error, UserError) or not str(error).startswith("Expected more than 1 value per channel"):
            raise
        raise UserError(  # torch.nn's layers say what is wrong, but not what to do
            f"{error}: train with a larger batch_size or larger images, or without batch norm in that layer."
        ) from error


def _mean(losses: list[Tensor], run: Run, first: int) -> float:
    # Looked at once per evaluation: reading each loss would make the host wait for the device at every step.
    values = run.devices.mean(torch.stack(losses)).cpu().double()
    bad = (~values.isfinite()).nonzero()
    if len(bad) > 0:
        step = first + int(bad[0])
        raise Diverged(step, learning_rate(run.config, step))
    return values.mean().item()


def _measured(average: EMA, run: Run) -> nn.Module:
    """The averaged model, with batch norms that have seen training images through its weights."""
    images = run.batches.calibration(_CALIBRATION_IMAGES, run.config.batch_size)
    with run.devices.autocast():
        average.recalibrate(images, skip_nonfinite=True)
    return average.module


def _record(run: Run, train_loss: float | None, checkpoint: str | os.PathLike[str] | None) -> Evaluation:
    """Evaluate, note it, and write a checkpoint if one is due."""
    model = run.model if run.average is None else _measured(run.average, run)
    test_loss, test_accuracy = evaluate_placed(model, run.batches, run.devices, run.data.num_classes, run.config)
    seconds, test_loss, test_accuracy = run.devices.from_first([run.seconds, test_loss, test_accuracy])
    rate = learning_rate(run.config, max(run.step - 1, 0))
    evaluation = Evaluation(run.step, seconds, rate, train_loss, test_loss, test_accuracy)
    run.evaluations.append(evaluation)
    every = run.config.checkpoint_every or run.config.eval_every
    if checkpoint is not None and (run.step % every == 0 or run.step == run.config.steps):
        save(checkpoint, run)
    return evaluation
