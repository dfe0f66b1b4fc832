"""Every kernel compiles for GPUs, to the machine code, with the arguments that its launcher gives it. Needs no GPU."""

from __future__ import annotations

import importlib
import re
import subprocess
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.torch_version import TorchVersion

triton = pytest.importorskip("triton", reason="Triton is not installed")

TYPES = {torch.float32: "fp32", torch.float64: "fp64", torch.bfloat16: "bf16", torch.float16: "fp16"}
OPTIONS = ("num_warps", "enable_fp_fusion")
SHAPES = {
    (32, 256, 1024): "planes, the largest slab that is read once forward, without a residual",
    (2048, 512, 1): "the same of rows",
    (16, 256, 1024): "planes, the largest slab that is read once forward with a residual, and backward",
    (1024, 512, 1): "the same of rows",
    (32, 512, 49): "planes of which no tile is aligned",
    (64, 64, 12544): "two sweeps over planes",
    (100352, 256, 1): "two sweeps over rows",
    (2**31, 3, 1): "more than 2³¹ rows",
}


class Recorder:
    """Stands for a kernel, and notes the arguments it is launched with."""

    def __init__(self, kernel: Any, launches: list) -> None:
        self.kernel, self.launches = kernel, launches

    def __getitem__(self, grid: tuple[int, ...]) -> Any:
        assert 0 < grid[0] < 2**31, "a grid has no more programs"
        return lambda *values, **named: self.launches.append((self.kernel, values, named))


@pytest.fixture
def launches(monkeypatch: pytest.MonkeyPatch) -> list:
    forward, backward, tiles = (
        importlib.import_module(f"bnkit.ops._triton_{name}") for name in ("forward", "backward", "tiles")
    )
    found: list = []
    for module in (forward, backward):
        for name, kernel in list(vars(module).items()):
            if name.endswith("_kernel"):
                monkeypatch.setattr(module, name, Recorder(kernel, found))
    monkeypatch.setattr(tiles, "_processors", lambda _: 132)
    return found


def launch(shape: tuple[int, int, int], dtype: torch.dtype, activation: str | None, optional: bool) -> None:
    """Training, inference and the backward pass, with or without the optional tensors."""
    from bnkit.ops._triton_backward import batch_norm_backward
    from bnkit.ops._triton_forward import batch_norm_forward, batch_norm_inference

    x = torch.empty(shape, dtype=dtype, device="meta")
    mean, invstd = (torch.empty(shape[1], dtype=dtype, device="meta") for dtype in (torch.float64, torch.float32))
    extras = (x, invstd, invstd) if optional else (None, None, None)
    batch_norm_forward(x, *extras, *extras[1:], 0.1, 1e-5, activation, shape)
    batch_norm_inference(x, *extras, invstd, invstd, 1e-5, activation, shape)
    for training in (True, False):
        batch_norm_backward(x, x, *extras, mean, invstd, training, activation, (True,) * 4, shape)


def compile_kernel(kernel: Any, values: tuple, named: dict[str, Any], capability: int) -> Any:
    arguments = dict(zip(kernel.arg_names, values, strict=False)) | named
    options = {name: arguments.pop(name) for name in OPTIONS if name in arguments}
    assert set(arguments) == set(kernel.arg_names)
    signature, constants, aligned = {}, {}, {}
    for i, (name, parameter) in enumerate(zip(kernel.arg_names, kernel.params, strict=True)):
        value, special = arguments[name], not parameter.do_not_specialize
        if parameter.is_constexpr or value is None or (isinstance(value, int) and value == 1 and special):
            signature[name], constants[name] = "constexpr", value
        elif isinstance(value, Tensor):
            signature[name] = "*" + TYPES[value.dtype]
            aligned[(i,)] = [["tt.divisibility", 16]]
        elif isinstance(value, float):
            signature[name] = "fp32"
        else:
            signature[name] = "i32" if value < 2**31 else "i64"
            aligned |= {(i,): [["tt.divisibility", 16]]} if value % 16 == 0 and special else {}
    source = triton.compiler.ASTSource(kernel, signature, constants, aligned)
    target = triton.backends.compiler.GPUTarget("cuda", capability, 32)
    return triton.compile(source, target=target, options=options)


def spilled_bytes(cubin: bytes, folder: Path) -> int:
    """Bytes of each thread's stack, where values go that find no register."""
    tool = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "cuobjdump"
    if not tool.exists():
        pytest.skip("Triton has no cuobjdump here")
    (folder / "kernel.cubin").write_bytes(cubin)
    usage = subprocess.run([tool, "-res-usage", folder / "kernel.cubin"], capture_output=True, text=True, check=True)
    return int(re.findall(r"STACK:(\d+)", usage.stdout)[0])


def may_spill(shape: tuple[int, int, int]) -> int:
    """Nothing, but for four registers in the largest slabs of rows, and more where the compiler is Triton 3.6's."""
    if TorchVersion(triton.__version__) < (3, 9):
        return 72
    return 16 if shape in ((2048, 512, 1), (1024, 512, 1)) else 0


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("optional", [True, False])
def test_kernels_compile_and_keep_their_values_in_registers(shape, optional, launches, tmp_path, monkeypatch):
    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path))
    launch(shape, torch.float32, "relu", optional=optional)
    for kernel, values, named in launches:
        compiled = compile_kernel(kernel, values, named, 90)
        assert spilled_bytes(compiled.asm["cubin"], tmp_path) <= may_spill(shape), kernel.__name__


@pytest.mark.parametrize("capability", [80, 90])
@pytest.mark.parametrize("activation", [None, "gelu", "tanh"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_kernels_compile_without_the_optional_tensors(capability, activation, dtype, launches, tmp_path, monkeypatch):
    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path))
    launch((60, 100, 1), dtype, activation, optional=False)
    assert len(launches) == 4
    for kernel, values, named in launches:
        assert compile_kernel(kernel, values, named, capability).asm["cubin"]


def test_what_fits_in_registers_takes_one_launch_a_pass(launches):
    launch((4, 3, 5), torch.float32, None, optional=True)
    assert [kernel.__name__ for kernel, _, _ in launches] == [
        "_batch_norm_forward_kernel",
        "_batch_norm_inference_kernel",
        "_batch_norm_backward_kernel",
        "_batch_norm_backward_kernel",
    ]
