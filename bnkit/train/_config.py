"""What a training run is told: every choice that its result depends on."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping
from typing import Any

from .._checks import UserError, check_seed, require, unknown
from ..data import SHUFFLES, Augmentation

SCHEDULES = ("constant", "cosine", "step", "exponential")
LOSSES = ("cross-entropy", "rbf", "rbf-discriminative")
NORMALIZATIONS = ("channel", "unit", "imagenet")
PRECISIONS = ("32-true", "64-true", "bf16-mixed")
DEVICES = ("auto", "cpu", "cuda", "mps")


@dataclasses.dataclass(frozen=True)
class FitConfig:
    """The settings of `fit`: mini-batch SGD on the cross-entropy.

    Attributes:
        steps: Updates of the weights.
        batch_size: Images an update, over all devices together.
        lr: Learning rate, after the warm-up and before any decay.
        momentum: Of SGD, in [0, 1).
        weight_decay: L2 penalty on weights; norms' parameters and biases are spared (see `parameter_groups`).
        nesterov: Nesterov's momentum, as `torch.optim.SGD` has it.
        schedule: `"constant"`; `"cosine"` down to zero at the last step (Loshchilov and Hutter 2017); `"step"`, a
            tenth after half of the steps and a hundredth after three quarters (He et al. 2015, "Deep Residual
            Learning", section 4.2); or `"exponential"` by `decay`.
        decay: Factor, in (0, 1], that the exponential schedule reaches at the end of the run.
        warmup_steps: Steps over which the rate first grows linearly to `lr` (Goyal et al. 2017, section 2.2).
        loss: `"cross-entropy"`; or for `lenet5_1998`, which gives negative distances, `"rbf"` (equation 8 of LeCun et
            al. 1998) or `"rbf-discriminative"` (equation 9, with j = 0.1). Of a network with auxiliary heads, their
            losses count 0.3 each (Szegedy et al. 2015, section 5). Evaluations have the cross-entropy.
        label_smoothing: Part of each label's probability that is spread over all classes (Szegedy et al. 2016, section
            7), in training only, in [0, 1).
        shuffle: `"all"` training images each epoch, `"within-shards"` or `"shards"`; see `bnkit.data.BatchOrder`.
        augment: Changes of the training images, such as `"crop=4,flip"`; see `bnkit.data.Augmentation`.
        ema: Decay of an exponential moving average of the weights over the steps, 0 for none. Evaluations are then of
            the average, and the model becomes it at the end of the run; see `fit`.
        seed: Of the order of the batches and of what the model draws while it trains; not of its initial weights.
        eval_every: Steps between evaluations.
        eval_batch_size: Images a forward pass of an evaluation.
        checkpoint_every: Steps between checkpoints, a multiple of `eval_every`; by default at each evaluation.
        normalize: `"unit"` scales pixels to [0, 1]; `"channel"` then also takes the training images' mean and
            standard deviation to 0 and 1, channel by channel; `"imagenet"` takes ImageNet's instead of their own, as
            pretrained weights expect.
        precision: `"32-true"`, `"64-true"`, or `"bf16-mixed"` (autocast).
        channels_last: Keep images and convolutions' weights with the channel innermost in memory.
        device: `"auto"` (CUDA, else Apple's GPU, else CPU), `"cpu"`, `"cuda"` or `"mps"`.
        devices: Processes that train together, each on its own device and its own share of every batch, by
            `DistributedDataParallel`. More than one are started with `torchrun --nproc-per-node`.

        workers: Processes that decode photographs, 0 for none but the training's own; by default one a core, 8 at
            most.

    Raises:
        UserError: a value out of range.
    """

    steps: int
    batch_size: int = 128
    lr: float = 0.1
    momentum: float = 0.0
    weight_decay: float = 0.0
    nesterov: bool = False
    schedule: str = "constant"
    decay: float = 0.01
    warmup_steps: int = 0
    loss: str = "cross-entropy"
    label_smoothing: float = 0.0
    shuffle: str = "all"
    augment: str = "none"
    ema: float = 0.0
    seed: int = 0
    eval_every: int = 250
    eval_batch_size: int = 1000
    checkpoint_every: int | None = None
    normalize: str = "channel"
    precision: str = "32-true"
    channels_last: bool = False
    device: str = "auto"
    devices: int = 1
    workers: int | None = None

    def __post_init__(self) -> None:
        for name in ("steps", "batch_size", "eval_every", "eval_batch_size", "devices"):
            _require_integer(name, getattr(self, name), at_least=1)
        _require_integer("warmup_steps", self.warmup_steps, at_least=0)
        _require_integer("seed", self.seed, at_least=0)
        check_seed(self.seed)
        if self.workers is not None:
            _require_integer("workers", self.workers, at_least=0)
        require(
            _is_finite(self.lr) and self.lr > 0,
            f"lr must be a positive number, got {self.lr!r}: try 0.1.",
        )
        for name, usual in (("momentum", 0.9), ("label_smoothing", 0.1), ("ema", 0.999)):
            value = getattr(self, name)
            require(_is_finite(value) and 0 <= value < 1, f"{name} must be in [0, 1), got {value!r}: try {usual}.")
        require(
            _is_finite(self.weight_decay) and self.weight_decay >= 0,
            f"weight_decay must be zero or positive, got {self.weight_decay!r}: try 1e-4.",
        )
        require(
            _is_finite(self.decay) and 0 < self.decay <= 1,
            f"decay must be in (0, 1], got {self.decay!r}: try 0.01.",
        )
        for name, choices in (
            ("schedule", SCHEDULES),
            ("loss", LOSSES),
            ("shuffle", SHUFFLES),
            ("normalize", NORMALIZATIONS),
            ("precision", PRECISIONS),
            ("device", DEVICES),
        ):
            if getattr(self, name) not in choices:
                raise unknown(name, getattr(self, name), choices)
        Augmentation.parse(self.augment)
        self._check_relations()

    def _check_relations(self) -> None:
        require(
            self.momentum > 0 or not self.nesterov,
            f"Nesterov's momentum needs one, got momentum={self.momentum}: try 0.9.",
        )
        require(
            self.label_smoothing == 0 or self.loss == "cross-entropy",
            f"label smoothing is for the cross-entropy, got loss={self.loss!r}: leave one of them out.",
        )
        require(
            self.warmup_steps <= self.steps,
            f"the warm-up must end within the run, got warmup_steps={self.warmup_steps} of steps={self.steps}: "
            "shorten it.",
        )
        require(
            self.batch_size % self.devices == 0,
            f"the batch must split evenly over the devices, got batch_size={self.batch_size} on "
            f"devices={self.devices}: choose a multiple.",
        )
        if self.checkpoint_every is not None:
            _require_integer("checkpoint_every", self.checkpoint_every, at_least=1)
            require(
                self.checkpoint_every % self.eval_every == 0,
                f"checkpoint_every must be a multiple of eval_every={self.eval_every}, "
                f"got {self.checkpoint_every}: choose one.",
            )

    def to_dict(self) -> dict[str, Any]:
        """Plain values by name, ready for JSON."""
        return dataclasses.asdict(self)

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> FitConfig:
        """The configuration that `to_dict` described.

        Raises:
            UserError: an unknown or missing setting, or a value out of range.
        """
        names = [field.name for field in dataclasses.fields(cls)]
        for name in values:
            if name not in names:
                raise unknown("setting", name, names)
        require("steps" in values, "a configuration must say for how many steps to train: add steps.")
        return cls(**values)


def _is_finite(value: object) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool) and math.isfinite(value)


def _require_integer(name: str, value: object, *, at_least: int) -> None:
    if isinstance(value, bool) or not isinstance(value, int) or value < at_least:
        raise UserError(f"{name} must be an integer of {at_least} or more, got {value!r}: choose one.")
