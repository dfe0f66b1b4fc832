"""Our networks beside those of torchvision and timm: the same keys, and the same outputs with the same weights."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import nn


def on_meta(make: Callable[[], nn.Module]) -> nn.Module:
    """A network without memory for its weights."""
    with torch.device("meta"):
        return make()


def shapes(model: nn.Module) -> dict[str, tuple[int, ...]]:
    return {key: tuple(value.shape) for key, value in model.state_dict().items()}


def parameters(model: nn.Module) -> int:
    return sum(p.numel() for p in model.parameters())


def draw_state(model: nn.Module) -> dict[str, torch.Tensor]:
    """Weights and statistics that differ from their defaults, so that none can be forgotten unseen."""
    state = model.state_dict()
    for key, value in state.items():
        if value.dim() > 1:
            value.normal_(0, (2 / value[0].numel()) ** 0.5)
        elif value.dim() == 1:
            low, high = (-0.2, 0.2) if key.endswith(("bias", "running_mean")) else (0.5, 1.5)
            value.uniform_(low, high)
            if key.endswith("bn3.weight"):  # as trained bottlenecks have it; else rounding errors grow with the depth
                value.mul_(0.2)
        else:
            value.zero_()
    return state


def fresh_state(model: nn.Module) -> dict[str, torch.Tensor]:
    """Weights as torch.nn draws them, with calm branches: in deep networks others amplify float32's rounding."""
    for layer in model.modules():
        if isinstance(layer, (nn.Conv2d, nn.Linear, nn.modules.batchnorm._BatchNorm)):
            layer.reset_parameters()
    for key, value in model.state_dict().items():
        if key.endswith(("bn2.weight", "bn3.weight")):
            value.mul_(0.2)
    return model.state_dict()


DRAWS = {torch.float32: fresh_state, torch.float64: draw_state}


def agree(
    ours: nn.Module,
    theirs: nn.Module,
    x: torch.Tensor,
    tolerance: float,
    statistics: float | None = None,
    draw: Callable[[nn.Module], dict[str, torch.Tensor]] = draw_state,
) -> None:
    """With one state, which `draw` makes, the two give the same outputs and gradients in training, update the same
    statistics, and give the same outputs in eval mode; the models are on the meta device."""
    ours.to(x.dtype).to_empty(device="cpu")
    theirs.to(x.dtype).to_empty(device="cpu")
    ours.load_state_dict(draw(theirs))
    for training in (True, False):
        expected, got = theirs.train(training)(x), ours.train(training)(x)
        assert expected.std() > 1e-3
        close(got, expected, tolerance)
        if training:
            upstream = torch.randn_like(expected)
            expected.backward(upstream)
            got.backward(upstream)
    gradients = dict(ours.named_parameters())
    for key, parameter in theirs.named_parameters():
        assert parameter.grad is not None
        assert gradients[key].grad is not None, key
    first = next(iter(gradients))
    close(gradients[first].grad, dict(theirs.named_parameters())[first].grad, 100 * tolerance)  # pyright: ignore
    for key, value in theirs.state_dict().items():
        close(ours.state_dict()[key], value, statistics or tolerance, key)


def close(got: torch.Tensor, expected: torch.Tensor, tolerance: float, what: str = "y") -> None:
    """To a part of the largest value."""
    assert (got - expected).abs().max() <= tolerance * max(expected.abs().max(), 1e-3), what
