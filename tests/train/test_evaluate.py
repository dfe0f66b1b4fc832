from __future__ import annotations

import pytest
import torch
from torch import nn
from torch.nn import functional as F
from toys import toy_net, toy_set

from bnkit._checks import UserError
from bnkit.train import FitConfig, evaluate

CONFIG = FitConfig(steps=1, normalize="unit", device="cpu", eval_batch_size=40)


def test_by_value() -> None:
    data, net = toy_set(), toy_net()
    loss, accuracy = evaluate(net, data, CONFIG)
    with torch.no_grad():
        log_p = net.eval().double()(data.test_images.double() / 255).log_softmax(1)
    assert loss == pytest.approx(-log_p[torch.arange(90), data.test_labels].mean().item(), rel=1e-6)
    assert accuracy == pytest.approx((log_p.argmax(1) == data.test_labels).double().mean().item(), abs=1e-12)


@pytest.mark.parametrize("precision", ["64-true", "bf16-mixed"])
def test_precision(precision: str) -> None:
    data = toy_set()
    exact = evaluate(toy_net(), data, CONFIG)
    other = evaluate(toy_net(), data, FitConfig(steps=1, normalize="unit", device="cpu", precision=precision))
    assert other[0] == pytest.approx(exact[0], rel=1e-6 if precision == "64-true" else 0.05)
    assert other[0] != exact[0]


def test_statistics_and_modes_are_left_alone() -> None:
    net = toy_net()
    net[1].eval()
    before = {key: value.clone() for key, value in net.state_dict().items()}
    evaluate(net, toy_set(), CONFIG)
    assert [module.training for module in net] == [True, False, True, True, True]
    for key, value in net.state_dict().items():
        assert torch.equal(value, before[key]), key


def test_modes_come_back_after_an_error() -> None:
    net = nn.Sequential(nn.Flatten(), nn.Linear(1, 3))
    with pytest.raises(RuntimeError, match="shapes cannot be multiplied"):
        evaluate(net, toy_set(), CONFIG)
    assert all(module.training for module in net.modules())


def test_an_interrupt_between_batches_leaves_no_mode_on(monkeypatch: pytest.MonkeyPatch) -> None:
    def interrupted(*args: object, **kwargs: object) -> torch.Tensor:
        raise KeyboardInterrupt

    net = toy_net()
    monkeypatch.setattr(F, "cross_entropy", interrupted)
    with pytest.raises(KeyboardInterrupt) as caught:
        evaluate(net, toy_set(), CONFIG)
    # The traceback keeps the frames alive, as an interactive session does.
    assert caught.tb is not None
    assert not torch.is_inference_mode_enabled()
    assert all(module.training for module in net.modules())


def test_too_few_outputs() -> None:
    message = r"one logit for each of 3 classes, got outputs of shape \(40, 2\): build it with num_classes=3"
    with pytest.raises(UserError, match=message):
        evaluate(nn.Sequential(nn.Flatten(), nn.Linear(128, 2)), toy_set(), CONFIG)
