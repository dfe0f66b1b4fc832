"""The operators of `torch.ops.bnkit`: what PyTorch asks of an operator, and who sees them instead of calls into C."""

from __future__ import annotations

import itertools
from typing import Any

import oracle
import pytest
import torch
from _cases import Record
from oracle import make_case
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.fx.experimental.proxy_tensor import make_fx
from torch.utils.flop_counter import FlopCounterMode

import bnkit.nn
from bnkit import UserError
from bnkit.functional import batch_norm
from bnkit.ops import cpu, dispatch

pytestmark = pytest.mark.skipif(not cpu.available(), reason="installed without the C kernels")

BATCH_NORM, FORWARD, BACKWARD = (
    getattr(torch.ops.bnkit, name).default for name in ("batch_norm", "batch_norm_forward", "batch_norm_backward")
)
# Each with the reason it is there.
SAMPLES: dict[str, dict[str, Any]] = {
    "plain": {},
    "relu and residual": {"activation": "relu", "residual": True},
    "a residual that is passed on": {"residual": True},
    "inference": {"training": False, "activation": "silu"},
    "without parameters": {"affine": "none"},
    "weight alone": {"affine": "weight", "activation": "tanh"},
    "channels_last, low precision": {"layout": "channels_last", "dtype": torch.bfloat16, "residual": True},
    "parameters of low precision": {"dtype": torch.float16, "parameter_dtype": torch.float16},
    "strides that no kernel reads": {"layout": "transposed", "dtype": torch.float64},
    "an activation that no kernel has": {"activation": "elu"},
}


def forward_arguments(case: oracle.Case) -> tuple:
    parameters = (case.running_mean, case.running_var, case.weight, case.bias)
    return (case.x, *parameters, case.training, case.momentum, case.eps, case.activation, case.residual)


def backward_arguments(case: oracle.Case, needs: tuple[bool, ...] | None = None) -> tuple:
    _, mean, invstd = FORWARD(*forward_arguments(case))
    present = (True, case.residual is not None and case.activation is not None, case.weight, case.bias)
    needs = needs or tuple(bool(p is not None and p is not False) for p in present)
    residual = None if case.activation is None else case.residual
    arguments = (case.dy, case.x, mean, invstd, case.weight, case.bias, case.training, case.activation, residual)
    return (*arguments, list(needs))


@pytest.mark.parametrize("name", SAMPLES)
def test_opcheck(name):
    """Schema (what is written to, what is an alias), fake kernel, autograd, and tracing with dynamic shapes."""
    case = make_case((3, 4, 5, 6), **SAMPLES[name])
    for tensor in (case.x, case.weight, case.bias, case.residual):
        if tensor is not None:
            tensor.requires_grad_()
    torch.library.opcheck(BATCH_NORM, forward_arguments(case))


@pytest.mark.parametrize("name", [name for name in SAMPLES if "no kernel has" not in name])
def test_opcheck_of_the_passes(name):
    case = make_case((3, 4, 5, 6), **SAMPLES[name])
    torch.library.opcheck(FORWARD, forward_arguments(case))
    torch.library.opcheck(BACKWARD, backward_arguments(case))


LOW = [torch.float64, torch.bfloat16, torch.float16]
SHAPES = [(6, 3), (4, 3, 5), (2, 3, 4, 5), (2, 3, 2, 3, 4), (1, 3, 4, 4), (4, 1, 3, 3), (4, 3, 1, 1), (2, 3, 1, 5)]


def layouts(shape: tuple[int, ...], dtype: torch.dtype) -> list[Tensor]:
    """The same values under every order of the dimensions in memory, sliced, and expanded."""
    x = torch.randn(shape).to(dtype)
    orders = itertools.permutations(range(len(shape))) if len(shape) < 5 else [(0, 2, 3, 4, 1), (4, 3, 2, 1, 0)]
    made = []
    for order in orders:
        back = [order.index(d) for d in range(len(shape))]
        made.append(x.permute(order).contiguous().permute(back))
    return [*made, torch.randn((*shape[:-1], 2 * shape[-1])).to(dtype)[..., ::2], x[:1].expand(shape)]


def assert_fake_as_real(fakes: list[Tensor], reals: list[Tensor], label: str) -> None:
    assert len(fakes) == len(reals)
    for fake, real in zip(fakes, reals, strict=True):
        assert (fake.shape, fake.dtype, fake.device) == (real.shape, real.dtype, real.device), label
        assert fake.stride() == real.stride(), f"{label}: fake {fake.stride()}, real {real.stride()}"


@pytest.mark.parametrize(
    ("shape", "dtype"), [(s, torch.float32) for s in SHAPES] + [((4, 3, 5), d) for d in LOW], ids=str
)
def test_fake_results_are_as_real_ones(shape, dtype):
    """A compiled graph reads the real result with the strides of the fake one."""
    mode = FakeTensorMode()
    for x, activation in itertools.product(layouts(shape, dtype), (None, "relu")):
        case = make_case(shape, dtype=dtype, residual=True, activation=activation)
        case.x = x
        for operator, arguments in ((FORWARD, forward_arguments(case)), (BACKWARD, backward_arguments(case))):
            fakes = [mode.from_tensor(a) if isinstance(a, Tensor) else a for a in arguments]
            with mode:
                expected = operator(*fakes)
            assert_fake_as_real(list(expected), list(operator(*arguments)), f"{operator}, strides {x.stride()}")


@pytest.mark.parametrize("needs", list(itertools.product([False, True], repeat=4)), ids=str)
def test_only_the_gradients_needed_come_back(needs):
    case = make_case((6, 3), residual=True, activation="relu")
    everything = BACKWARD(*backward_arguments(case, (True,) * 4))
    some = BACKWARD(*backward_arguments(case, needs))
    for ours, wanted in zip(some, itertools.compress(everything, needs), strict=True):
        torch.testing.assert_close(ours, wanted)


@pytest.mark.parametrize("name", SAMPLES)
def test_values_and_gradients(name):
    case = make_case((6, 4, 5, 6), **SAMPLES[name])

    def ours(case):
        return BATCH_NORM(*forward_arguments(case))

    def direct(case):
        x, mean, var, weight, bias, *numbers, activation, residual = forward_arguments(case)
        return batch_norm(x, mean, var, weight, bias, *numbers, activation=activation, residual=residual)

    wanted = oracle.run(case, direct)
    for key, value in oracle.run(case, ours).items():
        if value is None or key.startswith("running"):  # updated by other operators
            torch.testing.assert_close(value, wanted[key])
        else:
            assert torch.equal(value, wanted[key]), key


def test_second_derivatives():
    x = torch.randn(4, 3, dtype=torch.float64, requires_grad=True)
    weight = torch.randn(3, dtype=torch.float64, requires_grad=True)

    def function(x, weight):
        return BATCH_NORM(x, None, None, weight, None, True, 0.1, 1e-5, "tanh", None)

    assert torch.autograd.gradgradcheck(function, (x, weight))


def test_writing_to_the_running_statistics_shows_in_their_version():
    case = make_case((4, 3))
    FORWARD(*forward_arguments(case))
    assert (case.running_mean._version, case.running_var._version) == (1, 1)
    case.training = False
    FORWARD(*forward_arguments(case))
    assert (case.running_mean._version, case.running_var._version) == (1, 1)


def test_a_pass_refuses_what_no_backend_takes():
    with pytest.raises(
        NotImplementedError, match=r"no kernel of bnkit takes a torch.float32 tensor on cpu .*functional"
    ):
        FORWARD(*forward_arguments(make_case((4, 3), residual=True))[:-1], torch.randn(4, 3).half())
    with pytest.raises(NotImplementedError, match="no kernel of bnkit takes"):
        FORWARD(torch.zeros(0, 3), None, None, None, None, True, 0.1, 1e-5, None, None)


def test_dispatch_modes_see_the_operators():
    case = make_case((4, 3))
    x = case.x.requires_grad_()
    with Record() as mode:
        batch_norm(x, case.running_mean, case.running_var, training=True).backward(case.dy)
    assert "bnkit.batch_norm_forward.default" in mode.seen
    assert "bnkit.batch_norm_backward.default" in mode.seen
    torch.testing.assert_close(x.grad.double(), oracle.exact(make_without_parameters(case))["dx"], atol=1e-5, rtol=1e-5)
    with FlopCounterMode(display=False) as counter:
        batch_norm(x, None, None, training=True)
    assert counter.get_total_flops() == 0


def make_without_parameters(case: oracle.Case) -> oracle.Case:
    case.x, case.weight, case.bias, case.running_mean, case.running_var = case.x.detach(), None, None, None, None
    return case


def test_make_fx_records_them():
    """Each mode of tracing: with `real`, the tensors are ordinary ones."""
    x, other = torch.randn(2, 4, 3)
    for tracing in ("real", "fake", "symbolic"):
        graph = make_fx(lambda x: batch_norm(x, None, None, training=True, activation="relu"), tracing_mode=tracing)(x)
        torch.testing.assert_close(graph(other), batch_norm(other, None, None, training=True, activation="relu"))
        assert "bnkit.batch_norm_forward" in graph.code


def test_fake_tensors_pass_a_layer():
    with FakeTensorMode():
        layer, x = bnkit.nn.BatchNorm2d(3), torch.empty(2, 3, 4, 5, requires_grad=True)
        y = layer(x.to(memory_format=torch.channels_last))
        y.backward(torch.empty_like(y))
        assert y.is_contiguous(memory_format=torch.channels_last)
        assert x.grad.shape == x.shape


@pytest.mark.filterwarnings("ignore")  # torch.jit is deprecated, and the checks of the arguments are traced
@pytest.mark.parametrize("training", [False, True])
def test_torch_jit_trace_records_plain_operators(training):
    """Calls into C would leave no trace: the recorded function would return memory as it finds it."""
    layer = bnkit.nn.BatchNorm1d(3, activation="relu").train(training)
    layer.running_mean.normal_()
    x, other = torch.randn(2, 4, 3)
    traced = torch.jit.trace(layer, x, check_trace=not training)
    assert {node.kind().split("::")[0] for node in traced.inlined_graph.nodes()} == {"aten", "prim"}
    assert not traced.inlined_graph.findAllNodes("prim::PythonOp")
    torch.testing.assert_close(traced(other), layer(other))


def test_eager_calls_do_not_pass_through_the_operators(monkeypatch):
    """They cost a few microseconds more than a direct call."""
    calls = []
    monkeypatch.setattr(dispatch, "serve", lambda backend, *_: calls.append(backend) or torch.zeros(()))
    batch_norm(torch.randn(4, 3), None, None, training=True)
    assert calls == [cpu]


def replaced(arguments: tuple, index: int, value: object) -> tuple:
    return (*arguments[:index], value, *arguments[index + 1 :])


PER_CHANNEL = {FORWARD: {1: "running_mean", 2: "running_var", 3: "weight", 4: "bias"}}
PER_CHANNEL[BACKWARD] = {2: "mean", 3: "invstd", 4: "weight", 5: "bias"}


@pytest.mark.parametrize("size", [1, 3, 5])
@pytest.mark.parametrize(("operator", "index"), [(op, index) for op, names in PER_CHANNEL.items() for index in names])
def test_a_pass_refuses_another_number_of_channels(operator, index, size):
    """The kernels take pointers: they would read, or write, past the end."""
    case = make_case((6, 4), activation="relu")
    arguments = (forward_arguments if operator is FORWARD else backward_arguments)(case)
    name = PER_CHANNEL[operator][index]
    with pytest.raises(UserError, match=rf"^{name} must have a value for each of the 4 channels of x, got {size}: "):
        operator(*replaced(arguments, index, torch.ones(size)))


@pytest.mark.parametrize("shape", [(6, 3), (5, 4), (1, 4), (6, 4, 1)], ids=str)
def test_a_pass_refuses_another_shape(shape):
    case = make_case((6, 4), activation="relu", residual=True)
    forward, backward = forward_arguments(case), backward_arguments(case)
    for operator, arguments, index, name in (
        (FORWARD, forward, 9, "residual"),
        (BACKWARD, backward, 0, "dy"),
        (BACKWARD, backward, 8, "residual"),
    ):
        with pytest.raises(UserError, match=rf"^{name} must have the shape of x, \(6, 4\), got \({shape[0]}, "):
            operator(*replaced(arguments, index, torch.ones(shape)))


def test_inference_refuses_to_go_without_statistics():
    forward = forward_arguments(make_case((6, 4), training=False))
    for missing in (1, 2):
        with pytest.raises(UserError, match="inference must have running_mean and running_var, got None"):
            FORWARD(*replaced(forward, missing, None))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64], ids=str)
def test_types_of_what_the_backward_pass_is_given(dtype):
    case = make_case((6, 4, 5, 5), dtype=dtype, activation="relu", layout="channels_last")
    arguments = backward_arguments(case)
    wanted = BACKWARD(*arguments)
    for index, dtypes in {0: (torch.float32, torch.float64), 2: (torch.float32,), 3: (torch.float32,)}.items():
        for other in dtypes:
            found = BACKWARD(*replaced(arguments, index, arguments[index].to(other)))
            for a, b in zip(found, wanted, strict=True):
                torch.testing.assert_close(a, b, rtol=1e-2 if dtype == torch.bfloat16 else 1e-5, atol=1e-5)


def test_hooks_that_save_in_another_type_and_a_dispatch_mode():
    case = make_case((6, 4, 5, 5), dtype=torch.bfloat16, activation="gelu")
    wide = torch.autograd.graph.saved_tensors_hooks(lambda t: t, lambda t: t.float())
    wanted = oracle.run(case, lambda case: BATCH_NORM(*forward_arguments(case)))
    with wide, FlopCounterMode(display=False):
        found = oracle.run(case, lambda case: BATCH_NORM(*forward_arguments(case)))
    for name, value in found.items():
        torch.testing.assert_close(value, wanted[name], rtol=2e-2, atol=1e-2)
