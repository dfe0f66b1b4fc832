"""What the tests of the C kernels and their operators share: each instruction set on its own, results, the judge."""

from __future__ import annotations

import ctypes
import functools
import os
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path

import oracle
import pytest
import torch
from oracle import Case
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from bnkit import functional
from bnkit.ops import _cpu_library, cpu, dispatch, reference

needs_kernels = pytest.mark.skipif(not cpu.available(), reason="installed without the C kernels")


@pytest.fixture(params=["avx512", "avx2", "portable"])
def instruction_set(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    """The kernels as a machine with no more than this instruction set would run them."""
    library = load(request.param)
    if library.bnkit_instruction_set().decode() != request.param:
        pytest.skip(f"this machine has no {request.param}")
    monkeypatch.setattr(cpu, "_library", lambda: library)
    return request.param


@functools.cache
def load(instruction_set: str) -> ctypes.CDLL:
    """Another copy of the library, since one is told its instruction set when it is loaded.

    One for all tests of a process: under the sanitizers it has 70 MB.
    """
    loaded = cpu._library()
    assert loaded is not None
    before = os.environ.get("BNKIT_CPU")
    os.environ["BNKIT_CPU"] = instruction_set
    try:
        with tempfile.TemporaryDirectory() as folder:
            copy = shutil.copy(loaded._name, Path(folder) / f"{instruction_set}.so")
            return _cpu_library.load(Path(copy))
    finally:
        del os.environ["BNKIT_CPU"]
        if before is not None:
            os.environ["BNKIT_CPU"] = before


@pytest.fixture
def poisoned() -> Iterator[None]:
    """In deterministic mode PyTorch fills new memory with NaN, so a value that no kernel wrote shows."""
    assert torch.utils.deterministic.fill_uninitialized_memory
    torch.use_deterministic_algorithms(True)
    yield
    torch.use_deterministic_algorithms(False)


@pytest.fixture
def threads_kept() -> Iterator[None]:
    """PyTorch's number of threads is put back."""
    before = torch.get_num_threads()
    yield
    torch.set_num_threads(before)


@pytest.fixture
def only_kernels(monkeypatch: pytest.MonkeyPatch) -> None:
    """Nothing falls back to the reference unseen."""

    def refuse(*_):
        raise AssertionError("the kernels did not take the call")

    monkeypatch.setattr(dispatch, "BACKENDS", (cpu,))
    monkeypatch.setattr(reference, "batch_norm", refuse)


class Record(TorchDispatchMode):
    """Notes the operators that it sees."""

    def __init__(self) -> None:
        super().__init__()
        self.seen: list[str] = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.seen.append(str(func))
        return func(*args, **(kwargs or {}))


def in_fresh_process(script: str, **environment: str) -> list[str]:
    """The words that the script prints. A hang is a failure."""
    preamble = "import os, sys; sys.path[:0] = {}\nimport torch, oracle\nfrom _cases import batch_norm\n"
    here = Path(__file__).parent
    paths = [str(here), str(here.parent), *sys.path]
    done = subprocess.run(
        [sys.executable, "-c", preamble.format(paths) + script],
        env=os.environ | environment,
        timeout=120,
        check=False,
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    return done.stdout.split()


def batch_norm(case: Case) -> Tensor:
    arguments = (case.x, case.running_mean, case.running_var, case.weight, case.bias)
    options = {"activation": case.activation, "residual": case.residual}
    return functional.batch_norm(*arguments, case.training, case.momentum, case.eps, **options)


def check(case: Case, label: str = "") -> oracle.Results:
    """The kernels' results, which are as near to the exact ones as eager PyTorch's."""
    results = oracle.run(case, batch_norm)
    if case.x.dtype == torch.float64:
        _assert_near_in_double(results, case, label)
    else:
        oracle.assert_as_accurate(results, case, label)
    return results


def _assert_near_in_double(results: oracle.Results, case: Case, label: str) -> None:
    """The exact results are of double precision themselves: over many values their own rounding shows."""
    summed = case.dy.abs().sum().item() / case.x.shape[1]
    scales = {"dweight": summed, "dbias": summed, "dx": oracle.largest_term_of_dx(case)}
    # The mean's last place, against the deviation.
    blurred = 1 + 0.1 * (oracle.slopes(case).max() * case.x.abs().max()).item()
    for name, true in oracle.exact(case).items():
        ours = results[name]
        if true is None or ours is None:
            assert true is ours, f"{name} is there in only one {label}"
        else:
            assert ours.dtype == torch.float64, f"{name}: {ours.dtype} {label}"
            allowed = 1e-14 * blurred * max(true.abs().max().item(), scales.get(name, 0.0))
            torch.testing.assert_close(ours, true, rtol=0, atol=allowed, msg=lambda m, n=name: f"{n} {label} {m}")


def assert_identical(a: oracle.Results, b: oracle.Results, label: str = "") -> None:
    for name, value in a.items():
        other = b[name]
        same = value is other if value is None or other is None else torch.equal(value, other)
        assert same, f"{name} differs {label}"
