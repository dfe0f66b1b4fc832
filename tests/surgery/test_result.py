"""Surgery's report and `rebind`; the operation that takes changes back."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn

from bnkit import UserError
from bnkit.surgery._operation import Operation
from bnkit.surgery._result import Surgery


def network() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4), nn.Linear(4, 2))


def stepped(model: nn.Module, optimizer: torch.optim.Optimizer) -> None:
    x = torch.randn(8, 3)
    model(x).square().sum().backward()
    optimizer.step()
    optimizer.zero_grad()


@pytest.mark.parametrize("inplace", [False, True])
def test_rebind_keeps_groups_and_state_of_survivors(inplace):
    model = network()
    optimizer = torch.optim.AdamW(
        [{"params": model[0].parameters(), "lr": 0.1}, {"params": [*model[1].parameters(), *model[2].parameters()]}]
    )
    stepped(model, optimizer)
    state = {name: copy.deepcopy(optimizer.state[p]) for name, p in model.named_parameters()}
    with Operation(model, inplace=inplace) as operation:
        operation.swap(operation.model[1], nn.LayerNorm(4, bias=False))
    surgery = operation.result({"1": "to LayerNorm"}, {}, None)
    new = surgery.model
    assert surgery.rebind(optimizer) is optimizer
    first, second = (group["params"] for group in optimizer.param_groups)
    assert set(first) == {*new[0].parameters(), new[1].weight}
    assert set(second) == set(new[2].parameters())
    assert set(optimizer.state) == {*new[0].parameters(), *new[2].parameters()}
    for name in ("0.weight", "2.bias"):
        for key, value in optimizer.state[new.get_parameter(name)].items():
            assert torch.equal(value, state[name][key])
    before = new[1].weight.detach().clone()
    stepped(new, optimizer)
    assert not torch.equal(new[1].weight, before)


@pytest.mark.parametrize("known", [True, False])
def test_new_parameters_join_the_group_of_the_one_directly_ahead(known):
    model = network()
    optimizer = torch.optim.SGD(model.parameters() if known else model[2].parameters(), lr=0.1)
    with Operation(model, inplace=False) as operation:
        operation.swap(operation.model[1], nn.LayerNorm(4))
    surgery = operation.result({"1": "to LayerNorm"}, {}, None)
    new = surgery.model
    expected = set(new.parameters()) if known else set(new[2].parameters())
    for _ in range(2):  # the second time nothing is new
        assert set(surgery.rebind(optimizer).param_groups[0]["params"]) == expected
        assert len(optimizer.param_groups[0]["params"]) == len(expected)


def test_rebind_refuses_another_models_optimizer():
    surgery = Operation(network(), inplace=False).result({}, {}, None)
    with pytest.raises(UserError, match="pass the optimizer made for that model"):
        surgery.rebind(torch.optim.SGD(network().parameters(), lr=0.1))


def test_the_copy_leaves_the_original_alone_and_in_place_works_on_it():
    model = network()
    assert Operation(model, inplace=True).model is model
    with Operation(model, inplace=False) as operation:
        operation.fill(operation.model[0].weight, torch.zeros(4, 3))
        operation.swap(operation.model[1], nn.Identity())
    assert isinstance(model[1], nn.BatchNorm1d)
    assert model[0].weight.abs().min() > 0


def test_an_exception_takes_everything_back():
    model = network()
    model.alias = model[1]
    before = {name: value.clone() for name, value in model.state_dict().items()}
    modules = dict(model.named_modules(remove_duplicate=False))
    weight = model[0].weight

    def fail() -> None:
        with Operation(model, inplace=True) as operation:
            operation.fill(weight, torch.zeros(4, 3))
            operation.touch(model[0])
            del model[0].bias
            model[0].register_buffer("bias", torch.zeros(4))
            operation.swap(model[1], nn.Identity())
            assert isinstance(model.alias, nn.Identity)
            raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        fail()
    assert dict(model.named_modules(remove_duplicate=False)) == modules
    assert model[0].weight is weight
    assert isinstance(model[0].bias, nn.Parameter)
    after = model.state_dict()
    assert list(after) == list(before)
    assert all(torch.equal(after[name], before[name]) for name in before)


def test_swapping_the_root_gives_another_model():
    model = nn.BatchNorm1d(3)
    operation = Operation(model, inplace=True)
    operation.swap(model, new := nn.Identity())
    assert operation.result({}, {}, None).model is new


def test_a_model_that_cannot_be_copied_is_a_clear_error():
    model = nn.Linear(2, 2)
    model.extra = (torch.ones(2, requires_grad=True) * 2,)
    with pytest.raises(UserError, match="pass inplace=True"):
        Operation(model, inplace=False)


def test_the_report():
    surgery = Surgery(nn.Identity(), {"layer.bn1": "folded into layer.conv1", "": "gone"}, {"x": "ran twice"}, 3.2e-7)
    assert repr(surgery) == (
        "Surgery: 2 changed, 1 skipped, max_error 3.2e-07\n"
        "  changed\n"
        "    layer.bn1    folded into layer.conv1\n"
        "    (the model)  gone\n"
        "  skipped\n"
        "    x  ran twice"
    )
    assert repr(Surgery(nn.Identity(), {}, {})) == "Surgery: 0 changed, 0 skipped"
