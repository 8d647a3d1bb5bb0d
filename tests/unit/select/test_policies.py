# SPDX-License-Identifier: Apache-2.0
"""The selection: what it takes, that it keeps the staleness cap, and that it recovers from drops."""

from __future__ import annotations

import random
import time

from hypothesis import given, settings
from hypothesis import strategies as st

from megatron_moetion.select.policies import unsaved_tokens
from megatron_moetion.select.popularity import Ledger

SIZES = st.tuples(st.integers(1, 24), st.integers(1, 8)).flatmap(
    lambda ec: st.tuples(st.just(ec[0]), st.integers(-(-ec[0] // ec[1]), ec[0]), st.just(ec[1]))
)
"""(E, K, cap) with K * cap >= E."""


def choose(unsaved: list[int], staleness: list[int], num_experts: int, cap: int) -> tuple[int, ...]:
    """With a K that stays as it is."""
    return unsaved_tokens(unsaved, staleness, num_experts, num_experts, cap)


def skewed_tokens(num_experts: int, seed: int) -> list[int]:
    """Popularity as a few hot experts and many cold ones, some of which get nothing."""
    draw = random.Random(seed)
    weights = [draw.paretovariate(0.7) if draw.random() < 0.8 else 0.0 for _ in range(num_experts)]
    return [int(100 * w) for w in weights]


@given(
    st.lists(st.tuples(st.integers(0, 10**12), st.integers(1, 40)), max_size=40), st.integers(1, 40), st.integers(1, 10)
)
def test_so_many_distinct_experts_the_same_every_time(
    experts: list[tuple[int, int]], num_experts: int, cap: int
) -> None:
    unsaved, staleness = [u for u, _ in experts], [s for _, s in experts]
    chosen = choose(unsaved, staleness, num_experts, cap)
    assert len(chosen) == len(set(chosen)) == min(num_experts, len(experts))
    assert all(0 <= e < len(experts) for e in chosen)
    assert list(chosen) == sorted(chosen)
    assert chosen == choose(list(unsaved), list(staleness), num_experts, cap)


@given(SIZES, st.integers(0, 10**6))
@settings(max_examples=40)
def test_no_expert_passes_the_cap_while_nothing_is_dropped(sizes: tuple[int, int, int], seed: int) -> None:
    total, num_experts, cap = sizes
    ledger = Ledger(total)
    totals = [0] * total
    ledger.captured(0, range(total), totals)  # the baseline: all expire together
    for iteration in range(1, 201):
        totals = [t + n for t, n in zip(totals, skewed_tokens(total, seed + iteration // 20), strict=True)]
        ledger.update(totals)
        assert max(ledger.staleness) <= cap, f"snapshot {iteration}"
        ledger.captured(iteration, choose(ledger.unsaved, ledger.staleness, num_experts, cap), totals)
        ledger.settle(iteration, whole=True)


@given(SIZES, st.integers(0, 12), st.integers(0, 10**6))
@settings(max_examples=40)
def test_no_expert_passes_the_cap_while_k_goes_up_and_down(sizes: tuple[int, int, int], more: int, seed: int) -> None:
    total, fewest, cap = sizes
    draw = random.Random(seed)
    ledger = Ledger(total)
    totals = [0] * total
    ledger.captured(0, range(total), totals)
    for iteration in range(1, 201):
        totals = [t + n for t, n in zip(totals, skewed_tokens(total, seed + iteration // 20), strict=True)]
        ledger.update(totals)
        assert max(ledger.staleness) <= cap, f"snapshot {iteration}"
        now = fewest + draw.randint(0, more)
        chosen = unsaved_tokens(ledger.unsaved, ledger.staleness, now, fewest, cap)
        assert len(chosen) == min(now, total)
        ledger.captured(iteration, chosen, totals)
        ledger.settle(iteration, whole=True)


@given(st.lists(st.integers(0, 10**6), min_size=1, max_size=30), st.integers(1, 30))
def test_without_pressure_it_takes_the_most_choose(unsaved: list[int], num_experts: int) -> None:
    total = len(unsaved)
    chosen = choose(unsaved, [1] * total, num_experts, total)
    best = sorted(range(total), key=lambda e: (-unsaved[e], e))[:num_experts]
    assert chosen == tuple(sorted(best))


def test_ties_go_to_the_staler_then_to_the_lower_position() -> None:
    assert choose([5, 5, 5, 5], [1, 2, 2, 1], 1, 100) == (1,)
    assert choose([5, 5, 5], [1, 1, 1], 2, 100) == (0, 1)


def test_a_deadline_goes_before_tokens() -> None:
    assert choose([100, 90, 0, 80], [1, 1, 8, 1], 1, 8) == (2,)


def test_reservation_spreads_experts_that_would_expire_together() -> None:
    # 8 experts, 2 a snapshot, cap 4: already at staleness 1 two of the cold ones must go, or six expire at once later.
    staleness = [1] * 8
    for _ in range(40):
        chosen = choose([1000, 900, 800, 700, 0, 0, 0, 0], staleness, 2, 4)
        staleness = [1 if e in chosen else s + 1 for e, s in enumerate(staleness)]
        assert max(staleness) <= 4


@given(SIZES, st.integers(0, 10**6), st.floats(0.1, 0.9))
@settings(max_examples=40)
def test_after_drops_the_cap_holds_again_within_one_round(
    sizes: tuple[int, int, int], seed: int, drop_rate: float
) -> None:
    total, num_experts, cap = sizes
    draw = random.Random(seed)
    ledger = Ledger(total)
    totals = [0] * total
    ledger.captured(0, range(total), totals)
    calm = 0
    for iteration in range(1, 120):
        totals = [t + n for t, n in zip(totals, skewed_tokens(total, seed), strict=True)]
        ledger.update(totals)
        stormy = iteration < 60
        calm = 0 if stormy else calm + 1
        if calm > 2 * cap:
            assert max(ledger.staleness) <= cap, f"snapshot {iteration}"
        ledger.captured(iteration, choose(ledger.unsaved, ledger.staleness, num_experts, cap), totals)
        ledger.settle(iteration, whole=not (stormy and draw.random() < drop_rate))


def test_the_most_overdue_go_first_when_drops_have_broken_the_cap() -> None:
    assert choose([9, 9, 0, 0, 9], [9, 9, 14, 12, 1], 2, 8) == (2, 3)


def test_long_staleness_costs_no_time() -> None:
    began = time.perf_counter()
    choose([1] * 64, [10**6] * 64, 8, 8)
    assert time.perf_counter() - began < 0.5
