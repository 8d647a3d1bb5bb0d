# SPDX-License-Identifier: Apache-2.0
"""The book of experts: what it chooses, and what it says a fault has cost."""

from __future__ import annotations

import random
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from megatron_moetion.select.book import ExpertBook, Losses, Rules, lost_until, recent_until, share_lost
from megatron_moetion.select.policies import POLICIES
from megatron_moetion.snapshot.host_state import decode, encode


def rules(**changes: Any) -> Rules:
    fields: dict[str, Any] = {
        "policy": "unsaved-tokens", "reserved": 1, "most": 3, "staleness_cap": 3, "interval": 1,
    }  # fmt: skip
    return Rules(**{**fields, **changes})


def book(**changes: Any) -> ExpertBook:
    return ExpertBook(names=("a", "b", "c"), layers=("l0", "l0", "l1"), rules=rules(**changes))


def recover(experts: ExpertBook, state: dict[str, Any], losses: Losses, totals: list[int]) -> None:
    """Where no other rank shares the experts."""
    experts.recover(
        state,
        losses,
        totals=totals,
        lost=losses.lost,
        lost_before=lost_until(state),
        recent=recent_until(state),
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
    experts = book(reserved=2)
    experts.choose_all(0, [0, 0, 0])
    experts.ledger.captured(1, [0], [10, 10, 10])
    experts.ledger.captured(2, [1], [20, 20, 20])
    state = decode(encode(experts.state()))
    losses = experts.losses(state, {"a": 1, "b": 2, "c": 0}, 2, [25, 20, 25])
    assert losses.captured == (1, 2, 0)
    assert losses.now == (25, 20, 25)
    assert losses.lost == (15, 0, 25)
    after = book()
    recover(after, state, losses, [50, 40, 50])
    assert after.ledger.unsaved == [0, 0, 0]
    assert after.ledger.staleness == [2, 1, 3]
    assert lost_until(after.state()) == [15, 0, 25]
    assert after.layers([25, 20, 25], {}) == {"l0": (15, 45), "l1": (25, 25)}
    assert after.layers([25, 20, 25], {"l1": 90}) == {"l0": (15, 45), "l1": (25, 90)}, "its router counts dropped ones"
    assert after.layers([25, 20, 25], {"l1": 90}, counted=False) == {"l0": (0, 0), "l1": (0, 90)}, "another rank tells"
    assert [(e.name, e.at_risk, e.staleness, e.lost, e.lost_before) for e in after.experts()] == [
        ("a", 0, 2, 15, 0),
        ("b", 0, 1, 0, 0),
        ("c", 0, 3, 25, 0),
    ]


def test_what_was_lost_once_is_not_lost_again() -> None:
    experts = book()
    experts.choose_all(0, [0, 0, 0])
    state = experts.state()
    recover(experts, state, experts.losses(state, {"a": 0, "b": 0, "c": 0}, 1, [5, 5, 5]), [5, 5, 5])
    assert lost_until(experts.state()) == [5, 5, 5]
    state = experts.state()
    losses = experts.losses(state, {"a": 0, "b": 0, "c": 0}, 2, [12, 12, 12])
    assert losses.lost == (7, 7, 7)
    recover(experts, state, losses, [12, 12, 12])
    assert lost_until(experts.state()) == [12, 12, 12]
    assert [(e.lost, e.lost_before) for e in experts.experts()] == [(7, 5)] * 3


@given(st.integers(2, 20), st.integers(2, 8), st.integers(0, 10**6), st.integers(1, 60), st.sampled_from((1, 10)))
@settings(max_examples=40)
def test_no_expert_passes_the_cap_because_of_a_recovery(
    total: int, cap: int, seed: int, fault: int, interval: int
) -> None:
    """G2: staleness stays within the cap unless snapshots were dropped. Here none is, and one recovery happens."""

    each = -(-total // cap)

    def new() -> ExpertBook:
        names = [str(e) for e in range(total)]
        return ExpertBook(
            names=names, layers=names, rules=rules(reserved=each, most=total, staleness_cap=cap, interval=interval)
        )

    draw, experts, totals, newest = random.Random(seed), new(), [0] * total, [0] * total
    experts.choose_all(0, totals)
    for number in range(1, fault + 2 * cap):
        iteration = number * interval
        totals = [t + draw.choice((0, 1, 100)) * (e < 3) for e, t in enumerate(totals)]
        experts.ledger.update(totals)
        state = decode(encode(experts.state()))
        for e in experts.choose(iteration, totals, each):
            newest[e] = iteration
        assert max(iteration - n for n in newest) < cap * interval, f"snapshot {number}, fault after {fault}"
        if number == fault:
            experts = new()
            losses = experts.losses(state, {str(e): n for e, n in enumerate(newest)}, iteration, totals)
            recover(experts, state, losses, totals)


def test_the_share_over_ranks_sums_before_it_divides() -> None:
    ranks = [{"l0": (5, 50), "l1": (0, 10)}, {"l0": (5, 50), "l1": (10, 10)}]
    assert share_lost(ranks) == pytest.approx((10 / 100 + 10 / 20) / 2)
    assert share_lost([]) == 0.0


# -- the budget of lost tokens --------------------------------------------------------------------------------


@given(
    st.integers(2, 24),
    st.integers(2, 8),
    st.integers(0, 10**6),
    st.sampled_from(sorted(POLICIES)),
    st.lists(st.integers(1, 60), max_size=4),
)
@settings(max_examples=60)
def test_whenever_the_fault_comes_plt_is_within_the_budget(
    total: int, cap: int, seed: int, policy: str, faults: list[int]
) -> None:
    """Loads differ by expert and not by iteration; counts are known one snapshot late, as in a session."""
    each, budget = -(-total // cap), 0.05
    loads = [int(random.Random(seed + e).paretovariate(0.8) * 10) for e in range(total)]
    names = [str(e) for e in range(total)]

    def new() -> ExpertBook:
        the_rules = rules(policy=policy, reserved=each, most=total, staleness_cap=cap, lost_token_budget=budget)
        return ExpertBook(names=names, layers=["l"] * total, rules=the_rules)

    experts, newest, before = new(), [0] * total, None
    experts.choose_all(0, [0] * total)
    iteration, lost, done = 0, 0, 0
    while done < 80:
        iteration, done = iteration + 1, done + 1
        now = [iteration * load for load in loads]
        if before is not None:
            experts.ledger.update(before)
        state = decode(encode(experts.state()))
        for e in experts.choose(iteration, now, each):
            newest[e] = iteration
        before = now
        losses = experts.losses(state, {n: i for n, i in zip(names, newest, strict=True)}, iteration, now)
        assert lost + sum(losses.lost) <= budget * sum(now) + 1, f"a fault at {iteration} would cost too much"
        if done in faults:
            lost += sum(losses.lost)
            experts = new()
            recover(experts, state, losses, now)
            newest, before = list(losses.captured), None
    assert experts.past_budget is None


def test_k_grows_while_little_is_processed_and_falls_back_later() -> None:
    experts = book(lost_token_budget=0.05, staleness_cap=10)
    experts.choose_all(0, [0, 0, 0])
    sizes = []
    for iteration in range(1, 200):
        experts.ledger.update([10 * (iteration - 1)] * 3)
        sizes.append(len(experts.choose(iteration, [10 * iteration] * 3, 1)))
    assert sizes[1] == 3
    assert sizes[-1] == 1
    assert experts.projected_share <= 0.05


def test_what_no_growth_can_keep_is_said() -> None:
    experts = book(lost_token_budget=0.05)
    experts.choose_all(0, [0, 0, 0])
    state = experts.state()
    recover(experts, state, experts.losses(state, {"a": 0, "b": 0, "c": 0}, 1, [10, 10, 10]), [10, 10, 10])
    experts.ledger.update([20, 20, 20])
    assert experts.choose(2, [20, 20, 20], 1) == (0, 1, 2)
    spent = experts.past_budget
    assert spent is not None
    assert spent.kind == "spent"
    assert spent.text.startswith("faults so far have cost 50.00% of the tokens")
    tight = book(lost_token_budget=0.05, most=1)
    tight.choose_all(0, [0, 0, 0])
    tight.ledger.update([10, 10, 10])
    assert len(tight.choose(1, [10, 10, 10], 1)) == 1
    assert tight.past_budget is None, "one interval's tokens are more than the budget: nothing could keep it yet"
    for iteration in range(2, 30):
        tight.ledger.update([10 * iteration] * 3)
    assert len(tight.choose(30, [290, 290, 290], 1)) == 1
    at_risk = tight.past_budget
    assert at_risk is not None
    assert at_risk.kind == "at-risk"
    assert "a snapshot takes 1 of 3: raise --moetion-max-experts-per-snapshot" in at_risk.text
    assert book().past_budget is None


def test_layers_take_turns_in_a_round() -> None:
    experts = ExpertBook(
        names="abcdef", layers=["l0", "l0", "l0", "l1", "l1", "l1"], rules=rules(policy="sequential", reserved=2)
    )
    experts.choose_all(0, [0] * 6)
    rounds = [experts.choose(i, [0] * 6, 2) for i in (1, 2, 3, 4)]
    assert rounds == [(0, 3), (1, 4), (2, 5), (0, 3)]
