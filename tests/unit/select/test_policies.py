# SPDX-License-Identifier: Apache-2.0
"""The selection: what it takes, that it keeps the staleness cap, and that it recovers from drops."""

from __future__ import annotations

import random
import time

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from megatron_moetion.select import policies
from megatron_moetion.select.policies import POLICIES, Popularity, grow
from megatron_moetion.select.popularity import Ledger
from megatron_moetion.select.shares import Shares

DEFAULT = "unsaved-tokens"
SIZES = st.tuples(st.integers(1, 24), st.integers(1, 8)).flatmap(
    lambda ec: st.tuples(st.just(ec[0]), st.integers(-(-ec[0] // ec[1]), ec[0]), st.just(ec[1]))
)
"""(E, K, cap) with K * cap >= E."""


def seen(unsaved: list[int], staleness: list[int], average: list[float] | None = None) -> Popularity:
    """What a policy is told; turns are positions."""
    return Popularity(
        unsaved=unsaved, staleness=staleness, average=average or [0.0] * len(unsaved), turn=range(len(unsaved))
    )


def choose(
    unsaved: list[int],
    staleness: list[int],
    num_experts: int,
    cap: int,
    reserved: int = 0,
    policy: str = DEFAULT,
    shares: Shares | None = None,
) -> tuple[int, ...]:
    """In order of position; with a K that stays as it is, unless ``reserved`` says otherwise."""
    order = POLICIES[policy](seen(unsaved, staleness))
    return tuple(sorted(policies.choose(order, staleness, num_experts, reserved or num_experts, cap, shares)))


def spans(total: int, ranks: int, usual: int, most: int = 0) -> Shares:
    """As Megatron's distributed optimizer shares experts of 48 bytes: a contiguous span of all of them each."""
    each, span = 48, 48 * total // ranks
    table = [
        [max(0, min(each * (e + 1), span * (r + 1)) - max(each * e, span * r)) for r in range(ranks)]
        for e in range(total)
    ]
    return Shares.of(np.array(table, dtype=np.int64), usual, most or total)


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


@given(SIZES, st.integers(0, 10**6), st.sampled_from(sorted(POLICIES)))
@settings(max_examples=100)
def test_no_expert_passes_the_cap_while_nothing_is_dropped(sizes: tuple[int, int, int], seed: int, policy: str) -> None:
    total, num_experts, cap = sizes
    ledger = Ledger(total)
    totals = [0] * total
    ledger.captured(0, range(total), totals)  # the baseline: all expire together
    for iteration in range(1, 201):
        totals = [t + n for t, n in zip(totals, skewed_tokens(total, seed + iteration // 20), strict=True)]
        ledger.update(totals)
        assert max(ledger.staleness) <= cap, f"snapshot {iteration}"
        chosen = choose(ledger.unsaved, ledger.staleness, num_experts, cap, policy=policy)
        ledger.captured(iteration, chosen, totals)
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
        chosen = choose(ledger.unsaved, ledger.staleness, now, cap, reserved=fewest)
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


def test_many_experts_and_long_staleness_cost_little_time() -> None:
    draw = random.Random(0)
    unsaved = [draw.randrange(10**6) for _ in range(20_000)]
    staleness = [draw.randrange(1, 10**6) for _ in unsaved]
    began = time.thread_time()
    choose(unsaved, staleness, 2500, 8)
    assert time.thread_time() - began < 2


# -- the other policies ---------------------------------------------------------------------------------------


def test_popular_experts_go_first_whether_saved_or_not() -> None:
    assert POLICIES["popularity-ema"](seen([9, 0, 5], [1, 1, 2], [1.0, 7.0, 1.0])) == [1, 2, 0]


def test_in_turn_means_the_stalest_and_then_the_next_in_the_round() -> None:
    assert POLICIES["sequential"](seen([9, 0, 5, 7], [1, 2, 2, 3])) == [3, 1, 2, 0]


@given(SIZES)
def test_in_turn_takes_each_once_a_round(sizes: tuple[int, int, int]) -> None:
    total, num_experts, _ = sizes
    staleness, rounds = [1] * total, []
    for _ in range(-(-total // num_experts)):
        chosen = choose([0] * total, staleness, num_experts, 10**6, policy="sequential")
        staleness = [1 if e in chosen else s + 1 for e, s in enumerate(staleness)]
        rounds += chosen
    assert set(rounds) == set(range(total))
    assert all(rounds.count(e) <= 2 for e in range(total)), "the last of a round and the first of the next"


@given(st.lists(st.integers(0, 1000), min_size=1, max_size=30), st.sampled_from(sorted(POLICIES)))
def test_a_policy_orders_every_expert_once(unsaved: list[int], policy: str) -> None:
    order = POLICIES[policy](seen(unsaved, [1] * len(unsaved)))
    assert sorted(order) == list(range(len(unsaved)))


# -- more than K, for the budget ------------------------------------------------------------------------------


@given(
    st.lists(st.integers(0, 1000), min_size=1, max_size=30),
    st.integers(0, 30),
    st.integers(-5, 5000),
    st.integers(1, 30),
)
def test_it_grows_no_more_than_the_allowance_needs(at_risk: list[int], start: int, allowance: int, most: int) -> None:
    chosen = list(range(min(start, len(at_risk), most)))
    grown = grow(chosen, at_risk, allowance, most)
    assert grown[: len(chosen)] == chosen
    assert len(set(grown)) == len(grown) <= max(most, len(chosen))
    left = sum(at_risk) - sum(at_risk[e] for e in grown)
    assert left <= allowance or len(grown) == min(most, len(at_risk))
    if len(grown) > len(chosen):
        assert left + at_risk[grown[-1]] > allowance, "one less would not have been enough"


# -- experts whose state several ranks share ------------------------------------------------------------------


def test_the_busiest_rank_sends_no_more_than_the_others() -> None:
    hot = [90, 80, 70, 60, 4, 3, 2, 1]
    assert choose(hot, [1] * 8, 4, 8) == (0, 1, 2, 3), "all of it is the first of two ranks'"
    assert choose(hot, [1] * 8, 4, 8, shares=spans(8, 2, usual=4)) == (0, 1, 4, 5)
    assert choose(hot, [1] * 8, 4, 8, shares=spans(8, 1, usual=4)) == (0, 1, 2, 3), "nobody to share with"
    assert choose(hot, [1] * 8, 4, 8, shares=spans(8, 8, usual=4)) == (0, 1, 2, 3), "each is another rank's"


def test_an_expert_of_two_ranks_needs_room_on_both() -> None:
    thirds = spans(3, 2, usual=1)
    assert thirds.nbytes.tolist() == [[48, 0], [24, 24], [0, 48]]
    assert choose([1, 9, 1], [1] * 3, 1, 8, shares=thirds) == (1,)
    assert choose([5, 9, 1], [1] * 3, 2, 8, reserved=1, shares=spans(3, 2, usual=2)) == (1,)
    assert choose([5, 9, 1], [1] * 3, 2, 8, shares=spans(3, 2, usual=2)) == (0, 1), "the least that a snapshot takes"


def test_the_cap_goes_before_the_bound_of_bytes() -> None:
    shares = spans(8, 2, usual=2)
    assert choose([9, 9, 9, 9, 9, 9, 9, 9], [8, 8, 1, 1, 1, 1, 1, 1], 2, 8, shares=shares) == (0, 1)


def test_what_arenas_have_no_room_for_is_not_taken() -> None:
    shares = spans(8, 2, usual=2, most=4)
    assert shares.most_bytes.tolist() == [96, 96]
    assert choose([9, 9, 9, 9, 0, 0, 0, 0], [8, 8, 8, 8, 1, 1, 1, 1], 4, 8, shares=shares) == (0, 1, 4, 5)
    assert grow([0], [9, 8, 7, 6, 5, 4, 3, 2], 0, 8, shares) == [0, 1, 4, 5]
    assert grow([0], [9, 8, 7, 6, 5, 4, 3, 2], 14, 8, shares) == [0, 1, 4, 5], "no more can be done"
    assert grow([0], [9, 8, 7, 6, 5, 4, 3, 2], 30, 8, shares) == [0, 1]
    assert grow([0, 4], [0] * 8, 0, 8, shares) == [0, 4]


@pytest.mark.parametrize("total", [14, 16, 30, 64])
@pytest.mark.parametrize("ranks", [2, 3, 4, 8, 16])
@pytest.mark.parametrize("policy", sorted(POLICIES))
def test_shared_experts_keep_the_cap_and_the_busiest_rank_its_bound(total: int, ranks: int, policy: str) -> None:
    cap = 8
    fewest, usual = -(-total // cap), -(-2 * total // cap)
    shares = spans(total, ranks, usual, total // 2)
    bound = shares.busiest_bytes(usual)
    ledger = Ledger(total)
    totals = [0] * total
    ledger.captured(0, range(total), totals)
    busiest = []
    for iteration in range(1, 120):
        totals = [t + n for t, n in zip(totals, skewed_tokens(total, iteration // 20), strict=True)]
        ledger.update(totals)
        assert max(ledger.staleness) <= cap, f"snapshot {iteration}"
        chosen = choose(ledger.unsaved, ledger.staleness, usual, cap, fewest, policy, shares)
        ledger.captured(iteration, chosen, totals)
        ledger.settle(iteration, whole=True)
        busiest.append(int(shares.nbytes[list(chosen)].sum(axis=0).max()))
        assert (shares.nbytes[list(chosen)].sum(axis=0) <= shares.most_bytes).all()
    assert sum(b <= bound for b in busiest) >= 0.95 * len(busiest), f"{busiest} of {bound}"
