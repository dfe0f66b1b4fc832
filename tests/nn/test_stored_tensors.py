"""Where parameters and buffers are not where `torch.nn.Module` keeps them, the layers find them all the same."""

import copy

import pytest
import torch
from torch import nn
from torch.nn.utils import parametrizations, parametrize, prune, weight_norm

from bnkit.nn import BatchNorm2d, DomainBatchNorm


class Doubled(nn.Module):
    def forward(self, values: torch.Tensor) -> torch.Tensor:
        return 2 * values


def pair() -> tuple[BatchNorm2d, nn.BatchNorm2d, torch.Tensor]:
    ours, theirs = BatchNorm2d(3), nn.BatchNorm2d(3)
    with torch.no_grad():
        for parameter in ours.parameters():
            parameter.uniform_(0.5, 2)
    theirs.load_state_dict(ours.state_dict())
    return ours, theirs, torch.randn(4, 3, 5, 5)


def test_parametrized_parameters_and_buffers():
    ours, theirs, x = pair()
    for layer in (ours, theirs):
        parametrize.register_parametrization(layer, "weight", Doubled())
        layer.eval().get_buffer("running_mean").fill_(0.3)
        parametrize.register_parametrization(layer, "running_mean", Doubled())
    torch.testing.assert_close(ours(x), theirs(x))


def test_a_replica_of_data_parallel():
    ours, theirs, x = pair()
    replica = ours._replicate_for_data_parallel()
    for name, value in {**dict(theirs.named_parameters()), **dict(theirs.named_buffers())}.items():
        setattr(replica, name, value)
    torch.testing.assert_close(replica(x), nn.functional.batch_norm(x, None, None, theirs.weight, theirs.bias, True))
    assert theirs.num_batches_tracked == 1


def test_a_functional_call():
    ours, theirs, x = pair()
    state = {name: value + 1 for name, value in ours.state_dict().items()}
    theirs.load_state_dict(state)
    torch.testing.assert_close(torch.func.functional_call(ours, state, x), theirs(x))
    assert state["num_batches_tracked"] == 2


def replica_of(layer: nn.Module, _: str) -> nn.Module:
    replica = layer._replicate_for_data_parallel()
    for name, parameter in layer.named_parameters():
        setattr(replica, name, 1 * parameter)
    return replica


USES = {
    "parametrization": lambda layer, name: parametrize.register_parametrization(layer, name, nn.Identity()),
    "weight_norm": parametrizations.weight_norm,
    "old weight_norm": weight_norm,
    "pruning": prune.identity,
    "replica": replica_of,
}


@pytest.mark.filterwarnings("ignore:.*weight_norm.*:FutureWarning")
@pytest.mark.parametrize("use", USES)
@pytest.mark.parametrize("shared_affine", [True, False])
def test_the_weight_of_a_domain(shared_affine, use):
    layer = DomainBatchNorm(3, 2, shared_affine=shared_affine)
    with torch.no_grad():
        for parameter in layer.parameters():
            parameter.uniform_(0.5, 2)
    twin, x = copy.deepcopy(layer), torch.randn(4, 3, 5)
    layer = USES[use](layer, "weight" if shared_affine else "weight_0")
    for domain in (0, 1):
        torch.testing.assert_close(layer(x, domain=domain), twin(x, domain=domain))


def test_a_domain_without_its_weight_and_with_parametrized_statistics():
    layer = DomainBatchNorm(3, 2, shared_affine=False)
    del layer._parameters["weight_1"]
    layer(torch.randn(4, 3), domain=0)
    with pytest.raises(AttributeError, match="has no attribute 'weight_1'"):
        layer(torch.randn(4, 3), domain=1)
    parametrize.register_parametrization(layer, "running_vars", Doubled())
    torch.testing.assert_close(layer.running_var, 2 * layer.parametrizations.running_vars.original[0])
