# SPDX-License-Identifier: Apache-2.0
"""The bitmask of whole iterations, against sets."""

from __future__ import annotations

from functools import reduce

import pytest
from hypothesis import given
from hypothesis import strategies as st

from megatron_moetion.replicate.agreement import WINDOW, fates, mask_of, newest_common

GAPS = st.lists(st.integers(1, 1000), min_size=50, max_size=50)
"""How many iterations lie between two snapshots."""


def places() -> st.SearchStrategy[list[frozenset[int]]]:
    return st.lists(st.frozensets(st.integers(0, 45), max_size=20), min_size=1, max_size=4)


def test_a_minimum_over_ranks_would_be_wrong() -> None:
    recent = (10, 9, 8)
    masks = [mask_of({8, 10}, recent), mask_of({8, 9}, recent)]
    assert newest_common(masks[0] & masks[1], recent) == 8


@given(places(), places(), st.integers(0, 45), GAPS)
def test_against_sets(whole: list[frozenset[int]], dropped: list[frozenset[int]], newest: int, gaps: list[int]) -> None:
    """Snapshots are numbered 0, 1, ...; their iterations have any gaps."""
    at = [sum(gaps[:i]) for i in range(len(gaps))]
    recent = [at[i] for i in range(newest, -1, -1)]
    dropped = [dropped[r % len(dropped)] - w for r, w in enumerate(whole)]
    mask = reduce(
        int.__and__,
        (mask_of({at[i] for i in w}, recent, {at[i] for i in w | d}) for w, d in zip(whole, dropped, strict=True)),
    )
    assert 0 <= mask < 2**63, "it travels as a signed 64-bit integer"
    window = range(max(0, newest - WINDOW + 1), newest + 1)
    everywhere = frozenset.intersection(*whole).intersection(window)
    decided = frozenset.intersection(*(w | d for w, d in zip(whole, dropped, strict=True))).intersection(window)
    best = max(everywhere, default=None)
    assert newest_common(mask, recent) == (None if best is None else at[best])
    settled = {i for i in range(newest + 5) if i in decided or (best is not None and i <= best) or i < window.start}
    assert fates(mask, recent, at[: newest + 5]) == {at[i]: i in everywhere for i in settled}


def test_a_snapshot_that_one_rank_dropped_is_settled_while_none_is_newer() -> None:
    recent = (10, 9, 8)
    masks = [mask_of({8, 9}, recent, {8, 9}), mask_of({8}, recent, {8, 9})]
    assert newest_common(masks[0] & masks[1], recent) == 8
    assert fates(masks[0] & masks[1], recent, {8, 9, 10}) == {8: True, 9: False}


@pytest.mark.parametrize("step", [1, 2, 64, 1000])
def test_the_window_counts_snapshots_and_has_two_ends(step: int) -> None:
    recent = [step * i for i in range(100, 0, -1)]
    assert mask_of({100 * step}, recent) == 1
    assert mask_of({(101 - WINDOW) * step}, recent) == 1 << (WINDOW - 1)
    assert mask_of({(100 - WINDOW) * step, 101 * step}, recent) == 0
