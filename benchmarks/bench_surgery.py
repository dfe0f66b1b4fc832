"""Fold and convert over the models of torchvision and timm: what folds, what doesn't and why, and how exact it is.

Every model is made without weights; statistics, weights and biases of its batch norms are random, so that none is the
identity, which would hide mistakes. A row tells the batch norms found and folded, the reasons of those left, the
largest relative difference of the outputs in eval mode, and whether the folded model pickles, batch norms converted
to synchronized ones and back give the same bits, and, on request, whether it exports and compiles.
"""

from __future__ import annotations

import collections
import dataclasses
import pickle
import re
import warnings
from collections.abc import Callable, Iterator
from typing import Any

import torch
from _harness import quantiles, save_results, take_turns
from torch import Tensor, nn

from bnkit import surgery
from bnkit.graph import tensors_in

# One of each family, small: what CI runs.
QUICK = (
    *("torchvision:" + name for name in (
        "resnet18", "densenet121", "googlenet", "inception_v3", "vgg11_bn", "mobilenet_v3_small", "shufflenet_v2_x0_5",
        "mnasnet0_5", "regnet_y_400mf", "lraspp_mobilenet_v3_large", "ssdlite320_mobilenet_v3_large",
    )),
    *("timm:" + name for name in (
        "resnetv2_18", "tf_efficientnet_b0", "repvgg_a0", "dla46_c", "hardcorenas_a", "ghostnet_050", "levit_128s",
    )),
)  # fmt: skip


@dataclasses.dataclass(frozen=True)
class Row:
    """What surgery on one model gave."""

    model: str
    found: int = 0
    folded: int = 0
    left: str = ""
    error: float = float("nan")
    checks: str = ""
    speedup_1: float | None = None
    speedup_32: float | None = None


def names(everything: bool, per_family: int = 8) -> Iterator[str]:
    """The models to look at: one a family, or all of torchvision's and several of each file of timm's."""
    if not everything:
        yield from QUICK
        return
    import timm
    from torchvision import models

    for package in (models, models.segmentation, models.detection):
        yield from (f"torchvision:{name}" for name in models.list_models(module=package))
    for module in timm.list_modules():
        found = sorted(timm.list_models(module=module), key=lambda name: (len(name), name))
        yield from (f"timm:{name}" for name in found[:per_family])


def made(name: str) -> nn.Module:
    """The model, without weights, in eval mode, its batch norms random."""
    library, _, kind = name.partition(":")
    if library == "timm":
        import timm

        model = timm.create_model(kind)
    else:
        from torchvision import models

        options: dict[str, Any] = {"init_weights": False} if kind in ("googlenet", "inception_v3") else {}
        if kind in models.list_models(module=models.segmentation) + models.list_models(module=models.detection):
            options["weights_backbone"] = None
        model = models.get_model(kind, weights=None, **options)
    return randomized(model).eval()


@torch.no_grad()
def randomized(model: nn.Module) -> nn.Module:
    """The model with random statistics, weights and biases in its batch norms."""
    generator = torch.Generator().manual_seed(0)
    for module in model.modules():
        mean, var = getattr(module, "running_mean", None), getattr(module, "running_var", None)
        if not isinstance(mean, Tensor) or not isinstance(var, Tensor):
            continue
        mean.copy_(torch.randn(mean.shape, generator=generator) * 0.1)
        var.copy_(torch.rand(var.shape, generator=generator) + 0.5)
        for key, low in (("weight", 0.5), ("bias", -0.5)):
            if (tensor := getattr(module, key, None)) is not None:
                tensor.copy_(torch.rand(tensor.shape, generator=generator) + low)
    return model


def example_for(name: str, model: nn.Module) -> tuple[Any, Any]:
    """An input the model runs on, small if it can be, and how to run the model on it."""
    generator = torch.Generator().manual_seed(1)
    sizes = [64, 96, 128, 224, 256, 299]
    if config := getattr(model, "default_cfg", None):
        sizes.append(config["input_size"][-1])
    if hasattr(model, "roi_heads") or hasattr(model, "anchor_generator"):
        image = torch.rand(3, 96, 96, generator=generator)
        return image, _detect
    for size in sizes:
        x = torch.randn(2, 3, size, size, generator=generator)
        try:
            with torch.no_grad():
                outputs = list(tensors_in(model(x)))
        except (RuntimeError, AssertionError, ValueError, IndexError):
            continue
        if all(t.isfinite().all() for t in outputs):
            return x, None
    raise ValueError(f"{name} runs on no input of {sizes}")


def _detect(model: nn.Module, image: Tensor) -> Any:
    return model([image])


def examine(name: str, *, export: bool = False, speed: int = 0) -> Row:
    """Fold one model, check what came out, and time it."""
    model = made(name)
    example, forward = example_for(name, model)
    if forward is not None:  # what a detector keeps is decided by comparisons, which rounding may turn
        model, example = model.double(), example.double()
    result = surgery.fold(model, example, forward=forward, tolerance=1e-9 if forward else 1e-4)
    checks = [kind for kind, check in _checks(export).items() if _passes(check, model, result.model, example, forward)]
    found = len(result.changed) + len(result.skipped)
    row = Row(name, found, len(result.changed), _reasons(result.skipped), result.max_error or 0.0, " ".join(checks))
    if speed and forward is None:
        ups = {size: _speedup(model, result.model, example, size, speed) for size in (1, 32)}
        row = dataclasses.replace(row, speedup_1=ups[1], speedup_32=ups[32])
    return row


def _checks(export: bool) -> dict[str, Callable[..., bool]]:
    checks: dict[str, Callable[..., bool]] = {"pickles": _pickles, "converts": _converts}
    return checks | ({"exports": _exports, "compiles": _compiles} if export else {})


def _passes(check: Callable[..., bool], *arguments: Any) -> bool:
    try:
        with torch.no_grad():
            return check(*arguments)
    except Exception:  # any failure is the finding
        return False


def _run(model: nn.Module, example: Any, forward: Any) -> list[Tensor]:
    return list(tensors_in(forward(model, example) if forward else model(example)))


def _same(found: list[Tensor], expected: list[Tensor]) -> bool:
    return all(torch.equal(a, b) for a, b in zip(found, expected, strict=True))


def _pickles(model: nn.Module, folded: nn.Module, example: Any, forward: Any) -> bool:
    return _same(_run(pickle.loads(pickle.dumps(folded)), example, forward), _run(folded, example, forward))


def _converts(model: nn.Module, folded: nn.Module, example: Any, forward: Any) -> bool:
    back = surgery.convert(surgery.convert(model, "sync").model, "torch").model
    before, after = model.state_dict(), back.state_dict()
    return list(before) == list(after) and all(torch.equal(before[key], after[key]) for key in before)


def _exports(model: nn.Module, folded: nn.Module, example: Any, forward: Any) -> bool:
    program = torch.export.export(folded, (example,)).module()
    pairs = zip(tensors_in(program(example)), tensors_in(folded(example)), strict=True)
    return all(torch.allclose(a, b, rtol=1e-4, atol=1e-4) for a, b in pairs)


def _compiles(model: nn.Module, folded: nn.Module, example: Any, forward: Any) -> bool:
    compiled = torch.compile(folded, backend="aot_eager")
    pairs = zip(tensors_in(compiled(example)), tensors_in(folded(example)), strict=True)
    return all(torch.allclose(a, b, rtol=1e-4, atol=1e-4) for a, b in pairs)


def _reasons(skipped: dict[str, str]) -> str:
    short = (re.sub(r"[: ]*(by \w+ in|in dimension) .*", "", reason.split(";")[0]) for reason in skipped.values())
    return "; ".join(f"{count} × {reason}" for reason, count in collections.Counter(short).most_common(3))


def _speedup(model: nn.Module, folded: nn.Module, example: Tensor, size: int, rounds: int) -> float:
    x = example[:1].expand(size, -1, -1, -1).contiguous()
    with torch.inference_mode():
        times = take_turns({"model": lambda: model(x), "folded": lambda: folded(x)}, rounds)
    return quantiles(times["model"])[1] / quantiles(times["folded"])[1]


def main(everything: bool, save: bool, export: bool, speed: int) -> None:
    """Print a row for each model; with `save`, write `benchmarks/results/surgery.csv`."""
    warnings.filterwarnings("ignore")
    rows = []
    for name in names(everything):
        try:
            row = examine(name, export=export, speed=speed)
        except Exception as error:  # one model that can't be made or run must not end the sweep
            row = Row(name, left=f"failed: {type(error).__name__}: {str(error).splitlines()[0][:120]}")
        if row.found or row.left:
            rows.append(row)
            ups = "" if row.speedup_1 is None else f"  ×{row.speedup_1:.2f} ×{row.speedup_32:.2f}"
            print(
                f"{row.model:45} {row.folded:4}/{row.found:<4} {row.error:8.1e}  {row.checks}{ups}  {row.left}",
                flush=True,
            )
    worked = [row for row in rows if row.found]
    print(f"{len(worked)} models, {sum(row.folded for row in worked)} of {sum(row.found for row in worked)} folded.")
    if save:
        save_results("surgery", [dataclasses.asdict(row) for row in rows])
