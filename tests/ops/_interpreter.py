"""Triton's interpreter, which runs kernels on the CPU."""

from __future__ import annotations

import contextlib
import os
import sys
import types
from collections.abc import Iterator


@contextlib.contextmanager
def interpreted() -> Iterator[None]:
    """Triton as its interpreter has it, whether or not something (`torch.compile`, say) has imported it before."""

    def modules() -> dict[str, types.ModuleType]:
        ours = ("bnkit.ops._triton_", "triton.")
        names = [n for n in sys.modules if n == "triton" or (n.startswith(ours) and not n.startswith("triton._C"))]
        return {name: sys.modules.pop(name) for name in names}

    before = modules()
    os.environ["TRITON_INTERPRET"] = "1"
    try:
        yield
    finally:
        del os.environ["TRITON_INTERPRET"]
        modules()
        sys.modules.update(before)
