from __future__ import annotations

import pytest
import torch

from bnkit.train import _recipe, fast_precision


def test_a_real_machine_gives_one_of_the_two() -> None:
    assert fast_precision(torch.device("cpu")) in ("32-true", "bf16-mixed")


@pytest.mark.parametrize(
    ("plain", "half", "expected"), [(1.3, 1, "bf16-mixed"), (1.1, 1, "32-true"), (1, 9, "32-true")]
)
def test_bf16_has_to_be_worth_it(monkeypatch: pytest.MonkeyPatch, plain: float, half: float, expected: str) -> None:
    monkeypatch.setattr(_recipe, "_step_seconds", lambda layer, x, bf16: half if bf16 else plain)
    assert fast_precision(torch.device("cpu")) == expected


def test_apples_gpu_stays_in_float32() -> None:
    assert fast_precision(torch.device("mps")) == "32-true"
