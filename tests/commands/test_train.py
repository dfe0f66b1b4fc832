from __future__ import annotations

import csv
import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from typer.testing import Result

from bnkit._checks import UserError
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

    bnkit("train", "--resume", "part")
    assert json.loads(Path("part/run.json").read_text())["partial"] is None
    assert [row["step"] for row in rows_of(Path("part"))] == ["0", "6", "12", "18", "24"]
    whole, resumed = read_weights(run / "weights.safetensors"), read_weights("part/weights.safetensors")
    assert all(torch.equal(whole[name], resumed[name]) for name in whole)


def test_weights_to_start_from(bnkit: Command, run: Path, pictures: Path):
    shared = ("--weights", run / "weights.safetensors", "--lr", 1e-12, "--weight-decay", 0)
    bnkit("train", *MODEL, "--data", pictures, "--epochs", 1, "--batch-size", 16, *shared, "--out", "on")
    rows = rows_of(Path("on"))
    assert float(rows[0]["test_accuracy"]) > 0.9


def test_models_of_other_libraries(bnkit: Command, pictures: Path):
    options = ("--model", "torchvision:squeezenet1_1", "-o", "num_classes=2", "--precision", "32-true")
    result = bnkit(
        "train", *options, "--data", pictures, "--image-size", 40, "--epochs", 0.2, "--batch-size", 8, "--out", "r"
    )
    assert result.exit_code == 0, result.output
    assert json.loads(bnkit("evaluate", "r", "--json").output)["images"] == 24


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--model", "lenet"], "unknown model 'lenet': did you mean lenet5"),
        (["--augment", "crap"], "unknown augmentation 'crap'"),
        (["--epochs", "0"], r"epochs must be positive, got 0"),
        (["--warmup", "2"], r"warmup is a part of the steps, from 0 to 1, got 2"),
        (["--batch-size", "97"], "batch_size must be from 1 to the 96 training images, got 97"),
        (["--schedule", "linear"], "unknown schedule 'linear'"),
        (["--model", "torchvision:resnet18", "--norm", "group"], "--norm is for bnkit's models"),
        (["--weights", "none.pt"], "there is no file none.pt"),
        (["--resume", "nowhere"], "there is no run in nowhere"),
        (["--evaluations", "0"], "evaluations must be 1 or more"),
    ],
)
def test_mistakes(bnkit: Command, pictures: Path, arguments: list[str], words: str):
    with pytest.raises(UserError, match=words):
        bnkit("train", *MODEL, "--data", pictures, "--batch-size", "16", "--out", "run", *arguments)


def test_mistakes_in_evaluation(bnkit: Command, run: Path):
    with pytest.raises(UserError, match="does not say of which model it is: add --model"):
        bnkit("evaluate", run / "weights.safetensors")
    with pytest.raises(UserError, match="don't say what they were trained on: add --data"):
        bnkit("evaluate", run / "weights.safetensors", "--model", "lenet5")
    (run / "run.json").write_text("{")
    with pytest.raises(UserError, match=r"run\.json is damaged"):
        bnkit("evaluate", run)
