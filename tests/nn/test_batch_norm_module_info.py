"""PyTorch's own test inputs for BatchNorm1d, 2d and 3d (its `ModuleInfo` data base), run on our layers."""

from __future__ import annotations

import copy

import pytest
import torch
from oracle import assert_near
from torch.testing._internal.common_modules import ModuleErrorEnum, module_db

import bnkit.nn

pytestmark = pytest.mark.usefixtures("backend")

INFOS = [info for info in module_db if info.module_cls.__name__ in bnkit.nn.__all__]
DTYPES = [torch.float32, torch.float64, torch.bfloat16, torch.float16]


def inputs():
    torch.manual_seed(0)
    for info in INFOS:
        made = info.module_inputs_func(info, device="cpu", dtype=torch.float64, requires_grad=True, training=True)
        for module_input in made:
            yield pytest.param(info, module_input, id=f"{info.module_cls.__name__}-{module_input.desc}")


def build(cls, module_input, dtype, training):
    constructor = module_input.constructor_input
    return cls(*constructor.args, **constructor.kwargs).to(dtype).train(training)


def results(module, x, dy):
    x = x.detach().clone().requires_grad_()
    y = module(x)
    y.backward(dy)
    gradients = {name: p.grad for name, p in module.named_parameters()}
    return {"y": y.detach(), "dx": x.grad, **gradients, **dict(module.named_buffers())}


def test_all_three_layers_have_entries():
    assert [info.module_cls.__name__ for info in INFOS] == ["BatchNorm1d", "BatchNorm2d", "BatchNorm3d"]
    assert sum(1 for _ in inputs()) >= 19  # one more a layer since PyTorch 2.15


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(("info", "module_input"), list(inputs()))
def test_as_accurate_as_torch(info, module_input, dtype, training):
    theirs = build(info.module_cls, module_input, dtype, training)
    ours = build(getattr(bnkit.nn, info.module_cls.__name__), module_input, dtype, training)
    ours.load_state_dict(theirs.state_dict())
    x = module_input.forward_input.args[0].to(dtype)
    dy = torch.randn(x.shape).to(dtype)
    true = results(copy.deepcopy(theirs).double(), x.double(), dy.double())
    wanted = results(theirs, x, dy)
    for name, tensor in results(ours, x, dy).items():
        if dtype == torch.float64:
            torch.testing.assert_close(tensor, true[name], msg=lambda m, n=name: f"{n}: {m}")
        else:
            scale = x.abs().max().item() if name == "running_mean" and x.numel() else 0.0
            assert_near(name, tensor, wanted[name], true[name], scale=scale)


@pytest.mark.parametrize(("info", "module_input"), list(inputs()))
def test_gradcheck_and_gradgradcheck(info, module_input):
    x = module_input.forward_input.args[0]
    module = build(getattr(bnkit.nn, info.module_cls.__name__), module_input, torch.float64, True)
    parameters = dict(module.named_parameters())

    def function(x, *values):
        twin = copy.deepcopy(module)  # each evaluation starts from the same running statistics
        return torch.func.functional_call(twin, dict(zip(parameters, values, strict=True)), (x,))

    arguments = (x, *parameters.values())
    assert torch.autograd.gradcheck(function, arguments, fast_mode=True)
    assert torch.autograd.gradgradcheck(function, arguments, fast_mode=True)


def errors():
    for info in INFOS:
        made = info.module_error_inputs_func(
            info, device="cpu", dtype=torch.float32, requires_grad=False, training=True
        )
        for index, error in enumerate(made):
            yield pytest.param(info, error, id=f"{info.module_cls.__name__}-{index}")


@pytest.mark.parametrize(("info", "error"), list(errors()))
def test_same_errors_as_torch(info, error):
    assert error.error_on == ModuleErrorEnum.FORWARD_ERROR
    module = build(getattr(bnkit.nn, info.module_cls.__name__), error.module_error_input, torch.float32, True)
    with pytest.raises(error.error_type, match=error.error_regex):
        module(*error.module_error_input.forward_input.args)
