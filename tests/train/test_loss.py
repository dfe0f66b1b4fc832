from __future__ import annotations

import pytest
import torch
from torch.nn import functional as F
from toys import toy_set

from bnkit import models
from bnkit._checks import UserError
from bnkit.models import GoogLeNetOutputs, rbf_loss
from bnkit.train import FitConfig, fit
from bnkit.train._loss import training_loss

LABELS = torch.tensor([2, 0, 1, 1])


def logits() -> torch.Tensor:
    return torch.randn(4, 3, generator=torch.Generator().manual_seed(0))


def test_cross_entropy() -> None:
    config = FitConfig(1, label_smoothing=0.1)
    expected = F.cross_entropy(logits(), LABELS, label_smoothing=0.1)
    assert training_loss(logits(), LABELS, config) == expected != F.cross_entropy(logits(), LABELS)


def test_auxiliary_heads_count_three_tenths() -> None:
    outputs = GoogLeNetOutputs(logits(), 2 * logits(), -logits())
    parts = [F.cross_entropy(part, LABELS) for part in outputs]
    torch.testing.assert_close(
        training_loss(outputs, LABELS, FitConfig(1)), parts[0] + 0.3 * (parts[1] + parts[2]), rtol=1e-6, atol=0
    )


@pytest.mark.parametrize(("name", "j"), [("rbf", None), ("rbf-discriminative", 0.1)])
def test_the_criteria_of_lenet_5(name: str, j: float | None) -> None:
    assert training_loss(logits(), LABELS, FitConfig(1, loss=name)) == rbf_loss(logits(), LABELS, j)


def test_googlenet_trains_with_its_heads() -> None:
    torch.manual_seed(0)
    model = models.create("googlenet", num_classes=3, in_channels=2, image_size=32, aux_logits=True)
    before = {key: parameter.clone() for key, parameter in model.named_parameters()}
    fit(model, toy_set(), FitConfig(steps=1, batch_size=8, device="cpu"))
    for key, parameter in model.named_parameters():
        assert not torch.equal(parameter, before[key]) or "bias" in key, key


def test_mistakes() -> None:
    with pytest.raises(UserError, match="unknown loss 'mse'"):
        FitConfig(1, loss="mse")
    with pytest.raises(UserError, match="label smoothing is for the cross-entropy, got loss='rbf'"):
        FitConfig(1, loss="rbf", label_smoothing=0.1)
