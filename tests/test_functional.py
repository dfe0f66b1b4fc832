"""functional.batch_norm: by value against float64 and eager PyTorch."""

from __future__ import annotations

import itertools

import oracle
import pytest
import torch
import torch.nn.functional as F
from oracle import ACTIVATIONS, Case, make_case

from bnkit.functional import batch_norm

pytestmark = pytest.mark.usefixtures("backend")

# Why each shape: what it would catch.
SHAPES = {
    "mlp": (12, 5),
    "sequence": (6, 5, 7),
    "image": (4, 5, 6, 7),
    "volume": (3, 5, 2, 3, 4),
    "one channel": (3, 1, 5, 5),
    "one position a plane": (9, 5, 1, 1),
    "one image": (1, 5, 6, 7),
    "two values a channel, the fewest": (2, 5),
    "more channels than values": (2, 513, 1, 3),
    "odd sizes that no vector length divides": (3, 3, 13, 11),
}
LAYOUTS = [
    ("contiguous", "mlp"),
    ("sliced", "mlp"),
    ("contiguous", "sequence"),
    ("transposed", "sequence"),
    ("contiguous", "image"),
    ("channels_last", "image"),
    ("sliced", "image"),
    ("transposed", "image"),
    ("contiguous", "volume"),
    ("channels_last", "volume"),
]
DTYPES = [torch.float32, torch.float64, torch.bfloat16, torch.float16]


def ours(case: Case) -> torch.Tensor:
    return batch_norm(
        case.x,
        case.running_mean,
        case.running_var,
        case.weight,
        case.bias,
        case.training,
        case.momentum,
        case.eps,
        activation=case.activation,
        residual=case.residual,
    )


def check(case: Case, label: str = "") -> None:
    oracle.assert_as_accurate(oracle.run(case, ours), case, label)


@pytest.mark.parametrize("activation", ACTIVATIONS)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(("layout", "shape"), LAYOUTS)
def test_every_combination(layout, shape, dtype, activation):
    for training, residual, affine in itertools.product((True, False), (False, True), ("both", "weight", "none")):
        case = make_case(
            SHAPES[shape],
            dtype=dtype,
            layout=layout,
            affine=affine,
            residual=residual,
            training=training,
            activation=activation,
        )
        check(case, f"with {training=}, {residual=}, {affine=}")


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("shape", SHAPES)
def test_shapes(shape, training):
    check(make_case(SHAPES[shape], training=training, residual=True, activation="silu"))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_parameters_in_the_inputs_type(dtype):
    check(make_case((4, 5, 6, 7), dtype=dtype, parameter_dtype=dtype, residual=True, activation="relu"))


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize(("mean", "std"), [(1e4, 1e-2), (-3e3, 1.0), (1e-12, 1e-8), (1e8, 1e9)])
def test_data_far_from_zero(mean, std, training):
    """Where E[x²] - E[x]² returns noise; and where eps, or float32's range, is near."""
    check(make_case((16, 3, 8, 8), mean=mean, std=std, training=training))


def test_large_offset_is_normalized_nearly_exactly():
    """Not just as well as eager: a mean rounded to float32 alone would be off by up to 5% of this deviation."""
    case = make_case((64, 3, 8, 8), mean=1e4, std=1e-2, affine="none")
    y, true = oracle.run(case, ours)["y"], oracle.exact(case)["y"]
    assert (y.double() - true).abs().max() < 1e-5


@pytest.mark.parametrize("momentum", [0.0, 0.1, 0.9, 1.0, -1.2])
def test_momentum_weighs_the_new_batch(momentum):
    check(make_case((8, 3, 4, 4), momentum=momentum))


@pytest.mark.parametrize("eps", [1e-12, 1e-5, 1e-3, 0.6])
def test_eps(eps):
    check(make_case((8, 3, 4, 4), eps=eps))


def test_without_running_statistics():
    case = make_case((8, 3, 4, 4))
    case.running_mean = case.running_var = None
    check(case)


@pytest.mark.parametrize("reduction", ["sum", "mean"])
def test_expanded_upstream_gradient(reduction):
    """`sum()` and `mean()` send back one number, expanded with strides of zero."""
    case = make_case((8, 3, 4, 4), activation="silu")
    x = case.x.requires_grad_()
    getattr(batch_norm(x, None, None, training=True, activation="silu"), reduction)().backward()
    case.weight = case.bias = None
    case.dy = torch.full_like(case.x, 1.0 if reduction == "sum" else 1.0 / x.numel())
    torch.testing.assert_close(x.grad.double(), oracle.exact(case)["dx"], atol=1e-6, rtol=1e-4)


def test_residual_of_a_wider_type_promotes():
    x, residual = torch.randn(4, 3).bfloat16(), torch.randn(4, 3)
    y = batch_norm(x, None, None, training=True, residual=residual)
    assert y.dtype == (F.batch_norm(x, None, None, training=True) + residual).dtype == torch.float32
    torch.testing.assert_close(y, batch_norm(x.float(), None, None, training=True) + residual)


@pytest.mark.parametrize("layout", ["contiguous", "channels_last"])
def test_memory_format_is_kept(layout):
    x = oracle.lay_out(torch.randn(2, 3, 4, 5), layout)
    assert batch_norm(x, None, None, training=True, activation="relu").stride() == x.stride()


@pytest.mark.parametrize("shape", [(0, 3), (0, 3, 4), (0, 3, 4, 4), (2, 3, 0), (2, 0), (0,)])
@pytest.mark.parametrize("training", [True, False])
def test_empty_batches(shape, training):
    channels = shape[1] if len(shape) > 1 else 0
    x, weight = torch.zeros(shape, requires_grad=True), torch.ones(channels, requires_grad=True)
    mean, var = torch.full((channels,), 2.0), torch.full((channels,), 3.0)
    y = batch_norm(x, mean, var, weight, torch.zeros(channels), training, activation="relu")
    y.sum().backward()
    assert y.shape == x.grad.shape == x.shape
    assert torch.equal(mean, torch.full((channels,), 2.0))
    assert torch.equal(var, torch.full((channels,), 3.0))
    assert weight.grad is None or not weight.grad.any()


@pytest.mark.parametrize("affine", ["both", "weight", "none"])
@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_first_and_second_derivatives(activation, training, affine):
    case = make_case(
        (3, 2, 2, 2), dtype=torch.float64, affine=affine, residual=True, training=training, activation=activation
    )
    names = [n for n in ("x", "weight", "bias", "residual") if getattr(case, n) is not None]

    def function(*tensors):
        arguments = dict(zip(names, tensors, strict=True))
        running = None if training else case.running_mean, None if training else case.running_var
        return batch_norm(arguments.pop("x"), *running, training=training, activation=activation, **arguments)

    inputs = [getattr(case, n).clone().requires_grad_() for n in names]
    assert torch.autograd.gradcheck(function, inputs, check_forward_ad=True, fast_mode=True)
    assert torch.autograd.gradgradcheck(function, inputs, check_fwd_over_rev=True, fast_mode=True)


def test_training_between_forward_and_backward_of_inference():
    """Updating the running statistics in place does not spoil the pending backward pass of an inference."""
    mean, var = torch.zeros(3), torch.ones(3)
    x = torch.randn(4, 3, requires_grad=True)
    y = batch_norm(x, mean, var)
    batch_norm(torch.randn(4, 3), mean, var, training=True)
    y.sum().backward()
    torch.testing.assert_close(x.grad, torch.full((4, 3), (1 + 1e-5) ** -0.5))


def test_vmap_over_models_and_per_sample_gradients():
    x, mean, var = torch.randn(5, 4, 3), torch.randn(3), torch.rand(3) + 0.5
    together = torch.vmap(lambda x: batch_norm(x, mean, var, activation="relu"))(x)
    torch.testing.assert_close(together, torch.stack([batch_norm(part, mean, var, activation="relu") for part in x]))
    grad = torch.func.grad(lambda x: batch_norm(x, None, None, training=True, activation="tanh").pow(3).sum())
    x = x[0].clone().requires_grad_()
    batch_norm(x, None, None, training=True, activation="tanh").pow(3).sum().backward()
    torch.testing.assert_close(grad(x.detach()), x.grad)


@pytest.mark.parametrize("compiler", ["eager", "aot_eager"])
@pytest.mark.parametrize("training", [True, False])
def test_compiles_without_graph_breaks(compiler, training):
    torch._dynamo.reset()
    compiled = torch.compile(ours, backend=compiler, fullgraph=True)
    case = make_case((4, 5, 6, 7), training=training, residual=True, activation="gelu")
    for name, tensor in oracle.run(case, compiled).items():
        torch.testing.assert_close(tensor, oracle.run(case, ours)[name], msg=lambda m, n=name: f"{n}: {m}")


def test_fx_records_one_call():
    graph = torch.fx.symbolic_trace(lambda x, m, v: batch_norm(x, m, v, activation="relu"))
    assert [node.target for node in graph.graph.nodes if node.op == "call_function"] == [batch_norm]
    x, mean, var = torch.randn(4, 3), torch.randn(3), torch.rand(3)
    assert torch.equal(graph(x, mean, var), batch_norm(x, mean, var, activation="relu"))
