# SPDX-License-Identifier: Apache-2.0
"""The mode that is taken is the strongest that fits, and the line says what each one takes."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from megatron_moetion.config import MAX_PERIOD, MIN_PERIOD, MoetionConfig
from megatron_moetion.plan.choice import STRONGEST_FIRST, choose
from megatron_moetion.plan.costs import (
    Cost,
    RankState,
    Resources,
    Shortage,
    cost_of_exact,
    cost_of_full,
    cost_of_popularity,
    costs_of,
    shortage,
)
from megatron_moetion.select.budget import experts_per_snapshot

STATE = RankState(dense_parameters=25_000_000, expert_parameters=705_000_000, num_experts=64)
"""Mixtral-8x7B on 64 GPUs."""
LIMITS = experts_per_snapshot(MoetionConfig(mode="popularity"), 64)
COSTS = costs_of(STATE, LIMITS)
BUDGET = 0.0375


def taking(cost: Cost, **changes: int) -> Resources:
    there = Resources(link_bytes=cost.sent_bytes, node_bytes=cost.node_bytes, device_bytes=cost.device_bytes)
    return replace(there, **changes)


def popularity(experts: int) -> Cost:
    return cost_of_popularity(STATE, replace(LIMITS, usual=experts))


def test_all_modes_are_there_once_for_each_period_and_number_of_experts() -> None:
    found = [(c.mode, c.period, c.experts) for c in COSTS]
    assert found == [
        ("full", 0, 0),
        *(("exact", p, 0) for p in range(MIN_PERIOD, MAX_PERIOD + 1)),
        *(("popularity", 0, k) for k in range(8, 17)),
    ]
    assert COSTS[-9:] == tuple(popularity(k) for k in range(8, 17))
    assert [c.period for c in costs_of(STATE, LIMITS, 7) if c.mode == "exact"] == [7]
    dense = RankState(dense_parameters=10**6, expert_parameters=0, num_experts=0)
    none = experts_per_snapshot(MoetionConfig(mode="popularity"), 0)
    assert {c.mode for c in costs_of(dense, none)} == {"full", "exact"}


def test_full_where_it_fits_else_exact_else_popularity() -> None:
    full = choose(COSTS, taking(cost_of_full(STATE)), lost_token_budget=BUDGET)
    assert (full.mode, full.period, full.experts, full.fits) == ("full", 0, 0, True)
    exact = choose(COSTS, taking(cost_of_exact(STATE, 7)), lost_token_budget=BUDGET)
    assert (exact.mode, exact.period, exact.experts, exact.fits) == ("exact", 7, 0, True)
    for experts in (16, 11, 8):
        some = choose(COSTS, taking(popularity(experts)), lost_token_budget=BUDGET)
        assert (some.mode, some.period, some.experts, some.fits) == ("popularity", 0, experts, True)


def test_each_resource_is_a_limit() -> None:
    plenty = taking(cost_of_exact(STATE, 7))
    for limit, mode in (("link_bytes", "popularity"), ("node_bytes", "popularity"), ("device_bytes", "popularity")):
        enough = getattr(plenty, limit)
        assert choose(COSTS, plenty, lost_token_budget=BUDGET).mode == "exact"
        less = choose(COSTS, replace(plenty, **{limit: int(0.7 * enough)}), lost_token_budget=BUDGET)
        assert less.mode == mode, limit
    assert choose(COSTS, Resources(), lost_token_budget=BUDGET).mode == "full", "what is not known is no limit"


def test_the_weakest_in_the_form_that_lacks_least_where_nothing_fits() -> None:
    least = popularity(8)
    there = taking(least, link_bytes=least.sent_bytes - 5)
    nothing = choose(COSTS, there, lost_token_budget=BUDGET)
    assert (nothing.mode, nothing.experts, nothing.fits) == ("popularity", 8, False)
    assert nothing.shortage == Shortage(link_bytes=5)
    assert "nothing fits, and it is the weakest" in nothing.line
    dense = [c for c in COSTS if c.mode != "popularity"]
    assert choose(dense, there, lost_token_budget=BUDGET).mode == "exact"


def test_the_line_is_one_and_shows_each_mode() -> None:
    line = choose(COSTS, taking(cost_of_exact(STATE, 7)), lost_token_budget=BUDGET).line
    assert line.startswith("mode 'exact' with period 7, the strongest that fits 3.89 GiB an iteration on the link, 827")
    assert "; for full 4.27 GiB an iteration on the link are missing. " in line
    assert "full sends 8.16! GiB an iteration, takes 392 GiB a node, a fault replays and loses nothing; " in line
    assert "a fault replays up to 7 optimizer steps, 14 at worst; " in line
    assert "popularity K=16 sends 2.25 GiB an iteration, takes 266 GiB a node" in line
    assert line.endswith("a fault loses up to 3.75% of experts' tokens")
    assert "\n" not in line
    unbounded = choose(COSTS, Resources(), lost_token_budget=0.0).line
    assert unbounded.endswith("a fault loses experts' tokens")


@settings(max_examples=100, deadline=None)
@given(
    link=st.none() | st.floats(0.05, 1.5),
    memory=st.none() | st.floats(0.2, 5.0),
    device=st.none() | st.floats(0.5, 1.5),
    chosen=st.sets(st.integers(0, len(COSTS) - 1), min_size=1),
)
def test_nothing_that_fits_is_stronger(
    link: float | None, memory: float | None, device: float | None, chosen: set[int]
) -> None:
    full, exact = cost_of_full(STATE), cost_of_exact(STATE, 8)
    there = Resources(
        link_bytes=None if link is None else int(link * full.sent_bytes),
        node_bytes=None if memory is None else int(memory * full.node_bytes),
        device_bytes=None if device is None else int(device * exact.device_bytes),
    )
    costs = [COSTS[i] for i in chosen]
    choice = choose(costs, there, lost_token_budget=BUDGET)
    assert choice.cost in costs

    def strength(cost: Cost) -> Any:
        return STRONGEST_FIRST.index(cost.mode), cost.period, -cost.experts

    fitting = [c for c in costs if not shortage(c, there)]
    if fitting:
        assert choice.fits
        assert choice.cost == min(fitting, key=strength)
    else:
        assert choice.shortage == shortage(choice.cost, there)
        assert choice.mode == max(costs, key=lambda c: STRONGEST_FIRST.index(c.mode)).mode
    assert all(f"{mode} " in choice.line for mode in {c.mode for c in costs})


def test_there_must_be_something_to_choose_from() -> None:
    with pytest.raises(AssertionError):
        choose([], Resources(), lost_token_budget=BUDGET)
