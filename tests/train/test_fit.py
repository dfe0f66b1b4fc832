from __future__ import annotations

import dataclasses
import time
from typing import Any

import pytest
import torch
from torch import nn
from torch.nn import functional as F
from toys import toy_net, toy_set

from bnkit._checks import UserError
from bnkit.data import BatchOrder
from bnkit.train import Diverged, Evaluation, FitConfig, History, evaluate, fit, iterate, learning_rate

CONFIG = FitConfig(
    steps=50,
    batch_size=32,
    lr=0.05,
    momentum=0.9,
    weight_decay=0.01,
    schedule="cosine",
    warmup_steps=8,
    eval_every=20,
    normalize="unit",
    device="cpu",
)


def smoothed_cross_entropy(logits: torch.Tensor, labels: torch.Tensor, smoothing: float) -> torch.Tensor:
    target = (1 - smoothing) * F.one_hot(labels, logits.shape[1]).to(logits) + smoothing / logits.shape[1]
    return -(target * logits.log_softmax(1)).sum(1).mean()


def by_hand(net: nn.Module, config: FitConfig) -> list[float]:
    """The loop that `fit` stands for, with the update written out; returns the losses."""
    data, order = toy_set(), BatchOrder(300, config.batch_size, config.seed)
    net.double().train()
    velocity = {name: torch.zeros_like(parameter) for name, parameter in net.named_parameters()}
    losses = []
    for step in range(config.steps):
        index = next(order)
        logits = net(data.train_images[index].double() / 255)
        loss = smoothed_cross_entropy(logits, data.train_labels[index], config.label_smoothing)
        gradients = torch.autograd.grad(loss, list(net.parameters()))
        losses.append(loss.item())
        with torch.no_grad():
            for (name, parameter), gradient in zip(net.named_parameters(), gradients, strict=True):
                decay = config.weight_decay if name in ("0.weight", "4.weight") else 0.0
                gradient = gradient + decay * parameter
                velocity[name].mul_(config.momentum).add_(gradient)
                ahead = gradient + config.momentum * velocity[name] if config.nesterov else velocity[name]
                parameter.sub_(learning_rate(config, step) * ahead)
    return losses


@pytest.mark.parametrize(
    "changes",
    [{"momentum": 0.0}, {}, {"nesterov": True, "label_smoothing": 0.1}, {"channels_last": True, "schedule": "step"}],
    ids=["plain", "momentum", "nesterov", "channels_last"],
)
def test_weights_and_losses_are_those_of_the_loop_by_hand(changes: dict[str, Any]) -> None:
    config = dataclasses.replace(CONFIG, precision="64-true", **changes)
    ours, theirs = toy_net(dropout=0.0).eval(), toy_net(dropout=0.0)
    history, losses = fit(ours, toy_set(), config), by_hand(theirs, config)
    for key, value in theirs.state_dict().items():
        torch.testing.assert_close(ours.state_dict()[key], value, rtol=1e-9, atol=1e-11)
    means = [sum(losses[a:b]) / (b - a) for a, b in ((0, 20), (20, 40), (40, 50))]
    assert history.evaluations[0].train_loss is None
    assert [e.train_loss for e in history.evaluations[1:]] == pytest.approx(means, rel=1e-9)


def test_the_average_is_evaluated_and_becomes_the_model() -> None:
    config = dataclasses.replace(CONFIG, steps=12, eval_every=1, ema=0.8, precision="64-true")
    net, data = toy_net().double(), toy_set()
    average = {name: parameter.detach().clone() for name, parameter in net.named_parameters()}
    last: Evaluation | None = None
    for last in iterate(net, data, config):
        if last.step > 0:
            for name, parameter in net.named_parameters():
                average[name] = 0.8 * average[name] + 0.2 * parameter.detach()
    for name, parameter in net.named_parameters():
        torch.testing.assert_close(parameter.detach(), average[name], rtol=1e-9, atol=1e-12)
    seen = F.conv2d(data.train_images.double() / 255, average["0.weight"], average["0.bias"], padding=1)
    torch.testing.assert_close(net.get_buffer("1.running_mean"), seen.mean((0, 2, 3)), rtol=1e-6, atol=1e-7)
    torch.testing.assert_close(net.get_buffer("1.running_var"), seen.var((0, 2, 3)), rtol=1e-6, atol=1e-7)
    assert last is not None
    assert (last.test_loss, last.test_accuracy) == evaluate(net, data, config)


def test_evaluations() -> None:
    net = toy_net()
    before = evaluate(toy_net(), toy_set(), CONFIG)
    history = fit(net, toy_set(), CONFIG)
    assert [e.step for e in history.evaluations] == [0, 20, 40, 50]
    assert [e.learning_rate for e in history.evaluations] == [learning_rate(CONFIG, step) for step in (0, 19, 39, 49)]
    first, last = history.evaluations[0], history.final
    assert (first.test_loss, first.test_accuracy) == before
    assert (last.test_loss, last.test_accuracy) == evaluate(net, toy_set(), CONFIG)
    assert first.seconds == 0
    assert last.test_accuracy > 0.95 > first.test_accuracy
    assert net.training


def test_two_runs_in_turns_are_the_runs_alone() -> None:
    # Dropout draws at every step, so that shared random states would show.
    configs = [CONFIG, dataclasses.replace(CONFIG, lr=0.02)]
    alone = [toy_net(), toy_net(seed=1)]
    expected = [fit(net, toy_set(), config) for net, config in zip(alone, configs, strict=True)]
    nets = [toy_net(), toy_net(seed=1)]
    runs = [iterate(net, toy_set(), config) for net, config in zip(nets, configs, strict=True)]
    torch.manual_seed(123)
    for pair in zip(*runs, strict=True):
        for evaluation, history in zip(pair, expected, strict=True):
            same = next(e for e in history.evaluations if e.step == evaluation.step)
            assert dataclasses.replace(evaluation, seconds=0) == dataclasses.replace(same, seconds=0)
        torch.rand(7)
    for net, other in zip(nets, alone, strict=True):
        for key, value in net.state_dict().items():
            assert torch.equal(value, other.state_dict()[key]), key


def test_the_seed_decides_order_and_dropout() -> None:
    nets = [toy_net(), toy_net(), toy_net()]
    for net, seed in zip(nets, (0, 0, 1), strict=True):
        fit(net, toy_set(), dataclasses.replace(CONFIG, seed=seed))
    assert torch.equal(nets[0].get_parameter("4.weight"), nets[1].get_parameter("4.weight"))
    assert not torch.equal(nets[0].get_parameter("4.weight"), nets[2].get_parameter("4.weight"))


class SlowToEvaluate(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.net = toy_net()

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        time.sleep(0.001 if self.training else 0.3)
        return self.net(x)


def test_seconds_count_training_alone() -> None:
    config = FitConfig(steps=20, eval_every=10, device="cpu")
    started = time.perf_counter()
    seconds = []
    for evaluation in iterate(SlowToEvaluate(), toy_set(), config):
        time.sleep(0.3)
        seconds.append(evaluation.seconds)
    whole = time.perf_counter() - started
    assert seconds[0] == 0
    assert seconds[1] >= 10 * 0.001
    assert seconds[2] - seconds[1] >= 10 * 0.001
    assert seconds[2] <= whole - 6 * 0.3


class FiniteUntil(nn.Module):
    """Gives NaN from the `step`-th training forward on."""

    def __init__(self, step: int) -> None:
        super().__init__()
        self.net = toy_net()
        self.left = step

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        if self.training:
            self.left -= 1
        return self.net(x) * (float("nan") if self.left < 0 else 1.0)


def test_divergence_names_step_and_rate_and_stops_that_run_only() -> None:
    bad, good = iterate(FiniteUntil(27), toy_set(), CONFIG), iterate(toy_net(), toy_set(), CONFIG)
    assert [next(bad).step, next(good).step, next(bad).step, next(good).step] == [0, 0, 20, 20]
    rate = learning_rate(CONFIG, 27)
    with pytest.raises(Diverged, match=rf"not finite at step 27 with learning rate {rate:g}: lower the rate") as caught:
        next(bad)
    assert (caught.value.step, caught.value.learning_rate) == (27, rate)
    assert isinstance(caught.value, UserError)
    assert [e.step for e in good] == [40, 50]


def test_a_rate_too_high_diverges() -> None:
    net = toy_net(norm=False)
    with pytest.raises(Diverged) as caught:
        fit(net, toy_set(), FitConfig(steps=300, lr=1e30, device="cpu"))
    assert 1 <= caught.value.step < 300
    assert not net.get_parameter("4.weight").isfinite().all()


def test_on_evaluation_sees_each_as_it_is_made() -> None:
    seen: list[Evaluation] = []
    history = fit(toy_net(), toy_set(), CONFIG, on_evaluation=seen.append)
    assert seen == history.evaluations


def test_an_interrupted_run_has_told_what_it_measured() -> None:
    def stop(evaluation: Evaluation) -> None:
        if evaluation.step == 20:
            raise KeyboardInterrupt

    net = toy_net()
    torch.manual_seed(5)
    expected = torch.rand(1)
    torch.manual_seed(5)
    with pytest.raises(KeyboardInterrupt):
        fit(net, toy_set(), CONFIG, on_evaluation=stop)
    assert torch.equal(torch.rand(1), expected)
    assert net.training


def test_a_batch_larger_than_the_data() -> None:
    net = toy_net()
    with pytest.raises(UserError, match="the batch size 301 exceeds the 300 training examples"):
        fit(net, toy_set(), FitConfig(steps=1, batch_size=301, device="cpu"))


def test_history() -> None:
    accuracies = [0.1, 0.8, 0.9, 0.9, 0.7]
    evaluations = [Evaluation(step, step / 10, 0.1, None, 1.0, a) for step, a in enumerate(accuracies)]
    history = History(CONFIG, evaluations)
    assert (history.best.step, history.final.step) == (2, 4)
    reached = history.reached(0.8)
    assert reached is not None
    assert reached.step == 1
    assert history.reached(0.95) is None


def test_one_value_a_channel_ends_with_the_remedy() -> None:
    net = nn.Sequential(nn.Flatten(), nn.Linear(128, 4), nn.BatchNorm1d(4), nn.Linear(4, 3))
    config = FitConfig(steps=2, batch_size=1, lr=0.1, device="cpu")
    with pytest.raises(
        UserError, match=r"Expected more than 1 value .*\(\[1, 4\]\): train with a larger batch_size"
    ) as caught:
        fit(net, toy_set(), config)
    assert "\n" not in str(caught.value)
