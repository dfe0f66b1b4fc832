"""What recalibration does on each fault, beside fvcore's `update_bn_stats` and torch's `update_bn`.

`docs/population.md` has the outcome as a table, and the last test holds the page to it.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path

import fvcore.nn
import pytest
import torch
from nets import batches, buffers, moments, randomized, same
from torch import nn
from torch.optim.swa_utils import update_bn

import bnkit
from bnkit.population import recalibrate

PAGE = Path(__file__).parents[2] / "docs" / "population.md"


def ours(model: nn.Module, data, count: int) -> None:
    recalibrate(model, data, num_batches=count)


def fvcores(model: nn.Module, data, count: int) -> None:
    with torch.no_grad():
        fvcore.nn.update_bn_stats(model, data, count)


def torchs(model: nn.Module, data, count: int) -> None:
    with torch.no_grad():
        update_bn(data, model)


TOOLS: dict[str, Callable] = {"bnkit": ours, "fvcore": fvcores, "torch": torchs}


class Parts(nn.Module):
    """A batch norm used, one not used, and a dropout between."""

    def __init__(self):
        super().__init__()
        self.used = randomized(nn.BatchNorm2d(3, momentum=0.3))
        self.unused = randomized(nn.BatchNorm2d(3))
        self.dropout, self.last = nn.Dropout(0.5), randomized(nn.BatchNorm2d(3))

    def forward(self, x):
        return self.last(self.dropout(self.used(x)))


def attempt(tool: Callable, model: nn.Module, data, count: int) -> BaseException | None:
    try:
        tool(model, data, count)
    except (Exception, KeyboardInterrupt) as error:
        return error
    return None


def failing(error: type[BaseException]):
    yield from batches(4, 4)
    raise error("midway")


def intact(model: Parts, before: list[torch.Tensor]) -> str:
    problems = []
    if model.used.momentum != 0.3:
        problems.append(f"momentum left at {model.used.momentum}")
    if any(m._forward_pre_hooks or m._forward_hooks or "forward" in vars(m) for m in model.modules()):
        problems.append("hooks left")
    if not same(before, model.buffers()):
        problems.append("statistics half changed")
    return "everything as before" if not problems else ", ".join(problems)


def loader_raises(tool: Callable, error: type[BaseException] = OSError) -> str:
    model = Parts()
    before = buffers(model)
    assert isinstance(attempt(tool, model, failing(error), 5), error)
    return intact(model, before)


def interrupted(tool: Callable) -> str:
    return loader_raises(tool, KeyboardInterrupt)


def short_loader(tool: Callable) -> str:
    model = Parts()
    before = buffers(model)
    error = attempt(tool, model, batches(4, 4), 5)
    if error is None:
        return "goes on, and reports it" if tool is ours else "has no such number"
    return f"{type(error).__name__}, {intact(model, before)}"


def nan_batch(tool: Callable) -> str:
    model, data = Parts(), batches(4, 4)
    data[1][0, 0, 0, 0] = float("nan")
    before = buffers(model)
    error = attempt(tool, model, data, 2)
    if error is not None:
        return f"clear error, {intact(model, before)}"
    return "NaN in the statistics" if model.used.running_mean.isnan().any() else "ignored"


def never_run(tool: Callable) -> str:
    model = Parts()
    before = buffers(model.unused)
    assert attempt(tool, model, batches(4, 4), 2) is None
    if same(before, model.unused.buffers()):
        return "kept, and reported"
    var = model.unused.running_var
    return f"reset to variance {var[0].item():.0f}"


def frozen(tool: Callable) -> str:
    model = Parts().train()
    model.used.eval()
    before = buffers(model.used)
    assert attempt(tool, model, batches(4, 4), 2) is None
    return "kept" if same(before, model.used.buffers()) else "overwritten"


def unequal_batches(tool: Callable) -> str:
    model, data = Parts(), [torch.randn(100, 3, 2, 2) * 2, torch.randn(2, 3, 2, 2) + 10]
    assert attempt(tool, model, data, 2) is None
    true, _ = moments(torch.cat(data))
    error = (model.used.running_mean.double() - true).abs().max().item()
    return "exact" if error < 1e-5 else f"mean off by {error:.1f}"


def large_mean(tool: Callable) -> str:
    model, data = Parts(), [torch.randn(64, 3, 4, 4) * 0.1 + 3000 for _ in range(4)]
    assert attempt(tool, model, data, 4) is None
    _, true = moments(torch.cat(data))
    error = ((model.used.running_var.double() - true) / true).abs().max().item()
    return "exact" if error < 1e-5 else "variance wrong" if error > 1 else "within 1%"


def momentum_none(tool: Callable) -> str:
    model = Parts()
    model.used.momentum = None
    assert attempt(tool, model, batches(4, 4), 2) is None
    return "kept" if model.used.momentum is None else "changed"


def half_buffers(tool: Callable) -> str:
    model = nn.BatchNorm2d(3).half()
    data = [x.half() * 0.1 + 3 for x in batches(64, 64)]
    true, _ = moments(torch.cat(data))
    error = attempt(tool, model, data, 2)
    if error is not None:
        return "clear error with the remedy" if "call .float()" in str(error) else type(error).__name__
    return "rounded" if (model.running_mean.double() - true).abs().max() > 1e-4 else "exact"


def reused_layer(tool: Callable) -> str:
    norm, data = randomized(nn.BatchNorm2d(3)), batches(4, 4)
    again = nn.BatchNorm2d(3, track_running_stats=False)
    again.load_state_dict({"weight": norm.weight, "bias": norm.bias})
    _, true = moments(torch.cat([*data, *(again(x).relu() for x in data)]).detach())
    error = attempt(tool, nn.Sequential(norm, nn.ReLU(), norm), data, 2)
    if error is not None:
        return type(error).__name__
    return "exact" if torch.allclose(norm.running_var.double(), true, rtol=1e-5) else "variance wrong"


class FusedSum(nn.Module):
    """y = batch_norm(x) + x, the sum by the layer."""

    def __init__(self):
        super().__init__()
        self.norm, self.last = bnkit.nn.BatchNorm2d(3), nn.BatchNorm2d(3)

    def forward(self, x):
        return self.last(self.norm(x, x))


def fused_residual(tool: Callable) -> str:
    model, data = FusedSum(), batches(4, 4)
    normalized = [nn.functional.batch_norm(x, None, None, training=True) for x in data]
    true, _ = moments(torch.cat(normalized) + torch.cat(data))
    assert attempt(tool, model, data, 2) is None
    return "exact" if torch.allclose(model.last.running_mean.double(), true, atol=1e-5) else "residual dropped"


def dropout(tool: Callable) -> str:
    model, seen = Parts().train(), []
    model.dropout.register_forward_hook(lambda m, x, y: seen.append(torch.equal(x[0], y)))
    assert attempt(tool, model, batches(4, 4), 2) is None
    return "off" if all(seen) else "on"


def same_tensors(tool: Callable) -> str:
    model = Parts()
    tensors = list(model.buffers())
    assert attempt(tool, model, batches(4, 4), 2) is None
    return "in place" if all(a is b for a, b in zip(tensors, model.buffers(), strict=True)) else "other tensors"


FAULTS = {
    "the loader raises": (loader_raises, "everything as before"),
    "interrupted (Ctrl-C)": (interrupted, "everything as before"),
    "fewer batches than asked for": (short_loader, "goes on, and reports it"),
    "a batch with NaN": (nan_batch, "clear error, everything as before"),
    "a layer that never runs": (never_run, "kept, and reported"),
    "a frozen layer (in eval mode)": (frozen, "kept"),
    "batches of 100 and 2": (unequal_batches, "exact"),
    "mean 3000, deviation 0.1": (large_mean, "exact"),
    "momentum None": (momentum_none, "kept"),
    "float16 statistics": (half_buffers, "clear error with the remedy"),
    "a layer used twice": (reused_layer, "exact"),
    "a layer that adds a residual": (fused_residual, "exact"),
    "dropout while measuring": (dropout, "off"),
    "the buffers are written": (same_tensors, "in place"),
}


@pytest.mark.parametrize("fault", list(FAULTS))
def test_ours(fault):
    run, expected = FAULTS[fault]
    assert run(ours) == expected


def table() -> list[list[str]]:
    torch.manual_seed(0)
    return [[fault, *(run(tool) for tool in TOOLS.values())] for fault, (run, _) in FAULTS.items()]


def test_the_page_has_what_happens():
    text = PAGE.read_text(encoding="utf-8")
    rows = [re.split(r" \| ", line.strip("| \n")) for line in text.splitlines() if line.startswith("| ")]
    assert [row for row in rows if row[0] in FAULTS] == table()


if __name__ == "__main__":
    for row in table():
        print("|", " | ".join(row), "|")
