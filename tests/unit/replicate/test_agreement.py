# SPDX-License-Identifier: Apache-2.0
"""The bitmask of whole iterations, against sets."""

from __future__ import annotations

from functools import reduce

from hypothesis import given
from hypothesis import strategies as st

from megatron_moetion.replicate.agreement import WINDOW, fates, mask_of, newest_common

SETS = st.lists(st.frozensets(st.integers(0, 90), max_size=20), min_size=1, max_size=4)


def test_a_minimum_over_ranks_would_be_wrong() -> None:
    masks = [mask_of({8, 10}, 10), mask_of({8, 9}, 10)]
    assert newest_common(masks[0] & masks[1], 10) == 8


@given(SETS, st.integers(0, 90))
def test_against_sets(whole: list[frozenset[int]], base: int) -> None:
    mask = reduce(int.__and__, (mask_of(w, base) for w in whole))
    assert 0 <= mask < 2**63, "it travels as a signed 64-bit integer"
    seen = {i for i in frozenset.intersection(*whole) if base - WINDOW < i <= base}
    newest = newest_common(mask, base)
    assert newest == max(seen, default=None)
    known = range(100)
    if newest is None:
        assert fates(mask, base, known) == {}
    else:
        assert fates(mask, base, known) == {i: i in seen for i in known if i <= newest}


def test_the_window_has_two_ends() -> None:
    base = 100
    assert mask_of({base}, base) == 1
    assert mask_of({base - WINDOW + 1}, base) == 1 << (WINDOW - 1)
    assert mask_of({base - WINDOW, base + 1}, base) == 0
