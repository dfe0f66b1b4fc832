"""Long loops show a bar: on standard error, in a terminal, and not where the output is for machines."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest

from bnkit import models
from bnkit._weights import save_weights


@pytest.fixture
def commands(pictures: Path, tmp_path: Path) -> dict[str, tuple[object, ...]]:
    """Of each command, what it is given; of each bar, its words."""
    save_weights(models.create("lenet5", num_classes=2, in_channels=3, image_size=32), tmp_path / "lenet5.pt")
    on_pictures = ("--data", pictures, "--batch-size", 8, "--image-size", 32)
    return {
        "Measuring activations": ("insert", "lenet5", *on_pictures),
        "Evaluating": ("evaluate", "lenet5.pt", "--model", "lenet5", *on_pictures),
    }


@pytest.mark.parametrize("words", ["Measuring activations", "Evaluating"], ids=["insert", "evaluate"])
def test_bar(bnkit: Callable, monkeypatch: pytest.MonkeyPatch, commands: dict, words: str) -> None:
    assert words not in bnkit(*commands[words]).stderr
    monkeypatch.setenv("FORCE_COLOR", "1")
    shown = bnkit(*commands[words])
    assert shown.exit_code == 0
    assert words in shown.stderr
    assert "100%" in shown.stderr
    assert words not in shown.stdout
    silent = bnkit(*commands[words], "--json")
    assert words not in silent.stderr
    json.loads(silent.stdout)
