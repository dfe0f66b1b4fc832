"""What every test gets: repeatable random numbers, and one thread. What some ask for: each backend in turn."""

from __future__ import annotations

import hypothesis
import pytest
import torch

from bnkit.ops import cpu, dispatch

hypothesis.settings.register_profile("bnkit", deadline=None, max_examples=50, print_blob=True)
hypothesis.settings.load_profile("bnkit")

# Most tensors here are tiny, and pytest-xdist fills the cores; a test about threads asks for them.
torch.set_num_threads(1)


@pytest.fixture(autouse=True)
def _seed() -> None:
    torch.manual_seed(0)


@pytest.fixture(params=["reference", "cpu"])
def backend(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    """Runs the test on each backend of batch norm in turn."""
    if request.param == "cpu" and not cpu.available():
        pytest.skip("the C kernels are not installed")
    monkeypatch.setattr(dispatch, "BACKENDS", {"reference": (), "cpu": (cpu,)}[request.param])
    return request.param
