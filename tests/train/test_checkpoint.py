from __future__ import annotations

import dataclasses
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from toys import toy_net, toy_set

from bnkit._checks import UserError
from bnkit.train import FitConfig, fit, iterate

CONFIG = FitConfig(steps=40, batch_size=32, lr=0.05, momentum=0.9, eval_every=10, device="cpu")
SCRIPT = Path(__file__).with_name("killable_run.py")


def start(*paths: Path) -> subprocess.Popen[str]:
    return subprocess.Popen([sys.executable, str(SCRIPT), *map(str, paths)], stdout=subprocess.PIPE, text=True)


def steps_printed(process: subprocess.Popen[str]) -> list[int]:
    output, _ = process.communicate(timeout=300)
    assert process.returncode == 0
    return [int(line) for line in output.split()]


def test_killed_and_resumed_ends_with_the_same_bits(tmp_path: Path) -> None:
    process = start(tmp_path / "killed.pt")
    assert process.stdout is not None
    while int(process.stdout.readline()) < 40:
        pass
    process.kill()
    process.communicate(timeout=60)
    assert process.returncode == -signal.SIGKILL
    reached = torch.load(tmp_path / "killed.pt", weights_only=True)["step"]
    assert 40 <= reached < 120

    whole = start(tmp_path / "whole.pt", tmp_path / "whole-weights.pt")
    resumed = start(tmp_path / "killed.pt", tmp_path / "resumed-weights.pt")
    # The resumed run repeats what the killed one measured.
    assert steps_printed(whole) == steps_printed(resumed) == list(range(0, 121, 5))

    expected, weights = (torch.load(tmp_path / f"{name}-weights.pt") for name in ("whole", "resumed"))
    assert expected.keys() == weights.keys()
    for key, value in expected.items():
        assert torch.equal(value, weights[key]), key
    same_but_for_seconds(*(torch.load(tmp_path / f"{name}.pt", weights_only=True) for name in ("whole", "killed")))


def same_but_for_seconds(left: Any, right: Any, where: str = "checkpoint") -> None:
    assert type(left) is type(right), where
    if isinstance(left, dict):
        assert left.keys() == right.keys(), where
        for key in left.keys() - {"seconds"}:
            same_but_for_seconds(left[key], right[key], f"{where}.{key}")
    elif isinstance(left, (list, tuple)):
        assert len(left) == len(right), where
        for index, pair in enumerate(zip(left, right, strict=True)):
            same_but_for_seconds(*pair, f"{where}.{index}")
    elif isinstance(left, torch.Tensor):
        assert torch.equal(left, right), where
    else:
        assert left == right, where


@pytest.fixture
def saved(tmp_path: Path) -> Path:
    path = tmp_path / "run.pt"
    fit(toy_net(), toy_set(), CONFIG, checkpoint=path)
    return path


def test_a_longer_run_at_a_constant_rate_goes_on_from_a_shorter_one(saved: Path) -> None:
    longer = dataclasses.replace(CONFIG, steps=70)
    whole, resumed = toy_net(), toy_net(seed=5)
    expected = fit(whole, toy_set(), longer)
    history = fit(resumed, toy_set(), longer, resume=saved)
    assert torch.equal(whole.get_parameter("4.weight"), resumed.get_parameter("4.weight"))
    assert [dataclasses.replace(e, seconds=0) for e in history.evaluations] == [
        dataclasses.replace(e, seconds=0) for e in expected.evaluations
    ]
    seconds = [e.seconds for e in history.evaluations]
    assert seconds == sorted(seconds)


def test_a_finished_run_repeats_its_evaluations(saved: Path) -> None:
    net = toy_net()
    expected = fit(net, toy_set(), CONFIG)
    resumed = toy_net(seed=5)
    assert [e.test_loss for e in iterate(resumed, toy_set(), CONFIG, resume=saved)] == [
        e.test_loss for e in expected.evaluations
    ]
    assert torch.equal(net.get_parameter("4.weight"), resumed.get_parameter("4.weight"))


def test_checkpoint_every_selects_evaluations(tmp_path: Path) -> None:
    path = tmp_path / "run.pt"
    config = dataclasses.replace(CONFIG, steps=50, checkpoint_every=20)
    written = []
    for evaluation in iterate(toy_net(), toy_set(), config, checkpoint=path):
        written.append((evaluation.step, torch.load(path, weights_only=True)["step"]))
    assert written == [(0, 0), (10, 0), (20, 20), (30, 20), (40, 40), (50, 50)]
    assert [file.name for file in tmp_path.iterdir()] == ["run.pt"]


def refuse(path: Path, match: str, *, net: nn.Module | None = None, config: FitConfig = CONFIG, **data: Any) -> None:
    """`resume` must fail so, and change nothing."""
    net = net if net is not None else toy_net(seed=5)
    before = {key: value.clone() for key, value in net.state_dict().items()}
    with pytest.raises(UserError, match=match) as caught:
        next(iterate(net, dataclasses.replace(toy_set(), **data), config, resume=path))
    assert "\n" not in str(caught.value)
    for key, value in net.state_dict().items():
        assert torch.equal(value, before[key]), key


@pytest.mark.parametrize("keep", [0.0, 0.01, 0.5, 0.99])
def test_a_truncated_file(saved: Path, keep: float) -> None:
    content = saved.read_bytes()
    saved.write_bytes(content[: int(keep * len(content))])
    refuse(saved, r"run\.pt is not a whole checkpoint: name another, or start without")


class Evil:
    def __reduce__(self) -> tuple[Any, ...]:
        return print, ("code from a checkpoint",)


def test_other_files(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "other.pt"
    refuse(path, r"there is no checkpoint .*other\.pt")
    path.write_text("not a checkpoint")
    refuse(path, "is not a whole checkpoint")
    torch.save({"model": {}, "format": 1}, path)
    refuse(path, "is not a checkpoint of a run, it lacks config, data, step and 5 more: name another")
    torch.save([1, 2], path)
    refuse(path, "is not a checkpoint of a run, it lacks format, config, data and 7 more")
    torch.save({"model": Evil()}, path)
    refuse(path, "is not a whole checkpoint")
    assert "code from a checkpoint" not in capsys.readouterr().out


def test_another_format(saved: Path) -> None:
    torch.save({**torch.load(saved, weights_only=True), "format": 99}, saved)
    refuse(saved, "has format 99, this version reads 2")


@pytest.fixture(scope="module")
def averaged(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("averaged") / "run.pt"
    fit(toy_net(), toy_set(), dataclasses.replace(CONFIG, ema=0.9), checkpoint=path)
    return path


@pytest.mark.parametrize(
    "key", ["config", "data", "model", "optimizer", "average", "order", "random", "evaluations", "step"]
)
def test_right_keys_with_rubbish(averaged: Path, tmp_path: Path, key: str) -> None:
    whole = torch.load(averaged, weights_only=True)
    for value in (None, 7.5, "x", [], [3], {}, {"a": 1}, [{"step": 1}], -1):
        torch.save({**whole, key: value}, tmp_path / "run.pt")
        match = "is not a whole checkpoint|does not fit the model|made with other|for other parameters"
        refuse(tmp_path / "run.pt", match, config=dataclasses.replace(CONFIG, ema=0.9))


def test_evaluations_without_numbers(saved: Path) -> None:
    content = torch.load(saved, weights_only=True)
    content["evaluations"][-1]["seconds"] = None
    torch.save(content, saved)
    refuse(saved, "is not a whole checkpoint, what it has as 'evaluations' is none: name another, or start without")


def test_momentum_of_other_shapes(saved: Path) -> None:
    content = torch.load(saved, weights_only=True)
    content["optimizer"]["state"][0]["momentum_buffer"] = torch.zeros(3)
    torch.save(content, saved)
    refuse(saved, "is not a whole checkpoint, what it has as 'optimizer' is none: name another, or start without")


def test_another_configuration(saved: Path) -> None:
    refuse(saved, r"made with other settings: lr=0\.05, not 0\.1;", config=dataclasses.replace(CONFIG, lr=0.1))
    refuse(saved, "other settings: seed=0, not 1", config=dataclasses.replace(CONFIG, seed=1))
    refuse(
        saved,
        "other settings: steps=40, not 50, schedule='constant', not 'cosine'",
        config=dataclasses.replace(CONFIG, steps=50, schedule="cosine"),
    )


def test_settings_that_may_change(saved: Path) -> None:
    config = dataclasses.replace(CONFIG, eval_every=5, eval_batch_size=7, device="auto")
    assert next(iterate(toy_net(), toy_set(), config, resume=saved)).step == 0


def test_another_data_set(saved: Path) -> None:
    refuse(saved, "other data: name='toy', not 'another'", name="another")
    other = toy_set(train=200)
    refuse(saved, "other data: train=300, not 200", train_images=other.train_images, train_labels=other.train_labels)


def test_another_model(saved: Path) -> None:
    refuse(
        saved,
        r"does not fit the model: it has also 1\.weight, 1\.bias, 1\.running_mean and 2 more\. "
        "Build the model that was saved",
        net=toy_net(norm=False),
    )
    wider = toy_net()
    wider[4] = nn.Linear(256, 7)
    wider.append(nn.Linear(7, 3, bias=False))
    refuse(saved, r"it lacks 5\.weight; of another shape are 4\.weight, 4\.bias\.", net=wider)


def test_other_frozen_parameters(saved: Path) -> None:
    net = toy_net()
    net[0].requires_grad_(False)
    refuse(saved, "the optimizer in .* is for other parameters: freeze those that were frozen", net=net)


def test_a_folder_that_can_t_be_written(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match=r"can't write .*choose another folder"):
        next(iterate(toy_net(), toy_set(), CONFIG, checkpoint=tmp_path / "file" / "run.pt"))
