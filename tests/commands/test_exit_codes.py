"""Exit codes: 0 success, 1 a finding or a failed check, 2 bad use; the same for the app, the command and the module."""

from __future__ import annotations

import importlib
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace

import pytest
from command_line import run
from typer.testing import Result

FOLD = ["fold", "vgg11", "-o", "num_classes=2", "-o", "in_channels=3", "-o", "image_size=32", "--shape", "3,32,32"]
BRANCHING = """
from torch import nn

class Strict(nn.Sequential):
    def forward(self, x):
        assert isinstance(self[1], nn.BatchNorm2d), "a batch norm"
        return super().forward(x)

def strict(): return Strict(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.ReLU())
"""


def assert_one_line(result: Result, code: int, words: str) -> None:
    assert result.exit_code == code, result.output
    assert result.stdout == ""
    assert result.stderr.startswith("bnkit: ")
    assert words in result.stderr
    assert result.stderr.count("\n") == 1


def test_bad_use() -> None:
    assert_one_line(run("fold", "nope"), 2, "unknown model 'nope'")
    assert_one_line(run("bench", "kernels", "--device", "tpu"), 2, "device must be cpu or cuda, got 'tpu'")
    assert run("fold", "--nope").exit_code == 2


def test_outputs_that_differ_are_a_failed_check() -> None:
    assert_one_line(run(*FOLD, "--tolerance", 0), 1, "fold must leave the outputs as they were")


def test_a_changed_model_that_no_longer_runs_is_a_failed_check(tmp_path: Path) -> None:
    (tmp_path / "mine.py").write_text(BRANCHING)
    assert_one_line(
        run("fold", f"{tmp_path / 'mine.py'}:strict", "--shape", "3,8,8"), 1, "must leave a model that runs"
    )


def test_red_tests_of_the_kernels_are_a_failed_check(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(str(Path(__file__).parents[2] / "benchmarks"))
    kernels = importlib.import_module("bench_kernels")
    monkeypatch.setattr(kernels.subprocess, "run", lambda *_, **__: SimpleNamespace(returncode=1, stdout="1 failed"))
    result = run("bench", "kernels", "--device", "cpu")
    assert result.exit_code == 1
    assert "a speed is reported only of kernels whose tests pass" in result.stderr


@pytest.mark.parametrize(("arguments", "code"), [(["fold", "nope"], 2), (["models", "mlp"], 0)])
def test_the_module_runs(arguments: list[str], code: int) -> None:
    done = subprocess.run([sys.executable, "-m", "bnkit", *arguments], capture_output=True, text=True)
    assert done.returncode == code, done.stderr
    assert "Traceback" not in done.stderr


def test_the_fixture_raises_bad_use_and_nothing_else(bnkit: Callable[..., Result]) -> None:
    with pytest.raises(ValueError, match=r"^unknown model 'nope'"):
        bnkit("fold", "nope")
    assert bnkit(*FOLD, "--tolerance", 0).exit_code == 1
