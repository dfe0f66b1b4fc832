"""Corrupted images, and what adaptation to them is measured and said to do."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import pytest
import torch
from torch import nn

from bnkit import UserError
from bnkit.experiments import corruptions
from bnkit.experiments._corrupt import STRENGTHS, corrupted
from bnkit.experiments._corruptions_page import figure
from bnkit.experiments._corruptions_record import Corruptions, CorruptionsConfig, Measured

SMALL = CorruptionsConfig(test_images=12, adaptation_images=20, counts=(1, 8, None), strengths=(1, 5))


def pixels(count: int = 8) -> torch.Tensor:
    return torch.rand(count, 3, 8, 8)


@pytest.mark.parametrize("corruption", list(STRENGTHS))
def test_the_stronger_the_further_from_the_image(corruption):
    images = pixels()
    distances = [(corrupted(images, corruption, s) - images).square().mean().item() for s in range(6)]
    assert distances[0] == 0
    assert distances == sorted(distances)
    assert len(set(distances)) == 6
    made = corrupted(images, corruption, 5)
    assert 0 <= made.min() <= made.max() <= 1


def test_each_by_its_formula():
    images = pixels() * 0.4 + 0.3  # far enough from 0 and 1 that nothing is clipped
    torch.testing.assert_close(corrupted(images, "brightness", 2), images + 0.1)
    mean = images.mean((2, 3), keepdim=True)
    torch.testing.assert_close(corrupted(images, "contrast", 3), mean + 0.4 * (images - mean))
    noise = corrupted(torch.full((4, 3, 64, 64), 0.5), "noise", 1) - 0.5
    assert noise.std().item() == pytest.approx(0.04, rel=0.02)
    assert torch.equal(corrupted(images, "noise", 3, seed=1), corrupted(images, "noise", 3, seed=1))
    assert not torch.equal(corrupted(images, "noise", 3, seed=1), corrupted(images, "noise", 3, seed=2))
    point = torch.zeros(1, 1, 9, 9)
    point[0, 0, 4, 4] = 1
    weights = torch.exp(-0.5 * (torch.arange(-4, 5) / 0.7).square())
    weights /= weights.sum()
    torch.testing.assert_close(corrupted(point, "blur", 3)[0, 0], weights.outer(weights), rtol=1e-4, atol=1e-6)


def test_unknown_ones():
    with pytest.raises(UserError, match="unknown corruption 'blurr': did you mean blur"):
        corrupted(pixels(), "blurr", 1)
    with pytest.raises(UserError, match="strength is 0 to 5, got 6"):
        corrupted(pixels(), "blur", 6)


def network() -> nn.Module:
    return nn.Sequential(nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.ReLU(), nn.Flatten(), nn.Linear(8 * 36, 4)).eval()


def test_runs_and_leaves_the_networks_alone():
    torch.manual_seed(0)
    model, images, labels = network(), torch.randint(256, (40, 3, 8, 8), dtype=torch.uint8), torch.randint(4, (40,))
    before = [tensor.clone() for tensor in model.state_dict().values()]
    result = corruptions.classify({"net": model}, images, labels, SMALL)
    assert all(torch.equal(a, b) for a, b in zip(before, model.state_dict().values(), strict=True))
    assert len(result.measured) == (1 + 4 * 2) * (1 + 3 * 3)
    assert {m.count for m in result.measured} == {None, 1, 8, 20}
    expected = (model(corruptions._normalized(images.float() / 255)).argmax(1) == labels).double().mean().item()
    assert result.whole_set["net"] == pytest.approx(expected)
    again = corruptions.classify({"net": model}, images, labels, SMALL)
    assert dataclasses.asdict(again) == dataclasses.asdict(result)
    page = corruptions.page_of(result, "the command")
    assert page.command == "the command"
    assert page.tables[0].columns == ["", "n = 1", "n = 8", "n = 20"]
    assert len(page.figures[0].plots) == 4


def test_too_few_images():
    with pytest.raises(UserError, match="32 images are needed, got 5"):
        corruptions.classify({"net": network()}, torch.zeros(5, 3, 8, 8, dtype=torch.uint8), torch.zeros(5), SMALL)


def made_up(after: float) -> Corruptions:
    """Before 0.5 on corrupted images, 0.8 on others; after adaptation with n = 8 and N = 16 as given, else 0.1."""
    domains = [("none", 0), *((name, s) for name in STRENGTHS for s in SMALL.strengths)]
    found = []
    for corruption, strength in domains:
        found.append(Measured("net", corruption, strength, None, None, 0.5 if strength else 0.8))
        for n in SMALL.sizes:
            found += [
                Measured("net", corruption, strength, n, w, after if (n, w) == (8, 16) else 0.1) for w in (0, 16, 128)
            ]
    return Corruptions(SMALL, {"net": 0.75}, found)


@pytest.mark.parametrize(("after", "words"), [(0.7, "wins back accuracy: 70.0%"), (0.4, "does not win back accuracy")])
def test_words_follow_the_numbers(after, words):
    page = corruptions.page_of(made_up(after))
    assert page.summary[0].startswith("net: 80.0% as the images are, 50.0% corrupted;")
    assert words in page.summary[0]
    assert "with n = 8, N = 16" in page.summary[0]
    assert page.tables[0].rows[1] == ["N = 16", "10.0%", f"{after:.1%}", "10.0%"]
    assert "75.00% on all test images" in page.tables[0].note


def test_the_figure_begins_with_the_images_as_they_are():
    curves = figure(made_up(0.7)).plots[2].curves
    assert [curve.label for curve in curves] == ["as trained", "n = 1, N = 0", "n = 8, N = 16"]
    assert (list(curves[0].x), list(curves[0].y)) == ([0, 1, 5], [0.8, 0.5, 0.5])


def test_weights_that_are_not_there(tmp_path):
    with pytest.raises(UserError, match=r"there is no file .*resnet20"):
        corruptions.corruptions("digits", tmp_path)


def test_published_weights_load():
    weights = Path(__file__).parents[2].parent / "shared" / "weights"
    if not (weights / corruptions.WEIGHTS["resnet20"]).is_file():
        pytest.skip(f"no weights in {weights}")
    with pytest.raises(UserError, match=r"no such folder: ./absent\.zip"):
        corruptions.corruptions("./absent.zip", weights)
