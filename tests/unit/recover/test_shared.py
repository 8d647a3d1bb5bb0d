# SPDX-License-Identifier: Apache-2.0
"""Experts that several ranks hold shards of: what all shards have, whoever combines with whom first."""

from __future__ import annotations

from functools import reduce

from hypothesis import given
from hypothesis import strategies as st

from megatron_moetion.recover.shared import ITERATIONS_MAX, captured_at, common, iterations_of, words_of

NAMES = ["layers.0.experts.0", "layers.0.experts.1", "layers.1.experts.0"]
CAPTURED = st.dictionaries(st.sampled_from(NAMES), st.sets(st.integers(0, 12), max_size=8))


@given(st.lists(CAPTURED, min_size=1, max_size=5), st.randoms(use_true_random=False))
def test_what_all_shards_have_is_what_the_sets_have_in_common(ranks: list[dict[str, set[int]]], draw: object) -> None:
    tables = [words_of(NAMES, captured) for captured in ranks]
    found = iterations_of(NAMES, reduce(common, tables))
    expected = {}
    for name in NAMES:
        shards = [captured[name] for captured in ranks if name in captured]
        if shards:
            expected[name] = tuple(sorted(set.intersection(*shards), reverse=True))
    assert found == expected
    draw.shuffle(tables)  # type: ignore[attr-defined]
    while len(tables) > 1:  # as a tree combines them
        tables = [reduce(common, tables[n : n + 2]) for n in range(0, len(tables), 2)]
    assert iterations_of(NAMES, tables[0]) == expected


def test_of_too_many_iterations_the_newest_are_told() -> None:
    words = words_of(NAMES[:1], {NAMES[0]: set(range(1000))})
    (newest, *_, oldest) = iterations_of(NAMES[:1], words)[NAMES[0]]
    assert (newest, oldest) == (999, 1000 - ITERATIONS_MAX)
    assert len(words) == ITERATIONS_MAX


def test_an_expert_comes_from_the_newest_common_iteration_until_then() -> None:
    iterations = {NAMES[0]: (9, 7, 3), NAMES[1]: (8,)}
    assert captured_at(iterations, 8) == {NAMES[0]: 7, NAMES[1]: 8}
