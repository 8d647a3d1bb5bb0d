# SPDX-License-Identifier: Apache-2.0
"""What a mirror lacks, and what a holder believes of an update: nothing that its arena cannot have caused."""

from __future__ import annotations

import random
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest

from megatron_moetion.errors import ChannelError
from megatron_moetion.replicate.mirror import Received, Update, decode_update, difference, encode_digests, plain
from megatron_moetion.store.manifest import NO_SLOT, Branch, Record, Records

CHUNK_BYTES = 4096
UNIT_BYTES = np.array([100, 5000, 100], dtype=np.int64)


def record(unit: int, iteration: int, **changes: Any) -> Record:
    nbytes = int(UNIT_BYTES[unit])
    fields = {"epoch": 1, "slot": unit, "nbytes": nbytes, "digest": 7 * unit + iteration, "tokens": 5, **changes}
    return Record(unit=unit, iteration=iteration, **fields)


ZERO = record(2, 9, slot=NO_SLOT, nbytes=0, digest=0)
DROPPED = Records.of([record(0, 7), record(1, 8)])
ADDED = Records.of([record(0, 9), record(1, 9), ZERO])
UPDATE = Update(dropped=plain(DROPPED), added=ADDED, digests=np.array([1, 2, 3], dtype=np.uint64))


def decoded(body: Any, **changes: Any) -> Received:
    fields: dict[str, Any] = {
        "dropped": 2, "added": 3, "iteration": 9, "unit_bytes": UNIT_BYTES, "chunk_bytes": CHUNK_BYTES, "epoch": 1,
        "branches": (Branch(epoch=1, iteration=4),),
    }  # fmt: skip
    return decode_update(body, **{**fields, **changes})


def test_an_update_arrives_as_it_was_meant() -> None:
    found = decoded(UPDATE.encode())
    assert found.added == ADDED.replace(slot=np.where(ADDED.is_zero, NO_SLOT, 0))
    assert found.digests.tolist() == [1, 2, 3]
    before = Records.of([record(0, 7), record(0, 8), record(1, 8), record(2, 7)])
    assert found.kept(before).keys == [(0, 8), (2, 7)]


@pytest.mark.parametrize(
    "change",
    [
        {"dropped": 3}, {"dropped": 1}, {"dropped": 2**32 - 1}, {"added": 2}, {"added": 4}, {"added": 2**32 - 1},
        {"iteration": -1}, {"iteration": 2**62}, {"epoch": 0},
    ],
)  # fmt: skip
def test_a_header_that_verifies_and_cannot_be_is_refused(change: dict[str, int]) -> None:
    with pytest.raises(ChannelError):
        decoded(UPDATE.encode(), **change)


def changed(what: Callable[[Any], None]) -> Any:
    records = ADDED.table.copy()
    what(records)
    return Update(dropped=UPDATE.dropped, added=Records(records), digests=UPDATE.digests).encode()


TABLES: dict[str, Callable[[Any], None]] = {
    "a unit that is not there": lambda t: t["unit"].__setitem__(0, 3),
    "a unit of the largest number": lambda t: t["unit"].__setitem__(0, 2**32 - 1),
    "a unit twice": lambda t: t["unit"].__setitem__(0, 1),
    "another unit's size": lambda t: t["unit"].__setitem__(1, 2),
    "a later epoch": lambda t: t["epoch"].__setitem__(0, 2),
    "a history that has ended": lambda t: t["epoch"].__setitem__(0, 0),
    "zeros that have digests": lambda t: t["slot"].__setitem__(0, NO_SLOT),
}


@pytest.mark.parametrize("what", TABLES)
def test_a_table_that_verifies_and_cannot_be_is_refused(what: str) -> None:
    with pytest.raises(ChannelError):
        decoded(changed(TABLES[what]))


def test_captures_from_before_a_recovery_belong_to_its_history_up_to_its_iteration() -> None:
    older = Update(
        dropped=UPDATE.dropped[:0],
        added=Records.of([record(0, 4, epoch=0)]),
        digests=np.array([1], dtype=np.uint64),
    )
    assert len(decoded(older.encode(), dropped=0, added=1, iteration=4).added) == 1
    with pytest.raises(ChannelError, match="history"):
        decoded(older.encode(), dropped=0, added=1, iteration=5)


@pytest.mark.parametrize("seed", range(20))
def test_step_by_step_a_mirror_becomes_what_the_page_lists(seed: int) -> None:
    """Against sets; other bytes of one unit and iteration are another capture, another slot is not."""
    rng = random.Random(seed)

    def some() -> Records:
        keys = {(rng.randrange(3), rng.randrange(12)) for _ in range(rng.randrange(15))}
        return Records.of([record(u, i, slot=rng.randrange(99), tokens=rng.randrange(2)) for u, i in sorted(keys)])

    def bare(records: Records) -> set[Record]:
        return set(plain(records))

    page, mirror = some(), plain(some())
    found = difference(page, mirror)
    assert bare(found.missing) == bare(page) - set(mirror)
    assert set(found.stale) == set(mirror) - bare(page)
    assert {(r.unit, r.iteration, r.slot) for r in found.missing} <= {(r.unit, r.iteration, r.slot) for r in page}
    late = {r.iteration for r in found.missing}
    assert found.whole == {r.iteration for r in page if r.iteration < min(late, default=99)}
    mirror = plain(Records.of([r for r in mirror if r not in set(found.stale)]))
    for iteration in found.iterations:
        mirror = plain(mirror + found.missing.where(found.missing.table["iteration"] == iteration))
        assert iteration in difference(page, mirror).whole
    assert difference(page, mirror).is_empty


def test_digests_that_follow_the_bytes_complete_an_update() -> None:
    late = Update(dropped=UPDATE.dropped, added=ADDED, digests=np.empty(0, dtype=np.uint64)).encode()
    found = decoded(late, is_late=True)
    assert found.num_late == 3
    done = found.completed(encode_digests(np.array([5, 6], np.uint64), np.array([1, 2, 3], np.uint64)))
    assert done is not None
    assert done.added.table["digest"].tolist() == [5, 6, 0]
    assert (done.digests.tolist(), done.num_late) == ([1, 2, 3], 0)
    for body in (b"", b"\0" * 32, b"\0" * 48, b"\0" * 41):
        assert found.completed(np.frombuffer(body, dtype=np.uint8)) is None, "the captures have gone, or it is damaged"
    with pytest.raises(ChannelError):
        decoded(late)
