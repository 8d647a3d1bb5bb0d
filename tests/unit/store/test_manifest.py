# SPDX-License-Identifier: Apache-2.0
"""Manifest pages survive torn writes and damage; histories and retention are held to naive models."""

from __future__ import annotations

from dataclasses import replace
from itertools import product

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from megatron_moetion.store.manifest import (
    ITERATIONS_MAX,
    MAX_BRANCHES,
    Branch,
    Page,
    Record,
    Records,
    current_page,
    decode_page,
    encode_page,
    in_history,
    page_bytes,
    successor,
)

U32, U64, U63 = st.integers(0, 2**32 - 1), st.integers(0, 2**64 - 1), st.integers(0, 2**63 - 2)
ITERATIONS = st.integers(0, ITERATIONS_MAX - 1)


def any_record(epochs: st.SearchStrategy[int]) -> st.SearchStrategy[Record]:
    return st.builds(
        Record, unit=U32, iteration=ITERATIONS, epoch=epochs, slot=U32, nbytes=U64, digest=U64, tokens=U64
    )  # fmt: skip


@st.composite
def pages(draw: st.DrawFn) -> Page:
    """Pages that a run can write."""
    epoch = draw(st.integers(0, 2**31 - 1))
    recoveries = draw(st.lists(st.integers(1, epoch), max_size=MAX_BRANCHES, unique=True)) if epoch else []
    return Page(
        sequence=draw(U63),
        epoch=epoch,
        stable=draw(st.integers(-1, ITERATIONS_MAX - 1)),
        lineage=draw(U63),
        branches=tuple(Branch(epoch=e, iteration=draw(ITERATIONS), nonce=draw(U32)) for e in sorted(recoveries)),
        records=tuple(draw(st.lists(any_record(st.integers(0, epoch)), max_size=5))),
    )


PAGES = pages()


def record(unit: int, iteration: int, slot: int = 0, epoch: int = 0) -> Record:
    return Record(unit=unit, iteration=iteration, epoch=epoch, slot=slot, nbytes=64, digest=iteration * 31 + unit)


def page(sequence: int, num_records: int = 4) -> Page:
    return Page(
        sequence=sequence,
        epoch=2,
        stable=sequence + 5,
        branches=(Branch(epoch=1, iteration=3), Branch(epoch=2, iteration=9)),
        records=tuple(record(u, sequence + u, slot=u) for u in range(num_records)),
    )


@given(PAGES)
def test_round_trip(any_page: Page) -> None:
    data = encode_page(any_page, max_records=5)
    assert len(data) <= page_bytes(5)
    assert decode_page(data) == any_page
    assert decode_page(data + b"what the page area held before") == any_page


def test_a_page_refuses_more_records_than_it_has_room_for() -> None:
    with pytest.raises(ValueError, match="4 records do not fit in a page for 3"):
        encode_page(page(1), max_records=3)


def test_only_the_newest_branches_are_written() -> None:
    last = MAX_BRANCHES + 5
    many = Page(epoch=last, branches=tuple(Branch(epoch=e, iteration=e) for e in range(1, last + 1)))
    found = decode_page(encode_page(many, 0))
    assert found is not None
    assert found.branches == many.branches[-MAX_BRANCHES:]


@pytest.mark.parametrize(("old_records", "new_records"), [(0, 4), (4, 4), (4, 1)])
def test_a_write_cut_after_any_byte_leaves_the_other_page_in_force(old_records: int, new_records: int) -> None:
    oldest, current, coming = page(1, old_records), page(2, 4), page(3, new_records)
    area = bytearray(page_bytes(4))
    under = encode_page(oldest, 4)
    area[: len(under)] = under
    new, other = encode_page(coming, 4), decode_page(encode_page(current, 4))
    for cut in range(len(new)):
        torn = new[:cut] + bytes(area[cut:])
        assert current_page([decode_page(torn), other]) == current, f"cut after {cut} bytes"
    assert current_page([decode_page(new + bytes(area[len(new) :])), other]) == coming


def test_a_flipped_bit_anywhere_makes_the_page_invalid() -> None:
    data = bytearray(encode_page(page(7, 2), 2))
    for position, bit in product(range(len(data)), range(8)):
        data[position] ^= 1 << bit
        assert decode_page(bytes(data)) is None, f"bit {bit} of byte {position}"
        data[position] ^= 1 << bit
    assert decode_page(bytes(data)) == page(7, 2)


@given(st.binary(max_size=300))
def test_noise_is_no_page(noise: bytes) -> None:
    assert decode_page(noise) is None
    assert decode_page(b"MOEPAGE1" + noise) is None


def test_the_current_page_is_the_valid_one_with_the_higher_number() -> None:
    assert current_page([page(4), page(5)]) == page(5)
    assert current_page([page(4), None]) == page(4)
    assert current_page([None, None]) is None


def test_a_successor_counts_on() -> None:
    assert successor(page(4), stable=11) == Page(
        sequence=5, epoch=2, stable=11, branches=page(4).branches, records=page(4).records
    )


@given(st.lists(st.one_of(st.integers(1, 4), st.floats(0, 1)), max_size=25))
@settings(max_examples=150)
def test_histories_agree_with_a_run_that_is_replayed(events: list[int | float]) -> None:
    """An int trains for so many steps; a float goes back to that share of the iterations reached."""
    epoch, now = 0, 0
    alive: set[tuple[int, int]] = {(0, 0)}
    ever = set(alive)
    branches: list[Branch] = []
    for event in events:
        if isinstance(event, int):
            taken = {(epoch, i) for i in range(now + 1, now + event + 1)}
            alive |= taken
            ever |= taken
            now += event
        else:
            now = int(event * now)
            epoch += 1
            branches.append(Branch(epoch=epoch, iteration=now))
            alive = {(e, i) for e, i in alive if i <= now}
    known = sorted(ever)
    is_alive = in_history(Records.of(record(0, i, epoch=e) for e, i in known), branches, epoch)
    assert {each for each, found in zip(known, is_alive.tolist(), strict=True) if found} == alive


def test_a_capture_from_the_future_is_refused() -> None:
    branches = [Branch(epoch=1, iteration=9), Branch(epoch=2, iteration=9)]
    assert in_history(Records.of([record(0, 1, epoch=3)]), branches, 2).tolist() == [False]


def test_a_capture_from_before_the_remembered_branches_is_refused() -> None:
    branches = [Branch(epoch=e, iteration=9) for e in (2, 3)]
    records = Records.of([record(0, 1, epoch=0), record(0, 1, epoch=1)])
    assert in_history(records, branches, 3).tolist() == [False, True]


# -- records --------------------------------------------------------------------------------------------------


KEYS = st.lists(st.tuples(st.integers(0, 3), st.integers(0, 9)), unique=True, max_size=12)


@given(st.lists(any_record(U32), max_size=6))
def test_records_are_a_sequence_of_record(plain: list[Record]) -> None:
    records = Records.of(plain)
    assert records == plain
    assert records == tuple(plain)
    assert records == Records.of(plain)
    assert hash(records) == hash(tuple(plain))
    assert list(records) == plain
    assert [records[n] for n in range(len(plain))] == plain
    assert records[1:] == plain[1:]
    assert records.keys == [r.key for r in plain]
    assert records.is_zero.tolist() == [r.is_zero for r in plain]
    assert Records.from_bytes(records.table.tobytes()) == plain
    assert (records + records) == plain + plain
    assert bool(records) == bool(plain)
    assert records != [*plain, record(0, 1)]
    assert records.replace(epoch=7) == [replace(r, epoch=7) for r in plain]


@given(KEYS, KEYS)
def test_records_that_follow_take_the_place_of_those_with_their_keys(
    before: list[tuple[int, int]], after: list[tuple[int, int]]
) -> None:
    old, new = ([record(u, i, epoch=e) for u, i in keys] for e, keys in enumerate((before, after)))
    expected = [r for r in old if r.key not in after] + new
    assert Records.of(old).followed_by(Records.of(new)) == expected


def test_records_cannot_be_changed() -> None:
    records = Records.of([record(1, 2)])
    with pytest.raises(ValueError, match="read-only"):
        records.table["unit"] = 3
    wire = bytearray(records.table.tobytes())
    taken = Records.from_bytes(wire)
    wire[:] = bytes(len(wire))
    assert taken == records
