# SPDX-License-Identifier: Apache-2.0
"""Which fragments a capture is rebuilt from, and which ones holders go on with."""

from __future__ import annotations

from itertools import permutations

import pytest

from megatron_moetion.coding import WHOLE, Coding, Part
from megatron_moetion.errors import ChannelError
from megatron_moetion.recover.plan import (
    Order,
    Place,
    copies_of,
    fetches_of,
    held_of,
    keepers_of,
    order_of,
    sources_of,
    with_parts_kept,
)
from megatron_moetion.replicate.placement import place
from megatron_moetion.store.manifest import NO_SLOT, Record, Records

FOUR = place(["a", "b", "c", "d"], 2, coding_nodes=4)
ONE, TWO, PARITY = (Coding(holders=3, data=2).part(n) for n in range(3))


def captures(*iterations: int, digest: int = 7, unit: int = 0) -> Records:
    return Records.of(
        Record(unit=unit, iteration=i, epoch=0, slot=i, nbytes=640, digest=digest + i) for i in iterations
    )


def zero(iteration: int) -> Records:
    return Records.of([Record(unit=0, iteration=iteration, epoch=0, slot=NO_SLOT, nbytes=0, digest=0)])


def test_enough_different_fragments_of_one_capture_are_as_good_as_all_of_it() -> None:
    assert held_of({Place(1, ONE): captures(1, 2), Place(2, PARITY): captures(2, 3)}) == {0: {2}}
    assert held_of({Place(1, ONE): captures(1), Place(2, ONE): captures(1)}) == {}
    assert held_of({Place(1, ONE): captures(1), Place(2, TWO): captures(1, digest=8)}) == {}
    other = Part(number=2, data=2, parity=2)
    assert held_of({Place(1, ONE): captures(1), Place(2, other): captures(1)}) == {}
    assert held_of({Place(1, ONE): captures(1), Place(0): captures(2)}) == {0: {2}}
    assert held_of({Place(3, PARITY): zero(1)}) == {0: {1}}


def test_what_is_whole_is_read_before_fragments_and_rows_as_they_are_before_parity() -> None:
    everywhere = {Place(n + 1, part): captures(1) for n, part in enumerate((PARITY, TWO, ONE))}
    assert sources_of(everywhere, 0)[0, 1].places == (Place(3, ONE), Place(2, TWO))
    assert sources_of(everywhere, 1)[0, 1].places == (Place(1, PARITY), Place(3, ONE)), "its own node first"
    assert sources_of({**everywhere, Place(2): captures(1)}, 0)[0, 1].places == (Place(2),)


def test_an_owner_that_lost_all_orders_fragments_and_makes_those_that_are_missing() -> None:
    copies = {Place(1, ONE): captures(1), Place(3, PARITY): captures(1)}
    order = Order.from_bytes(0, order_of(0, [(0, 1)], copies, FOUR).to_bytes())
    assert order.records == captures(1)
    assert order.is_rebuilt.tolist() == [True]
    assert order.is_from(0).tolist() == [False]
    keepers = keepers_of([[], [(0, ONE)], [], [(0, PARITY)]], FOUR)
    legs = fetches_of(order, keepers, FOUR)
    assert [(leg.source, leg.out_of, leg.into) for leg in legs] == [
        (1, (0, ONE), (0, WHOLE)), (3, (0, PARITY), (0, WHOLE)),
    ]  # fmt: skip
    assert [(leg.target, leg.into) for leg in copies_of(order, FOUR)] == [(2, (0, TWO))]


def test_holders_go_on_with_the_fragments_that_they_have_in_whatever_order() -> None:
    for now in permutations((ONE, TWO, PARITY)):
        kept = [[], *([(0, part)] for part in now)]
        assert with_parts_kept(FOUR, keepers_of(kept, FOUR)).parts[0] == now


def test_of_two_holders_with_one_fragment_the_usual_one_keeps_it_and_no_fragment_is_missing() -> None:
    for first, second, expected in (
        (TWO, TWO, (ONE, TWO, PARITY)),
        (ONE, ONE, (ONE, TWO, PARITY)),
        (PARITY, PARITY, (PARITY, ONE, TWO)),
    ):
        kept = keepers_of([[], [(0, first)], [(0, second)], []], FOUR)
        assert with_parts_kept(FOUR, kept).parts[0] == expected
    assert with_parts_kept(FOUR, {}) == FOUR
    whole = place(["a", "b"], 1)
    assert with_parts_kept(whole, {0: {Place(1, ONE): 1}}) == whole


def test_an_order_that_reads_from_nowhere_is_refused() -> None:
    copies = {Place(1, ONE): captures(1), Place(3, PARITY): captures(1)}
    order = order_of(0, [(0, 1)], copies, FOUR)
    no_place, no_part = order.table.copy(), (Place(1, Part(number=4, data=2, parity=1)), Place(3, PARITY))
    no_place["sources"] = 0b101
    for wrong in (
        Order(owner=0, places=order.places, table=no_place),
        Order(owner=0, places=no_part, table=order.table),
        Order(owner=0, places=order.places * 40, table=order.table),
    ):
        with pytest.raises(ChannelError, match="something else than an order"):
            Order.from_bytes(0, wrong.to_bytes())
