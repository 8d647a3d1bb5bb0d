# SPDX-License-Identifier: Apache-2.0
"""The token book: what is unsaved and stale, after captures, drops and recoveries."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from megatron_moetion.select.popularity import AVERAGED_OVER, Ledger, tokens_lost_share


def test_tokens_and_staleness_count_from_the_newest_capture() -> None:
    ledger = Ledger(3)
    assert (ledger.unsaved, ledger.staleness) == ([0, 0, 0], [1, 1, 1])
    ledger.captured(0, range(3), [0, 0, 0])
    ledger.update([10, 20, 30])
    assert (ledger.unsaved, ledger.staleness) == ([10, 20, 30], [1, 1, 1])
    ledger.captured(1, [1], [9, 19, 29])
    ledger.update([15, 26, 30])
    assert (ledger.unsaved, ledger.staleness) == ([15, 6, 30], [2, 1, 2])
    assert ledger.history.tolist() == [[0, 0, 0], [1, 0, 0], [1, 1, 19], [2, 0, 0]]


def test_a_drop_brings_the_older_capture_back() -> None:
    ledger = Ledger(2)
    ledger.captured(0, [0, 1], [0, 0])
    ledger.update([10, 10])
    ledger.captured(1, [0], [10, 10])
    ledger.update([25, 25])
    ledger.captured(2, [0, 1], [25, 25])
    ledger.settle(1, whole=False)
    ledger.settle(2, whole=False)
    assert (ledger.unsaved, ledger.staleness) == ([25, 25], [3, 3])


def test_what_is_whole_settles_what_came_before() -> None:
    ledger = Ledger(1)
    for iteration, total in enumerate([0, 10, 20, 30]):
        ledger.update([total])
        ledger.captured(iteration, [0], [total])
    ledger.settle(2, whole=True)
    ledger.settle(3, whole=False)
    assert (ledger.unsaved, ledger.staleness) == ([10], [2])


@given(st.lists(st.tuples(st.integers(0, 6), st.booleans()), max_size=30))
def test_settling_against_a_naive_model(events: list[tuple[int, bool]]) -> None:
    """Each event is a snapshot of one of three experts, whose fate is known two snapshots later."""
    ledger = Ledger(3)
    fate = {i: whole for i, (_, whole) in enumerate(events)}
    for now, (chosen, _) in enumerate(events):
        ledger.captured(now, [chosen % 3], [0, 0, 0])
        if now >= 2:
            ledger.settle(now - 2, fate[now - 2])
        for expert in range(3):
            counted = [i for i in range(now + 1) if events[i][0] % 3 == expert and (i > now - 2 or fate[i])]
            assert ledger.staleness[expert] == now + 2 - (counted[-1] + 1 if counted else 0)


def test_recent_tokens_and_their_average() -> None:
    ledger = Ledger(2)
    ledger.update([100, 0])
    assert (ledger.recent, ledger.average) == ([100, 0], [100 / AVERAGED_OVER, 0.0])
    for _ in range(200):
        ledger.update([t + n for t, n in zip(ledger.totals, (7, 30), strict=True)])
    assert ledger.recent == [7, 30]
    assert ledger.average == pytest.approx([7, 30])


def test_a_recovered_ledger_knows_tokens_and_ages() -> None:
    ledger = Ledger(3)
    ledger.seed(captured=[8, 10, 9], ages=[2, 0, 1], totals=[100, 100, 100], local=[6, 10, 9], recent=[3, 0, 4])
    assert ledger.unsaved == [0, 0, 0], "what was lost is lost; it is not to be saved any more"
    assert ledger.staleness == [3, 1, 2]
    assert (ledger.recent, ledger.average) == ([3, 0, 4], [3.0, 0.0, 4.0])


@pytest.mark.parametrize(
    ("lost", "routed", "share"),
    [([], [], 0.0), ([0, 0], [10, 10], 0.0), ([5, 0], [10, 10], 0.25), ([5, 3], [10, 0], 0.5), ([3], [0], 0.0)],
)
def test_the_share_of_lost_tokens_is_the_mean_over_layers(lost: list[int], routed: list[int], share: float) -> None:
    assert tokens_lost_share(lost, routed) == share
