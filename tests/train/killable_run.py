"""Trains the toy net, with a checkpoint at each evaluation: `killable_run.py CHECKPOINT [WEIGHTS]`.

Goes on from the checkpoint if it exists. Prints each evaluation's step; saves the final state to WEIGHTS, or, without
them, takes its time, to be killed.
"""

from __future__ import annotations

import sys
import time
from pathlib import Path

import torch
from toys import toy_net, toy_set

from bnkit.train import FitConfig, iterate

CONFIG = FitConfig(
    steps=120,
    batch_size=32,
    lr=0.05,
    momentum=0.9,
    weight_decay=1e-3,
    schedule="cosine",
    warmup_steps=30,
    augment="shift=1",
    ema=0.9,
    eval_every=5,
    device="cpu",
)


def main(checkpoint: Path, weights: Path | None = None) -> None:
    torch.set_num_threads(1)
    net = toy_net()
    for evaluation in iterate(
        net, toy_set(), CONFIG, checkpoint=checkpoint, resume=checkpoint if checkpoint.exists() else None
    ):
        print(evaluation.step, flush=True)
        if weights is None:
            time.sleep(0.1)
    if weights is not None:
        torch.save(net.state_dict(), weights)


if __name__ == "__main__":
    main(*map(Path, sys.argv[1:]))
