"""The C kernels on several threads: the same bits for any number, torch's own pool, calls at once, and after fork."""

from __future__ import annotations

import itertools
import os
import sys
import threading
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import oracle
import pytest
import torch
from _cases import (  # noqa: F401
    assert_identical,
    batch_norm,
    check,
    in_fresh_process,
    instruction_set,
    needs_kernels,
    only_kernels,
    poisoned,
    threads_kept,
)
from oracle import make_case

from bnkit.ops import _cpu_library, cpu

pytestmark = [needs_kernels, pytest.mark.usefixtures("poisoned", "only_kernels", "threads_kept")]

# A thread gets 16384 elements at least, so all of these keep several busy.
SHAPES = {
    (64, 48, 13, 11): "more channels than threads, in groups",
    (40, 3, 32, 33): "fewer channels than threads, which share each",
    (3, 2, 190, 190): "planes cut into units, shared",
    (1, 1, 300, 301): "one channel, one run",
    (900, 130): "rows, more blocks than threads",
    (140, 700): "rows, fewer blocks than threads, which divide the channels too",
    (60_000, 3): "narrow rows, folded",
    (300, 40, 3, 3): "small planes, as rows",
    (9, 23, 24, 25): "rows where the layout is channels_last",
}
COUNTS = (2, 3, 4, 7)


def on_threads(count: int, case: oracle.Case) -> oracle.Results:
    torch.set_num_threads(count)
    return oracle.run(case, batch_norm)


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.usefixtures("instruction_set")
def test_same_bits_on_any_number_of_threads(shape):
    for layout, training, activation in itertools.product(
        ("contiguous", "channels_last"), (True, False), ("relu", "gelu")
    ):
        layout = layout if len(shape) == 4 else "contiguous"
        case = make_case(shape, layout=layout, training=training, activation=activation, residual=activation == "relu")
        alone = on_threads(1, case)
        for count in COUNTS:
            assert_identical(on_threads(count, case), alone, f"on {count} threads: {layout} {training} {activation}")


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64], ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_same_bits_in_other_types(shape, dtype):
    case = make_case(shape, dtype=dtype, activation="relu", residual=True)
    alone = on_threads(1, case)
    for count in (2, 5):
        assert_identical(on_threads(count, case), alone, f"on {count} threads")


@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_by_value_on_three_threads(shape):
    torch.set_num_threads(3)
    check(make_case(shape, activation="relu", residual=True))


@pytest.mark.parametrize(
    ("shape", "dtype", "layout"),
    [
        ((9, 64, 92, 92), torch.float32, "contiguous"),
        ((9, 64, 92, 92), torch.float32, "channels_last"),
        ((9, 64, 92, 181), torch.bfloat16, "contiguous"),
    ],
)
def test_by_value_past_the_caches(shape, dtype, layout):
    torch.set_num_threads(3)
    check(make_case(shape, dtype=dtype, layout=layout, activation="relu", residual=True))


def test_far_more_threads_than_the_machine_has():
    case = make_case((300, 5, 30, 31), activation="relu")
    assert_identical(on_threads(64, case), on_threads(1, case))


def test_calls_at_once():
    """Several Python threads, each with its own tensors, over and over: nothing is shared between calls."""
    torch.set_num_threads(2)
    cases = [make_case(shape, activation="relu") for shape in ((32, 48, 13, 11), (900, 130), (40, 3, 32, 33), (60, 10))]
    alone = [oracle.run(case, batch_norm) for case in cases]
    start = threading.Barrier(len(cases))

    def repeat(case: oracle.Case) -> list[oracle.Results]:
        start.wait()
        torch.use_deterministic_algorithms(True)
        return [oracle.run(case, batch_norm) for _ in range(8)]

    with ThreadPoolExecutor(len(cases)) as pool:
        for results, expected in zip(pool.map(repeat, cases), alone, strict=True):
            for result in results:
                assert_identical(result, expected)


def test_one_input_for_calls_at_once():
    """Threads that read the same x and weights, as data-parallel evaluation does."""
    case = make_case((64, 24, 13, 11), training=False, activation="relu")
    alone = oracle.run(case, batch_norm)["y"]
    with ThreadPoolExecutor(4) as pool:
        for y in pool.map(lambda _: batch_norm(case), range(16)):
            assert torch.equal(y, alone)


def test_other_python_threads_run_meanwhile():
    """With no switch of threads but where the interpreter's lock is let go, one is seen inside a call."""
    x = torch.randn(64, 64, 56, 56)
    y, mean, invstd = torch.empty_like(x), torch.empty(64, dtype=torch.float64), torch.empty(64, dtype=torch.float64)
    library = cpu._library()
    assert library is not None
    pointers = (x.data_ptr(), *[0] * 5, mean.data_ptr(), invstd.data_ptr(), y.data_ptr(), 0)
    packed = _cpu_library.pack_forward(64, 64, 56 * 56, 0, 0, 1, True, False, *pointers, 0.1, 1e-5)
    inside, seen, stop = [False], [False], [False]

    def call() -> None:
        while not stop[0]:
            inside[0] = True
            library.bnkit_batch_norm_forward(packed)
            inside[0] = False
            threading.Event().wait(1e-3)

    interval = sys.getswitchinterval()
    sys.setswitchinterval(1e3)
    worker = threading.Thread(target=call)
    try:
        worker.start()
        for _ in range(5000):
            threading.Event().wait(1e-3)
            if inside[0]:
                seen[0] = True
                break
    finally:
        stop[0] = True
        sys.setswitchinterval(interval)
        worker.join()
    assert seen[0]


POOL = """
def threads(): return len(os.listdir("/proc/self/task"))
def call(count):
    torch.set_num_threads(count)
    batch_norm(case)
    return threads()
torch.set_num_threads(1)
case = oracle.make_case((64, 48, 13, 11))
before = threads()
alone, three = call(1), call(3)
case.x.exp()
print(alone - before, three - before, threads() - before, call(2) - before)
maps = open("/proc/self/maps").read().split()
print(len({os.path.realpath(word) for word in maps if "omp" in os.path.basename(word) and ".so" in word}))
"""


@pytest.mark.skipif(not Path("/proc/self/task").exists(), reason="counts threads where Linux lists them")
def test_the_threads_are_torchs_own():
    """`torch.set_num_threads` says how many; an operator of torch's adds none; one OpenMP library is loaded."""
    alone, three, with_torch, two, libraries = map(int, in_fresh_process(POOL))
    assert alone == 0
    assert three == 2
    assert with_torch == 2
    assert two <= 2
    assert libraries == 1


LIMITED = """
cases = [oracle.make_case(shape, activation="relu") for shape in ((40, 3, 32, 33), (140, 700))]
def results(count):
    torch.set_num_threads(count)
    return [t for case in cases for t in oracle.run(case, batch_norm).values() if t is not None]
many, one = results(8), results(1)
print(all(torch.equal(a, b) for a, b in zip(many, one, strict=True)))
"""


def test_fewer_threads_than_asked_for():
    """OpenMP may start fewer: the work is divided among those that are there."""
    assert in_fresh_process(LIMITED, OMP_THREAD_LIMIT="2") == ["True"]


# With the workers' one thread for PyTorch's own operators, which wait forever for the threads that fork has taken.
FORK = """
from torch.utils.data import DataLoader, Dataset
from bnkit.ops import cpu
cases = [oracle.make_case(shape, activation="relu") for shape in ((64, 48, 13, 11), (900, 130), (40, 3, 32, 33))]

def gradient(case):
    torch.set_num_threads(3)
    _, mean, invstd, _ = cpu.forward(case.x, None, None, case.weight, case.bias, True, 0.1, 1e-5, "relu", None, True)
    dx = cpu.backward(case.dy, case.x, mean, invstd, case.weight, case.bias, True, "relu", None, (True,) * 4)[0]
    torch.set_num_threads(1)
    return dx

class Gradients(Dataset):
    def __len__(self): return len(cases)
    def __getitem__(self, i): return gradient(cases[i])

before = [gradient(case) for case in cases]
def same(found): return all(torch.equal(a, b) for a, b in zip(found, before, strict=True))
loader = DataLoader(Gradients(), batch_size=None, num_workers=2, multiprocessing_context="fork")
print(same(list(loader)), same(map(gradient, cases)), flush=True)
if os.fork() == 0:
    if os.fork() == 0:
        os._exit(0 if same(map(gradient, cases)) else 1)
    os._exit(os.waitstatus_to_exitcode(os.wait()[1]))
print(os.waitstatus_to_exitcode(os.wait()[1]))
"""


@pytest.mark.skipif(not hasattr(os, "fork"), reason="no fork here")
def test_after_fork():
    """In the workers of a DataLoader, whose parent's threads are gone; in the parent after that; in a grandchild."""
    assert in_fresh_process(FORK) == ["True", "True", "0"]
