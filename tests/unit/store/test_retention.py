# SPDX-License-Identifier: Apache-2.0
"""What arenas keep, against plain models that go through records one by one."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Collection, Mapping, Sequence

from hypothesis import given, settings
from hypothesis import strategies as st

from megatron_moetion.store.chains import ChainLayout, base_of
from megatron_moetion.store.manifest import NO_SLOT, Record, Records
from megatron_moetion.store.retention import Chains, Newest, Settled

NEWEST = 12
ITERATIONS = st.integers(-1, NEWEST)
KEYS = st.lists(st.tuples(st.integers(0, 8), st.integers(0, NEWEST)), unique=True, max_size=80)


def records(keys: Sequence[tuple[int, int]]) -> list[Record]:
    return [
        Record(unit=u, iteration=i, epoch=i % 3, slot=NO_SLOT if n % 5 == 0 else n, nbytes=64, digest=u * 100 + i)
        for n, (u, i) in enumerate(keys)
    ]


def newest(held: Sequence[Record], stable: int, whole: Mapping[int, bool]) -> list[Record]:
    found: dict[int, Record] = {}
    kept: list[Record] = []
    for record in held:
        if not whole.get(record.iteration, True):
            continue
        if record.iteration > stable:
            kept.append(record)
        elif record.unit not in found or record.iteration > found[record.unit].iteration:
            found[record.unit] = record
    return sorted([*kept, *found.values()], key=lambda r: r.key)


def chains(
    held: Sequence[Record], stable: int, layout: ChainLayout, broken: int, unreachable: Collection[int]
) -> list[Record]:
    stale = max(stable, broken)
    kept: list[Record] = []
    captures: dict[int, dict[int, Record]] = defaultdict(dict)
    logs: dict[int, dict[int, Record]] = defaultdict(dict)
    slice_of = {log: unit for unit, log in layout.log_of.items()}
    for record in held:
        if stable < record.iteration <= stale:
            continue
        if record.unit in layout.log_of:
            captures[record.unit][record.iteration] = record
        elif record.unit in slice_of:
            logs[slice_of[record.unit]][record.iteration] = record
        elif (
            record.unit not in layout.always
            or record.iteration == stable
            or (record.iteration > stale and record.iteration not in unreachable)
        ):
            kept.append(record)
    for unit in layout.log_of:
        base = base_of(captures[unit], logs[unit], stable)
        new = [i for i in captures[unit] if i > stale]
        kept.extend(captures[unit][i] for i in ([] if base is None else [base]) + new)
        if base is not None:
            kept.extend(r for i, r in logs[unit].items() if base < i <= stable)
        begin = stable if stale == stable else min(new, default=None)
        if begin is not None:
            kept.extend(r for i, r in logs[unit].items() if i > max(begin, stale))
    return sorted(kept, key=lambda r: r.key)


@given(KEYS, ITERATIONS, st.dictionaries(st.integers(0, NEWEST), st.booleans()))
@settings(max_examples=300)
def test_newest_keeps_what_the_plain_model_keeps(
    keys: list[tuple[int, int]], stable: int, whole: dict[int, bool]
) -> None:
    held = records(keys)
    assert Newest().keep(Records.of(held), Settled(stable=stable, whole=whole)) == newest(held, stable, whole)


LAYOUTS = st.permutations(range(8)).flatmap(
    lambda units: st.builds(
        lambda number, others: ChainLayout(
            log_of=dict(zip(units[:number], units[number : 2 * number], strict=True)),
            always=frozenset(units[2 * number : 2 * number + others]),
        ),
        st.integers(0, 3),
        st.integers(0, 2),
    )
)


@given(KEYS, LAYOUTS, ITERATIONS, ITERATIONS, st.frozensets(st.integers(0, NEWEST)))
@settings(max_examples=500)
def test_chains_keep_what_the_plain_model_keeps(
    keys: list[tuple[int, int]], layout: ChainLayout, stable: int, broken: int, unreachable: frozenset[int]
) -> None:
    """Also of units that the layout does not name: unit 8 is in none."""
    held = records(keys)
    settled = Settled(stable=stable, broken=broken, unreachable=unreachable)
    assert Chains(layout).keep(Records.of(held), settled) == chains(held, stable, layout, broken, unreachable)
