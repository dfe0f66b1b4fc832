"""`bnkit convert`: weights in and out keep their values, options reach the layers, bad use is one clear error."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from bnkit import UserError, models
from bnkit._weights import read_weights, save_weights

OPTIONS = ("-o", "num_classes=2", "-o", "in_channels=3", "-o", "image_size=32")


@pytest.fixture
def saved(tmp_path: Path) -> Path:
    torch.manual_seed(0)
    model = models.create("vgg11", norm="batch", num_classes=2, in_channels=3, image_size=32)
    model(torch.randn(4, 3, 32, 32))  # running statistics of its own
    save_weights(model, tmp_path / "batch.pt")
    return tmp_path / "batch.pt"


def test_weights_go_through_unchanged(bnkit: Callable, saved: Path, tmp_path: Path):
    result = bnkit("convert", "vgg11", saved, *OPTIONS, "--to", "ghost", "--norm-option", "ghost_size=2",
                   "--where", "features", "--out", tmp_path / "ghost.safetensors")  # fmt: skip
    assert result.exit_code == 0, result.output
    assert "8 changed, 0 skipped" in result.output
    assert "→ GhostBatchNorm" in result.output
    before, after = read_weights(saved), read_weights(tmp_path / "ghost.safetensors")
    assert set(before) == set(after)
    assert all(torch.equal(before[name], after[name]) for name in before)


def test_json(bnkit: Callable, tmp_path: Path):
    result = bnkit("convert", "vgg11", *OPTIONS, "--to", "batch", "--json")
    facts = json.loads(result.stdout)
    assert facts["changed"] == {}
    assert set(facts["skipped"].values()) == {"is a BatchNorm2d already"}
    assert (facts["max_error"], facts["out"]) == (None, None)


def test_outputs_are_compared_where_a_shape_is_given(bnkit: Callable):
    facts = json.loads(bnkit("convert", "vgg11", *OPTIONS, "--to", "ghost", "--shape", "3,32,32", "--json").stdout)
    assert len(facts["changed"]) == 8
    assert facts["max_error"] < 1e-5
    result = bnkit("convert", "vgg11", *OPTIONS, "--to", "torch", "--shape", "3,32,32", "--tolerance", -1)
    assert result.exit_code == 1
    assert "convert must leave the outputs as they were" in result.stderr
    with pytest.raises(UserError, match="--tolerance is for outputs, which there are only of inputs of a --shape"):
        bnkit("convert", "vgg11", *OPTIONS, "--to", "torch", "--tolerance", 1e-4)
    with pytest.raises(UserError, match=r"must run on inputs of shape \(2, 1, 32, 32\)"):
        bnkit("convert", "vgg11", *OPTIONS, "--to", "ghost", "--shape", "1,32,32")


def test_bad_use_is_one_clear_error(bnkit: Callable, tmp_path: Path):
    with pytest.raises(UserError, match="--norm-option is NAME=VALUE, got 'ghost_size'"):
        bnkit("convert", "vgg11", *OPTIONS, "--to", "ghost", "--norm-option", "ghost_size")
    with pytest.raises(UserError, match="has no option 'size'"):
        bnkit("convert", "vgg11", *OPTIONS, "--to", "ghost", "--norm-option", "size=2")
    with pytest.raises(UserError, match=r"kind of norm 'gost'.*ghost"):
        bnkit("convert", "vgg11", *OPTIONS, "--to", "gost")
    with pytest.raises(UserError, match=r"name a .safetensors or .pt file"):
        bnkit("convert", "vgg11", *OPTIONS, "--to", "ghost", "--out", tmp_path / "program.pt2")


@pytest.mark.parametrize("name", ["inplace", "where", "example", "forward", "model", "to", "tolerance"])
def test_an_argument_of_convert_is_no_option_of_the_layers(bnkit: Callable, name: str):
    with pytest.raises(UserError, match=f"--norm-option is for the new layers, got {name} of convert itself"):
        bnkit("convert", "vgg11", *OPTIONS, "--norm-option", f"{name}=True")


@pytest.mark.parametrize("value", ["[1]", "abc"])
@pytest.mark.parametrize(
    ("kind", "option"), [("ghost", "ghost_size"), ("sync", "timeout"), ("renorm", "r_max"), ("batch", "activation")]
)
def test_a_value_of_another_type_is_one_clear_error(bnkit: Callable, kind: str, option: str, value: str):
    with pytest.raises(UserError) as caught:
        bnkit("convert", "vgg11", *OPTIONS, "--to", kind, "--norm-option", f"{option}={value}")
    words = str(caught.value)
    assert option in words
    assert value in words
    assert "\n" not in words
