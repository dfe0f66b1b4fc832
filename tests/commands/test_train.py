from __future__ import annotations

import csv
import itertools
import json
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from rich.console import Console
from torch.optim import SGD
from typer.testing import Result

from bnkit import data
from bnkit._checks import UserError
from bnkit._commands._data import load_for_training
from bnkit._weights import read_weights
from bnkit.report import LiveProgress

Command = Callable[..., Result]
MODEL = ("--model", "lenet5", "--precision", "32-true", "--device", "cpu")


def rows_of(run: Path) -> list[dict[str, str]]:
    return list(csv.DictReader((run / "metrics.csv").read_text().splitlines()))


@pytest.fixture
def run(bnkit: Command, pictures: Path) -> Path:
    result = bnkit("train", *MODEL, "--data", pictures, "--epochs", 4, "--batch-size", 16, "--out", "run")
    assert result.exit_code == 0, result.output
    assert "of the test images right" in " ".join(result.output.split())
    return Path("run").absolute()


def test_a_run_leaves_everything_behind(run: Path):
    assert {path.name for path in run.iterdir()} == {
        "checkpoint.pt",
        "curves.svg",
        "metrics.csv",
        "report.html",
        "run.json",
        "weights.safetensors",
    }
    told = json.loads((run / "run.json").read_text())
    assert told["config"]["augment"] == "crop=4,flip"
    assert told["config"]["steps"] == 4 * (96 // 16)
    assert told["outcome"]["classes"] == ["dark", "light"]
    rows = rows_of(run)
    assert float(rows[-1]["test_accuracy"]) == told["outcome"]["test_accuracy"] > 0.9
    assert int(rows[-1]["step"]) == 24


def test_evaluation_finds_what_training_found(bnkit: Command, run: Path):
    result = json.loads(bnkit("evaluate", run, "--json").output)
    outcome = json.loads((run / "run.json").read_text())["outcome"]
    assert result["results"][0]["accuracy"] == outcome["test_accuracy"]
    assert result["images"] == 24


def test_an_ensemble_averages_probabilities(bnkit: Command, run: Path, pictures: Path):
    bnkit("train", *MODEL, "--data", pictures, "--epochs", 1, "--batch-size", 16, "--seed", 1, "--out", "other")
    result = json.loads(bnkit("evaluate", run, "other", "--json").output)["results"]
    assert [row["name"] for row in result] == [str(run), "other", "ensemble"]
    # The logarithm is concave: the mean probability's loss is at most the mean of the losses.
    assert result[2]["loss"] <= (result[0]["loss"] + result[1]["loss"]) / 2 + 1e-9
    assert result[2]["loss"] != pytest.approx(result[0]["loss"])
    assert "ensemble" in bnkit("evaluate", run, "other").output


def test_an_interrupted_run_is_kept_and_resumed(
    bnkit: Command, run: Path, pictures: Path, monkeypatch: pytest.MonkeyPatch
):
    def interrupt(self: LiveProgress, step: int, accuracies: object):
        if step >= 12:
            raise KeyboardInterrupt

    options = ("--data", pictures, "--epochs", 4, "--batch-size", 16, "--out", "part", "--evaluations", 4)
    with monkeypatch.context() as patch:
        patch.setattr(LiveProgress, "update", interrupt)
        assert "interrupted after step 12 of 24" in bnkit("train", *MODEL, *options).output
    assert json.loads(Path("part/run.json").read_text())["partial"] is not None
    assert rows_of(Path("part"))[-1]["step"] == "12"

    command = json.loads(Path("part/run.json").read_text())["command"]
    with monkeypatch.context() as patch:
        patch.setattr("sys.argv", ["bnkit", "train", "--resume", "part"])
        bnkit("train", "--resume", "part")
    told = json.loads(Path("part/run.json").read_text())
    assert (told["partial"], told["command"]) == (None, command)
    assert [row["step"] for row in rows_of(Path("part"))] == ["0", "6", "12", "18", "24"]
    whole, resumed = read_weights(run / "weights.safetensors"), read_weights("part/weights.safetensors")
    assert all(torch.equal(whole[name], resumed[name]) for name in whole)


@pytest.mark.parametrize("ema", [0, 0.9])
def test_an_interrupted_run_keeps_the_weights_it_evaluated(
    bnkit: Command, pictures: Path, monkeypatch: pytest.MonkeyPatch, ema: float
):
    calls = itertools.count()

    def interrupted(optimizer: SGD, *rest: object):
        if next(calls) == 10:
            raise KeyboardInterrupt
        return step(optimizer, *rest)

    options = ("--data", pictures, "--epochs", 4, "--batch-size", 16, "--out", "part", "--evaluations", 4)
    step = SGD.step
    with monkeypatch.context() as patch:
        patch.setattr(SGD, "step", interrupted)
        assert "interrupted after step 6 of 24" in bnkit("train", *MODEL, *options, "--ema", ema).output
    reported = rows_of(Path("part"))[-1]
    (found,) = json.loads(bnkit("evaluate", "part", "--json").output)["results"]
    assert found["loss"] == pytest.approx(float(reported["test_loss"]), rel=1e-6)


def test_weights_to_start_from(bnkit: Command, run: Path, pictures: Path):
    shared = ("--weights", run / "weights.safetensors", "--lr", 1e-12, "--weight-decay", 0)
    bnkit("train", *MODEL, "--data", pictures, "--epochs", 1, "--batch-size", 16, *shared, "--out", "on")
    rows = rows_of(Path("on"))
    assert float(rows[0]["test_accuracy"]) > 0.9
    Path("on/checkpoint.pt").unlink()  # as where the run was killed before it wrote one
    bnkit("train", "--resume", "on")
    assert rows_of(Path("on"))[0]["test_accuracy"] == rows[0]["test_accuracy"]


def test_models_of_other_libraries(bnkit: Command, pictures: Path):
    options = ("--model", "torchvision:squeezenet1_1", "-o", "num_classes=2", "--precision", "32-true")
    result = bnkit(
        "train", *options, "--data", pictures, "--image-size", 40, "--epochs", 0.2, "--batch-size", 8, "--out", "r"
    )
    assert result.exit_code == 0, result.output
    assert json.loads(bnkit("evaluate", "r", "--json").output)["images"] == 24


@pytest.fixture
def photographs(tmp_path: Path) -> Path:
    """Two classes of 20 JPEGs, of 70 to 140 pixels a side."""
    generator = np.random.default_rng(0)
    for name, low in (("dark", 0), ("light", 128)):
        (tmp_path / "photographs" / name).mkdir(parents=True)
        for i in range(20):
            height, width = generator.integers(70, 140, 2)
            pixels = generator.integers(low, low + 128, (height, width, 3), dtype=np.uint8)
            Image.fromarray(pixels).save(tmp_path / "photographs" / name / f"{i}.jpg")
    return tmp_path / "photographs"


def test_photographs_stay_in_their_files(bnkit: Command, photographs: Path):
    options = ("--model", "resnet18", "-o", "width=8", "--precision", "32-true", "--image-size", 72, "--workers", 2)
    result = bnkit("train", *options, "--data", photographs, "--epochs", 3, "--batch-size", 8, "--out", "run")
    assert result.exit_code == 0, result.output
    told = json.loads(Path("run/run.json").read_text())
    assert told["config"]["augment"] == "resized_crop=0.08,flip"
    assert told["config"]["normalize"] == "imagenet"
    assert told["recipe"]["image_size"] == 72
    again = json.loads(bnkit("evaluate", "run", "run", "--json").output)
    assert again["images"] == 8
    assert {row["accuracy"] for row in again["results"]} == {told["outcome"]["test_accuracy"]}


def test_photographs_that_can_not_be_read_are_left_out_of_an_evaluation(bnkit: Command, photographs: Path):
    options = ("--model", "resnet20", "-o", "width=4", "--precision", "32-true", "--image-size", 72, "--workers", 0)
    (photographs / data.photographs(photographs).test_files[0]).write_bytes(b"damaged")
    shared = ("--data", photographs, "--epochs", 0.3, "--batch-size", 8, "--skip-corrupt", "--out", "run")
    assert bnkit("train", *options, *shared).exit_code == 0
    told = json.loads(Path("run/run.json").read_text())
    again = json.loads(bnkit("evaluate", "run", "run", "--skip-corrupt", "--json").output)
    assert again["images"] == 7
    assert {row["accuracy"] for row in again["results"]} == {told["outcome"]["test_accuracy"]}


def test_photographs_get_the_model_s_own_size(photographs: Path, pictures: Path):
    arguments = (None, False, None, False, Console(quiet=True))
    large = load_for_training("bnkit:resnet18", str(photographs), *arguments)
    assert large.shape == (3, 32, 32)
    assert load_for_training("resnet20", str(photographs), *arguments).shape == (3, 32, 32)
    for path in photographs.rglob("*.jpg"):
        with Image.open(path) as image:
            larger = image.resize((250, 200))
        larger.save(path)
    for model in ("bnkit:resnet18", "resnet18", "torchvision:resnet18", "timm:resnet18"):
        assert load_for_training(model, str(photographs), *arguments).shape == (3, 224, 224)
    assert load_for_training("resnet20", str(photographs), *arguments).shape == (3, 32, 32)
    assert load_for_training("resnet18", str(pictures), *arguments).shape == (3, 32, 32)


def test_a_recipe_of_the_paper(bnkit: Command, pictures: Path):
    shared = ("--data", pictures, "--precision", "32-true", "--epochs", 0.4, "--evaluations", 1)
    result = bnkit("train", "--recipe", "BN-x5", "--lr", 0.001, "-o", "dropout=0.1", *shared, "--out", "run")
    assert result.exit_code == 0, result.output
    told = json.loads(Path("run/run.json").read_text())
    config, recipe = told["config"], told["recipe"]
    assert (recipe["model"], recipe["norm"]) == ("bn_inception", "batch")
    assert recipe["options"] == ["activation=relu", "dropout=0.0", "lrn=False", "dropout=0.1"]
    assert (config["lr"], config["batch_size"], config["momentum"], config["nesterov"]) == (0.001, 32, 0.9, False)
    assert config["weight_decay"] == pytest.approx(4e-5 / 5)
    assert (config["schedule"], config["warmup_steps"]) == ("exponential", 0)
    assert config["decay"] == pytest.approx(0.96 ** (6 * 0.4 / 8))
    assert (config["shuffle"], config["augment"]) == ("within-shards", "crop=4,flip,color=0.2")

    bnkit("train", "--recipe", "inception", "--model", "lenet5", *shared, "--out", "other")
    told = json.loads(Path("other/run.json").read_text())
    config, recipe = told["config"], told["recipe"]
    assert (recipe["model"], recipe["norm"], recipe["options"]) == ("lenet5", "none", ["activation=relu"])
    assert (config["lr"], config["weight_decay"], config["shuffle"]) == (0.0015, 4e-5, "shards")
    assert config["augment"] == "crop=4,flip,color=0.4"
    assert config["decay"] == pytest.approx(0.96 ** (0.4 / 8))


def test_a_recipe_with_a_model_of_another_library(bnkit: Command, pictures: Path):
    shared = ("--data", pictures, "--precision", "32-true", "--epochs", 0.4, "--evaluations", 1, "--out", "run")
    model = ("--model", "torchvision:squeezenet1_1", "-o", "num_classes=2", "--image-size", 40)
    assert bnkit("train", "--recipe", "bn-x5", *model, *shared).exit_code == 0
    told = json.loads(Path("run/run.json").read_text())
    assert (told["recipe"]["norm"], told["recipe"]["options"]) == (None, ["num_classes=2"])
    assert told["config"]["lr"] == 0.0075


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--recipe", "bn-x6"], "unknown recipe 'bn-x6': did you mean bn-x5"),
        (["--loss", "mse"], "unknown loss 'mse'"),
        (["--shuffle", "none"], "unknown shuffle 'none'"),
        (["--model", "lenet"], "unknown model 'lenet': did you mean lenet5"),
        (["--augment", "crap"], "unknown augmentation 'crap'"),
        (["--epochs", "0"], r"epochs must be positive and finite, got 0"),
        (["--warmup", "2"], r"warmup is a part of the steps, from 0 to 1, got 2"),
        (["--batch-size", "97"], "batch_size must be from 1 to the 96 training images, got 97"),
        (["--schedule", "linear"], "unknown schedule 'linear'"),
        (["--model", "torchvision:resnet18", "--norm", "group"], "--norm is for bnkit's models"),
        (["--weights", "none.pt"], "there is no file none.pt"),
        (["--resume", "nowhere"], "there is no run in nowhere"),
        (["--evaluations", "0"], "evaluations must be 1 or more"),
        (["--image-size", "0"], "the image size must be at least 1, got 0"),
    ],
)
def test_mistakes(bnkit: Command, pictures: Path, arguments: list[str], words: str):
    with pytest.raises(UserError, match=words):
        bnkit("train", *MODEL, "--data", pictures, "--batch-size", "16", "--out", "run", *arguments)


def test_mistakes_in_evaluation(bnkit: Command, run: Path):
    with pytest.raises(UserError, match="there is no run or file runs/nowhere: name one that exists"):
        bnkit("evaluate", "runs/nowhere")
    with pytest.raises(UserError, match="does not say of which model it is: add --model"):
        bnkit("evaluate", run / "weights.safetensors")
    with pytest.raises(UserError, match="don't say what they were trained on: add --data"):
        bnkit("evaluate", run / "weights.safetensors", "--model", "lenet5")
    (run / "run.json").write_text("{")
    with pytest.raises(UserError, match=r"run\.json is damaged"):
        bnkit("evaluate", run)
