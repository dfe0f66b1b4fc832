"""What batch norm should give: closed formulas in float64, PyTorch's eager operators, and a judge between them."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

ACTIVATIONS = [None, "relu", "leaky_relu", "silu", "gelu", "hardswish", "sigmoid", "tanh"]
Results = dict[str, Tensor | None]


@dataclasses.dataclass
class Case:
    """The arguments of one call, and the upstream gradient `dy`."""

    x: Tensor
    running_mean: Tensor | None
    running_var: Tensor | None
    weight: Tensor | None
    bias: Tensor | None
    residual: Tensor | None
    dy: Tensor
    training: bool = True
    momentum: float = 0.1
    eps: float = 1e-5
    activation: str | None = None


def make_case(
    shape: tuple[int, ...],
    *,
    dtype: torch.dtype = torch.float32,
    layout: str = "contiguous",
    affine: str = "both",
    residual: bool = False,
    mean: float = 0.5,
    std: float = 2.0,
    parameter_dtype: torch.dtype | None = None,
    **options,
) -> Case:
    """Random numbers throughout, dy too: with `y.sum()` the gradients of x and weight vanish identically.

    affine: "both", "weight" or "none". Parameters are float32 (float64 for float64) unless `parameter_dtype` is given.
    """
    channels = shape[1]
    parameter_dtype = parameter_dtype or (torch.float64 if dtype == torch.float64 else torch.float32)

    def activation_like(scale: float, offset: float = 0.0) -> Tensor:
        return lay_out((torch.randn(shape, dtype=torch.float64) * scale + offset).to(dtype), layout)

    def parameter(values: Tensor) -> Tensor:
        return values.to(parameter_dtype)

    return Case(
        x=activation_like(std, mean),
        running_mean=parameter(torch.randn(channels) + mean),
        running_var=parameter(torch.rand(channels) + 0.5) * std**2,
        weight=parameter(torch.randn(channels)) if affine != "none" else None,
        bias=parameter(torch.randn(channels)) if affine == "both" else None,
        residual=activation_like(1.0) if residual else None,
        dy=activation_like(1.0),
        **options,
    )


def lay_out(x: Tensor, layout: str) -> Tensor:
    """The values of `x` in memory as `layout` says."""
    if layout == "contiguous":
        return x.contiguous()
    if layout == "channels_last":
        return x.contiguous(memory_format=torch.channels_last if x.dim() == 4 else torch.channels_last_3d)
    if layout == "sliced":  # every second value of the last dimension, from an odd address
        wide = torch.full((*x.shape[:-1], 2 * x.shape[-1] + 1), math.nan, dtype=x.dtype)
        wide[..., 1::2] = x
        return wide[..., 1::2]
    assert layout == "transposed"  # the batch innermost
    return x.movedim(0, -1).contiguous().movedim(-1, 0)


def _activate(z: Tensor, name: str | None) -> tuple[Tensor, Tensor]:
    """activation(z) and its derivative."""
    sigmoid, one = 1 / (1 + torch.exp(-z)), torch.ones_like(z)
    normal_cdf = 0.5 * (1 + torch.special.erf(z / math.sqrt(2)))
    normal_pdf = torch.exp(-z * z / 2) / math.sqrt(2 * math.pi)
    return {
        None: lambda: (z, one),
        "relu": lambda: (z.clamp(min=0), one * (z > 0)),
        "leaky_relu": lambda: (torch.where(z > 0, z, 0.01 * z), torch.where(z > 0, one, 0.01 * one)),
        "silu": lambda: (z * sigmoid, sigmoid * (1 + z * (1 - sigmoid))),
        "gelu": lambda: (z * normal_cdf, normal_cdf + z * normal_pdf),
        "hardswish": lambda: (
            z * (z + 3).clamp(0, 6) / 6,
            torch.where(z <= -3, 0 * one, torch.where(z >= 3, one, (2 * z + 3) / 6)),
        ),
        "sigmoid": lambda: (sigmoid, sigmoid * (1 - sigmoid)),
        "tanh": lambda: (torch.tanh(z), 1 - torch.tanh(z) ** 2),
    }[name]()


def exact(case: Case) -> Results:
    """All results by formula, in float64, without autograd."""
    dims = (0, *range(2, case.x.dim()))
    shape = (1, -1) + (1,) * (case.x.dim() - 2)
    x, dy = case.x.double(), case.dy.double()
    n = x.numel() // x.shape[1]
    results: Results = {}
    if case.training:
        mean, var = x.mean(dims), x.var(dims, correction=0)
        for name, batch in (("running_mean", mean), ("running_var", var * n / (n - 1))):
            if (old := getattr(case, name)) is not None:
                results[name] = (1 - case.momentum) * old.double() + case.momentum * batch
    else:
        mean, var = case.running_mean.double(), case.running_var.double()
        results |= {"running_mean": mean, "running_var": var}
    weight = torch.ones_like(mean) if case.weight is None else case.weight.double()
    bias = torch.zeros_like(mean) if case.bias is None else case.bias.double()
    residual = 0.0 if case.residual is None else case.residual.double()
    invstd = (1 / torch.sqrt(var + case.eps)).view(shape)
    xhat = (x - mean.view(shape)) * invstd
    results["y"], slope = _activate(weight.view(shape) * xhat + bias.view(shape) + residual, case.activation)
    g = dy * slope
    dweight, dbias = (g * xhat).sum(dims), g.sum(dims)
    through_statistics = (dbias.view(shape) + xhat * dweight.view(shape)) / n if case.training else 0.0
    results["dx"] = weight.view(shape) * invstd * (g - through_statistics)
    results["dresidual"] = None if case.residual is None else g
    results["dweight"] = None if case.weight is None else dweight
    results["dbias"] = None if case.bias is None else dbias
    return results


def run(case: Case, function: Callable[[Case], Tensor]) -> Results:
    """All results of `function`, which calls some implementation with the fields of the case it is given."""
    copy = dataclasses.replace(case)
    for name in ("x", "weight", "bias", "residual"):
        if (tensor := getattr(case, name)) is not None:
            setattr(copy, name, tensor.detach().requires_grad_())
    for name in ("running_mean", "running_var"):
        if (tensor := getattr(case, name)) is not None:
            setattr(copy, name, tensor.clone())
    y = function(copy)
    y.backward(case.dy.to(y.dtype))
    results: Results = {"y": y.detach(), "running_mean": copy.running_mean, "running_var": copy.running_var}
    for name in ("x", "weight", "bias", "residual"):
        tensor = getattr(copy, name)
        results["d" + name] = None if tensor is None else tensor.grad
    return results


def eager(case: Case) -> Tensor:
    """The chain of PyTorch's own operators, in the types that a user's network would have."""
    y = F.batch_norm(
        case.x, case.running_mean, case.running_var, case.weight, case.bias, case.training, case.momentum, case.eps
    )
    if case.residual is not None:
        y = y + case.residual
    functions = {name: getattr(F, name) for name in ACTIVATIONS if name} | {None: lambda z: z}
    return functions[case.activation](y)


def slopes(case: Case) -> Tensor:
    """dx̂/dx of each channel, apart from what goes by way of the statistics: 1/σ."""
    var = case.x.double().movedim(1, 0).flatten(1).var(1, correction=0) if case.training else case.running_var
    assert var is not None
    return (var.double() + case.eps).rsqrt()


def largest_term_of_dx(case: Case) -> float:
    """The size of what is summed to dx: the terms cancel each other where a channel has few different values."""
    weight = 1.0 if case.weight is None else case.weight.double().abs()
    return ((slopes(case) * weight).max() * case.dy.double().abs().max()).item()


def assert_as_accurate(ours: Results, case: Case, label: str = "") -> None:
    """Each tensor of `ours` is about as near to the exact one as eager PyTorch's."""
    theirs, true = run(case, eager), exact(case)
    summed = case.dy.double().abs().sum().item() / case.x.shape[1]
    scales = {"dweight": summed, "dbias": summed, "running_mean": case.x.double().abs().max().item()}
    if case.x.numel():
        scales["dx"] = largest_term_of_dx(case)
    for name, wanted in true.items():
        if wanted is None:
            assert ours[name] is None, f"{name} should not be there {label}"
        else:
            assert_near(name, ours[name], theirs[name], wanted, label, scale=scales.get(name, 0.0))


def assert_near(
    name: str, ours: Tensor | None, theirs: Tensor | None, true: Tensor, label: str = "", *, scale: float = 0.0
) -> None:
    """The largest error of `ours` is at most twice that of `theirs`, plus four last places of its largest value.

    Sums may cancel: they get one last place more of `scale`, the size of what is summed, in the type
    that sums are kept in.
    """
    assert ours is not None, f"{name} is missing {label}"
    assert theirs is not None
    assert ours.shape == true.shape, f"{name}: shape {tuple(ours.shape)} {label}"
    assert ours.dtype == theirs.dtype, f"{name}: {ours.dtype} instead of {theirs.dtype} {label}"
    if ours.numel() == 0:
        return
    error, eager_error = ((t.double() - true).abs().max().item() for t in (ours, theirs))
    kept_in = torch.finfo(torch.float64 if ours.dtype == torch.float64 else torch.float32)
    last_place = torch.finfo(ours.dtype).eps if ours.is_floating_point() else 0.0
    allowed = 2 * eager_error + 4 * last_place * true.abs().max().item() + kept_in.eps * scale
    assert error <= allowed, f"{name}: error {error:.2e}, eager's {eager_error:.2e}, allowed {allowed:.2e} {label}"
