"""Trains the toy net in as many processes as torchrun started: `distributed_run.py CHECKPOINT`."""

from __future__ import annotations

import dataclasses
import os
import sys

import torch
from toys import toy_net, toy_set

from bnkit.train import FitConfig, History, fit

CONFIG = FitConfig(steps=12, batch_size=40, lr=0.05, momentum=0.9, eval_every=6, device="cpu", seed=1)


def run(devices: int, checkpoint: str) -> History:
    torch.set_num_threads(1)
    config = dataclasses.replace(CONFIG, devices=devices)
    return fit(toy_net(dropout=0.0, norm=False), toy_set(), config, checkpoint=checkpoint)


if __name__ == "__main__":
    # One write: print's second one, of the line's end, may come after the other process's line.
    sys.stdout.write(f"{run(int(os.environ['WORLD_SIZE']), sys.argv[1]).final}\n")
