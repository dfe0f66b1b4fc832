"""The models that surgery is tried on: torchvision's and timm's, without weights, their batch norms random."""

from __future__ import annotations

import fnmatch
import zlib
from collections.abc import Iterable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from bnkit._modes import hooked
from bnkit.graph import Forward, apply, tensors_in

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


def names(everything: bool, only: Sequence[str] = (), per_family: int = 4) -> Iterator[str]:
    """The models to look at: one a family; or all of torchvision's, and of each file of timm's the first few that
    have batch norms. `only` takes shell patterns, of which one must fit.
    """
    for name in _everything(per_family) if everything else QUICK:
        if not only or any(fnmatch.fnmatchcase(name, pattern) for pattern in only):
            yield name


def hash_of(name: str) -> int:
    """The same on every machine."""
    return zlib.crc32(name.encode())


def in_order_of_hash(names: Iterable[str]) -> list[str]:
    """For sweeps that take hours: the first of them are a sample without bias."""
    return sorted(names, key=hash_of)


def _everything(per_family: int) -> Iterator[str]:
    import timm
    from torchvision import models

    for package in (models, models.segmentation, models.detection):
        yield from (f"torchvision:{name}" for name in models.list_models(module=package))
    for module in timm.list_modules():
        found = sorted(timm.list_models(module=module), key=lambda name: (len(name), name))[: 2 * per_family]
        having = [name for name in found if _has_batch_norm(name)]
        yield from (f"timm:{name}" for name in having[:per_family])


def _has_batch_norm(name: str) -> bool:
    """Whether a model of timm's has batch norms; one that can't be made without memory for its weights may have."""
    import timm

    try:
        with torch.device("meta"):
            model = timm.create_model(name)
    except Exception:  # its constructor computes something from values
        return True
    return any(isinstance(module, _BatchNorm) for module in model.modules())


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
    """The model with random statistics, weights and biases in its batch norms, so that none is an identity."""
    generator = torch.Generator().manual_seed(0)
    for module in model.modules():
        if not _has_statistics(module):
            continue
        mean, var = module.get_buffer("running_mean"), module.get_buffer("running_var")
        _fill(module, torch.zeros_like(mean), torch.ones_like(var), generator)
        for key, low in (("weight", 0.5), ("bias", 0.5)):
            if (tensor := getattr(module, key, None)) is not None:
                tensor.copy_(torch.rand(tensor.shape, generator=generator) + low)
    return model


@torch.no_grad()
def settle(model: nn.Module, example: Any, forward: Forward | None) -> None:
    """Put the statistics of each batch norm near those of its input on the example: else the signal would vanish or
    explode on the way through a deep model, and outputs tell nothing about its layers.
    """
    generator = torch.Generator().manual_seed(2)

    def near(module: Any, args: tuple[Tensor, ...]) -> None:
        dims = [d for d in range(args[0].dim()) if d != 1]
        if args[0].dim() > 1 and args[0].shape[1] == len(module.running_mean):
            mean, var = args[0].mean(dims), args[0].var(dims, correction=0)
            # The few values of a small example are much alike: their true variance would amplify rounding.
            _fill(module, mean, (var + var.mean() + mean.square()).clamp(min=1e-6) / 2, generator)

    with hooked(module.register_forward_pre_hook(near) for module in model.modules() if _has_statistics(module)):
        apply(model, example, forward)


def _fill(module: Any, mean: Tensor, var: Tensor, generator: torch.Generator) -> None:
    """Statistics that differ from the true ones at random."""
    module.running_mean.copy_(mean + torch.randn(mean.shape, generator=generator) * 0.3 * var.sqrt())
    module.running_var.copy_(var * (torch.rand(var.shape, generator=generator) + 0.5))


def _has_statistics(module: nn.Module) -> bool:
    return all(isinstance(getattr(module, name, None), Tensor) for name in ("running_mean", "running_var"))


def example_for(name: str, model: nn.Module) -> tuple[Any, Forward | None]:
    """An input the model runs on, small if it can be, and how to run the model on it."""
    generator = torch.Generator().manual_seed(1)
    if hasattr(model, "roi_heads") or hasattr(model, "anchor_generator"):
        # Else a network without weights finds nothing, and there is nothing to compare.
        (model.roi_heads if hasattr(model, "roi_heads") else model).score_thresh = 0.0  # pyright: ignore
        transform: Any = model.transform
        if len(transform.min_size) == 1 and transform.fixed_size is None:
            transform.min_size, transform.max_size = (96,), 96
        return torch.rand(3, 96, 96, generator=generator), _detect
    sizes = [64, 96, 128, 224, 256, 299]
    if config := getattr(model, "default_cfg", None):
        sizes.append(config["input_size"][-1])
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


def has_batch_norms(model: nn.Module) -> bool:
    """Whether any module keeps running statistics."""
    return any(isinstance(getattr(module, "running_var", None), Tensor) for module in model.modules())


def ready(name: str) -> tuple[nn.Module, Any, Forward | None] | None:
    """The model settled on an example, the example, and how to run the model on it; None without batch norms."""
    model = made(name)
    if not has_batch_norms(model):
        return None
    example, forward = example_for(name, model)
    settle(model, example, forward)
    return model, example, forward
