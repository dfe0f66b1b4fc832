import numpy as np
import pytest
import torch

from bnkit.experiments._lit_pixels import MOST_LIT, LitPixels, lists_of, mostly_dark


@pytest.mark.parametrize("shape", [(1, 1, 1), (3, 7, 13), (2, 60, 784), (1, 5, 1)])
@pytest.mark.parametrize("density", [0.0, 0.13, 1.0])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_sums_are_the_dense_products(shape, density, dtype):
    generator = torch.Generator().manual_seed(0)
    x = torch.rand(shape, generator=generator) < density
    weight = torch.randn(shape[2], 11, generator=generator, dtype=dtype)
    delta = torch.randn(shape[1], 11, generator=generator, dtype=dtype)
    batches = LitPixels.of(x.numpy())
    assert len(batches) == shape[0]
    for batch, dense in zip(batches, x.to(dtype), strict=True):
        assert_sums(batch.by_image.sums(weight), dense, weight)
        assert_sums(batch.by_pixel.sums(delta), dense.T, delta)


def assert_sums(found: torch.Tensor, x: torch.Tensor, matrix: torch.Tensor) -> None:
    """The exact product, up to four roundings of the sum of its terms' sizes: the order of sums is the processor's."""
    exact, sizes = x.double() @ matrix.double(), x.double() @ matrix.double().abs()
    assert found.dtype == matrix.dtype
    assert ((found - exact).abs() <= 4 * torch.finfo(matrix.dtype).eps * sizes).all()


def test_lists_name_the_columns_of_each_row():
    (lists,) = lists_of(np.array([[[0, 1, 1], [0, 0, 0], [1, 0, 0]]], dtype=bool))
    assert lists.rows.tolist() == [1, 2, 0]
    assert lists.starts.tolist() == [0, 2, 2]


def dark(value, lit, size=100):
    images = torch.zeros(2, size, dtype=torch.uint8)
    images.view(-1)[: round(lit * 2 * size)] = value
    return images


@pytest.mark.parametrize(
    ("parts", "expected"),
    [
        ([dark(255, 0.1)], True),
        ([dark(1, MOST_LIT)], True),
        ([dark(255, MOST_LIT + 0.01)], False),
        ([dark(255, 0.1), dark(254, 0.1)], False),
        ([dark(255, 0.1), dark(255, 0.0)], True),
    ],
)
def test_lists_are_for_binary_images_with_few_lit_pixels(parts, expected):
    assert mostly_dark(*parts) is expected
    gray = parts[0].clone()
    gray[0, 0] = 7
    assert not mostly_dark(gray, *parts[1:])
