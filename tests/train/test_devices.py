from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
import torch
from toys import toy_net, toy_set

from bnkit._checks import UserError
from bnkit.train import FitConfig, fit
from bnkit.train import _devices as devices


def test_full_precision_leaves_the_model_as_it_is() -> None:
    net = toy_net()
    placed = devices.place(net, FitConfig(steps=1, device="cpu"))
    assert placed.forward is net
    assert (placed.device, placed.dtype, placed.rank, placed.world) == (torch.device("cpu"), torch.float32, 0, 1)


def test_float64_converts_the_model() -> None:
    net = toy_net()
    assert devices.place(net, FitConfig(steps=1, device="cpu", precision="64-true")).dtype == torch.float64
    assert all(parameter.dtype == torch.float64 for parameter in net.parameters())


def test_the_direct_way_gives_what_fabric_gives(monkeypatch: pytest.MonkeyPatch) -> None:
    config = FitConfig(steps=20, batch_size=32, eval_every=10, momentum=0.9, device="cpu")
    direct, through = toy_net(), toy_net()
    fit(direct, toy_set(), config)
    monkeypatch.setattr(
        "bnkit.train._run.place",
        lambda model, config: devices._through_fabric(model, config, torch.device("cpu"), torch.float32),
    )
    fit(through, toy_set(), config)
    for key, value in direct.state_dict().items():
        assert torch.equal(value, through.state_dict()[key]), key


def test_bfloat16_is_used_under_autocast_and_learns() -> None:
    seen = set()
    net = toy_net()
    net[4].register_forward_hook(lambda module, args, output: seen.add(output.dtype))
    history = fit(net, toy_set(), FitConfig(steps=60, eval_every=60, precision="bf16-mixed", device="cpu"))
    assert seen == {torch.bfloat16}
    assert all(parameter.dtype == torch.float32 for parameter in net.parameters())
    assert history.final.test_accuracy > 0.95


def test_a_device_that_is_not_there() -> None:
    if torch.cuda.is_available():
        pytest.skip("this machine has the device")
    with pytest.raises(UserError, match="this machine has no cuda device: choose device='cpu'"):
        devices.place(toy_net(), FitConfig(steps=1, device="cuda"))


def test_processes_that_were_not_started(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("WORLD_SIZE", raising=False)
    with pytest.raises(UserError, match=r"devices=2 needs as many processes, got 1: .* torchrun --nproc-per-node 2"):
        devices.place(toy_net(), FitConfig(steps=1, device="cpu", devices=2))


@pytest.mark.skipif(not torch.distributed.is_available(), reason="this build of torch has no torch.distributed")
def test_two_processes_train_as_one(tmp_path: Path) -> None:
    script = Path(__file__).with_name("distributed_run.py")
    command = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", "2", "--standalone"]
    done = subprocess.run(
        [*command, str(script), str(tmp_path / "two.pt")], capture_output=True, text=True, timeout=300
    )
    assert done.returncode == 0, done.stderr
    first, second = done.stdout.strip().splitlines()
    assert first == second

    from distributed_run import run

    run(1, str(tmp_path / "one.pt"))
    one, two = (torch.load(tmp_path / f"{name}.pt", weights_only=True) for name in ("one", "two"))
    for key, value in one["model"].items():
        torch.testing.assert_close(two["model"][key], value, rtol=1e-4, atol=1e-6)
    for left, right in zip(one["evaluations"], two["evaluations"], strict=True):
        # No loss is known at step 0, and NaN stands for it here.
        values = [[e[key] or float("nan") for key in sorted(e.keys() - {"seconds"})] for e in (left, right)]
        assert values[1] == pytest.approx(values[0], rel=1e-4, nan_ok=True)
    assert len(two["random"]) == 2
    assert not torch.equal(two["random"][0]["torch"], two["random"][1]["torch"])
