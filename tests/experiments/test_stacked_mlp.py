"""The stack against the same networks as ordinary modules, in float64."""

import copy

import pytest
import torch
from torch import nn

from bnkit import models
from bnkit.experiments._lit_pixels import LitPixels, lists_of
from bnkit.experiments._stacked_input import Inputs
from bnkit.experiments._stacked_mlp import StackedMLP

CONFIGURATIONS = [("none", 0.1, 0.5), ("none", 0.3, 0.1), ("batch", 0.1, 0.5), ("batch", 0.3, 2.0)]


def create(norm, std, seed, hidden=(12, 9, 9)):
    torch.manual_seed(seed)
    net = models.create("mlp", norm=norm, num_classes=5, in_channels=1, image_size=6, init=std, hidden=hidden)
    for module in net.modules():
        if isinstance(module, nn.modules.batchnorm._BatchNorm):
            nn.init.uniform_(module.weight, 0.5, 1.5)
            nn.init.uniform_(module.bias, -0.5, 0.5)
    return net.double()


def stack_of(configurations, seeds, lit=False, **options):
    nets = [[create(norm, std, seed, **options) for seed in range(seeds)] for norm, std, _ in configurations]
    return StackedMLP(nets, [rate for _, _, rate in configurations], Inputs(scale=0.5, lit=lit))


def descend(net, x, y, rate):
    net.zero_grad()
    nn.functional.cross_entropy(net(x), y).backward()
    with torch.no_grad():
        for parameter in net.parameters():
            parameter -= rate * parameter.grad


def batches(seeds, sizes, dtype=torch.float64):
    generator = torch.Generator().manual_seed(0)
    for size in sizes:
        x = torch.rand(seeds, size, 36, generator=generator, dtype=dtype)
        yield x, torch.randint(0, 5, (seeds, size), generator=generator)


@pytest.mark.parametrize("seeds", [1, 3])
@pytest.mark.parametrize(
    "configurations",
    [CONFIGURATIONS, CONFIGURATIONS[:1], CONFIGURATIONS[2:3]],
    ids=["both norms", "without norm only", "with norm only"],
)
def test_trains_like_the_modules(configurations, seeds):
    stack = stack_of(configurations, seeds)
    expected = copy.deepcopy(stack.nets)
    # The batch size changes on the way, as it does for whoever steps by hand.
    for x, y in batches(seeds, [7] * 10 + [4] * 5):
        stack.step(x.unbind(), nn.functional.one_hot(y, 5).double())
        for row, (_, _, rate) in zip(expected, configurations, strict=True):
            for seed, net in enumerate(row):
                descend(net, x[seed] / 2, y[seed], rate)
    stack.store()
    for row, expected_row in zip(stack.nets, expected, strict=True):
        for net, expected_net in zip(row, expected_row, strict=True):
            for (name, value), want in zip(net.state_dict().items(), expected_net.state_dict().values(), strict=True):
                if not name.endswith("num_batches_tracked"):
                    torch.testing.assert_close(
                        value, want, rtol=1e-9, atol=1e-11, msg=lambda m, name=name: f"{name}: {m}"
                    )


@pytest.mark.parametrize("seeds", [1, 3])
def test_lists_of_lit_pixels_train_and_evaluate_like_the_images(seeds):
    lit, dense = (stack_of(CONFIGURATIONS, seeds, lit=lit) for lit in (True, False))
    for x, y in batches(seeds, [7] * 6 + [4] * 3):
        images, target = x < 0.2, nn.functional.one_hot(y, 5).double()
        lit.step(LitPixels.of(images.numpy()), target)
        dense.step(images.double().unbind(), target)
    images = torch.rand(11, 36) < 0.2
    found, expected = lit.frozen()(lists_of(images[None].numpy())[0]), dense.frozen()(images.double())
    torch.testing.assert_close(found, expected, rtol=1e-10, atol=1e-12)
    torch.testing.assert_close(lit.input.weights_of_nets(), dense.input.weights_of_nets(), rtol=1e-10, atol=1e-12)


def test_frozen_networks_do_not_follow_the_training():
    stack = stack_of(CONFIGURATIONS, 2)
    x = torch.rand(11, 36, dtype=torch.float64)
    frozen, (before, _) = stack.frozen(), stack.frozen()(x)
    for rows, y in batches(2, [8] * 3):
        stack.step(rows.unbind(), nn.functional.one_hot(y, 5).double())
    torch.testing.assert_close(frozen(x)[0], before, rtol=0, atol=0)
    assert not torch.allclose(stack.frozen()(x)[0], before)


@pytest.mark.parametrize("seeds", [1, 2])
def test_evaluates_like_the_modules(seeds):
    stack = stack_of(CONFIGURATIONS, seeds)
    for x, y in batches(seeds, [8] * 5):
        stack.step(x.unbind(), nn.functional.one_hot(y, 5).double())
    stack.store()
    x = torch.rand(11, 36, dtype=torch.float64)
    logits, z = stack.frozen()(x)
    for k, row in enumerate(stack.nets):
        for seed, net in enumerate(row):
            net.eval()
            torch.testing.assert_close(logits[:, k, seed], net(x / 2), rtol=1e-10, atol=1e-12)
            torch.testing.assert_close(z[:, k, seed].sigmoid(), net.features(x / 2), rtol=1e-10, atol=1e-12)


def test_a_diverging_network_leaves_the_others_alone():
    configurations = [("none", 0.1, 0.5), ("none", 0.1, float("inf")), ("batch", 0.1, 0.5)]
    stack, alone = stack_of(configurations, 1), stack_of([configurations[0], configurations[2]], 1)
    for x, y in batches(1, [8] * 4):
        stack.step(x.unbind(), nn.functional.one_hot(y, 5).double())
        alone.step(x.unbind(), nn.functional.one_hot(y, 5).double())
    assert stack.bias[1].isnan().any()
    torch.testing.assert_close(stack.bias[[0, 2]], alone.bias, rtol=1e-12, atol=1e-14)


def test_float32_stays_close_to_float64():
    """float32 takes another path, oneDNN's product, so it is compared too."""
    double = stack_of(CONFIGURATIONS, 2)
    nets = [[copy.deepcopy(net).float() for net in row] for row in double.nets]
    single = StackedMLP(nets, [rate for _, _, rate in CONFIGURATIONS], Inputs(scale=0.5))
    for x, y in batches(2, [8] * 3):
        target = nn.functional.one_hot(y, 5)
        double.step(x.unbind(), target.double())
        single.step(x.float().unbind(), target.float())
    x = torch.rand(11, 36, dtype=torch.float64)
    torch.testing.assert_close(single.frozen()(x.float())[0].double(), double.frozen()(x)[0], rtol=1e-4, atol=1e-5)
