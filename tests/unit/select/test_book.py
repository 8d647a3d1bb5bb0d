# SPDX-License-Identifier: Apache-2.0
"""The book of experts: what it chooses, and what it says a fault has cost."""

from __future__ import annotations

import json
import random

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from megatron_moetion.select.book import ExpertBook, share_lost


def book(num_experts: int = 1) -> ExpertBook:
    return ExpertBook(
        names=("a", "b", "c"), layers=("l0", "l0", "l1"), reserved=num_experts, staleness_cap=3, interval=1
    )


def test_it_chooses_the_most_unsaved_and_keeps_the_cap() -> None:
    experts = book()
    experts.choose_all(0, [0, 0, 0])
    chosen = []
    for iteration in range(1, 7):
        experts.ledger.update([100 * iteration, 10 * iteration, 0])
        chosen.append(experts.choose(iteration, [0, 0, 0], 1))
    assert all({0, 1, 2} <= {e for c in chosen[i : i + 3] for e in c} for i in range(4))


def test_losses_are_the_tokens_since_the_captures_that_are_loaded() -> None:
    experts = book(num_experts=2)
    experts.choose_all(0, [0, 0, 0])
    experts.ledger.captured(1, [0], [10, 10, 10])
    experts.ledger.captured(2, [1], [20, 20, 20])
    state = json.loads(json.dumps(experts.state()))
    losses = experts.losses(state, {"a": 1, "b": 2, "c": 0}, 2, [25, 20, 25])
    assert losses.captured == (1, 2, 0)
    assert losses.now == (25, 20, 25)
    assert losses.lost == (15, 0, 25)
    after = book()
    after.recover(state, losses, totals=[50, 40, 50])
    assert after.ledger.unsaved == [0, 0, 0]
    assert after.ledger.staleness == [2, 1, 3]
    assert after.state()["lost"] == [15, 0, 25]
    assert after.layers([25, 20, 25]) == {"l0": (15, 45), "l1": (25, 25)}


def test_what_was_lost_once_is_not_lost_again() -> None:
    experts = book()
    experts.choose_all(0, [0, 0, 0])
    state = experts.state()
    experts.recover(state, experts.losses(state, {"a": 0, "b": 0, "c": 0}, 1, [5, 5, 5]), [5, 5, 5])
    assert experts.state()["lost"] == [5, 5, 5]
    state = experts.state()
    losses = experts.losses(state, {"a": 0, "b": 0, "c": 0}, 2, [12, 12, 12])
    assert losses.lost == (7, 7, 7)
    experts.recover(state, losses, [12, 12, 12])
    assert experts.state()["lost"] == [12, 12, 12]


@given(st.integers(2, 20), st.integers(2, 8), st.integers(0, 10**6), st.integers(1, 60), st.sampled_from((1, 10)))
@settings(max_examples=40)
def test_no_expert_passes_the_cap_because_of_a_recovery(
    total: int, cap: int, seed: int, fault: int, interval: int
) -> None:
    """G2: staleness stays within the cap unless snapshots were dropped. Here none is, and one recovery happens."""

    each = -(-total // cap)

    def new() -> ExpertBook:
        names = [str(e) for e in range(total)]
        return ExpertBook(names=names, layers=names, reserved=each, staleness_cap=cap, interval=interval)

    draw, experts, totals, newest = random.Random(seed), new(), [0] * total, [0] * total
    experts.choose_all(0, totals)
    for number in range(1, fault + 2 * cap):
        iteration = number * interval
        totals = [t + draw.choice((0, 1, 100)) * (e < 3) for e, t in enumerate(totals)]
        experts.ledger.update(totals)
        state = json.loads(json.dumps(experts.state()))
        for e in experts.choose(iteration, totals, each):
            newest[e] = iteration
        assert max(iteration - n for n in newest) < cap * interval, f"snapshot {number}, fault after {fault}"
        if number == fault:
            experts = new()
            losses = experts.losses(state, {str(e): n for e, n in enumerate(newest)}, iteration, totals)
            experts.recover(state, losses, totals)


def test_the_share_over_ranks_sums_before_it_divides() -> None:
    ranks = [{"l0": (5, 50), "l1": (0, 10)}, {"l0": (5, 50), "l1": (10, 10)}]
    assert share_lost(ranks) == pytest.approx((10 / 100 + 10 / 20) / 2)
    assert share_lost([]) == 0.0
