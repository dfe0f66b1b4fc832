"""Large outputs of the C kernels: tensors like any other, whose memory serves the next ones."""

from __future__ import annotations

import copy
import gc
import io
import itertools
import os
import shutil
import sys
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import torch
from _cases import in_fresh_process, needs_kernels, poisoned  # noqa: F401
from torch import Tensor

from bnkit import functional
from bnkit.nn import BatchNorm2d
from bnkit.ops import _outputs, cpu

MIB = 1 << 20

pytestmark = [
    needs_kernels,
    pytest.mark.skipif(not sys.platform.startswith("linux"), reason="only Linux can take kept memory back at need"),
]


@pytest.fixture(autouse=True)
def _empty(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Nothing is kept before, and the allocator counts as not tuned, whatever other tests have done."""
    monkeypatch.setattr(_outputs, "allocator_setting", lambda: "default")
    gc.collect()  # outputs of other tests, which would be kept when they go
    cpu.empty_cache()
    yield
    cpu.empty_cache()


def large(mib: int = 16) -> Tensor:
    return torch.empty(mib, MIB // 4)


def output(x: Tensor) -> Tensor:
    return functional.batch_norm(x, None, None, training=True)


def place_of_one(mib: int) -> int:
    """Where an output of this size came to lie; it is released by then."""
    return _outputs.empty_like(large(mib)).data_ptr()


def release_together(*sizes: int) -> None:
    """Outputs of these sizes in MiB live at once, and are released in this order."""
    held = [_outputs.empty_like(large(mib)) for mib in sizes]
    while held:
        del held[0]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float64], ids=str)
def test_is_like_torchs(dtype):
    shape = (2, 64, 512, 256)
    layouts = {
        "contiguous": torch.empty(shape, dtype=dtype),
        "channels_last": torch.empty(shape, dtype=dtype, memory_format=torch.channels_last),
        "one image": torch.empty(1, 64, 512, 512, dtype=dtype, memory_format=torch.channels_last),
        "3d": torch.empty(2, 8, 8, 512, 256, dtype=dtype, memory_format=torch.channels_last_3d),
        "rows": torch.empty(1 << 20, 16, dtype=dtype),
        "one channel": torch.empty(1 << 20, 1, 16, dtype=dtype),
    }
    for name, x in layouts.items():
        ours, torchs = _outputs.empty_like(x), torch.empty_like(x)
        assert (ours.dtype, ours.device, ours.shape) == (torchs.dtype, torchs.device, torchs.shape), name
        assert (ours.stride(), ours.storage_offset()) == (torchs.stride(), 0), name
        assert ours.untyped_storage().nbytes() == torchs.untyped_storage().nbytes(), name
        del ours
        assert cpu.empty_cache() == x.nbytes, f"{name}: not from what is kept"


def test_released_memory_serves_the_next_output():
    x = torch.randn(16, MIB // 4)
    first = output(x)
    address = first.data_ptr()
    second = output(x)
    assert second.data_ptr() != address
    before = first.clone()
    del second
    third = output(-x)
    assert third.data_ptr() != address
    assert torch.equal(first, before)
    del first
    assert output(x).data_ptr() == address


def test_gradients_are_outputs_too():
    x, dy = torch.randn(8, 64, 128, 128, requires_grad=True), torch.randn(8, 64, 128, 128)
    layer = BatchNorm2d(64, activation="gelu")
    layer(x, residual=x.detach().clone().requires_grad_()).backward(dy)
    x.grad = None
    assert cpu.empty_cache() >= 3 * dy.nbytes  # y, dx, dresidual
    torch.nn.functional.gelu(torch.nn.BatchNorm2d(64)(x)).backward(dy)
    eager, x.grad = x.grad, None
    for _ in range(3):  # in fresh memory, then in what was used
        layer(x).backward(dy)
        torch.testing.assert_close(x.grad, eager, rtol=1e-4, atol=1e-5)
        x.grad = None
    x, dy = x.detach().requires_grad_(), dy.to(memory_format=torch.channels_last)
    layer(x).backward(dy)
    torch.testing.assert_close(x.grad, eager, rtol=1e-4, atol=1e-5)


def test_small_outputs_and_a_tuned_allocator_keep_nothing(monkeypatch):
    output(torch.randn(15, MIB // 4))
    assert cpu.empty_cache() == 0
    monkeypatch.setattr(_outputs, "allocator_setting", lambda: "tuned")
    output(large())
    assert cpu.empty_cache() == 0


def test_memory_may_have_an_eighth_to_spare():
    address = place_of_one(18)
    assert place_of_one(17) == address
    assert place_of_one(16) == address
    assert cpu.empty_cache() == 18 * MIB
    place_of_one(19)
    place_of_one(16)
    assert cpu.empty_cache() == 16 * MIB


def test_what_does_not_fit_makes_room_oldest_first():
    release_together(20, 40, 24)
    place_of_one(28)
    assert cpu.empty_cache() == (24 + 28) * MIB  # 20 are less than 28
    release_together(40, 24, 20)
    place_of_one(28)
    assert cpu.empty_cache() == (24 + 20 + 28) * MIB
    release_together(20, 24)
    place_of_one(100)
    assert cpu.empty_cache() == 100 * MIB


def test_holds_an_eighth_more_than_was_once_in_use_at_most():
    sizes = [16, 40, 24, 17, 100, 33]
    release_together(*sizes)
    for mib in [64, 20, 150, 16, 90, 100]:
        place_of_one(mib)
        release_together(16, 33, mib)
    assert 100 * MIB <= cpu.empty_cache() <= sum(sizes) * MIB
    place_of_one(18)
    held = [_outputs.empty_like(large(mib)) for mib in (16, 18)]  # the first in memory of 18
    del held
    assert cpu.empty_cache() == 36 * MIB <= (16 + 18) * MIB * 9 / 8


def test_the_system_may_take_what_is_kept():
    def taken_at_need() -> int:
        lines = [line for line in Path("/proc/self/smaps").read_text().splitlines() if line.startswith("LazyFree:")]
        if not lines:
            pytest.skip("this system does not say what it may take")
        return sum(int(line.split()[1]) for line in lines)

    before = taken_at_need()
    output(large(64))
    assert taken_at_need() - before > 60 * 1024


def test_at_most_256_are_kept():
    held = [_outputs._kept_empty_like(torch.empty(16, MIB // 1024)) for _ in range(260)]
    del held
    assert cpu.empty_cache() == 256 * MIB // 16


def test_without_memory_of_its_own_it_is_torchs(monkeypatch):
    monkeypatch.setattr(cpu._library(), "bnkit_new_output", lambda *_: None)
    x = large()
    torch.testing.assert_close(output(x.fill_(3.0)), torch.zeros_like(x))
    assert cpu.empty_cache() == 0


@pytest.mark.usefixtures("poisoned")
def test_new_memory_is_filled_where_torch_fills_it():
    assert _outputs.empty_like(large()).isnan().all()


def test_outputs_can_go_where_tensors_go():
    y = output(torch.randn(16, MIB // 4))
    assert torch.equal(copy.deepcopy(y), y)
    saved = io.BytesIO()
    torch.save(y, saved)
    saved.seek(0)
    assert torch.equal(torch.load(saved), y)
    assert torch.from_numpy(y.numpy()).data_ptr() == y.data_ptr()
    assert torch.equal(torch.from_dlpack(y), y)
    values = y.clone()
    assert torch.equal(y.share_memory_(), values)
    assert y.is_shared()


def test_inference_mode():
    with torch.inference_mode():
        assert output(large()).is_inference()
    assert not output(large()).is_inference()


@pytest.mark.skipif(shutil.which("g++") is None and shutil.which("clang++") is None, reason="no C++ compiler")
def test_in_a_compiled_graph():
    layer, x = BatchNorm2d(64, activation="relu").eval(), torch.randn(8, 64, 128, 128)
    compiled = torch.compile(layer, fullgraph=True)
    y = compiled(x)
    torch.testing.assert_close(y, layer(x))
    cpu.empty_cache()
    del y
    assert cpu.empty_cache() == x.nbytes
    torch.testing.assert_close(compiled(x), layer(x))


def test_from_many_threads():
    def work(number: int) -> None:
        held: list[Tensor] = []
        for i, mib in zip(range(60), itertools.cycle([16, 17, 20, 24]), strict=False):
            y = _outputs.empty_like(large(mib))
            y[:, :: 1 << 12] = number * 1000 + i
            held.append(y)
            if len(held) == 3:
                oldest = held.pop(0)
                assert oldest[:, :: 1 << 12].unique().tolist() == [number * 1000 + i - 2]

    with ThreadPoolExecutor(6) as pool:
        list(pool.map(work, range(6)))


def test_released_by_another_thread():
    held = [output(large())]
    address = held[0].data_ptr()
    with ThreadPoolExecutor(1) as pool:
        pool.submit(held.clear).result()
    assert output(large()).data_ptr() == address


AT_THE_END = """
from bnkit import functional
from bnkit.ops import cpu

torch.set_num_threads(1)
x = torch.randn(16, 1 << 18)
held, kept = functional.batch_norm(x, None, None, training=True), functional.batch_norm(x, None, None, training=True)
expected = held.clone()
del kept
child = os.fork()
again = functional.batch_norm(x, None, None, training=True)
assert torch.equal(again, expected) and torch.equal(held, expected)
if child == 0:
    del held, again
    assert cpu.empty_cache() == 2 * x.nbytes
    os._exit(0)
assert os.waitpid(child, 0)[1] == 0
assert torch.equal(again, expected) and torch.equal(held, expected)
print("done")
"""


@pytest.mark.skipif(not hasattr(os, "fork"), reason="no fork here")
def test_after_fork_and_at_the_end():
    """The child's outputs are its own, and a process ends with outputs alive."""
    assert in_fresh_process(AT_THE_END) == ["done"]
