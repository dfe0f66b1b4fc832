from __future__ import annotations

import itertools

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from bnkit._checks import UserError
from bnkit.data import BatchOrder


def take(order: BatchOrder, count: int) -> list[list[int]]:
    return [batch.tolist() for batch in itertools.islice(order, count)]


sizes = st.integers(1, 40).flatmap(lambda n: st.tuples(st.just(n), st.integers(1, n)))


@given(sizes, st.integers(-(2**70), 2**70))
def test_each_epoch_is_a_permutation(size, seed):
    n, batch_size = size
    order = BatchOrder(n, batch_size, seed, drop_last=False)
    for epoch in range(3):
        assert (order.epoch, order.position) == (epoch, 0)
        batches = take(order, order.batches_per_epoch)
        assert {len(batch) for batch in batches[:-1]} <= {batch_size}
        assert sorted(itertools.chain(*batches)) == list(range(n))


@given(sizes)
def test_drop_last_leaves_out_only_the_rest(size):
    n, batch_size = size
    whole, dropped = BatchOrder(n, batch_size, 3, drop_last=False), BatchOrder(n, batch_size, 3)
    assert dropped.batches_per_epoch == n // batch_size
    for _ in range(2):
        expected = take(whole, whole.batches_per_epoch)
        assert take(dropped, dropped.batches_per_epoch) == [batch for batch in expected if len(batch) == batch_size]


@given(sizes, st.integers(0, 100), st.booleans())
def test_resuming_anywhere_goes_on_as_if_uninterrupted(size, steps, drop_last):
    n, batch_size = size
    uninterrupted = BatchOrder(n, batch_size, 7, drop_last=drop_last)
    take(uninterrupted, steps)
    resumed = BatchOrder(n, batch_size, 7, drop_last=drop_last)
    take(resumed, 3)
    resumed.load_state_dict(uninterrupted.state_dict())
    assert take(resumed, 50) == take(uninterrupted, 50)


def test_state_is_two_integers():
    order = BatchOrder(10, 3, 0)
    take(order, 7)
    assert order.state_dict() == {"epoch": 2, "position": 1}


def test_batches_index_tensors():
    batch = next(BatchOrder(10, 3, 0))
    assert batch.dtype == torch.int64
    assert torch.arange(10)[batch].tolist() == batch.tolist()


def test_epochs_and_seeds_differ():
    first, second = BatchOrder(100, 100, 0), BatchOrder(100, 100, 1)
    permutations = [tuple(batch) for order in (first, second) for batch in take(order, 3)]
    assert len(set(permutations)) == 6


def test_every_example_is_as_likely_in_every_place():
    first_places = torch.stack([next(BatchOrder(4, 4, seed)) for seed in range(2000)])
    counts = torch.stack([place.bincount(minlength=4) for place in first_places.unbind(1)])
    # 500 expected each, standard deviation 19: five of them.
    assert (counts - 500).abs().max() < 97


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ((0, 1), "number of examples must be at least 1, got 0"),
        ((5, 0), "batch size must be at least 1, got 0"),
        ((5, 6), "batch size 6 exceeds the 5 training examples: choose a smaller one"),
    ],
)
def test_sizes_that_make_no_batch_are_refused(arguments, message):
    with pytest.raises(UserError, match=message):
        BatchOrder(*arguments, seed=0)


def test_a_batch_larger_than_the_data_is_one_batch_without_drop_last():
    assert sorted(next(BatchOrder(5, 6, 0, drop_last=False)).tolist()) == [0, 1, 2, 3, 4]


@pytest.mark.parametrize(
    "state", [{"epoch": 0, "position": 3}, {"epoch": 0, "position": -1}, {"epoch": -1, "position": 0}]
)
def test_a_place_that_does_not_exist_is_refused(state):
    with pytest.raises(UserError, match=r"no batch -?\d in epoch -?\d, which has 3 batches: resume with the data"):
        BatchOrder(10, 3, 0).load_state_dict(state)


def test_shards_keep_their_examples_and_shuffled_ones_change_their_order():
    n = 2500
    fixed, mixed = (BatchOrder(n, n, 5, shuffle=shuffle) for shuffle in ("shards", "within-shards"))
    epochs = [[next(order) for _ in range(4)] for order in (fixed, mixed)]
    shards = [set(part.tolist()) for part in epochs[0][0].split(1024)]
    for each in (*epochs[0], *epochs[1]):
        assert sorted(each.tolist()) == list(range(n))
    ends = {tuple(epoch[-1000:].tolist()) for epoch in epochs[0]}
    assert len(ends) <= 4
    assert len({tuple(epoch.tolist()) for epoch in epochs[0]}) > 1
    last = [i for i in epochs[0][0].tolist() if i in min(shards, key=len)]
    for epoch in epochs[0]:
        assert [i for i in epoch.tolist() if i in set(last)] == last
    assert len({tuple(i for i in epoch.tolist() if i in set(last)) for epoch in epochs[1]}) == 4


@given(sizes, st.integers(0, 100), st.sampled_from(["shards", "within-shards"]))
def test_shards_resume_too(size, steps, shuffle):
    n, batch_size = size
    uninterrupted = BatchOrder(n, batch_size, 7, shuffle=shuffle)
    take(uninterrupted, steps)
    resumed = BatchOrder(n, batch_size, 7, shuffle=shuffle)
    resumed.load_state_dict(uninterrupted.state_dict())
    assert take(resumed, 20) == take(uninterrupted, 20)


def test_an_unknown_shuffle():
    with pytest.raises(UserError, match="unknown shuffle 'none'"):
        BatchOrder(10, 3, 0, shuffle="none")
