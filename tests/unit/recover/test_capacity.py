# SPDX-License-Identifier: Apache-2.0
"""How far capacity is raised after a recovery, that it is bounded, and that it ends."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from megatron_moetion.recover.capacity import CapacityRules, boosts, repaid

RULES = CapacityRules(iterations=10, max_boost=2.0, headroom=0.25)
TOKENS = st.lists(st.integers(0, 10_000), min_size=1, max_size=40)


def array(values: Any) -> np.ndarray[Any, np.dtype[np.float64]]:
    return np.array(values, dtype=np.float64)


def test_who_drops_tokens_gets_room_for_them() -> None:
    load = array([[300, 60, 20, 20]])  # base capacity, with a factor of 1, is 100 each
    raised = boosts(load, array([[5, 0, 0, 0]]), 0, 1.0, CapacityRules(iterations=10, max_boost=2.0, headroom=1.0))
    assert raised.tolist() == [[2.0, 1.0, 1.0, 1.0]]
    half = boosts(load, array([[0, 0, 5, 0]]), 5, 1.0, CapacityRules(iterations=10, max_boost=2.0, headroom=1.0))
    assert half.tolist() == [[1.5, 1.0, 1.0, 1.0]], "whoever owes, whoever can repay does; half of the time is over"


def test_a_layer_that_owes_nothing_is_left_alone() -> None:
    load = array([[300, 100], [300, 100]])
    assert boosts(load, array([[0, 0], [0, 1]]), 0, 1.0, RULES).tolist()[0] == [1.0, 1.0]
    assert boosts(array([[0, 0]]), array([[1, 1]]), 0, 1.0, RULES).tolist() == [[1.0, 1.0]]


@given(TOKENS, st.integers(0, 30), st.floats(0.5, 4.0), st.integers(0, 1000))
def test_never_below_the_base_never_past_the_bounds_and_exactly_the_base_in_the_end(
    load: list[int], passed: int, factor: float, debt: int
) -> None:
    raised = boosts(array(load), array([debt] + [0] * (len(load) - 1)), passed, factor, RULES)
    assert (raised >= 1.0).all()
    assert (raised <= RULES.max_boost).all()
    assert raised.sum() <= (1 + RULES.headroom) * len(load) + 1e-9
    if passed >= RULES.iterations or not debt:
        assert (raised == 1.0).all()


@given(TOKENS, st.integers(0, 12), st.integers(0, 50))
def test_torch_and_numpy_agree(load: list[int], passed: int, debt: int) -> None:
    owed = [debt] * len(load)
    here = boosts(array(load), array(owed), passed, 1.25, RULES)
    clock = torch.tensor(float(passed), dtype=torch.float64)
    there = boosts(torch.tensor(load, dtype=torch.float64), torch.tensor(owed, dtype=torch.float64), clock, 1.25, RULES)
    assert there.numpy() == pytest.approx(here, rel=1e-12)


def test_an_expert_pays_for_itself_first_and_then_for_its_layer() -> None:
    assert repaid(array([[10, 0, 20]]), array([[4, 0, 0]])).tolist() == [[6, 0, 20]]
    assert repaid(array([[10, 0, 20]]), array([[10, 5, 0]])).tolist() == [[0, 0, 15]]
    assert repaid(array([[10, 0, 20], [3, 0, 0]]), array([[99, 0, 0], [0, 0, 0]])).tolist() == [[0, 0, 0], [3, 0, 0]]


@given(st.lists(st.tuples(st.integers(0, 1000), st.integers(0, 1000)), min_size=1, max_size=20))
def test_a_debt_falls_by_what_was_processed_beyond_and_not_below_zero(experts: list[tuple[int, int]]) -> None:
    debt, beyond = array([d for d, _ in experts]), array([b for _, b in experts])
    left = repaid(debt, beyond)
    assert (left >= 0).all()
    assert (left <= debt).all()
    assert left.sum() == pytest.approx(max(0.0, debt.sum() - beyond.sum()), abs=1e-6)
