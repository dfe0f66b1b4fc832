"""`bnkit bench surgery`: it holds on one model of each family, its checks notice what is wrong, and failures end it."""

from __future__ import annotations

import importlib
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from bnkit import surgery
from bnkit._checks import FailedCheck

sys.path.append(str(Path(__file__).parents[1] / "benchmarks"))
bench: Any = importlib.import_module("bench_surgery")
checks: Any = importlib.import_module("_surgery_checks")
QUICK = importlib.import_module("_surgery_models").QUICK


@pytest.mark.parametrize("name", QUICK)
def test_one_model_of_each_family(name: str) -> None:
    if name.startswith("timm:"):
        pytest.importorskip("timm", reason="timm is not installed")
    row = bench.examine(name)
    assert "failed:" not in row.left
    assert row.checks == "pickles converts"
    assert 0 < row.folded <= row.found


def network() -> nn.Module:
    return nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.ReLU(), nn.BatchNorm2d(4)).eval()


def found(monkeypatch: pytest.MonkeyPatch, faulty: Callable[..., surgery.Surgery]) -> str:
    """What the check says of a convert that is as `faulty` makes it."""
    convert = surgery.convert
    monkeypatch.setattr(surgery, "convert", lambda model, to, *args, **kw: faulty(convert, model, to, *args, **kw))
    model = network()
    return checks.fault(checks.converts, model, model, torch.randn(2, 3, 6, 6), None)


def nothing(convert: Any, model: nn.Module, to: Any, *args: Any, **options: Any) -> surgery.Surgery:
    return convert(model, to, lambda name, module: False, **options)


def first_only(convert: Any, model: nn.Module, to: Any, *args: Any, **options: Any) -> surgery.Surgery:
    result = convert(model, to, *args, **options)
    return surgery.Surgery(result.model, {"1": "changed"}, {"3": "has a forward of its own"}, None, {})


def one_way(convert: Any, model: nn.Module, to: Any, *args: Any, **options: Any) -> surgery.Surgery:
    return convert(model, "batch" if to == "torch" else to, *args, **options)


def with_other_values(convert: Any, model: nn.Module, to: Any, *args: Any, **options: Any) -> surgery.Surgery:
    result = convert(model, to, *args, **options)
    if to == "ghost":
        result.model[3].running_mean += 1e-6
    return result


def with_other_eps(convert: Any, model: nn.Module, to: Any, *args: Any, **options: Any) -> surgery.Surgery:
    result = convert(model, to, *args, **options)
    if to == "torch" and args:
        result.model[3].eps = 1e-3
    return result


def raising(convert: Any, model: nn.Module, to: Any, *args: Any, **options: Any) -> surgery.Surgery:
    raise RuntimeError("no\nway")


@pytest.mark.parametrize(
    ("faulty", "words"),
    [
        (nothing, "batch changes nothing"),
        (first_only, "batch leaves 1: has a forward of its own"),
        (
            one_way,
            "back from batch 1 is a bnkit.nn._batch_norm.BatchNorm2d, not a torch.nn.modules.batchnorm.BatchNorm2d",
        ),
        (with_other_values, "back from ghost 3.running_mean differs"),
        (with_other_eps, "back from batch the outputs differ"),
        (raising, "RuntimeError: no way"),
    ],
)
def test_converts_notices(monkeypatch: pytest.MonkeyPatch, faulty: Any, words: str) -> None:
    assert found(monkeypatch, faulty) == words


def test_converts_passes_what_is_right(monkeypatch: pytest.MonkeyPatch) -> None:
    assert found(monkeypatch, lambda convert, *args, **options: convert(*args, **options)) == ""


@pytest.mark.parametrize("what", ["fold", "export", "speed"])
def test_a_model_that_fails_is_a_failed_check_after_all_rows(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], what: str
) -> None:
    modules = {"fold": "bench_surgery", "export": "_surgery_programs", "speed": "_surgery_speed"}
    module: Any = importlib.import_module(modules[what])
    monkeypatch.setattr(module, "names", lambda *_: ["a", "b"])
    monkeypatch.setattr(module, "ready", lambda name: 1 / 0 if name == "a" else None)
    if what == "speed":
        monkeypatch.setattr(module, "tune_allocator", lambda: None)
    with pytest.raises(FailedCheck, match=r"\ba: see their rows"):
        bench.main(False, False, what)
    assert "failed: ZeroDivisionError" in capsys.readouterr().out
    monkeypatch.setattr(module, "names", lambda *_: ["b"])
    bench.main(False, False, what)
