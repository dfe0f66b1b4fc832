from __future__ import annotations

import pytest
import torch

from bnkit.train import FitConfig, learning_rate


def rates(config: FitConfig) -> list[float]:
    return [learning_rate(config, step) for step in range(config.steps)]


def test_constant() -> None:
    assert rates(FitConfig(steps=3, lr=0.3)) == [0.3, 0.3, 0.3]


def test_warm_up_ends_at_the_full_rate() -> None:
    assert rates(FitConfig(steps=6, lr=0.4, warmup_steps=4)) == pytest.approx([0.1, 0.2, 0.3, 0.4, 0.4, 0.4])
    assert rates(FitConfig(steps=2, lr=0.4, warmup_steps=2, schedule="cosine")) == pytest.approx([0.2, 0.4])


@pytest.mark.parametrize("warmup", [0, 5])
def test_cosine_is_torch_s(warmup: int) -> None:
    config = FitConfig(steps=25, lr=0.7, schedule="cosine", warmup_steps=warmup)
    optimizer = torch.optim.SGD([torch.zeros(1)], lr=config.lr)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, T_max=config.steps - warmup)
    expected = []
    for _ in range(config.steps - warmup):
        expected.append(optimizer.param_groups[0]["lr"])
        optimizer.step()
        schedule.step()
    assert rates(config)[warmup:] == pytest.approx(expected, rel=1e-9)


def test_steps_come_at_half_and_at_three_quarters() -> None:
    config = FitConfig(steps=8, lr=0.4, schedule="step", warmup_steps=2)
    assert rates(config) == pytest.approx([0.2, 0.4, 0.4, 0.4, 0.04, 0.04, 0.004, 0.004])


def test_exponential_reaches_its_factor_at_the_end() -> None:
    config = FitConfig(steps=12, lr=0.4, schedule="exponential", decay=0.01, warmup_steps=2)
    assert rates(config) == pytest.approx([0.2, 0.4, *(0.4 * 0.01 ** (i / 10) for i in range(10))])
