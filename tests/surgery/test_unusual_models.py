"""Models that hold, wrap, call or return things in unusual ways, and the surroundings in which surgery is called."""

from __future__ import annotations

import dataclasses
import pickle
import types
from collections.abc import Callable
from typing import Any

import pytest
import settled_models
import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.utils import parametrizations
from torch.nn.utils.parametrize import remove_parametrizations
from torch.utils.checkpoint import checkpoint

from bnkit import UserError
from bnkit.graph import tensors_in
from bnkit.surgery import convert, fold, freeze, fuse, insert, unfreeze


def values(*shape: int, seed: int = 1) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def settled(model: nn.Module) -> Any:
    return settled_models.settled(model, seed=2)


def normed() -> Any:
    return settled(nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.ReLU(), nn.Conv2d(4, 2, 1)))


def plain() -> Any:
    return settled(nn.Sequential(nn.Conv2d(3, 4, 3), nn.ReLU(), nn.Conv2d(4, 2, 1)))


class Listed(nn.Module):
    """Runs its registered modules from a plain list, and from a dict of tuples."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.conv, self.bn, self.relu = nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.ReLU()
        self.order = [self.conv, self.bn]
        self.more: dict[str, Any] = {"act": (self.relu,)}
        self.more["itself"] = self.more

    def forward(self, x: Tensor) -> Tensor:
        for module in (*self.order, *self.more["act"]):
            x = module(x)
        return x


@pytest.mark.parametrize("inplace", [False, True])
def test_modules_held_in_plain_lists_are_replaced_there_too(inplace):
    x = values(2, 3, 6, 6)
    model = settled(Listed())
    expected = model(x)
    surgery = fold(model, x, inplace=inplace)
    assert surgery.changed == {"bn": "folded into conv"}
    torch.testing.assert_close(surgery.model(x), expected)
    ghost: Any = convert(settled(Listed()), "ghost", inplace=inplace).model
    assert ghost.order[1] is ghost.bn
    assert type(ghost.bn).__name__ == "GhostBatchNorm"
    fused: Any = fuse(settled(Listed()), x, inplace=inplace).model
    assert fused.order[1].activation == "relu"
    torch.testing.assert_close(fused(x), expected)


def test_a_failure_leaves_plain_lists_alone():
    model = settled(Listed())
    order, bn = model.order, model.bn
    with pytest.raises(UserError, match="beyond tolerance"):
        fold(model, values(2, 3, 6, 6), inplace=True, tolerance=0.0)
    assert model.order is order
    assert order[1] is bn is model.bn


def test_a_batch_norm_with_another_forward_is_left_alone():
    model = normed()
    model[1].forward = types.MethodType(lambda self, x: nn.BatchNorm2d.forward(self, x).clamp(min=0), model[1])
    x = values(2, 3, 6, 6)
    for verb in (lambda: fold(model, x), lambda: fuse(model, x), lambda: convert(model, "batch")):
        surgery = verb()
        assert surgery.skipped == {"1": "BatchNorm2d has a forward of its own"}


def test_nothing_is_inserted_behind_a_layer_with_another_forward():
    model = plain()
    forward = model[0].forward
    model[0].forward = lambda x: forward(x)
    surgery = insert(model, [values(2, 3, 6, 6)], inplace=True)
    assert surgery.skipped["0"] == "its forward was replaced, and would not call a batch norm"


def parametrized() -> Any:
    return settled(
        nn.Sequential(parametrizations.weight_norm(nn.Conv2d(3, 4, 3)), nn.ReLU(), nn.Conv2d(4, 2, 1)).double()
    )


def test_a_parametrization_can_be_removed_behind_which_was_inserted():
    model, x = parametrized(), values(4, 3, 6, 6)
    surgery = insert(model, [x])
    assert "0" in surgery.changed
    with pytest.raises(RuntimeError, match="parametrized modules"):
        pickle.dumps(surgery.model)
    remove_parametrizations(surgery.model[0], "weight")
    assert type(surgery.model[0]).__name__ == "NormedConv2d"
    torch.testing.assert_close(surgery.model(x), model(x))


def test_a_checkpoint_of_a_parametrized_network_loads_after_insertion():
    model, x = parametrized(), values(4, 3, 6, 6)
    changed = insert(parametrized(), [x]).model
    for parameter in model.parameters():
        parameter.data.mul_(1.5)
    changed.load_state_dict(model.state_dict())
    torch.testing.assert_close(changed(x), model(x))


@dataclasses.dataclass
class Outside:
    value: Tensor


class Slotted(Outside):
    __slots__ = ("other", "unset")

    def __init__(self, value: Tensor, other: Tensor) -> None:
        super().__init__(value)
        self.other = other


def test_tensors_in_slots_are_seen():
    first, second = torch.zeros(1), torch.ones(1)
    assert [float(t) for t in tensors_in([Slotted(first, second)])] == [0.0, 1.0]

    @dataclasses.dataclass(slots=True)
    class Output:
        value: Tensor

    assert list(tensors_in(Output(first))) == [first]


class Returning(nn.Module):
    def __init__(self, result: Callable[[Tensor], Any]) -> None:
        super().__init__()
        self.network, self.result = normed(), result

    def forward(self, x: Tensor) -> Any:
        return self.result(self.network(x))


RESULTS = {"list": Tensor.tolist, "float": lambda y: y.sum().item(), "None": lambda y: None}


@pytest.mark.parametrize("result", RESULTS)
def test_without_tensors_there_is_nothing_to_verify(result):
    model, x = Returning(RESULTS[result]), values(2, 3, 6, 6)
    with pytest.raises(UserError, match=r"must return tensors to be compared, got .*: pass forward="):
        fold(model, x)
    assert fold(model, x, forward=lambda m, batch: m.network(batch)).changed


class Writing(nn.Module):
    """Writes to its input and between layer and batch norm."""

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.bn, self.last = nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.Conv2d(4, 2, 1)

    def forward(self, x: Tensor) -> Tensor:
        return self.last(self.bn(self.conv(x.mul_(1.0)).relu_()).clamp_(min=0))


def test_in_inference_mode_writes_are_seen_and_results_can_be_trained():
    model = settled(Writing())
    with torch.inference_mode():
        x = values(4, 3, 6, 6)
        assert fold(model, x).skipped["bn"].startswith("its input comes from relu")
        fuse(model, x)
        inserted = insert(plain(), [x]).model
    inserted.train()(values(4, 3, 6, 6)).sum().backward()
    assert not any(parameter.is_inference() for parameter in inserted.parameters())


def test_under_autocast_the_new_weights_are_used():
    model, x = normed().float(), values(2, 3, 6, 6).float()
    with torch.autocast("cpu", torch.bfloat16):
        expected = model(x)
        folded = fold(model, x, inplace=True)
        torch.testing.assert_close(folded.model(x), expected, rtol=0.05, atol=0.05)
    assert folded.changed


def test_fusing_under_activation_checkpointing():
    class Checkpointed(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.conv, self.bn = nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4)

        def forward(self, x: Tensor) -> Any:
            return checkpoint(lambda t: F.relu(self.bn(self.conv(t))), x, use_reentrant=False)

    surgery = fuse(settled(Checkpointed()), values(2, 3, 6, 6))
    assert "bn" in surgery.changed


def test_a_model_under_distributed_training_is_refused_but_for_what_keeps_its_parameters(tmp_path):
    dist.init_process_group("gloo", init_method=f"file://{tmp_path}/store", rank=0, world_size=1)
    try:
        model, x = nn.parallel.DistributedDataParallel(normed()), values(2, 3, 6, 6)
        for verb in (lambda: insert(model, [x]), lambda: fold(model, x), lambda: fuse(model, x), lambda: freeze(model)):
            with pytest.raises(UserError, match=r"pass model.module, and wrap the result"):
                verb()
        assert convert(model, "sync").changed
        frozen = freeze(model, affine=False)
        assert frozen.changed
        assert unfreeze(frozen.model, affine=False).changed == dict.fromkeys(frozen.changed, "released statistics")
    finally:
        dist.destroy_process_group()


@pytest.mark.filterwarnings("ignore:.*torch.jit:FutureWarning")
def test_a_scripted_model_is_refused():
    scripted: Any = torch.jit.trace(normed(), values(2, 3, 6, 6))
    for verb in (lambda: convert(scripted, "ghost"), lambda: fold(scripted, values(2, 3, 6, 6))):
        with pytest.raises(UserError, match=r"must be of Python modules, got a .*: change it, then script it"):
            verb()


def test_a_function_that_normalizes_is_reported():
    class ByFunction(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return F.batch_norm(x, torch.zeros(4).double(), torch.ones(4).double())

    model = settled(nn.Sequential(nn.Conv2d(3, 4, 3), ByFunction(), nn.BatchNorm2d(4)))
    surgery = fold(model, values(2, 3, 6, 6))
    assert surgery.skipped["1"] == "batch_norm runs in its forward, outside of a layer: only layers are folded"
    assert not fold(model, values(2, 3, 6, 6), where="2").skipped.keys() - {"2"}


def test_where_takes_any_name_of_a_module():
    class Twice(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first = normed()
            self.second = nn.Module()
            self.second.bn = self.first[1]
            self.second.conv = self.first[0]

        def forward(self, x: Tensor) -> Tensor:
            return self.first(x)

    model, x = settled(Twice()), values(2, 3, 6, 6)
    assert fold(model, x, where="second.bn").changed == {"first.1": "folded into first.0"}
    assert list(convert(model, "ghost", where="second").changed) == ["first.1"]
    assert list(fuse(model, x, where="second.bn").changed) == ["first.1"]
    assert list(insert(plain(), [x], where="0").changed) == ["0"]


def test_the_names_that_an_optimizer_holds_follow_too():
    model, x = plain(), values(4, 3, 6, 6)
    optimizer = torch.optim.SGD(model.named_parameters(), lr=0.1, momentum=0.9)
    surgery = insert(model, [x], where="0")
    surgery.rebind(optimizer)
    (group,) = optimizer.param_groups
    names = {parameter: name for name, parameter in surgery.model.named_parameters()}
    assert group["param_names"] == [names[parameter] for parameter in group["params"]]
    assert "0.bn.weight" in group["param_names"]
    assert "0.bias" not in group["param_names"]
