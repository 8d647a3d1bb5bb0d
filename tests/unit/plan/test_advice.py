# SPDX-License-Identifier: Apache-2.0
"""What a plan recommends fits, and what it says is missing is missing."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from megatron_moetion.config import MAX_PERIOD, MIN_PERIOD, MoetionConfig
from megatron_moetion.plan.advice import recommend
from megatron_moetion.plan.choice import gib
from megatron_moetion.plan.costs import (
    Cost,
    RankState,
    Resources,
    Shortage,
    cost_of_exact,
    cost_of_full,
    cost_of_popularity,
    shortage,
    smallest_period,
)
from megatron_moetion.select.budget import Limits, experts_per_snapshot

PLENTY = 1 << 50


def limits(total: int, **changes: Any) -> Limits:
    return experts_per_snapshot(MoetionConfig(mode="popularity", **changes), total)


def large(**changes: Any) -> RankState:
    """1.2e9 dense parameters and eight experts with 4e8."""
    fields: dict[str, Any] = {"dense_parameters": 1_200_000_000, "expert_parameters": 400_000_000, "num_experts": 8}
    return RankState(**{**fields, **changes})


def there_is(cost: Cost, link: float = 1.0, memory: float = 1.0) -> Resources:
    """So much of what a mode takes."""
    return Resources(link_bytes=int(link * cost.sent_bytes), node_bytes=int(memory * cost.node_bytes))


def test_full_is_taken_where_it_fits() -> None:
    advice = recommend(large(), there_is(cost_of_full(large())), limits(8))
    assert (advice.mode, advice.period, advice.shortage) == ("full", 0, Shortage())
    assert advice.sentence.startswith("Mode 'full' fits")


@pytest.mark.parametrize("period", [2, 5, 8, 63, MAX_PERIOD])
def test_else_the_smallest_period_that_fits(period: int) -> None:
    cost = cost_of_exact(large(), period)
    advice = recommend(large(), there_is(cost), limits(8))
    assert (advice.mode, advice.period, advice.shortage) == ("exact", period, Shortage())
    assert f"--moetion-period {period} fits" in advice.sentence
    assert recommend(large(), Resources(link_bytes=cost.sent_bytes), limits(8)).period == period
    assert recommend(large(), there_is(cost), limits(8), period).mode == "exact"


def test_too_small_a_link() -> None:
    """Nobody can log gradients on a link that does not carry them."""
    n = large().parameters
    resources = Resources(link_bytes=3 * n, node_bytes=PLENTY)
    advice = recommend(large(), resources, limits(8))
    longest = cost_of_exact(large(), MAX_PERIOD)
    assert (advice.mode, advice.period) == ("", 0)
    assert advice.shortage == Shortage(link_bytes=longest.sent_bytes - 3 * n)
    assert f"Nothing fits the link: with period {MAX_PERIOD}, the least that fits the memory" in advice.sentence
    half = smallest_period(large(gradient_bytes=2), resources)
    assert half is not None
    assert f"bf16 gradients (with period {half.period})" in advice.sentence
    assert f"{longest.sent_bytes / (3 * n):.2f} times the bandwidth" in advice.sentence


def test_too_little_memory() -> None:
    fits_link = cost_of_exact(large(), 8)
    resources = there_is(fits_link, memory=0.95)
    advice = recommend(large(), resources, limits(8))
    missing = fits_link.node_bytes - int(0.95 * fits_link.node_bytes)
    assert (advice.mode, advice.shortage) == ("", Shortage(node_bytes=missing))
    assert "Nothing fits the memory: with period 8, the least that fits the link" in advice.sentence
    assert "bf16 gradients" in advice.sentence
    assert f"{gib(missing)} GiB more memory a node (with period 8)" in advice.sentence
    assert "times the bandwidth or iteration time (with period 6)" in advice.sentence, "which takes less memory"


def test_too_little_of_both() -> None:
    resources = Resources(link_bytes=1000, node_bytes=1000)
    advice = recommend(large(), resources, limits(8))
    assert advice.shortage == Shortage(
        link_bytes=cost_of_exact(large(), MAX_PERIOD).sent_bytes - 1000,
        node_bytes=cost_of_full(large()).node_bytes - 1000,
    )
    assert "bf16" not in advice.sentence, "that would not be enough"
    assert "what helps: more than" in advice.sentence


def test_fewer_replicas_help_and_what_helps_only_together_is_said_so() -> None:
    two = large(replicas=2)
    one = cost_of_exact(large(), 8)
    assert "1 replica (with period 8)" in recommend(two, there_is(one), limits(8)).sentence
    both = cost_of_exact(large(gradient_bytes=2), 8)
    sentence = recommend(two, there_is(both), limits(8)).sentence
    assert "bf16 gradients and 1 replica (with period 8)" in sentence
    none = recommend(large(), there_is(both, link=0.3), limits(8)).sentence
    assert "0 replicas" not in none, "without replicas nothing survives the loss of a node"


def test_popularity_is_taken_where_nothing_else_fits_and_what_would_help_the_others_is_said() -> None:
    state = RankState(dense_parameters=10**7, expert_parameters=10**9, num_experts=64, gradient_bytes=4)
    chosen = limits(64)
    assert (chosen.fewest, chosen.usual) == (8, 16)
    for experts in (16, 8):
        cost = cost_of_popularity(state, replace(chosen, usual=experts))
        advice = recommend(state, there_is(cost), chosen, lost_token_budget=0.0375)
        assert (advice.mode, advice.period, advice.experts, advice.shortage) == ("popularity", 0, experts, Shortage())
        assert f"Mode 'popularity' with {experts} of 64 experts a snapshot fits" in advice.sentence
        assert "cost up to 3.75% of experts' tokens: a rank sends" in advice.sentence
        assert "Of the modes that lose nothing, nothing fits the link or the memory: even with" in advice.sentence
    little = recommend(state, there_is(cost, link=0.99), chosen)
    assert (little.mode, little.experts) == ("", 0)
    assert little.sentence.startswith("Nothing fits the link or the memory: even with period 64 a rank")
    assert little.sentence.endswith(
        " or 1.01 times the bandwidth or iteration time in mode 'popularity' (8 of 64 experts a snapshot; faults cost "
        "tokens)."
    )
    asked = recommend(state, there_is(cost), chosen, 8).sentence
    assert "what helps: mode 'popularity' (8 of 64 experts a snapshot; faults cost tokens)" in asked


def test_a_period_that_was_asked_for() -> None:
    cost = cost_of_exact(large(), 8)
    short = recommend(large(), there_is(cost), limits(8), 4)
    assert (short.mode, short.shortage.node_bytes) == ("", 0)
    assert short.shortage.link_bytes == cost_of_exact(large(), 4).sent_bytes - cost.sent_bytes
    assert "--moetion-period 4 does not fit" in short.sentence
    assert "what helps: --moetion-period 8," in short.sentence
    long = recommend(large(), there_is(cost), limits(8), 16)
    assert (long.mode, long.shortage.link_bytes) == ("", 0)
    assert long.shortage.node_bytes == cost_of_exact(large(), 16).node_bytes - cost.node_bytes
    full = recommend(large(), there_is(cost_of_full(large())), limits(8), 8)
    assert "mode 'full'" in full.sentence


def test_without_a_link_memory_says_how_far_it_goes() -> None:
    assert "give --iteration-s and --gb-per-s" in recommend(large(), Resources(), limits(8)).sentence
    memory = Resources(node_bytes=cost_of_exact(large(), 8).node_bytes)
    advice = recommend(large(), memory, limits(8))
    assert (advice.mode, advice.period, advice.shortage) == ("", 0, Shortage())
    assert "mode 'full' and for mode 'exact' with periods up to 8;" in advice.sentence
    assert "for mode 'exact' with --moetion-period 7;" in recommend(large(), memory, limits(8), 7).sentence
    longer = recommend(large(), memory, limits(8), 9)
    assert longer.shortage.node_bytes == cost_of_exact(large(), 9).node_bytes - cost_of_exact(large(), 8).node_bytes
    assert "what helps: mode 'full', mode 'exact' with periods up to 8, bf16 gradients or" in longer.sentence


def test_memory_for_less_than_one_period() -> None:
    full = cost_of_full(large())
    assert full.node_bytes < cost_of_exact(large(), MIN_PERIOD).node_bytes
    assert "suffices for mode 'full';" in recommend(large(), Resources(node_bytes=full.node_bytes), limits(8)).sentence
    memory = int(0.9 * full.node_bytes)
    little = recommend(large(), Resources(node_bytes=memory), limits(8))
    assert little.shortage.node_bytes == full.node_bytes - memory
    assert "In mode 'full' a node's arenas take" in little.sentence
    fast = recommend(large(), Resources(link_bytes=PLENTY, node_bytes=memory), limits(8))
    assert fast.shortage == little.shortage
    assert "Nothing fits the memory: in mode 'full', the least that fits the link" in fast.sentence
    slow = recommend(large(), there_is(full, link=0.5), limits(8))
    assert slow.shortage == Shortage(node_bytes=cost_of_exact(large(), 7).node_bytes - full.node_bytes)
    assert "2.00 times the bandwidth or iteration time (in mode 'full')" in slow.sentence


@settings(max_examples=10, deadline=None)
@given(
    link=st.floats(0.05, 3.0),
    memory=st.floats(0.2, 20.0),
    gradient_bytes=st.sampled_from([2, 4]),
    replicas=st.integers(0, 3),
    period=st.sampled_from([0, 0, 2, 8, 40]),
)
def test_what_is_recommended_fits_and_what_is_missing_is_missing(
    link: float, memory: float, gradient_bytes: int, replicas: int, period: int
) -> None:
    state = large(gradient_bytes=gradient_bytes, replicas=replicas)
    full = cost_of_full(state)
    resources = Resources(link_bytes=int(link * full.snapshot_bytes), node_bytes=int(memory * full.node_bytes))
    advice = recommend(state, resources, limits(8), period)
    fitting = [p for p in range(MIN_PERIOD, MAX_PERIOD + 1) if not shortage(cost_of_exact(state, p), resources)]
    if advice.mode == "full":
        assert not shortage(full, resources)
        assert not period
    elif advice.mode == "exact":
        assert advice.period == (period or min(fitting))
        assert advice.period in fitting
    elif advice.mode == "popularity":
        assert not fitting
        assert not shortage(cost_of_popularity(state, replace(limits(8), usual=advice.experts)), resources)
    else:
        assert period not in fitting
        assert period or not fitting
        enough = Resources(
            link_bytes=(resources.link_bytes or 0) + advice.shortage.link_bytes,
            node_bytes=(resources.node_bytes or 0) + advice.shortage.node_bytes,
        )
        assert advice.shortage
        both = advice.shortage.link_bytes and advice.shortage.node_bytes
        assert (both and not period) or recommend(state, enough, limits(8), period).mode
    assert advice.sentence.endswith(".")
    assert "  " not in advice.sentence


@pytest.mark.parametrize(
    ("nbytes", "text"),
    [(0, "0.00"), (2**20, "0.0010"), (2**30, "1.00"), (25 * 2**29, "12.5"), (1234 * 2**30, "1,234")],
)
def test_sizes_for_a_person(nbytes: int, text: str) -> None:
    assert gib(nbytes) == text
