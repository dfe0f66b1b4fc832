"""What every `DataLoader` over photographs needs."""

from __future__ import annotations

import os
from collections.abc import Sequence

import torch
from torch import Tensor

from ._photographs import Example

_MOST_WORKERS = 8


def usual_workers(processes: int = 1) -> int:
    """Workers that decode for each of `processes` on this machine: together one a core, each at most 8."""
    return min(_MOST_WORKERS, max(1, (os.cpu_count() or 1) // processes))


def collated(examples: Sequence[Example]) -> tuple[Tensor, Tensor, str]:
    """Images (n, 3, H, W) and labels of those that could be read, and why the first other one could not."""
    read = [example for example in examples if not isinstance(example, str)]
    fault = next((example for example in examples if isinstance(example, str)), "")
    images = torch.stack([image for image, _ in read]) if read else torch.empty(0)
    return images, torch.tensor([label for _, label in read], dtype=torch.int64), fault
