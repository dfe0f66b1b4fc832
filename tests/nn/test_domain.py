"""DomainBatchNorm against one torch batch norm a domain."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn
from torch.optim.swa_utils import update_bn

import bnkit.nn
from bnkit.nn import DomainBatchNorm, use_domain

NAMES = ("clean", "adversarial")


def batch(scale=1.0, offset=0.0):
    return torch.randn(6, 3, 5) * scale + offset


@pytest.mark.parametrize("steps", [1, 2, 10])
@pytest.mark.parametrize("momentum", [0.1, None])
@pytest.mark.parametrize("shared_affine", [True, False])
def test_each_domain_is_a_batch_norm_of_its_own(shared_affine, momentum, steps):
    layer = DomainBatchNorm(3, NAMES, momentum=momentum, shared_affine=shared_affine)
    theirs = {name: nn.BatchNorm1d(3, momentum=momentum) for name in NAMES}
    if shared_affine:
        theirs["adversarial"].weight, theirs["adversarial"].bias = theirs["clean"].weight, theirs["clean"].bias
    modules = nn.ModuleList(theirs.values())
    ours, plain = (torch.optim.SGD(module.parameters(), 0.1) for module in (layer, modules))
    for step in range(steps):
        name = NAMES[step % 3 > 0]
        data = [batch(step + 1, step).requires_grad_() for _ in range(1)] * 2
        gradients, dy = [], torch.randn(6, 3, 5)
        for call, x, optimizer in zip(
            (lambda x, n=name: layer(x, domain=n), theirs[name]), data, (ours, plain), strict=True
        ):
            optimizer.zero_grad()
            x.grad = None
            call(x).backward(dy)
            optimizer.step()
            gradients.append(x.grad)
        torch.testing.assert_close(*gradients, atol=1e-5, rtol=1e-5)
    x = batch()
    for name in NAMES:
        layer.domain = name
        torch.testing.assert_close(layer.eval()(x), theirs[name].eval()(x), atol=1e-5, rtol=1e-5)
        for statistic in ("running_mean", "running_var", "num_batches_tracked", "weight", "bias"):
            torch.testing.assert_close(getattr(layer, statistic), getattr(theirs[name], statistic), msg=statistic)


def test_an_unused_domains_affine_has_no_gradient():
    """A gradient of zeros would still move it, by momentum or Adam's averages."""
    layer = DomainBatchNorm(3, 2, shared_affine=False)
    layer(batch(), domain=1).pow(2).sum().backward()
    assert layer.weight_0.grad is None
    assert layer.weight_1.grad is not None


def test_ways_to_choose_the_domain():
    model = nn.Sequential(DomainBatchNorm(3, NAMES), nn.ReLU(), DomainBatchNorm(3, NAMES))
    with use_domain(model, "adversarial"):
        model(batch())
        with use_domain(model, "clean"):
            assert model[2].domain == "clean"
        assert [model[0].domain, model[2].domain] == ["adversarial"] * 2
    assert [model[0].domain, model[2].domain] == ["clean"] * 2
    assert model[0].batches_tracked.tolist() == [0, 1]
    model[0](batch(), domain="adversarial")
    assert model[0].batches_tracked.tolist() == [0, 2]
    assert model[0].domain == "clean"
    with pytest.raises(RuntimeError, match="midway"), use_domain(model, "adversarial"):
        raise RuntimeError("midway")
    assert model[0].domain == "clean"


def test_use_domain_changes_nothing_if_one_layer_does_not_know_the_domain():
    model = nn.Sequential(DomainBatchNorm(3, NAMES), DomainBatchNorm(3, ("clean", "synthetic")))
    with pytest.raises(ValueError, match="unknown domain 'adversarial': choose one of 'clean', 'synthetic'"):
        use_domain(model, "adversarial").__enter__()
    assert model[0].domain == "clean"


@pytest.mark.parametrize("shared_affine", [True, False])
@pytest.mark.parametrize("counted", [True, False])
def test_a_plain_batch_norms_state_loads_into_every_domain(shared_affine, counted):
    theirs = nn.BatchNorm1d(3)
    for _ in range(3):
        theirs(batch(2, 1))
    nn.init.uniform_(theirs.weight)
    state = {f"0.{name}": tensor for name, tensor in theirs.state_dict().items()}
    if not counted:
        del state["0.num_batches_tracked"]
    model = nn.Sequential(DomainBatchNorm(3, 3, shared_affine=shared_affine))
    model.load_state_dict(state, strict=True)
    x = batch()
    for domain in range(3):
        model[0].domain = domain
        torch.testing.assert_close(model.eval()(x), theirs.eval()(x))
    assert model[0].batches_tracked.tolist() == [3 * counted] * 3
    model.train()(batch())
    assert not torch.equal(model[0].running_means[0], model[0].running_means[2])
    assert list(state) == [f"0.{n}" for n in theirs.state_dict() if counted or n != "num_batches_tracked"]


def test_loading_a_shared_affine_into_an_own_one_and_missing_keys():
    shared, own = DomainBatchNorm(3, 2), DomainBatchNorm(3, 2, shared_affine=False)
    nn.init.uniform_(shared.weight)
    own.load_state_dict(shared.state_dict())
    assert torch.equal(own.weight_1, shared.weight)
    with pytest.raises(RuntimeError, match=r'Missing key.*"running_means"'):
        shared.load_state_dict({})
    with pytest.raises(RuntimeError, match="size mismatch for running_means"):
        DomainBatchNorm(3, 4).load_state_dict(shared.state_dict())


@pytest.mark.parametrize("shared_affine", [True, False])
def test_a_plain_state_assigned_gives_each_domain_memory_of_its_own(shared_affine):
    theirs = nn.BatchNorm1d(3)
    theirs(batch(2, 1))
    layer = DomainBatchNorm(3, 3, shared_affine=shared_affine)
    layer.load_state_dict(theirs.state_dict(), assign=True)
    before = {name: tensor.clone() for name, tensor in layer.state_dict().items()}
    optimizer = torch.optim.SGD(layer.parameters(), 0.1)
    layer(batch(), domain=1).pow(3).sum().backward()
    optimizer.step()
    assert layer.batches_tracked.tolist() == [1, 2, 1]
    for name in ("running_means", "running_vars"):
        changed = (getattr(layer, name) != before[name]).any(1)
        assert changed.tolist() == [False, True, False], name
    if not shared_affine:
        changed = [not torch.equal(layer.get_parameter(f"weight_{k}"), before[f"weight_{k}"]) for k in range(3)]
        assert changed == [False, True, False]


def test_a_plain_state_without_a_statistic():
    for absent, missing in (("running_var", "running_vars"), ("running_mean", "running_means")):
        state = nn.BatchNorm1d(3).state_dict()
        del state[absent]
        with pytest.raises(RuntimeError, match=f'Missing key.*"{missing}"'):
            DomainBatchNorm(3, 2).load_state_dict(state)


def test_weight_and_bias_written_to_are_those_of_the_current_domain():
    layer = DomainBatchNorm(3, 2, shared_affine=False)
    layer.domain = 1
    layer.weight = nn.Parameter(torch.full((3,), 2.0))
    assert torch.equal(layer.weight_1, torch.full((3,), 2.0))
    assert [name for name, _ in layer.named_parameters()] == ["weight_0", "bias_0", "weight_1", "bias_1"]


def test_tools_that_estimate_statistics_work_on_the_current_domain():
    model = nn.Sequential(DomainBatchNorm(3, NAMES))
    data = [batch(3, 2) for _ in range(4)]
    with use_domain(model, "adversarial"):
        update_bn(data, model)
    torch.testing.assert_close(model[0].running_means[1], torch.stack([x.mean((0, 2)) for x in data]).mean(0))
    assert torch.equal(model[0].running_means[0], torch.zeros(3))


def test_the_domain_survives_copying():
    layer = DomainBatchNorm(3, NAMES)
    layer.domain = "adversarial"
    assert copy.deepcopy(layer).domain == "adversarial"
    assert "domains=('clean', 'adversarial'), shared_affine=True" in repr(layer)


def test_compiled_code_follows_the_domain():
    torch._dynamo.reset()
    layer = DomainBatchNorm(3, NAMES, shared_affine=False)
    compiled = torch.compile(layer, backend="eager", fullgraph=True)
    for name in (*NAMES, *NAMES):
        with use_domain(layer, name):
            compiled(batch())
    assert layer.batches_tracked.tolist() == [2, 2]


@pytest.mark.parametrize("domains", [0, (), ("a", "a"), "ab", -1])
def test_domains_out_of_range_are_refused(domains):
    with pytest.raises(ValueError, match="domains must be a positive number or different names"):
        DomainBatchNorm(3, domains)


@pytest.mark.parametrize("domain", ["clean", 2, -1])
def test_unknown_domains_are_refused(domain):
    layer = DomainBatchNorm(3, 2)
    with pytest.raises(ValueError, match=r"unknown domain .*: choose one of 0, 1"):
        layer.domain = domain
    with pytest.raises(ValueError, match="unknown domain"):
        layer(batch(), domain=domain)
    with pytest.raises(ValueError, match="use_domain needs a model with DomainBatchNorm layers, got Sequential"):
        use_domain(nn.Sequential(bnkit.nn.BatchNorm1d(3)), 0).__enter__()
