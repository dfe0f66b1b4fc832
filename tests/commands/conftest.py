from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from command_line import call
from PIL import Image
from typer.testing import Result


@pytest.fixture
def bnkit(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Callable[..., Result]:
    """Run a command in an empty folder; bad use raises the `UserError` whose words were printed."""
    monkeypatch.chdir(tmp_path)
    return call


@pytest.fixture
def pictures(tmp_path: Path) -> Path:
    """Two classes that brightness tells apart: 48 images of each to train, 12 to test."""
    generator = np.random.default_rng(0)
    for split, count in (("train", 48), ("test", 12)):
        for name, low in (("dark", 0), ("light", 128)):
            folder = tmp_path / "pictures" / split / name
            folder.mkdir(parents=True)
            for i in range(count):
                pixels = generator.integers(low, low + 128, (32, 32, 3), dtype=np.uint8)
                Image.fromarray(pixels).save(folder / f"{i}.png")
    return tmp_path / "pictures"
