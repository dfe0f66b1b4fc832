"""PyTorch's own samples for batch norm (`tests/test_functional_op_info.py`) on the Triton kernels, interpreted."""

from __future__ import annotations

import types
from collections.abc import Iterator

import pytest
import test_functional_op_info as op_info
import torch
from _interpreter import interpreted

from bnkit.ops import cuda, dispatch

pytest.importorskip("triton", reason="Triton is not installed")


@pytest.fixture(scope="module", autouse=True)
def _interpreted() -> Iterator[None]:
    with interpreted():
        yield


@pytest.fixture
def served(monkeypatch: pytest.MonkeyPatch) -> list[torch.Tensor]:
    """What the kernels took."""
    taken: list[torch.Tensor] = []

    def forward(x: torch.Tensor, *arguments: object) -> object:
        taken.append(x)
        return cuda.forward(x, *arguments)  # pyright: ignore

    kernels = types.SimpleNamespace(supports=lambda *_: True, forward=forward, backward=cuda.backward)
    monkeypatch.setattr(dispatch, "BACKENDS", (kernels,))
    return taken


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("index", range(op_info.SAMPLES))
def test_as_accurate_as_torch(served, index, dtype):
    op_info.test_as_accurate_as_torch(index, dtype)
    assert bool(served) == (op_info.sample(index, dtype).input.numel() > 0)
