from __future__ import annotations

import random

import numpy as np
import torch

from bnkit.train._random import RandomState

CPU = torch.device("cpu")


def draws() -> tuple[float, float, float, float]:
    # normal(): numpy keeps half of a pair for the next call, which is state too.
    return torch.rand(1).item(), random.random(), np.random.rand(), np.random.normal()


def drawn(state: RandomState) -> tuple[float, float, float, float]:
    with state.active():
        return draws()


def test_a_run_s_draws_depend_on_its_seed_alone() -> None:
    left, right, other = RandomState(3, CPU), RandomState(3, CPU), RandomState(4, CPU)
    alone = [drawn(left), drawn(left)]
    assert alone[0] != alone[1]
    in_turns = []
    for _ in range(2):
        draws()
        in_turns.append(drawn(right))
        assert all(a != b for a, b in zip(drawn(other), in_turns[-1], strict=True))
    assert in_turns == alone


def test_the_caller_s_draws_are_left_alone() -> None:
    def seed() -> None:
        torch.manual_seed(0)
        random.seed(0)
        np.random.seed(0)

    seed()
    expected = [draws(), draws()]
    seed()
    first = draws()
    drawn(RandomState(3, CPU))
    assert [first, draws()] == expected


def test_resumed_from_its_state() -> None:
    state = RandomState(3, CPU)
    drawn(state)
    saved = state.state_dict()
    expected = drawn(state)
    resumed = RandomState(0, CPU)
    resumed.load_state_dict(saved)
    assert drawn(resumed) == expected


def test_an_error_inside_restores_the_caller_s_state() -> None:
    torch.manual_seed(0)
    expected = torch.rand(2)
    torch.manual_seed(0)
    try:
        with RandomState(3, CPU).active():
            raise KeyboardInterrupt
    except KeyboardInterrupt:
        pass
    assert torch.equal(torch.rand(2), expected)
