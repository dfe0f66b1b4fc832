from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import nn
from torch.optim.swa_utils import AveragedModel

from bnkit import models
from bnkit._checks import UserError
from bnkit._weights import load_weights, read_weights, save_weights


def net(width: int = 4) -> nn.Sequential:
    return nn.Sequential(nn.Linear(3, width), nn.BatchNorm1d(width))


def assert_same(a: nn.Module, b: nn.Module):
    for (name, left), (other, right) in zip(a.state_dict().items(), b.state_dict().items(), strict=True):
        assert name == other
        assert torch.equal(left, right), name


@pytest.mark.parametrize("suffix", ["safetensors", "pt", "pth"])
def test_round_trip(tmp_path: Path, suffix: str):
    model, path = net(), tmp_path / "deep" / f"w.{suffix}"
    model(torch.randn(5, 3))
    save_weights(model, path)
    other = net()
    load_weights(other, path)
    assert_same(model, other)
    assert [p.name for p in path.parent.iterdir()] == [path.name]


def test_tied_weights_are_saved(tmp_path: Path):
    model = nn.Sequential(nn.Linear(3, 3), nn.Linear(3, 3))
    model[1].weight = model[0].weight
    save_weights(model, tmp_path / "w.safetensors")
    assert set(read_weights(tmp_path / "w.safetensors")) == {"0.weight", "0.bias", "1.weight", "1.bias"}


@pytest.mark.parametrize(
    "wrap",
    [
        lambda state: {"state_dict": state, "epoch": 3},
        lambda state: {"model": {"model_state_dict": state}},
        lambda state: {f"module.{name}": value for name, value in state.items()},
        lambda state: {f"_orig_mod.module.{name}": value for name, value in state.items()},
        lambda state: {"n_averaged": torch.tensor(7), **{f"module.{name}": value for name, value in state.items()}},
        lambda state: {name: value for name, value in state.items() if "num_batches" not in name},
    ],
    ids=["state_dict", "model", "module", "compiled", "averaged", "old"],
)
def test_what_training_programs_write(tmp_path: Path, wrap):
    model, other = net(), net()
    torch.save(wrap(model.state_dict()), tmp_path / "w.pt")
    load_weights(other, tmp_path / "w.pt")
    assert_same(model, other)


def test_a_prefix_that_the_model_has_stays(tmp_path: Path):
    class Holder(nn.Module):
        def __init__(self):
            super().__init__()
            self.module = net()

    model, other = Holder(), Holder()
    save_weights(model, tmp_path / "w.pt")
    load_weights(other, tmp_path / "w.pt")
    assert_same(model, other)


def test_an_average_loads_its_own_state(tmp_path: Path):
    average, other = AveragedModel(net()), AveragedModel(net())
    average.update_parameters(net())
    save_weights(average, tmp_path / "w.pt")
    load_weights(other, tmp_path / "w.pt")
    assert_same(average, other)
    assert other.n_averaged == 1


def test_a_pickled_module_is_refused(tmp_path: Path):
    torch.save(net(), tmp_path / "w.pt")
    with pytest.raises(UserError, match=r"could run any code .* save model\.state_dict\(\)"):
        read_weights(tmp_path / "w.pt")


@pytest.mark.parametrize("suffix", ["safetensors", "pt"])
@pytest.mark.parametrize("keep", [0, 10, 200])
def test_truncated_files_are_named(tmp_path: Path, suffix: str, keep: int):
    path = tmp_path / f"w.{suffix}"
    save_weights(net(), path)
    path.write_bytes(path.read_bytes()[:keep])
    with pytest.raises(UserError, match=rf"w\.{suffix} is not a whole .*: fetch or save it again"):
        read_weights(path)


def test_files_without_weights(tmp_path: Path):
    with pytest.raises(UserError, match="there is no file"):
        read_weights(tmp_path / "w.pt")
    torch.save({"state_dict": {"epoch": 3}}, tmp_path / "w.pt")
    with pytest.raises(UserError, match="holds no weights by name"):
        read_weights(tmp_path / "w.pt")


def test_mismatches_are_named_and_nothing_is_loaded(tmp_path: Path):
    torch.save({**net(5).state_dict(), "more": torch.zeros(1)}, tmp_path / "w.pt")
    model = net()
    before = {name: value.clone() for name, value in model.state_dict().items()}
    with pytest.raises(UserError, match=r"has besides more; has in another shape 0\.weight \(5, 3\) for \(4, 3\)"):
        load_weights(model, tmp_path / "w.pt")
    save_weights(nn.Linear(2, 2), tmp_path / "v.pt")
    with pytest.raises(UserError, match=r"lacks 0\.weight, 0\.bias, .* and 1 more; has besides weight, bias"):
        load_weights(model, tmp_path / "v.pt")
    assert all(torch.equal(before[name], value) for name, value in model.state_dict().items())


def test_what_a_model_leaves_out_by_itself_is_no_mismatch(tmp_path: Path):
    options = {"num_classes": 3, "image_size": 32}
    saved = models.create("googlenet", aux_logits=True, **options)
    save_weights(saved, tmp_path / "w.pt")
    model = models.create("googlenet", **options)
    load_weights(model, tmp_path / "w.pt")
    for name, value in model.state_dict().items():
        assert torch.equal(value, saved.state_dict()[name]), name


def test_other_tensors_beside_the_weights(tmp_path: Path):
    source, target = nn.Linear(3, 2), nn.Linear(3, 2)
    content = {"epoch": 3, "state_dict": source.state_dict(), "best_acc1": torch.tensor(71.5)}  # as torch's examples
    torch.save(content, tmp_path / "model.pt")
    load_weights(target, tmp_path / "model.pt")
    assert torch.equal(target.weight, source.weight)


def test_a_folder_is_no_file_to_write(tmp_path: Path):
    with pytest.raises(UserError, match="it is a folder; name a file"):
        save_weights(nn.Linear(3, 2), tmp_path)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("part", [0.3, 0.5, 0.7])
def test_a_changed_byte_is_noticed(tmp_path: Path, part: float):
    path = tmp_path / "w.pt"
    save_weights(nn.Linear(100, 100), path)
    content = bytearray(path.read_bytes())
    content[int(part * len(content))] ^= 0x55
    path.write_bytes(content)
    with pytest.raises(UserError, match=r"w\.pt is damaged, the checksum of .* differs: fetch or save it again"):
        read_weights(path)


class Remembering(nn.Linear):
    extra: object = None

    def get_extra_state(self) -> object:
        return self.extra

    def set_extra_state(self, state: object) -> None:
        self.extra = state


def test_extra_state_that_is_no_tensor_comes_back(tmp_path: Path):
    model, other = nn.Sequential(Remembering(2, 3)), nn.Sequential(Remembering(2, 3))
    model[0].extra = {"steps": 7}
    save_weights(model, tmp_path / "a.pt")
    load_weights(other, tmp_path / "a.pt")
    assert other[0].extra == {"steps": 7}
    assert torch.equal(other[0].weight, model[0].weight)


@pytest.mark.parametrize("text", ["version https://git-lfs.github.com/spec/v1\n", "<!DOCTYPE html>\n"])
def test_text_in_place_of_a_checkpoint_is_not_taken_for_a_pickle(tmp_path, text):
    (tmp_path / "weights.pt").write_text(text)
    with pytest.raises(UserError, match="is not a whole checkpoint"):
        read_weights(tmp_path / "weights.pt")


def test_a_safetensors_file_that_breaks_off_names_what_it_lacks(tmp_path: Path):
    path = tmp_path / "w.safetensors"
    save_weights(nn.Sequential(*[nn.Linear(30, 30) for _ in range(4)]), path)
    content = path.read_bytes()
    path.write_bytes(content[:-5000])
    message = (
        r"w.safetensors is not a whole safetensors file, it lacks 2\.weight, 3\.bias, 3\.weight: fetch or save it again"
    )
    with pytest.raises(UserError, match=message):
        read_weights(path)
    # Where the list of the tensors is damaged too, nothing is known of them.
    for damaged in (content[:50], content[:4], content[:8] + b"[" * (len(content) - 8), content[:8] + b"{}" * 9000):
        path.write_bytes(damaged)
        with pytest.raises(UserError, match=r"w.safetensors is not a whole safetensors file \(.*\): fetch or save"):
            read_weights(path)


def test_a_safetensors_file_that_can_not_be_read(tmp_path, monkeypatch):
    path = tmp_path / "weights.safetensors"
    path.write_bytes(b"")

    def refused(*_, **__):
        raise PermissionError("not yours")

    monkeypatch.setattr(type(path), "open", refused)
    monkeypatch.setattr("safetensors.torch.load_file", refused)
    with pytest.raises(UserError, match="not a whole safetensors file"):
        read_weights(path)
