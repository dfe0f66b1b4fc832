"""Random networks with branches, sharing, functional activations, concatenation and in-place operations."""

from __future__ import annotations

import copy
import random

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch_layers import without_bias

from bnkit.surgery import fold, fuse, insert

CHANNELS = 4
NORMS = ("plain", "no bias", "affine", "untracked")


class Random(nn.Module):
    """A straight-line program of random operations on (N, 4, 6, 6) values, decided by a seed."""

    def __init__(self, seed: int, norms: bool) -> None:
        super().__init__()
        choice = random.Random(seed)
        torch.manual_seed(seed)
        self.layers = nn.ModuleList()
        self.program: list[tuple[str, tuple[int, ...], int]] = []
        kinds = ["conv", "conv", "transposed", "again", "relu", "relu_", "add", "add_", "cat", "pool", "view", "silu"]
        if norms:
            kinds += ["norm"] * 5
        for _ in range(choice.randint(5, 14)):
            kind, last = choice.choice(kinds), len(self.program)
            first, second = (choice.choice([last, last, choice.randrange(last + 1)]) for _ in range(2))
            self._append(kind, first, second, choice)
            if kind == "norm" and choice.random() < 0.4:  # what it read is overwritten before its result is read
                self._append(choice.choice(["relu_", "add_"]), first, second, choice)
                self._append("conv", last + 1, first, choice)
        self.double()
        with torch.no_grad():
            for module in self.modules():
                if isinstance(module, nn.BatchNorm2d) and module.running_var is not None:
                    module.running_mean.normal_()
                    module.running_var.uniform_(0.3, 2)
                    for parameter in module.parameters():
                        parameter.normal_()

    def _append(self, kind: str, first: int, second: int, choice: random.Random) -> None:
        self.program.append((kind, (first, second), self._layer(kind, choice)))

    def _layer(self, kind: str, choice: random.Random) -> int:
        if kind == "again":
            return choice.randrange(len(self.layers)) if len(self.layers) else -1
        made = {
            "conv": lambda: self._conv(choice),
            "transposed": lambda: nn.ConvTranspose2d(4, 4, 3, padding=1, groups=choice.choice([1, 2])),
            "cat": lambda: nn.Conv2d(8, 4, 1),
            "norm": lambda: self._norm(choice.choice(NORMS)),
        }.get(kind)
        if made is None:
            return -1
        self.layers.append(made())
        return len(self.layers) - 1

    @staticmethod
    def _conv(choice: random.Random) -> nn.Module:
        size = choice.choice([1, 3])
        mode = choice.choice(["zeros", "zeros", "circular"])
        return nn.Conv2d(4, 4, size, padding=size // 2, groups=choice.choice([1, 2, 4]), bias=choice.random() < 0.5,
                         padding_mode=mode)  # fmt: skip

    @staticmethod
    def _norm(kind: str) -> nn.Module:
        if kind == "no bias":
            return without_bias(nn.BatchNorm2d(CHANNELS))
        return nn.BatchNorm2d(CHANNELS, affine=kind != "plain", track_running_stats=kind != "untracked")

    def forward(self, x: Tensor) -> Tensor:
        values = [x]
        for kind, (first, second), layer in self.program:
            values.append(self._run(kind, values[first], values[second], layer))
        return values[-1] + values[len(values) // 2]

    def _run(self, kind: str, x: Tensor, other: Tensor, layer: int) -> Tensor:
        if kind == "cat":
            return self.layers[layer](torch.cat([x, other], 1))
        if layer >= 0:
            module = self.layers[layer]
            return module(torch.cat([x, x], 1)) if getattr(module, "in_channels", 4) == 8 else module(x)
        functions = {
            "relu": lambda: F.relu(x),
            "relu_": lambda: F.relu(x, inplace=True),
            "silu": lambda: F.silu(x),
            "add": lambda: x + other,
            "add_": lambda: x.add_(0.1 * other),
            "pool": lambda: F.avg_pool2d(x, 3, 1, 1),
            "view": lambda: x.flatten(2).unflatten(2, x.shape[2:]),
            "again": lambda: x,
        }
        return functions[kind]()


def values(count: int, seed: int) -> Tensor:
    return torch.randn((count, 4, 6, 6), generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def assert_same(found: nn.Module, expected: nn.Module) -> None:
    x = values(3, 9)
    torch.testing.assert_close(found.eval()(x.clone()), expected.eval()(x.clone()), rtol=1e-8, atol=1e-8)


def seeds(count: int, total: int) -> list[object]:
    return [*range(count), *(pytest.param(seed, marks=pytest.mark.sweep) for seed in range(count, total))]


def example(model: nn.Module, batch: Tensor) -> Tensor:
    return model(batch.clone())  # the program may write into its input


@pytest.mark.parametrize("seed", seeds(60, 1500))
@pytest.mark.parametrize("padding", ["refuse", "exact"])
def test_fold(seed, padding):
    model = Random(seed, norms=True).eval()
    before = copy.deepcopy(model)
    result = fold(model, values(2, 8), padding=padding, forward=example, tolerance=1e-7)
    assert_same(result.model, before)
    assert_same(model, before)
    norms = [m for m in model.modules() if isinstance(m, nn.BatchNorm2d)]
    assert len(result.changed) + len(result.skipped) == len(norms)
    assert not fold(result.model, values(2, 8), padding=padding, forward=example, tolerance=1e-7).changed


@pytest.mark.parametrize("seed", seeds(60, 1500))
def test_insert(seed):
    model = Random(seed, norms=seed % 2 == 0).eval()
    result = insert(model, [values(4, 8), values(3, 7)], forward=example, tolerance=1e-7)
    assert_same(result.model, model)
    again = fold(result.model, values(2, 8), forward=example, tolerance=1e-7)
    assert_same(again.model, model)


@pytest.mark.parametrize("seed", seeds(30, 500))
def test_fuse(seed):
    model = Random(seed, norms=True).eval()
    result = fuse(model, values(3, 8), forward=example, tolerance=1e-7)
    assert_same(result.model, model)


def test_the_programs_reach_what_they_are_for():
    """Of the first seeds some must fold, be refused, share a layer and write in place."""
    results = [
        fold(Random(seed, norms=True).eval(), values(2, 8), forward=example, tolerance=1e-7) for seed in range(90)
    ]
    reasons = " ".join(reason for result in results for reason in result.skipped.values())
    assert sum(len(result.changed) for result in results) > 20
    for reason in ("runs 2 times", "used elsewhere", "batch's statistics", "comes from relu", "is overwritten"):
        assert reason in reasons
