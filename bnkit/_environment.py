"""What a measurement ran on: machine, versions, settings."""

from __future__ import annotations

import os
import platform
from importlib import metadata
from pathlib import Path

import torch

from ._allocator import allocator_setting


def _processor() -> str:
    cpuinfo = Path("/proc/cpuinfo")
    if cpuinfo.exists():
        for line in cpuinfo.read_text(encoding="utf-8", errors="replace").splitlines():
            if line.startswith("model name"):
                return line.split(":", 1)[1].strip()
    return platform.processor() or platform.machine()


def _memory_gib() -> float | None:
    try:
        return round(os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 2**30, 1)
    except (ValueError, OSError, AttributeError):
        return None


def installed_version(package: str) -> str | None:
    """None where it is not installed, as bnkit is not where it is run from its sources."""
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return None


def describe_machine() -> dict[str, str | int | float | None]:
    """Machine, versions and settings of this process, as plain values for reports and results files."""
    return {
        "processor": _processor(),
        "cores": os.cpu_count(),
        "memory_gib": _memory_gib(),
        "gpu": torch.cuda.get_device_name() if torch.cuda.is_available() else None,
        "cpu_capability": torch.backends.cpu.get_cpu_capability(),
        "system": platform.platform(),
        "python": platform.python_version(),
        "torch": torch.__version__,
        "bnkit": installed_version("bnkit"),
        "threads": torch.get_num_threads(),
        "allocator": allocator_setting(),
    }
