import multiprocessing

import numpy as np
import pytest
import torch
from torch import nn

from bnkit.data import BatchOrder, ImageSet
from bnkit.experiments._lockstep import (
    create_stack,
    create_stacks,
    evaluation_steps,
    step_seconds,
    train_stacks,
)
from bnkit.experiments._record import Configuration
from bnkit.experiments._task import Task, batches

CPU = torch.device("cpu")


@pytest.fixture(params=[0.5, 0.2], ids=["dense", "lists of lit pixels"])
def data(request):
    generator = torch.Generator().manual_seed(0)
    images = (torch.rand(300, 1, 8, 8, generator=generator) < request.param).to(torch.uint8) * 255
    # A pixel that is never on in training but is in tests, where its weights still count.
    images[:200, :, 2, 3] = 0
    upper, lower = (half.float().mean((1, 2)).gt(255 * request.param).long() for half in images[:, 0].split(4, 1))
    labels = upper + 2 * lower
    return ImageSet("halves", images[:200], labels[:200], images[200:], labels[200:], ("a", "b", "c", "d"))


def test_evaluation_steps_are_dense_at_the_start_and_never_fewer_than_asked():
    steps = evaluation_steps(50_000)
    assert steps[0] == 0
    assert steps[-1] == 50_000
    assert len(steps) >= 200
    assert np.diff(steps[:10]).max() < np.diff(steps[-10:]).min()
    assert steps == sorted(set(steps))


@pytest.mark.parametrize("steps", [1, 7, 100])
def test_a_short_run_is_evaluated_at_every_step(steps):
    assert evaluation_steps(steps) == list(range(steps + 1))


def test_trains_what_the_ordinary_loop_trains(data):
    """Same weights, same batches, same accuracy as the modules trained by autograd."""
    configurations = [Configuration("none", 0.5, 0.3), Configuration("batch", 0.5, 0.3)]
    task = Task.of(data, CPU)
    stack = create_stack(configurations, [0, 5], data, task)
    expected = [list(row) for row in create_stack(configurations, [0, 5], data, task).nets]
    for row in expected:
        for seed, net in zip([0, 5], row, strict=True):
            order, optimizer = BatchOrder(200, 20, seed), torch.optim.SGD(net.parameters(), 0.5)
            for _ in range(30):
                rows = next(order)
                optimizer.zero_grad()
                nn.functional.cross_entropy(net(data.train_images[rows] / 255), task.y[rows]).backward()
                optimizer.step()
    last = list(train_stacks([stack], task, [0, 5], 20, [0, 30]))[-1]
    for k, row in enumerate(expected):
        for s, net in enumerate(row):
            logits = net.eval()(data.test_images / 255)
            assert last.loss[k, s] == pytest.approx(nn.functional.cross_entropy(logits, task.test_y).item(), rel=1e-3)
            assert last.accuracy[k, s] == pytest.approx(
                (logits.argmax(1) == task.test_y).float().mean().item(), abs=0.011
            )


def test_one_seed_gives_every_configuration_the_same_weights_but_for_scale(data):
    task = Task.of(data, CPU)
    stack = create_stack([Configuration("none", 1.0, 0.1), Configuration("batch", 1.0, 0.2)], [7], data, task)
    small, large = stack.input.weights_of_nets()[:, 0]
    torch.testing.assert_close(large, 2 * small)


def test_percentiles_are_of_the_last_sigmoids_inputs(data):
    task = Task.of(data, CPU)
    stack = create_stack([Configuration("batch", 0.5, 0.3)], [0], data, task)
    last = list(train_stacks([stack], task, [0], 20, [10]))[-1]
    _, z = stack.frozen()(task.tests[0][0])
    want = np.quantile(z[:, 0, 0].numpy(), [0.15, 0.5, 0.85], axis=0, method="nearest").T
    assert last.percentiles.shape == (1, 100, 3)
    np.testing.assert_allclose(last.percentiles[0], want, rtol=1e-5, atol=1e-5)


def test_divergence_is_dated_to_the_step(data):
    configurations = [Configuration("none", 0.5, 0.1), Configuration("none", 1e38, 0.1)]
    task = Task.of(data, CPU)
    stack = create_stack(configurations, [0], data, task)
    first = create_stack(configurations[1:], [0], data, task)
    steps_alive = 0
    steps = batches(task, [0], 20)
    while first.bias.isfinite().all():
        first.step(*next(steps))
        steps_alive += 1
    last = list(train_stacks([stack], task, [0], 20, [0, 5, 40]))[-1]
    assert last.diverged.tolist() == [[0], [steps_alive]]
    assert np.isnan(last.accuracy[1, 0])
    assert np.isfinite(last.accuracy[0, 0])


@pytest.fixture
def three_threads():
    before = torch.get_num_threads()
    torch.set_num_threads(3)
    yield
    torch.set_num_threads(before)


def test_stacks_side_by_side_train_what_one_stack_trains(data, three_threads):
    """Divergence, which is one network's, included; and PyTorch's threads are put back."""
    kinds = [("none", 0.5, 0.3), ("none", 1e38, 0.1), ("batch", 0.5, 0.3), ("batch", 1.0, 0.1), ("batch", 0.1, 0.2)]
    configurations = [Configuration(*kind) for kind in kinds]
    task = Task.of(data, CPU)
    one, several = [create_stack(configurations, [3], data, task)], create_stacks(configurations, [3], data, task)
    assert [stack.shape for stack in several] == [(1, 1), (2, 1), (2, 1)]
    expected, found = (list(train_stacks(stacks, task, [3], 20, [0, 10, 25])) for stacks in (one, several))
    assert torch.get_num_threads() == 3
    for want, got in zip(expected, found, strict=True):
        assert got.step == want.step
        np.testing.assert_array_equal(got.diverged, want.diverged)
        np.testing.assert_allclose(got.loss, want.loss, rtol=1e-4)
        np.testing.assert_allclose(got.percentiles, want.percentiles, rtol=1e-3, atol=1e-4)
    assert found[-1].diverged[1, 0] > 0
    assert np.isfinite(found[-1].loss[[0, 2, 3, 4]]).all()


def test_an_interrupt_ends_all_stacks(data, three_threads):
    """No process goes on, and none is waited for until it has trained to the end."""
    configurations = [Configuration("none", 0.1, 0.1), Configuration("batch", 0.1, 0.1)]
    task = Task.of(data, CPU)
    stacks = create_stacks(configurations, [0, 1], data, task)
    assert len(stacks) == 2
    step, calls = stacks[0].step, []

    def interrupted(x, target):
        calls.append(1)
        if len(calls) == 5:
            raise KeyboardInterrupt
        step(x, target)

    stacks[0].step = interrupted
    with pytest.raises(KeyboardInterrupt):
        list(train_stacks(stacks, task, [0, 1], 20, [10**6]))
    assert not multiprocessing.active_children()
    assert torch.get_num_threads() == 3


def test_held_out_images_neither_train_nor_come_from_the_test(data):
    task = Task.of(data, CPU)
    held = task.with_held_out(40)
    assert len(held.x) == 160
    torch.testing.assert_close(held.test_x != 0, data.train_images[160:].flatten(1) != 0)
    torch.testing.assert_close(held.test_y, task.y[160:])


def test_step_seconds_measures_something(data):
    task = Task.of(data, CPU)
    stack = create_stack([Configuration("none", 0.5, 0.1)], [0], data, task)
    assert 0 < step_seconds(stack, task, 20, count=5) < 1
