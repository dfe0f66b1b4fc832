"""Under a real Lightning Trainer."""

from __future__ import annotations

import pytest
import pytorch_lightning as lightning
import torch
from nets import close, moments
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

from bnkit.nn import BatchNorm2d
from bnkit.population import EMACallback, GuardCallback, RecalibrateCallback
from bnkit.surgery import freeze

pytestmark = pytest.mark.filterwarnings("ignore")  # Lightning's advice: workers, loggers, limits


class Classifier(lightning.LightningModule):
    def __init__(self):
        super().__init__()
        self.net = nn.Sequential(
            nn.Conv2d(3, 4, 3),
            BatchNorm2d(4, activation="relu"),
            nn.AdaptiveAvgPool2d(1),
            nn.Flatten(),
            nn.Linear(4, 2),
        )

    def forward(self, x):
        return self.net(x)

    def training_step(self, batch, index):
        images, labels = batch
        return nn.functional.cross_entropy(self(images), labels)

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), lr=0.1)


def images(count=12):
    generator = torch.Generator().manual_seed(0)
    return torch.randn(count, 3, 6, 6, generator=generator) * 3 + 1, torch.arange(count) % 2


def trainer(folder, callbacks=(), epochs=2, **options):
    return lightning.Trainer(
        max_epochs=epochs,
        accelerator="cpu",
        callbacks=list(callbacks),
        default_root_dir=folder,
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        **options,
    )


def test_callbacks_measure_average_and_guard(tmp_path):
    data, model = images(), Classifier()
    loader = DataLoader(TensorDataset(*data), batch_size=4)
    recalibrate, ema, guard = RecalibrateCallback(), EMACallback(0.5, loader), GuardCallback()
    run = trainer(tmp_path, [recalibrate, ema, guard], accumulate_grad_batches=2)
    run.fit(model, loader)
    mean, var = moments(model.net[0](data[0]).detach())[:2]
    close(model.net[1].running_mean, mean)
    close(model.net[1].running_var, var)
    assert recalibrate.result.batches == 3
    assert run.global_step == ema.ema.n_averaged == 4
    assert not model.net[1]._forward_hooks


def test_an_average_goes_on_from_a_checkpoint(tmp_path):
    loader = DataLoader(TensorDataset(*images()), batch_size=4)
    first, path = EMACallback(0.5), tmp_path / "last.ckpt"
    run = trainer(tmp_path, [first, GuardCallback()], epochs=1)
    run.fit(Classifier(), loader)
    run.save_checkpoint(path)
    second = EMACallback(0.5)
    trainer(tmp_path, [second, GuardCallback()], epochs=3).fit(Classifier(), loader, ckpt_path=path)
    assert (first.ema.n_averaged, second.ema.n_averaged) == (3, 9)


def test_frozen_layers_stay_as_they_are(tmp_path):
    model = freeze(Classifier()).model
    before = {name: t.clone() for name, t in model.state_dict().items() if name.startswith("net.1.")}
    trainer(tmp_path).fit(model.train(), DataLoader(TensorDataset(*images()), batch_size=4))
    assert all(torch.equal(model.state_dict()[name], t) for name, t in before.items())
    assert len(before) == 5
