# SPDX-License-Identifier: Apache-2.0
"""Chains of mode ``exact``: which captures and gradients lead to an iteration, and what may be freed."""

from __future__ import annotations

from collections.abc import Collection, Iterable

from hypothesis import given, settings
from hypothesis import strategies as st

from megatron_moetion.store.chains import ChainLayout, base_of, chain_layout
from megatron_moetion.store.manifest import NO_SLOT, Record, Records
from megatron_moetion.store.retention import Chains, Settled
from megatron_moetion.units import UnitKind

A, A_LOG, B, B_LOG, BUFFERS, HOST, FROZEN = range(7)
UNITS = [
    ("a", int(UnitKind.DENSE), 64),
    ("a.grad", int(UnitKind.LOG), 64),
    ("b", int(UnitKind.EXPERT), 64),
    ("b.grad", int(UnitKind.LOG), 64),
    ("a.buffers", int(UnitKind.DENSE), 64),
    ("host", int(UnitKind.HOST), 64),
    ("frozen", int(UnitKind.FROZEN), 64),
]
LAYOUT = chain_layout(UNITS)
NEWEST = 12
KEYS = st.tuples(st.integers(A, FROZEN), st.integers(0, NEWEST))


def record(unit: int, iteration: int, zero: bool = False) -> Record:
    return Record(
        unit=unit, iteration=iteration, epoch=0, slot=NO_SLOT if zero else 0, nbytes=0 if zero else 64, digest=0
    )


def records(unit: int, iterations: Iterable[int]) -> list[Record]:
    return [record(unit, i) for i in iterations]


def keep(held: Iterable[Record], stable: int, broken: int = -1, unreachable: Collection[int] = ()) -> Records:
    settled = Settled(stable=stable, broken=broken, unreachable=frozenset(unreachable))
    return Chains(LAYOUT).keep(Records.of(held), settled)


def at(found: Iterable[Record], unit: int) -> list[int]:
    return [r.iteration for r in found if r.unit == unit]


def base(found: Iterable[Record], unit: int, iteration: int) -> int | None:
    held = list(found)
    return base_of(at(held, unit), set(at(held, LAYOUT.log_of[unit])), iteration)


# -- chains ---------------------------------------------------------------------------------------------------------


def test_the_base_is_the_newest_capture_that_gradients_lead_on_from() -> None:
    assert base_of([2, 5], {3, 4, 5, 6, 7}, 7) == 5
    assert base_of([2, 5], {3, 4, 5, 6, 7}, 4) == 2
    assert base_of([2, 5], set(), 5) == 5, "a capture needs no gradient of its own iteration"
    assert base_of([2, 5], {7}, 7) is None
    assert base_of([2, 5], {6}, 7) is None
    assert base_of([2, 5], {6, 7}, 1) is None
    assert base_of([], {1, 2}, 2) is None


def test_a_gap_before_the_newest_capture_does_no_harm() -> None:
    assert base_of([1, 6], {2, 3, 7}, 7) == 6
    assert base_of([1, 6], {2, 3, 7}, 5) is None


@given(st.sets(st.integers(0, 12)), st.sets(st.integers(0, 12)), st.integers(0, 12))
def test_a_chain_is_found_if_there_is_one(captures: set[int], logged: set[int], iteration: int) -> None:
    chains = [c for c in captures if c <= iteration and set(range(c + 1, iteration + 1)) <= logged]
    assert base_of(captures, logged, iteration) == max(chains, default=None)


def test_the_layout_of_an_arena_follows_from_its_units() -> None:
    assert chain_layout(UNITS) == ChainLayout(log_of={A: A_LOG, B: B_LOG}, always=frozenset({BUFFERS, HOST}))


# -- what is retained -------------------------------------------------------------------------------------------------


def test_of_each_slice_the_base_and_its_gradients_stay_and_all_that_is_newer() -> None:
    held = [
        *records(A, (1, 4, 7)),
        *records(A_LOG, range(1, 9)),
        *records(B, (2, 6)),
        *records(B_LOG, range(1, 9)),
        *records(BUFFERS, range(4, 9)),
        *records(HOST, range(4, 9)),
        record(FROZEN, 0),
    ]
    kept = keep(held, 5)
    assert [at(kept, unit) for unit in range(7)] == [
        [4, 7], [5, 6, 7, 8], [2, 6], [3, 4, 5, 6, 7, 8], [5, 6, 7, 8], [5, 6, 7, 8], [0],
    ]  # fmt: skip


def test_gradients_of_zeros_are_retained_like_others() -> None:
    held = [record(A, 1), *(record(A_LOG, i, zero=True) for i in range(1, 6)), *records(HOST, (4, 5))]
    assert at(keep(held, 4), A_LOG) == [2, 3, 4, 5]


def test_what_lies_between_the_stable_iteration_and_a_gap_is_of_no_use() -> None:
    held = [
        *records(A, (2, 5, 8)),
        *records(A_LOG, (*range(1, 6), *range(7, 11))),
        *records(B, (3,)),
        *records(B_LOG, (*range(1, 6), 10)),
        *records(HOST, (4, 5, 8, 9, 10)),
    ]
    kept = keep(held, 4, broken=6)
    assert at(kept, A) == [2, 8]
    assert at(kept, A_LOG) == [3, 4, 9, 10], "a new chain needs gradients only after it has begun"
    assert at(kept, B) == [3]
    assert at(kept, B_LOG) == [4], "no new chain has begun"
    assert at(kept, HOST) == [4, 8, 9, 10]


def test_a_gap_that_is_older_than_the_stable_iteration_changes_nothing() -> None:
    held = [*records(A, (3, 6)), *records(A_LOG, range(1, 9)), *records(HOST, range(9))]
    assert keep(held, 5, broken=2) == keep(held, 5)


def test_what_only_an_iteration_itself_needs_goes_with_it() -> None:
    held = [*records(A, (4, 6)), *records(A_LOG, (5, 6, 7, 8)), *records(HOST, range(4, 9))]
    kept = keep(held, 4, unreachable={6, 7})
    assert at(kept, HOST) == [4, 5, 8]
    assert (at(kept, A), at(kept, A_LOG)) == ([4, 6], [5, 6, 7, 8]), "8 may still be reached"


def test_a_slice_without_a_chain_keeps_no_gradient_and_no_capture_of_old() -> None:
    held = [*records(A, (1, 3)), *records(A_LOG, (2, 5)), *records(HOST, (4, 5))]
    kept = keep(held, 4)
    assert (at(kept, A), at(kept, A_LOG), at(kept, HOST)) == ([], [5], [4, 5])


@given(st.sets(KEYS, max_size=70), st.integers(0, NEWEST), st.integers(-1, NEWEST), st.sets(st.integers(0, NEWEST)))
@settings(max_examples=300)
def test_nothing_that_recovery_may_need_is_freed(
    keys: set[tuple[int, int]], stable: int, broken: int, unreachable: set[int]
) -> None:
    """Not of the stable iteration, and not of any after the newest gap that chains can lead to."""
    held = [record(unit, iteration) for unit, iteration in keys]
    kept = keep(held, stable, broken=broken, unreachable=unreachable)
    stale = max(stable, broken)
    assert at(kept, FROZEN) == [i for i in sorted(at(held, FROZEN)) if not stable < i <= stale]
    for iteration in [stable, *range(stale + 1, NEWEST + 1)]:
        for unit in (BUFFERS, HOST):
            if iteration == stable or iteration not in unreachable:
                assert (iteration in at(kept, unit)) == (iteration in at(held, unit))
        for unit in (A, B):
            before = base(held, unit, iteration)
            if before is not None and (iteration == stable or stable >= broken or before > broken):
                assert base(kept, unit, iteration) == before


@given(st.sets(KEYS, max_size=70), st.integers(0, NEWEST), st.integers(-1, NEWEST), st.sets(st.integers(0, NEWEST)))
@settings(max_examples=300)
def test_what_is_retained_has_a_use(
    keys: set[tuple[int, int]], stable: int, broken: int, unreachable: set[int]
) -> None:
    kept = keep([record(*key) for key in keys], stable, broken=broken, unreachable=unreachable)
    stale = max(stable, broken)
    assert {r.key for r in kept} <= keys
    assert [r.key for r in kept] == sorted({r.key for r in kept})
    assert kept == keep(kept, stable, broken=broken, unreachable=unreachable), "at once"
    for unit, log in LAYOUT.log_of.items():
        needed = base(kept, unit, stable)
        new_chain = min((i for i in at(kept, unit) if i > stale), default=NEWEST + 1)
        assert [i for i in at(kept, unit) if i <= stable] == ([] if needed is None else [needed])
        for iteration in at(kept, log):
            of_the_stable_one = needed is not None and needed < iteration <= stable
            of_a_newer_one = iteration > (stable if stable >= broken else new_chain)
            assert of_the_stable_one or of_a_newer_one
