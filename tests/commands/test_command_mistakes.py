"""Bad use of the commands ends in one line that says what to do."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from typer.testing import Result

from bnkit import UserError, models
from bnkit._weights import save_weights

Command = Callable[..., Result]


@pytest.fixture
def checkpoint(tmp_path: Path) -> Path:
    save_weights(models.create("lenet5", num_classes=10, in_channels=1), tmp_path / "lenet5.pt")
    return tmp_path / "lenet5.pt"


def assert_refused(bnkit: Command, words: str, *arguments: object) -> None:
    with pytest.raises(UserError, match=words) as caught:
        bnkit(*arguments)
    assert "\n" not in str(caught.value)


@pytest.mark.skipif(torch.cuda.is_available(), reason="this machine has the device")
@pytest.mark.parametrize("command", ["recalibrate", "adapt"])
def test_a_device_that_is_not_there(bnkit: Command, checkpoint: Path, command: str) -> None:
    arguments = [command, "lenet5", checkpoint, "--data", "digits", "--out", "after.pt"]
    assert_refused(bnkit, "this machine has no cuda device: choose device='cpu'", *arguments, "--device", "cuda")
    assert not Path("after.pt").exists()


@pytest.mark.skipif(torch.cuda.is_available(), reason="this machine has the device")
def test_training_on_a_device_that_is_not_there_writes_nothing(bnkit: Command) -> None:
    assert_refused(bnkit, "this machine has no cuda device", "train", "--device", "cuda", "--out", "run")
    assert not Path("run").exists()


def test_a_folder_as_output_file(bnkit: Command, checkpoint: Path, tmp_path: Path) -> None:
    arguments = ["recalibrate", "lenet5", checkpoint, "--data", "digits", "--out", tmp_path]
    assert_refused(bnkit, "--out must be a file, got the folder .*: name a file in it", *arguments)


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--norm", "bath"], "unknown norm 'bath': did you mean batch"),
        (["--image-size", "0"], "--image-size must be at least 1, got 0"),
        (["--image-size", "5"], "vgg needs images of 17 pixels a side or more, got image_size=5"),
    ],
)
def test_models_that_can_not_be_counted(bnkit: Command, arguments: list[str], words: str) -> None:
    assert_refused(bnkit, words, "models", "vgg11", *arguments)


def test_a_size_for_some_models_only(bnkit: Command) -> None:
    found = json.loads(bnkit("models", "[mv]*[p1]", "--image-size", "5", "--json").stdout)
    assert found.keys() == {"mlp", "vgg11"}
    assert "error" in found["vgg11"]
    assert found["mlp"]["parameters"] > 0


@pytest.mark.parametrize("epochs", ["inf", "nan", "0"])
def test_epochs_without_end(bnkit: Command, epochs: str) -> None:
    assert_refused(bnkit, "epochs must be positive and finite, got", "train", "--epochs", epochs)


@pytest.mark.parametrize("content", ["{}", "[]", "3", '{"recipe": {}}'])
@pytest.mark.parametrize("command", [["evaluate"], ["train", "--resume"]])
def test_a_run_that_lacks_its_recipe(bnkit: Command, tmp_path: Path, content: str, command: list[str]) -> None:
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "run.json").write_text(content)
    assert_refused(bnkit, "it lacks recipe and config: name another run", *command, "run")


def test_a_factory_s_error_of_several_lines(bnkit: Command, tmp_path: Path) -> None:
    (tmp_path / "mine.py").write_text("def make():\n    raise RuntimeError('one\\ntwo')\n")
    assert_refused(bnkit, r"mine.py:make failed \(RuntimeError: one two\)", "train", "--model", "mine.py:make")


def test_a_long_list_of_choices_is_cut_short(bnkit: Command) -> None:
    pytest.importorskip("timm")
    with pytest.raises(UserError, match=r"unknown timm model 'qqqq': choose one of .* and [\d,]+ more\.") as caught:
        bnkit("train", "--model", "timm:qqqq")
    assert len(str(caught.value)) < 4000


def test_a_model_for_other_images(bnkit: Command) -> None:
    words = r"torchvision:resnet18 can't take images of shape \(1, 28, 28\) \(RuntimeError: .* 3 channels.*\): build it"
    assert_refused(bnkit, words, "train", "--model", "torchvision:resnet18", "--data", "digits", "--out", "run")
