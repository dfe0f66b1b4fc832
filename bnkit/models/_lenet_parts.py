"""The parts of LeNet-5 that later networks gave up (LeCun et al. 1998, section II-B)."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ._init import Init, initializer

CONNECTIONS: tuple[tuple[int, ...], ...] = (
    *((0, 1, 2), (1, 2, 3), (2, 3, 4), (3, 4, 5), (0, 4, 5), (0, 1, 5)),
    *((0, 1, 2, 3), (1, 2, 3, 4), (2, 3, 4, 5), (0, 3, 4, 5), (0, 1, 4, 5), (0, 1, 2, 5)),
    *((0, 1, 3, 4), (1, 2, 4, 5), (0, 2, 3, 5), (0, 1, 2, 3, 4, 5)),
)
"""Table I: the maps of S2 that each map of C3 sees."""

# Stylized digits of 7×12 pixels, as in figure 3, which shows the paper's own.
_DIGITS = """
.#####. ...##.. .#####. .#####. ....##. ####### .#####. ####### .#####. .#####.
##...## ..###.. ##...## ##...## ...###. ##..... ##...## .....## ##...## ##...##
##...## .####.. ##...## .....## ..####. ##..... ##..... ....##. ##...## ##...##
##...## ...##.. .....## .....## .##.##. ##..... ##..... ....##. ##...## ##...##
##...## ...##.. .....## .....## ##..##. ######. ##..... ...##.. .##.##. ##...##
##...## ...##.. ....##. ..####. ##..##. .....## ######. ...##.. ..###.. .######
##...## ...##.. ...##.. .....## ####### .....## ##...## ..##... .##.##. .....##
##...## ...##.. ..##... .....## ....##. .....## ##...## ..##... ##...## .....##
##...## ...##.. .##.... .....## ....##. .....## ##...## ..##... ##...## .....##
##...## ...##.. ##..... ##...## ....##. ##...## ##...## ..##... ##...## ##...##
.#####. .###### ####### .#####. ....##. .#####. .#####. ..##... .#####. .#####.
....... ....... ....... ....... ....... ....... ....... ....... ....... .......
"""


class ScaledTanh(nn.Module):
    """A tanh(S x), A = 1.7159 and S = 2/3, by which f(±1) = ±1 (equation 6 and appendix A)."""

    def forward(self, x: Tensor) -> Tensor:
        return 1.7159 * torch.tanh(x * (2 / 3))


class Subsampling(nn.Module):
    """2×2 averages of each map, times its trained coefficient, plus its trained bias (layers S2 and S4)."""

    def __init__(self, channels: int):
        super().__init__()
        self.weight = nn.Parameter(torch.ones(channels))
        self.bias = nn.Parameter(torch.zeros(channels))

    def forward(self, x: Tensor) -> Tensor:
        return F.avg_pool2d(x, 2) * self.weight.view(-1, 1, 1) + self.bias.view(-1, 1, 1)


class TableConv2d(nn.Module):
    """A convolution whose output map i sees only the input maps `table[i]` (layer C3).

    Its weight, (number of connections, kernel_size, kernel_size), has the filters in the table's order. They are
    convolved as one dense filter with zeros, which is quicker than by map.
    """

    table: Tensor

    def __init__(self, table: Sequence[Sequence[int]], in_channels: int, kernel_size: int, *, bias: bool, init: Init):
        super().__init__()
        self.shape = (len(table), in_channels, kernel_size, kernel_size)
        connections = [(out, into) for out, inputs in enumerate(table) for into in inputs]
        self.register_buffer("table", torch.tensor(connections).T.contiguous(), persistent=False)
        fill = initializer(init)
        drawn = [fill(torch.empty(1, len(inputs), kernel_size, kernel_size))[0] for inputs in table]
        self.weight = nn.Parameter(torch.cat(drawn))
        self.bias = nn.Parameter(torch.zeros(len(table))) if bias else None

    def forward(self, x: Tensor) -> Tensor:
        dense = self.weight.new_zeros(self.shape).index_put((self.table[0], self.table[1]), self.weight)
        return F.conv2d(x, dense, self.bias)


class RBFOutput(nn.Module):
    """-Σ_j (x_j - w_ij)², the negative squared distance from the fixed code of each class (equation 7)."""

    codes: Tensor

    def __init__(self, codes: Tensor):
        super().__init__()
        self.register_buffer("codes", codes)

    def forward(self, x: Tensor) -> Tensor:
        return -(x.unsqueeze(1) - self.codes).square().sum(2)


def class_codes(num_classes: int) -> Tensor:
    """(num_classes, 84) of ±1: pictures of the ten digits, or for other numbers of classes always the same noise."""
    if num_classes == 10:
        rows = [row.split() for row in _DIGITS.split("\n") if row]
        pixels = [[pixel == "#" for row in rows for pixel in row[digit]] for digit in range(10)]
        return torch.tensor(pixels).float() * 2 - 1
    noise = torch.randint(0, 2, (num_classes, 84), generator=torch.Generator().manual_seed(1998), device="cpu")
    return (noise.float() * 2 - 1).to(torch.get_default_device())
