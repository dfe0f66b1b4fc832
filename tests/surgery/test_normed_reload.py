"""A network with inserted norms, operated on again: its own `state_dict` and the original's still load."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch import nn

from bnkit import UserError
from bnkit.surgery import convert, fold, insert


def networks() -> tuple[Any, Any, torch.Tensor]:
    """One network, the same after insertion, and an input."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(3, 8, 3), nn.ReLU(), nn.Conv2d(8, 4, 3), nn.ReLU(), nn.Conv2d(4, 2, 1)).double()
    x = torch.randn(6, 3, 8, 8, dtype=torch.float64)
    return model.eval(), insert(model, [x]).model, x


@pytest.mark.parametrize("rest", ["keep", "affine"])
def test_folded_again_it_loads_its_own_and_the_originals_state(rest):
    model, inserted, x = networks()
    folded: Any = fold(inserted, x, rest=rest).model
    assert type(folded[0].bn) is nn.Identity
    expected = model(x)
    state = copy.deepcopy(folded.state_dict())
    folded[0].weight.data.zero_()
    folded.load_state_dict(state)
    torch.testing.assert_close(folded(x), expected)
    folded[0].weight.data.zero_()
    folded.load_state_dict(model.state_dict())
    torch.testing.assert_close(folded(x), expected)


def test_as_group_norm_it_loads_its_own_state_and_names_what_the_originals_lacks():
    model, inserted, x = networks()
    grouped = convert(inserted, "group").model
    expected = grouped(x)
    grouped.load_state_dict(grouped.state_dict())
    torch.testing.assert_close(grouped(x), expected)
    with pytest.raises(RuntimeError, match=r"Missing key.*0\.bn\.weight"):
        grouped.load_state_dict(model.state_dict())


@pytest.mark.parametrize("groups", [0, -4, 2.0])
def test_groups_are_a_positive_number(groups):
    with pytest.raises(UserError, match="groups must be at least 1, got"):
        convert(nn.BatchNorm2d(8), "group", groups=groups)
