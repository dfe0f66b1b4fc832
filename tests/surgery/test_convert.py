"""Round trips to the bit, and everything that has to come along."""

from __future__ import annotations

import copy
import io

import pytest
import timm.layers
import torch
import torchvision
from torch import nn

import bnkit
from bnkit import UserError
from bnkit.surgery import convert

KINDS = ["batch", "sync", "ghost", "frozen", "renorm", "torch"]
LAYERS = {1: nn.BatchNorm1d, 2: nn.BatchNorm2d, 3: nn.BatchNorm3d}
CLASSES = {
    "sync": bnkit.nn.SyncBatchNorm,
    "ghost": bnkit.nn.GhostBatchNorm,
    "renorm": bnkit.nn.BatchRenorm,
}


def class_of(kind: str, dims: int) -> type:
    where = {"batch": (bnkit.nn, "BatchNorm"), "torch": (nn, "BatchNorm"), "frozen": (bnkit.nn, "FrozenBatchNorm")}
    return CLASSES[kind] if kind in CLASSES else getattr(where[kind][0], f"{where[kind][1]}{dims}d")


def randomized(model: nn.Module) -> nn.Module:
    with torch.no_grad():
        for tensor in (*model.parameters(), *model.buffers()):
            if tensor.is_floating_point():
                tensor.uniform_(0.5, 2)
    return model


def net(dims: int = 2) -> nn.Sequential:
    conv = {1: nn.Conv1d, 2: nn.Conv2d, 3: nn.Conv3d}[dims]
    norm = LAYERS[dims]
    model = nn.Sequential(conv(3, 4, 1), norm(4, eps=1e-3, momentum=0.3), nn.ReLU(), norm(4, momentum=None))
    return randomized(model)


def image(dims: int = 2) -> torch.Tensor:
    return torch.randn(4, 3, *(5,) * dims)


def settings(model: nn.Module) -> list[tuple]:
    return [
        (type(m), m.eps, m.momentum, m.affine, m.track_running_stats, m.training, m.weight is None)
        for m in model.modules()
        if isinstance(m, nn.modules.batchnorm._BatchNorm)
    ]


def same_state(a: nn.Module, b: nn.Module) -> bool:
    x, y = a.state_dict(), b.state_dict()
    return list(x) == list(y) and all(torch.equal(x[k], y[k]) for k in x)


@pytest.mark.parametrize("dims", [1, 2, 3])
@pytest.mark.parametrize("to", KINDS)
def test_class_settings_and_eval_outputs(to, dims):
    model, x = net(dims), image(dims)
    result = convert(model, to)
    if to != "torch":
        assert set(result.changed) == {"1", "3"}
        assert class_of(to, dims).__name__ in result.changed["1"]
    assert type(result.model[1]) is class_of(to, dims)
    torch.testing.assert_close(result.model.eval()(x), copy.deepcopy(model).eval()(x))
    assert same_state(model, result.model)
    assert settings(model) == settings(net(dims))  # the model given is untouched
    assert result.model[1].momentum == 0.3
    assert result.model[1].eps == 1e-3
    assert result.model[3].momentum is None


@pytest.mark.parametrize("first", KINDS)
@pytest.mark.parametrize("second", KINDS)
def test_round_trips_are_exact(first, second):
    model = net().train()
    model[3].eval()
    there = convert(convert(model, first).model, second).model
    back = convert(there, "torch").model
    assert settings(back) == settings(model)
    assert same_state(back, model)
    x = image()
    for mode in (False, True):
        a, b = copy.deepcopy(model).train(mode), copy.deepcopy(back).train(mode)
        assert torch.equal(a(x), b(x))
        assert same_state(a, b)


def test_what_only_a_class_has_comes_back():
    ghost = nn.Sequential(bnkit.nn.GhostBatchNorm(4, ghost_size=3, activation="relu", skip_nonfinite=True))
    sync = convert(ghost, "sync").model
    assert sync[0].activation == "relu"
    assert sync[0].skip_nonfinite
    back = convert(convert(sync, "frozen").model, "ghost").model
    assert back[0].ghost_size == 32  # made of a frozen one: new
    assert convert(sync, "ghost").model[0].ghost_size == 3


def test_options():
    model = net()
    assert convert(model, "ghost", ghost_size=2).model[1].ghost_size == 2
    assert convert(model, "renorm", r_max=2.0).model[3].r_max == 2.0
    assert convert(convert(model, "ghost").model, "ghost", ghost_size=2).model[1].ghost_size == 2
    with pytest.raises(UserError, match=r"convert to 'ghost' has no option 'ghosts': it has .*ghost_size"):
        convert(model, "ghost", ghosts=2)
    with pytest.raises(UserError, match="no option 'ghost_size'"):
        convert(model, "torch", ghost_size=2)


def test_training_matches_the_layer_built_directly():
    model, x = net().train(), image()
    ghosts = convert(model, "ghost", ghost_size=2).model
    expected = copy.deepcopy(model)
    for i in (1, 3):
        expected[i] = bnkit.nn.GhostBatchNorm(4, model[i].eps, model[i].momentum, ghost_size=2)
        expected[i].load_state_dict(model[i].state_dict())
    assert torch.equal(ghosts(x), expected(x))
    assert same_state(ghosts, expected)


def test_in_place_keeps_the_very_tensors_and_optimizers_work_on():
    model = net().train()
    optimizer = torch.optim.SGD(model.parameters(), 0.1, momentum=0.9)
    parameters, buffers = list(model.parameters()), list(model.buffers())
    assert convert(model, "batch", inplace=True).model is model
    assert all(a is b for a, b in zip(model.parameters(), parameters, strict=True))
    assert all(a is b for a, b in zip(model.buffers(), buffers, strict=True))
    before = model[1].weight.clone()
    model(image()).square().mean().backward()
    optimizer.step()
    assert not torch.equal(model[1].weight, before)


@pytest.mark.parametrize("to", ["sync", "group"])
def test_rebind_keeps_the_optimizers_state(to):
    model, x = net().train(), image()
    optimizer = torch.optim.Adam(model.parameters())
    model(x).square().mean().backward()
    optimizer.step()
    state = {name: optimizer.state[p]["exp_avg"].clone() for name, p in model.named_parameters()}
    result = convert(model, to)
    result.rebind(optimizer)
    for name, parameter in result.model.named_parameters():
        assert torch.equal(optimizer.state[parameter]["exp_avg"], state[name])
    assert len(optimizer.state) == len(state)


def test_a_shared_layer_stays_one():
    norm = nn.BatchNorm1d(3)
    model = nn.ModuleDict({"a": nn.Sequential(norm), "b": norm})
    result = convert(model, "ghost")
    assert result.model["a"][0] is result.model["b"]
    assert list(result.changed) == ["a.0"]
    assert model["b"] is norm


def test_a_bare_layer():
    layer = randomized(nn.BatchNorm1d(3)).train()
    result = convert(layer, "ghost")
    assert type(result.model) is bnkit.nn.GhostBatchNorm
    back = convert(result.model, "torch").model
    assert type(back) is nn.BatchNorm1d
    assert same_state(back, layer)
    assert convert(convert(layer, "frozen").model, "torch").model.training


def test_hooks_come_along_and_can_still_be_removed():
    model, calls = net(), []
    handle = model[1].register_forward_hook(lambda *_: calls.append("after"))
    model[1].register_forward_pre_hook(lambda *_: calls.append("before"))
    model[1].register_full_backward_hook(lambda *_: calls.append("backward"))
    convert(model, "batch", inplace=True)
    model(image()).square().mean().backward()
    assert calls == ["before", "after", "backward"]
    handle.remove()
    model(image())
    assert calls[3:] == ["before"]


def test_requires_grad_device_and_dtype():
    model = net().to(torch.float64).to("meta")
    model[1].weight.requires_grad_(False)
    result = convert(model, "sync").model
    assert not result[1].weight.requires_grad
    assert result[1].bias.requires_grad
    assert result[1].running_mean.is_meta
    assert result[1].weight.dtype == torch.float64


@pytest.mark.parametrize("options", [{"affine": False}, {"track_running_stats": False}, {"bias": False}])
def test_without_some_tensors(options):
    model = nn.Sequential(bnkit.nn.BatchNorm2d(3, **options))
    for to in ("sync", "ghost", "torch"):
        result = convert(model, to).model
        assert same_state(convert(result, "batch").model, model)
        x = image()
        torch.testing.assert_close(copy.deepcopy(result)(x), copy.deepcopy(model)(x))


def test_without_running_statistics_there_is_nothing_to_freeze():
    model = nn.Sequential(nn.BatchNorm2d(3, track_running_stats=False))
    for to in ("frozen", "renorm"):
        assert "keeps no running statistics" in convert(model, to).skipped["0"]


def test_modes_of_frozen_layers():
    model = net().train()
    model[3].eval()
    frozen = convert(model, "frozen").model
    assert not frozen.train()[1].training
    back = convert(frozen, "batch").model
    assert (back[1].training, back[3].training) == (True, False)  # each its own
    back = convert(frozen.eval(), "batch").model
    assert not back[1].training  # the model's mode has changed since
    assert convert(nn.Sequential(bnkit.nn.FrozenBatchNorm2d(3)).train(), "batch").model[0].training


def test_where():
    model = nn.Sequential(net(), net())
    assert set(convert(model, "batch", "0").changed) == {"0.1", "0.3"}
    assert set(convert(model, "batch", ["*.1"]).changed) == {"0.1", "1.1"}
    assert set(convert(model, "batch", lambda name, m: m.momentum is None).changed) == {"0.3", "1.3"}
    with pytest.raises(UserError, match="fits none"):
        convert(model, "batch", "7")


def test_timms_layers_with_activation():
    model = nn.Sequential(
        timm.layers.BatchNormAct2d(3),
        timm.layers.BatchNormAct2d(3, act_layer=nn.SiLU),
        timm.layers.BatchNormAct2d(3, apply_act=False),
        timm.layers.BatchNormAct2d(3, act_layer=nn.Mish),
        timm.layers.BatchNormAct2d(3, drop_layer=nn.Dropout),
    )
    randomized(model)
    x = image()
    result = convert(model, "batch")
    assert [getattr(m, "activation", None) for m in result.model] == ["relu", "silu", None, None, None]
    assert result.skipped == {
        "3": "applies a Mish too, which bnkit.nn's layers don't",
        "4": "applies a Dropout too, which bnkit.nn's layers don't",
    }
    torch.testing.assert_close(result.model.eval()(x), copy.deepcopy(model).eval()(x))
    assert same_state(result.model, model)
    assert "applies relu" in convert(result.model, "torch").skipped["0"]
    back = convert(result.model, timm.layers.BatchNormAct2d).model
    assert type(back[0]) is timm.layers.BatchNormAct2d
    assert torch.equal(back.eval()(x), copy.deepcopy(model).eval()(x))


def test_torchvisions_frozen_layer():
    theirs = torchvision.ops.FrozenBatchNorm2d(3, eps=1e-4)
    with torch.no_grad():
        for buffer in theirs.buffers():
            buffer.uniform_(0.5, 2)
    model = nn.Sequential(theirs)
    x = image()
    result = convert(model, "frozen").model
    assert type(result[0]) is bnkit.nn.FrozenBatchNorm2d
    torch.testing.assert_close(result(x), model(x))
    assert not any(p.requires_grad for p in result.parameters())
    trainable = convert(model, "batch").model
    torch.testing.assert_close(trainable.eval()(x), model(x))
    trainable.train()(x)
    assert trainable[0].num_batches_tracked == 1


@pytest.mark.parametrize("to", ["group", "layer", "instance"])
def test_norms_without_statistics(to):
    model, x = net(), image()
    result = convert(model, to, groups=2) if to == "group" else convert(model, to)
    norm, entering = result.model[1], model[0](x)
    by_hand = {"group": (4, 2, 2, 25), "layer": (4, 1, 4, 25), "instance": (4, 4, 1, 25)}[to]
    grouped = entering.reshape(by_hand).double()
    grouped = (grouped - grouped.mean((2, 3), keepdim=True)) / (
        grouped.var((2, 3), keepdim=True, correction=0) + 1e-3
    ).sqrt()
    expected = grouped.view_as(entering) * norm.weight.view(1, 4, 1, 1) + norm.bias.view(1, 4, 1, 1)
    torch.testing.assert_close(norm(entering).double(), expected, rtol=1e-4, atol=1e-5)
    assert torch.equal(norm.weight, model[1].weight)
    assert list(norm.state_dict()) == ["weight", "bias"]


def test_groups_divide_the_channels():
    assert convert(nn.BatchNorm2d(48), "group").model.num_groups == 16


class Own(nn.BatchNorm2d):
    def forward(self, x):
        return super().forward(x) * 2


def test_what_can_not_be_converted_is_left_with_its_reason():
    model = nn.Sequential(nn.BatchNorm2d(3), Own(3), bnkit.nn.BatchNorm2d(3, activation="relu"))
    result = convert(model, "group")
    assert set(result.changed) == {"0", "2"}
    assert result.skipped == {"1": "Own has a forward of its own"}
    assert convert(model, "torch").skipped == {
        "0": "is a BatchNorm2d already",
        "1": "Own has a forward of its own",
        "2": "applies relu, which BatchNorm2d can't",
    }
    assert "forward of its own" in repr(result)
    undecided = nn.Sequential(nn.Conv1d(3, 3, 1), nn.Conv2d(3, 3, 1), nn.SyncBatchNorm(3))
    assert "pass dims=" in convert(undecided, "batch").skipped["2"]
    assert type(convert(undecided, "batch", dims=1).model[2]) is bnkit.nn.BatchNorm1d


def test_torchs_sync_layer_and_classes():
    model = net()
    sync = convert(model, nn.SyncBatchNorm).model
    assert type(sync[1]) is nn.SyncBatchNorm
    assert type(convert(sync, "sync").model[1]) is bnkit.nn.SyncBatchNorm
    back = convert(sync, "torch").model
    assert settings(back) == settings(model)
    with pytest.raises(UserError, match="in another form"):
        convert(model, bnkit.nn.DomainBatchNorm)


def test_verified_on_an_example():
    model, x = net(), image()
    assert convert(model, "batch", example=x).max_error < 1e-6
    assert convert(model, "group", example=x).max_error > 0
    with pytest.raises(UserError, match="convert must leave the outputs as they were"):
        convert(model, "batch", example=x, tolerance=-1.0, inplace=True)
    assert type(model[1]) is nn.BatchNorm2d


def test_results_pickle_copy_compile_and_export():
    model, x = convert(net(), "ghost").model, image()
    file = io.BytesIO()
    torch.save(model, file)
    file.seek(0)
    loaded = torch.load(file, weights_only=False)
    assert type(convert(loaded, "torch").model[1]) is nn.BatchNorm2d
    copy.deepcopy(model)
    batch = convert(model, "batch").model.eval()
    torch.testing.assert_close(torch.compile(batch, backend="eager", fullgraph=True)(x), batch(x))
    torch.testing.assert_close(torch.export.export(batch, (x,)).module()(x), batch(x))


def test_unknown_kind():
    with pytest.raises(UserError, match="unknown kind of norm 'batched': did you mean batch"):
        convert(net(), "batched")
    with pytest.raises(UserError, match="dims must be 1, 2 or 3, got 4"):
        convert(net(), "batch", dims=4)


@pytest.mark.parametrize("name", ["resnet18", "mobilenet_v3_small", "densenet121"])
def test_networks_of_torchvision(name):
    model = randomized_statistics(getattr(torchvision.models, name)().eval())
    x = torch.randn(1, 3, 64, 64)
    result = convert(model, "batch", example=x)
    assert not result.skipped
    assert result.max_error < 1e-4
    back = convert(result.model, "torch", inplace=True).model
    assert torch.equal(back(x), model(x))


def randomized_statistics(model: nn.Module) -> nn.Module:
    with torch.no_grad():
        for module in model.modules():
            if isinstance(module, nn.BatchNorm2d):
                module.running_mean.normal_(0, 0.1)
                module.running_var.uniform_(0.5, 2)
    return model


@pytest.mark.parametrize(
    ("to", "remedy"),
    [
        (nn.GroupNorm, 'say to="group"'),
        (nn.LayerNorm, 'say to="layer"'),
        (nn.InstanceNorm2d, 'say to="instance"'),
        (nn.Linear, 'to="batch" is usual'),
        (None, 'to="batch" is usual'),
        (3, 'to="batch" is usual'),
        (int, 'to="batch" is usual'),
        (list[int], 'to="batch" is usual'),
    ],
)
def test_what_is_no_kind_of_norm(to, remedy):
    with pytest.raises(
        UserError, match=r"^to must be one of batch, frozen, .*, or a class of batch norms, got "
    ) as error:
        convert(net(), to)
    assert repr(to) in str(error.value)
    assert remedy in str(error.value)


class OfOtherArguments(nn.BatchNorm2d):
    def __init__(self, width):
        super().__init__(width)


@pytest.mark.parametrize("kind", [OfOtherArguments, torchvision.ops.FrozenBatchNorm2d])
def test_classes_of_other_arguments_come_back_but_are_not_built(kind):
    assert "takes other arguments" in convert(net(), kind).skipped["1"]
    model = nn.Sequential(kind(3))
    assert type(convert(convert(model, "batch").model, kind).model[0]) is kind


@pytest.mark.parametrize(
    ("to", "options", "message"),
    [
        ("ghost", {"ghost_size": "a"}, "ghost_size must be an integer of at least 1, got 'a'"),
        ("sync", {"process_group": 3}, "process_group must be a process group, or None for all ranks, got 3"),
    ],
)
def test_options_of_the_wrong_type(to, options, message):
    with pytest.raises(UserError, match=message):
        convert(net(), to, **options)


@pytest.mark.parametrize("where", [0, True, [0], ["1", None], [lambda name, module: True], nn.Sequential()])
def test_where_of_the_wrong_type(where):
    with pytest.raises(
        UserError, match=r"^where= must be a module's name, .* got (0|True|None|<function|a Sequential)"
    ):
        convert(net(), "batch", where)


def test_instance_norm_needs_positions():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv1d(3, 4, 1), nn.BatchNorm1d(4), nn.Flatten(), nn.Linear(20, 4), nn.BatchNorm1d(4))
    x = torch.randn(4, 3, 5)  # as many samples as channels: torch's layer would take (N, C) for (C, L)
    unknown = "nothing tells whether its input is (N, C), of one value a channel: pass example= or dims="
    assert convert(model, "instance").skipped == {"1": unknown, "4": unknown}
    result = convert(randomized(model), "instance", example=x)
    assert set(result.changed) == {"1"}
    assert result.skipped == {"4": "its input is (N, C), where an instance has one value a channel"}
    entering = model[0](x)
    normalized = (entering - entering.mean(2, keepdim=True)) / (
        entering.var(2, keepdim=True, correction=0) + 1e-5
    ).sqrt()
    expected = normalized * model[1].weight.view(1, 4, 1) + model[1].bias.view(1, 4, 1)
    torch.testing.assert_close(result.model[:2](x), expected, rtol=1e-4, atol=1e-5)
    assert type(convert(net(1), "instance", dims=1).model[1]) is nn.InstanceNorm1d


def test_instance_norm_of_layers_of_any_dimension_is_of_the_inputs():
    model = nn.Sequential(nn.Conv2d(3, 4, 1), nn.SyncBatchNorm(4), nn.Flatten(2), nn.SyncBatchNorm(4))
    kinds = [nn.InstanceNorm2d, nn.InstanceNorm1d]
    assert [type(norm) for norm in convert(model, "instance", example=image()).model[1::2]] == kinds
    twice = nn.Sequential(model[1], model[2], model[1])
    assert "and always as many" in convert(twice, "instance", example=torch.randn(2, 4, 3, 3)).skipped["0"]


class WithHelper(nn.Module):
    """Runs its layer by way of something that surgery doesn't see."""

    def __init__(self, hold):
        super().__init__()
        self.norm = nn.BatchNorm2d(3)
        self.helper = hold(self.norm)

    def forward(self, x):
        return self.helper(x)


class Helper:
    def __init__(self, norm):
        self.norm = norm

    def __call__(self, x):
        return self.norm(x)


def closure(norm):
    return lambda x: norm(x)


@pytest.mark.parametrize("inplace", [False, True])
@pytest.mark.parametrize("hold", [Helper, closure])
def test_old_layers_that_still_run_are_an_error(hold, inplace):
    model, x = WithHelper(hold), image()
    words = r"^an exchanged layer must not run any more, but norm does on the example: .* of a module\.$"
    with pytest.raises(UserError, match=words):
        convert(model, "batch", example=x, inplace=inplace)
    assert type(model.norm) is nn.BatchNorm2d
    assert model(x).shape == x.shape
