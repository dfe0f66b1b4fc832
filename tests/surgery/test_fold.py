"""Folding against the original, in float64, with statistics and affine parameters far from the identity's."""

from __future__ import annotations

import copy
import pickle

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.testing._internal import common_quantization as fixtures
from torch_layers import without_bias

import bnkit
from bnkit import UserError
from bnkit.surgery import fold


def randomized(model: nn.Module, dtype: torch.dtype = torch.float64) -> nn.Module:
    generator = torch.Generator().manual_seed(1)
    for module in model.to(dtype).modules():
        if not isinstance(getattr(module, "running_var", None), Tensor):
            continue
        size = module.running_var.shape
        module.running_mean.copy_(torch.randn(size, generator=generator))
        module.running_var.copy_(torch.rand(size, generator=generator) + 0.3)
        for key in ("weight", "bias"):
            if getattr(module, key) is not None:
                getattr(module, key).data.copy_(torch.randn(size, generator=generator))
    return model.eval()


def values(*shape: int, dtype: torch.dtype = torch.float64) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(2), dtype=dtype)


def assert_folded(model: nn.Module, x: Tensor, count: int = 1, skipped: int = 0, **options: object) -> nn.Module:
    """Fold, and compare on another input than the example: `fold` has compared on that itself."""
    randomized(model)
    before = copy.deepcopy(model.state_dict())
    result = fold(model, x, **options)
    assert len(result.changed) == count, result
    assert len(result.skipped) == skipped, result
    other = torch.randn(x.shape, generator=torch.Generator().manual_seed(3), dtype=x.dtype)
    torch.testing.assert_close(result.model(other), model(other), rtol=1e-10, atol=1e-10)
    assert all(torch.equal(before[name], value) for name, value in model.state_dict().items())
    return result.model


def assert_refused(model: nn.Module, x: Tensor, reason: str, count: int = 1) -> None:
    randomized(model)
    result = fold(model, x)
    assert not result.changed, result
    assert len(result.skipped) == count
    for text in result.skipped.values():
        assert reason in text
    assert torch.equal(result.model(x), model(x))


CONVOLUTIONS = {
    "conv1d": (lambda **k: nn.Conv1d(4, 6, 3, **k), nn.BatchNorm1d, (2, 4, 9)),
    "conv2d": (lambda **k: nn.Conv2d(4, 6, 3, **k), nn.BatchNorm2d, (2, 4, 7, 8)),
    "conv3d": (lambda **k: nn.Conv3d(4, 6, 2, **k), nn.BatchNorm3d, (2, 4, 4, 3, 5)),
    "transposed1d": (lambda **k: nn.ConvTranspose1d(4, 6, 3, **k), nn.BatchNorm1d, (2, 4, 9)),
    "transposed2d": (lambda **k: nn.ConvTranspose2d(4, 6, 3, **k), nn.BatchNorm2d, (2, 4, 7, 8)),
    "transposed3d": (lambda **k: nn.ConvTranspose3d(4, 6, 2, **k), nn.BatchNorm3d, (2, 4, 4, 3, 5)),
}


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("groups", [1, 2])
@pytest.mark.parametrize("kind", CONVOLUTIONS)
def test_into_the_convolution_before(kind, groups, bias):
    make, norm, shape = CONVOLUTIONS[kind]
    model = nn.Sequential(make(groups=groups, bias=bias, padding=1, stride=2), norm(6), nn.ReLU())
    folded = assert_folded(model, values(*shape))
    assert isinstance(folded[1], nn.Identity)
    assert set(folded.state_dict()) == {"0.weight", "0.bias"}


def test_a_square_transposed_convolution_is_seen_as_one():
    assert_folded(nn.Sequential(nn.ConvTranspose2d(4, 4, 3), nn.BatchNorm2d(4)), values(2, 4, 5, 5))


@pytest.mark.parametrize("make", [
    lambda kind: kind(5), lambda kind: kind(5, affine=False), lambda kind: without_bias(kind(5)),
], ids=["affine", "plain", "no bias"])  # fmt: skip
@pytest.mark.parametrize("layer", ["conv", "linear"])
def test_every_set_of_parameters(layer, make):
    if layer == "linear":
        assert_folded(nn.Sequential(nn.Linear(3, 5, bias=False), make(nn.BatchNorm1d)), values(4, 3))
    else:
        assert_folded(nn.Sequential(nn.Conv2d(3, 5, 1), make(nn.BatchNorm2d)), values(2, 3, 4, 4))


@pytest.mark.parametrize("mode", ["zeros", "circular", "reflect", "replicate"])
def test_any_padding_mode_of_the_convolution_before(mode):
    model = nn.Sequential(nn.Conv2d(2, 3, 3, padding=1, padding_mode=mode), nn.BatchNorm2d(3))
    assert_folded(model, values(2, 2, 5, 5))


@pytest.mark.parametrize("make", [
    lambda: nn.SyncBatchNorm(4),
    lambda: bnkit.nn.BatchNorm2d(4),
    lambda: bnkit.nn.FrozenBatchNorm2d(4),
    lambda: bnkit.nn.GhostBatchNorm(4),
    lambda: bnkit.nn.BatchRenorm(4),
], ids=["sync", "ours", "frozen", "ghost", "renorm"])  # fmt: skip
def test_relatives_of_batch_norm(make):
    model = assert_folded(nn.Sequential(nn.Conv2d(3, 4, 1), make()), values(2, 3, 4, 4))
    assert isinstance(model[1], nn.Identity)


def test_torchvisions_frozen_batch_norm():
    from torchvision.ops import FrozenBatchNorm2d

    model = nn.Sequential(nn.Conv2d(3, 4, 1), FrozenBatchNorm2d(4)).double()
    model[1].weight.copy_(values(4))
    model[1].bias.copy_(values(4))
    result = fold(model.train(), x := values(2, 3, 4, 4))
    assert result.changed
    torch.testing.assert_close(result.model(x), model(x), rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("residual", [False, True])
def test_activation_and_residual_of_our_layer_remain(residual):
    class Block(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.conv = nn.Conv2d(4, 4, 1)
            self.bn = bnkit.nn.BatchNorm2d(4, activation="silu")

        def forward(self, x: Tensor) -> Tensor:
            return self.bn(self.conv(x), x) if residual else self.bn(self.conv(x))

    assert_folded(Block(), values(2, 4, 3, 3))


def test_activation_of_timms_layer_remains_under_its_key():
    timm_layers = pytest.importorskip("timm.layers")
    norm = timm_layers.BatchNormAct2d(4, act_layer=nn.PReLU)
    folded = assert_folded(nn.Sequential(nn.Conv2d(3, 4, 1), norm), values(2, 3, 4, 4))
    assert set(folded.state_dict()) == {"0.weight", "0.bias", "1.act.weight"}


class Branches(nn.Module):
    """BN behind a concatenation of a convolution, a transposed one and a linear map."""

    def __init__(self, *, reuse: bool = False, dim: int = 1) -> None:
        super().__init__()
        self.reuse, self.dim = reuse, dim
        self.a, self.b = nn.Conv2d(3, 4, 1), nn.ConvTranspose2d(3, 4, 1)
        self.bn = nn.BatchNorm2d(4 if dim != 1 else 8)

    def forward(self, x: Tensor) -> Tensor:
        a, b = self.a(x), self.b(x)
        y = self.bn(torch.cat([a, b], self.dim))
        return y + a.mean() if self.reuse else y


@pytest.mark.parametrize("dim", [1, -3])
def test_behind_a_concatenation(dim):
    model = Branches()
    model.dim = dim
    folded = assert_folded(model, values(2, 3, 4, 4))
    assert isinstance(folded.bn, nn.Identity)


def test_not_behind_a_concatenation_of_what_is_used_again_or_along_another_dimension():
    assert_refused(Branches(reuse=True), values(2, 3, 4, 4), "used elsewhere too: by mean")
    assert_refused(Branches(dim=2), values(2, 3, 4, 4), "concatenated along dimension 2")


class Function(nn.Module):
    """Layers a, b and bn, put together by a function."""

    def __init__(self, function: object, channels: int = 4) -> None:
        super().__init__()
        self.a, self.b = nn.Conv2d(3, 4, 3, padding=1), nn.Conv2d(3, 4, 1)
        self.bn, self.bn2 = nn.BatchNorm2d(channels), nn.BatchNorm2d(channels)
        self.lin = nn.Linear(4, 5)
        self.next = nn.Conv2d(4, 2, 2)
        self.function = function

    def forward(self, x: Tensor) -> object:
        return self.function(self, x)


EXACT = {
    "chain of two": (lambda m, x: m.bn2(m.bn(m.a(x))), 2),
    "sum of two convolutions": (lambda m, x: m.bn(m.a(x) + m.b(x)), 1),
    "dropout between": (lambda m, x: m.bn(F.dropout(m.a(x), 0.5, m.training)), 1),
    "global average between": (lambda m, x: m.bn(F.adaptive_avg_pool2d(m.a(x), 1)), 1),
    "upsampling between": (lambda m, x: m.bn(F.interpolate(m.a(x), scale_factor=2, mode="bilinear")), 1),
    "average pooling between": (lambda m, x: m.bn(F.avg_pool2d(m.a(x), 2)), 1),
    "into the convolution after": (lambda m, x: m.next(m.bn(m.a(x).relu())), 1),
    "into both convolutions after": (lambda m, x: m.next(z := m.bn(m.a(x).relu())) + m.next2(z), 1),
    "into a linear layer after": (lambda m, x: m.lin(m.bn(m.a(x).relu()).mean((2, 3))), 0),
    "into a linear layer after flattening": (lambda m, x: m.wide(m.bn(m.a(x).relu()).flatten(1)), 1),
    "into a linear layer on channels last": (lambda m, x: m.lin(m.bn(m.a(x).relu()).permute(0, 2, 3, 1)), 1),
    "activation in place afterwards": (lambda m, x: F.relu(m.bn(m.a(x)), inplace=True), 1),
    "addition in place afterwards": (lambda m, x: m.bn(m.a(x)).add_(m.b(x)), 1),
    "control flow": (lambda m, x: m.bn(m.a(x)) if bool(x.sum() > -1e9) else x, 1),
}  # fmt: skip


@pytest.mark.parametrize("case", EXACT)
def test_where_it_is_exact(case):
    function, count = EXACT[case]
    model = Function(function)
    model.next2, model.wide = nn.Conv2d(4, 2, 2), nn.Linear(4 * 36, 3)
    assert_folded(model, values(2, 3, 6, 6), count, skipped=2 - count)


def keeping(m: Function, x: Tensor) -> Tensor:
    m.kept = m.a(x)
    return m.bn(m.kept)


REFUSED = {
    "shared convolution": (lambda m, x: m.bn(m.a(x)) + m.a(x + 1), "a runs 2 times"),
    "shared norm": (lambda m, x: m.bn(m.a(x)) + m.bn(m.b(x)), "it runs 2 times"),
    "input returned": (lambda m, x: ((y := m.a(x)), m.bn(y)), "also an output of the model"),
    "input used again": (lambda m, x: m.bn(y := m.a(x)) + y, "used elsewhere too: by add"),
    "input used by a view": (lambda m, x: m.bn(y := m.a(x)) + y.flatten(1).sum(), "used elsewhere too: by flatten"),
    "input kept as an attribute": (keeping, "kept by the model"),
    "input written in place": (lambda m, x: m.bn(m.a(x).mul_(2)), "comes from mul"),
    "input written through a view": (lambda m, x: ((y := m.a(x)), y[:, 0].zero_(), m.bn(y))[2], "not the result of a"),
    "weight used by a function too": (lambda m, x: m.bn(m.a(x)) + m.a.weight.sum(), "its a.weight is used elsewhere"),
    "norm's weight used elsewhere": (lambda m, x: m.bn(m.a(x)) + m.bn.weight.sum(), "used outside of it"),
    "activation between": (lambda m, x: m.bn(m.a(x).relu()), "comes from relu"),
    "maximum pooling between": (lambda m, x: m.bn(F.max_pool2d(m.a(x), 2)), "comes from max_pool2d"),
    "padded average pooling between": (lambda m, x: m.bn(F.avg_pool2d(m.a(x), 2, padding=1)), "comes from avg_pool2d"),
    "sum with a constant": (lambda m, x: m.bn(m.a(x) + 1), "addition that broadcasts"),
    "sum with itself": (lambda m, x: m.bn((y := m.a(x)) + y), "used elsewhere|itself"),
    "no layer before": (lambda m, x: m.bn(x[:, [0, 1, 2, 0]]), "comes from getitem"),
    "weight computed": (lambda m, x: m.bn(F.conv2d(x, m.a.weight * 2)), "is computed in each forward pass"),
    "zero padding after": (lambda m, x: m.padded(m.bn(m.a(x).relu())), "padded pads with zeros"),
    "transposed after": (lambda m, x: m.up(m.bn(m.a(x).relu())), "up is transposed"),
    "output used twice": (lambda m, x: m.next(z := m.bn(m.a(x).relu())).mean() + z, "its output goes to add"),
    "output returned": (lambda m, x: ((z := m.bn(m.a(x).relu())), m.next(z)), "output of the model"),
    "batch statistics": (lambda m, x: m.untracked(m.a(x)), "batch's statistics"),
    "left in training mode": (lambda m, x: m.bn.train()(m.a(x)), "batch's statistics"),
}  # fmt: skip


@pytest.mark.parametrize("case", REFUSED)
def test_what_is_refused(case):
    function, reason = REFUSED[case]
    model = Function(function)
    model.padded, model.up = nn.Conv2d(4, 2, 3, padding=1), nn.ConvTranspose2d(4, 2, 3)
    model.untracked = nn.BatchNorm2d(4, track_running_stats=False)
    randomized(model)
    result = fold(model, x := values(2, 3, 6, 6))
    assert result.changed == {}
    name = "untracked" if case == "batch statistics" else "bn"
    assert any(part in result.skipped[name] for part in reason.split("|")), result
    assert result.skipped["bn2"] == "it did not run on the example"
    for a, b in zip(result.model(x), model(x), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-12, atol=1e-12)


def test_linear_with_three_dimensions_is_refused():
    assert_refused(nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(5)), values(2, 5, 3), "outputs in dimension 2 of 3")
    assert_refused(nn.Sequential(nn.Linear(3, 5), nn.BatchNorm1d(5)), values(2, 5, 3), "outputs in dimension 2 of 3")


def test_linear_with_three_dimensions_and_a_transposition_is_exact():
    class Transposed(nn.Sequential):
        def forward(self, x: Tensor) -> Tensor:
            return self[1](self[0](x).transpose(1, 2))

    assert_folded(Transposed(nn.Linear(3, 4), nn.BatchNorm1d(4)), values(2, 5, 3))


@pytest.mark.parametrize("convolution", [
    lambda: nn.Conv2d(4, 3, 3, padding=1),
    lambda: nn.Conv2d(4, 6, (1, 3), padding=(0, 2), groups=2, bias=False),
    lambda: nn.Conv2d(4, 3, 4, padding="same"),
    lambda: nn.Conv2d(4, 4, 3, padding=1, dilation=2, stride=2, groups=4),
], ids=["square", "one side, groups", "same", "depthwise"])  # fmt: skip
def test_exact_padding_before_a_convolution(convolution):
    model = nn.Sequential(nn.ReLU(), nn.BatchNorm2d(4), convolution())
    x = values(2, 4, 6, 6)
    assert_refused(model, x, "pads with zeros")
    folded = assert_folded(model, x, padding="exact")
    assert set(folded.state_dict()) == {"1.value", "2.weight", "2.bias"}


def test_exact_padding_needs_a_scale_that_is_not_zero():
    model = randomized(nn.Sequential(nn.ReLU(), nn.BatchNorm2d(2), nn.Conv2d(2, 2, 3, padding=1)))
    model[1].weight.data[0] = 0
    assert "scale 0 never is zero" in fold(model, values(1, 2, 4, 4), padding="exact").skipped["1"]


@pytest.mark.parametrize("mode", ["circular", "reflect", "replicate"])
def test_padding_that_repeats_the_input_is_exact(mode):
    model = nn.Sequential(nn.ReLU(), nn.BatchNorm2d(4), nn.Conv2d(4, 3, 3, padding=1, padding_mode=mode))
    assert_folded(model, values(2, 4, 5, 5))


def test_zero_padding_is_exact_for_a_scale_without_shift():
    model = nn.Sequential(nn.ReLU(), without_bias(nn.BatchNorm2d(4)), nn.Conv2d(4, 3, 3, padding=1), nn.ReLU())
    model = randomized(model)
    model[1].running_mean.zero_()
    result = fold(model, x := values(2, 4, 5, 5))
    assert result.changed == {"1": "folded into 2"}
    torch.testing.assert_close(result.model(x), model(x), rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("norm", [
    lambda: nn.BatchNorm2d(4),
    lambda: bnkit.nn.BatchNorm2d(4, activation="gelu"),
], ids=["torch", "ours"])  # fmt: skip
def test_what_remains_can_become_one_multiplication_and_addition(norm):
    model = nn.Sequential(nn.ReLU(), norm(), nn.ReLU())
    folded = assert_folded(model, values(2, 4, 5, 5), rest="affine")
    assert set(folded.state_dict()) == {"1.weight", "1.bias"}


def test_a_chain_that_ends_at_nothing_becomes_one_norm():
    folded = assert_folded(nn.Sequential(nn.ReLU(), nn.BatchNorm2d(4, affine=False), nn.BatchNorm2d(4)),
                           values(2, 4, 5, 5), count=1, skipped=1)  # fmt: skip
    assert isinstance(folded[1], nn.BatchNorm2d)
    assert isinstance(folded[2], nn.Identity)


def test_a_norm_ahead_and_one_behind_go_into_a_convolution_without_bias():
    model = nn.Sequential(nn.ReLU(), nn.BatchNorm2d(3), nn.Conv2d(3, 4, 1, bias=False), nn.BatchNorm2d(4), nn.GELU())
    folded = assert_folded(model, values(2, 3, 5, 5), count=2)
    assert set(folded.state_dict()) == {"2.weight", "2.bias"}


def test_a_bias_that_the_layer_does_not_use_can_take_nothing():
    class Unused(nn.Conv2d):
        def forward(self, input: Tensor) -> Tensor:
            return F.conv2d(input, self.weight)

    assert_refused(nn.Sequential(Unused(3, 4, 1), nn.BatchNorm2d(4)), values(2, 3, 4, 4), "0 has no place for a bias")


def test_tied_weights_parametrizations_and_hooks_are_refused():
    tied = nn.Sequential(nn.Conv2d(3, 3, 1), nn.BatchNorm2d(3), nn.ReLU(), nn.Conv2d(3, 3, 1))
    tied[3].weight = tied[0].weight
    assert_refused(tied, values(2, 3, 4, 4), "used elsewhere too")
    aliased = nn.Sequential(nn.Conv2d(3, 3, 1), nn.BatchNorm2d(3)).double()
    aliased.other = nn.Parameter(aliased[0].weight.detach().view(9))
    assert "0.weight shares memory with other" in fold(aliased.eval(), values(2, 3, 4, 4), inplace=True).skipped["1"]
    normed = nn.Sequential(nn.utils.parametrizations.weight_norm(nn.Conv2d(3, 4, 1)), nn.BatchNorm2d(4))
    assert_refused(normed, values(2, 3, 4, 4), "is computed in each forward pass")
    for index, reason in ((0, "0 has forward hooks"), (1, "it has hooks")):
        hooked = nn.Sequential(nn.Conv2d(3, 4, 1), nn.BatchNorm2d(4))
        hooked[index].register_forward_hook(print_nothing)
        assert_refused(hooked, values(2, 3, 4, 4), reason)


def print_nothing(module: nn.Module, args: object, output: object) -> None:
    pass


def test_one_module_under_two_names_is_replaced_under_both():
    class Aliased(nn.Sequential):
        def forward(self, x: Tensor) -> Tensor:
            return self.alias[0](self[0](x))

    model = Aliased(nn.Conv2d(3, 4, 1), nn.BatchNorm2d(4))
    model.alias = nn.ModuleList([model[1]])
    folded = assert_folded(model, values(2, 3, 4, 4))
    assert isinstance(folded[1], nn.Identity)
    assert folded[1] is folded.alias[0]


def test_a_forward_of_its_own_is_refused():
    class Doubling(nn.BatchNorm2d):
        def forward(self, input: Tensor) -> Tensor:
            return 2 * super().forward(input)

    assert_refused(nn.Sequential(nn.Conv2d(3, 4, 1), Doubling(4)), values(2, 3, 4, 4), "Doubling has a forward of its")


def test_inplace_keeps_identities_and_folds_a_model_in_training_mode():
    model = randomized(nn.Sequential(nn.Conv2d(3, 4, 1), nn.BatchNorm2d(4), nn.Dropout()))
    expected, weight = model(x := values(2, 3, 4, 4)), model[0].weight
    result = fold(model.train(), x, inplace=True)
    assert result.model is model
    assert model[0].weight is weight
    assert not any(module.training for module in model.modules())
    torch.testing.assert_close(model(x), expected, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("inplace", [True, False])
def test_beyond_tolerance_nothing_is_changed(inplace):
    model = randomized(nn.Sequential(nn.Conv2d(3, 4, 1), nn.BatchNorm2d(4)), torch.float32).train()
    before, modules = copy.deepcopy(model.state_dict()), list(model)
    with pytest.raises(UserError, match="beyond tolerance=1e-12; nothing was changed"):
        fold(model, values(2, 3, 4, 4, dtype=torch.float32), tolerance=1e-12, inplace=inplace)
    assert list(model) == modules
    assert model[0].training
    assert list(model.state_dict()) == list(before)
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())


def test_where_takes_names_patterns_types_and_predicates():
    def make() -> nn.Module:
        return randomized(nn.Sequential(nn.Conv2d(3, 4, 1), nn.BatchNorm2d(4), nn.Conv2d(4, 4, 1), nn.SyncBatchNorm(4)))

    x = values(2, 3, 4, 4)
    for where in ("1", ["1"], nn.BatchNorm2d, "[01]", lambda name, module: name == "1"):
        result = fold(make(), x, where=where)
        assert set(result.changed) == {"1"}
        assert result.skipped == {}
    with pytest.raises(UserError, match="got 'bm', which fits none"):
        fold(make(), x, where="bm")


def test_data_is_compared_too_and_labels_are_ignored():
    model = randomized(nn.Sequential(nn.Conv2d(3, 4, 1), nn.BatchNorm2d(4)))
    batches = [(values(2, 3, 4, 4), torch.zeros(2)), (values(3, 3, 4, 4), torch.zeros(3))]
    assert fold(model, batches[0], data=batches, inplace=True).max_error < 1e-14


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_low_precision_is_rounded_once(dtype):
    model = randomized(nn.Sequential(nn.Conv2d(3, 4, 1), nn.BatchNorm2d(4)), dtype)
    folded = fold(model, values(2, 3, 4, 4).to(dtype), tolerance=0.1).model
    exact = fold(model.double(), values(2, 3, 4, 4)).model
    assert torch.equal(folded[0].weight, exact[0].weight.to(dtype))
    assert torch.equal(folded[0].bias, exact[0].bias.to(dtype))


@pytest.mark.parametrize("name", ["ConvBnModel", "ConvBnReLUModel", "ModelForLinearBNFusion",
                                  "ModelForConvTransposeBNFusion"])  # fmt: skip
def test_torchs_own_fixtures(name):
    shapes = {"ModelForLinearBNFusion": (3, 20), "ModelForConvTransposeBNFusion": (2, 3, 9)}
    model = randomized(getattr(fixtures, name)(), torch.float32)
    x = values(*shapes.get(name, (1, 3, 8, 8)), dtype=torch.float32)
    result = fold(model, x)
    assert result.changed, result
    assert result.max_error < 1e-5


def test_the_result_pickles_compiles_and_exports():
    model = randomized(nn.Sequential(nn.ReLU(), nn.BatchNorm2d(3), nn.Conv2d(3, 4, 3, padding=1),
                                     bnkit.nn.BatchNorm2d(4, activation="relu")))  # fmt: skip
    result = fold(model, x := values(2, 3, 5, 5), padding="exact")
    expected = result.model(x)
    assert torch.equal(pickle.loads(pickle.dumps(result.model))(x), expected)
    assert torch.equal(pickle.loads(pickle.dumps(result)).model(x), expected)
    torch.testing.assert_close(torch.export.export(result.model, (x,)).module()(x), expected)
    torch.testing.assert_close(torch.compile(result.model, backend="aot_eager", fullgraph=True)(x), expected)


def test_an_unknown_option_is_a_clear_error():
    with pytest.raises(UserError, match="padding must be 'refuse' or 'exact', got 'zero'"):
        fold(nn.Identity(), values(1, 1), padding="zero")
