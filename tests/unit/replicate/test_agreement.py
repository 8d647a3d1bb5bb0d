# SPDX-License-Identifier: Apache-2.0
"""The bitmask of whole iterations, against sets."""

from __future__ import annotations

from functools import reduce

import pytest
from hypothesis import given
from hypothesis import strategies as st

from megatron_moetion.replicate.agreement import WINDOW, fates, mask_of, newest_common

STEPS = st.integers(1, 100)


def places() -> st.SearchStrategy[list[frozenset[int]]]:
    return st.lists(st.frozensets(st.integers(0, 45), max_size=20), min_size=1, max_size=4)


def test_a_minimum_over_ranks_would_be_wrong() -> None:
    masks = [mask_of({8, 10}, 10), mask_of({8, 9}, 10)]
    assert newest_common(masks[0] & masks[1], 10) == 8


@given(places(), places(), st.integers(0, 45), STEPS)
def test_against_sets(whole: list[frozenset[int]], dropped: list[frozenset[int]], base: int, step: int) -> None:
    """Snapshots are numbered 0, 1, ...; iterations are these times the step."""
    dropped = [dropped[r % len(dropped)] - w for r, w in enumerate(whole)]
    mask = reduce(
        int.__and__,
        (
            mask_of({i * step for i in w}, base * step, {i * step for i in w | d}, step)
            for w, d in zip(whole, dropped, strict=True)
        ),
    )
    assert 0 <= mask < 2**63, "it travels as a signed 64-bit integer"
    window = range(max(0, base - WINDOW + 1), base + 1)
    everywhere = frozenset.intersection(*whole).intersection(window)
    decided = frozenset.intersection(*(w | d for w, d in zip(whole, dropped, strict=True))).intersection(window)
    newest = max(everywhere, default=None)
    assert newest_common(mask, base * step, step) == (None if newest is None else newest * step)
    settled = {i for i in range(base + 5) if i in decided or (newest is not None and i <= newest)}
    known = [i * step for i in range(base + 5)]
    assert fates(mask, base * step, known, step) == {i * step: i in everywhere for i in settled}


def test_a_snapshot_that_one_rank_dropped_is_settled_while_none_is_newer() -> None:
    masks = [mask_of({8, 9}, 10, {8, 9}), mask_of({8}, 10, {8, 9})]
    assert newest_common(masks[0] & masks[1], 10) == 8
    assert fates(masks[0] & masks[1], 10, {8, 9, 10}) == {8: True, 9: False}


@pytest.mark.parametrize("step", [1, 2, 64, 1000])
def test_the_window_counts_snapshots_and_has_two_ends(step: int) -> None:
    base = 100 * step
    assert mask_of({base}, base, step=step) == 1
    assert mask_of({base - (WINDOW - 1) * step}, base, step=step) == 1 << (WINDOW - 1)
    assert mask_of({base - WINDOW * step, base + step}, base, step=step) == 0
