# SPDX-License-Identifier: Apache-2.0
"""Replication over queues: what arrives is bit-equal, listed only if it verifies, and both sides stay in step."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
import pytest
from megatron_moetion.replicate.replicator import Replicator
from support import POOL, Network, ToyState, capture, find, make_arena, make_packer, no_probe, scheduler, together

from megatron_moetion.errors import ChannelError
from megatron_moetion.replicate.channel import Message
from megatron_moetion.replicate.placement import place
from megatron_moetion.snapshot.reference import capture_digest
from megatron_moetion.store.arena import Arena
from megatron_moetion.store.manifest import NO_RECORDS, NO_SLOT, RECORD, Record, Records


class Ranks:
    """Ranks on a node each: their state, packer, arenas and replicators."""

    def __init__(self, folder: Path, num_ranks: int, replicas: int = 1, held_copies: int = 3) -> None:
        self.network = Network(num_ranks, timeout_s=5)
        self.states = [ToyState(num_experts=2, seed=r) for r in range(num_ranks)]
        self.packers = [make_packer(s.inventory()) for s in self.states]
        placement = place([f"node{r}" for r in range(num_ranks)], replicas)
        self.own = [make_arena(folder / f"node{r}", s, owner=r) for r, s in enumerate(self.states)]
        self.held: list[dict[int, Arena]] = [
            {o: make_arena(folder / f"node{r}", self.states[o], o, held_copies) for o in placement.owners_held_by(r)}
            for r in range(num_ranks)
        ]
        self.replicators = [
            Replicator(
                channel=self.network.channel(r),
                own=self.own[r],
                holders=placement.holders[r],
                held=self.held[r],
                pool=POOL,
                epoch=0,
                probe=no_probe,
                pacing=scheduler(),
            )
            for r in range(num_ranks)
        ]

    def commit(self, rank: int, iteration: int) -> Records:
        return capture(self.packers[rank], self.own[rank], iteration)

    def round(self, iteration: int, records: Sequence[Sequence[Record]]) -> list[bool]:
        sent = [Records.of(r) for r in records]
        return together(
            *(lambda r=r: self.replicators[r].replicate(iteration, sent[r]) for r in range(len(self.own)))  # type: ignore[misc]
        )

    def listed(self, holder: int, owner: int) -> set[int]:
        return {r.iteration for r in self.held[holder][owner].page.records}

    def assert_equal(self, holder: int, owner: int, iteration: int) -> None:
        """The holder's copy of the owner's snapshot is the owner's, byte for byte."""
        ours = [r for r in self.own[owner].page.records if r.iteration == iteration]
        assert len(ours) == len(self.own[owner].spec.units)
        for record in ours:
            copy = find(self.held[holder][owner], record.unit, iteration)
            assert copy is not None
            assert (copy.digest, copy.tokens, copy.epoch) == (record.digest, record.tokens, record.epoch)
            theirs = self.held[holder][owner]
            assert theirs.payload(copy.slot).tobytes() == self.own[owner].payload(record.slot).tobytes()
            assert theirs.digests(copy.slot).tolist() == self.own[owner].digests(record.slot).tolist()


@pytest.mark.parametrize(("num_ranks", "replicas"), [(2, 1), (3, 1), (3, 2)])
def test_replicas_are_bit_equal_and_listed(tmp_path: Path, num_ranks: int, replicas: int) -> None:
    ranks = Ranks(tmp_path, num_ranks, replicas)
    for iteration in range(1, 3):
        for state in ranks.states:
            state.step(iteration)
        records = [ranks.commit(r, iteration) for r in range(num_ranks)]
        assert ranks.round(iteration, records) == [True] * num_ranks
        for holder in range(num_ranks):
            for owner in ranks.held[holder]:
                ranks.assert_equal(holder, owner, iteration)


def test_an_empty_round_keeps_both_sides_in_step(tmp_path: Path) -> None:
    ranks = Ranks(tmp_path, 2)
    assert ranks.round(1, [(), ()]) == [False, False]
    assert ranks.round(2, [ranks.commit(0, 2), ()]) == [True, False]
    assert ranks.round(3, [ranks.commit(0, 3), ranks.commit(1, 3)]) == [True, True]
    assert ranks.listed(1, 0) == {2, 3}
    assert ranks.listed(0, 1) == {3}


def test_a_buddy_without_room_refuses_and_both_stay_in_step(tmp_path: Path) -> None:
    ranks = Ranks(tmp_path, 2, held_copies=1)
    assert ranks.round(1, [ranks.commit(0, 1), ranks.commit(1, 1)]) == [True, True]
    assert ranks.round(2, [ranks.commit(0, 2), ()]) == [False, False]
    assert ranks.listed(1, 0) == {1}
    ranks.held[1][0].edit(lambda page: {"records": ()})
    assert ranks.round(3, [ranks.commit(0, 3), ()]) == [True, False]
    assert ranks.listed(1, 0) == {3}
    ranks.assert_equal(1, 0, 3)


def test_a_damaged_payload_is_refused_and_not_listed(tmp_path: Path) -> None:
    ranks = Ranks(tmp_path, 2)
    largest = max(nbytes for _, _, nbytes in ranks.own[0].spec.units)
    free_before = len(ranks.held[1][0].page.records)
    ranks.network.damage = lambda source, target, size: size // 2 if (source, size) == (0, largest) else None
    assert ranks.round(1, [ranks.commit(0, 1), ranks.commit(1, 1)]) == [False, True]
    assert ranks.listed(1, 0) == set()
    ranks.network.damage = lambda source, target, size: None
    for iteration in (2, 3):  # the slots of the refused snapshot are free again
        assert ranks.round(iteration, [ranks.commit(0, iteration), ()]) == [True, False]
    assert ranks.listed(1, 0) == {2, 3}
    assert free_before == 0


def test_a_damaged_table_lists_nothing_wrong(tmp_path: Path) -> None:
    """Where a record names the wrong iteration or unit, its bytes still verify: the table needs its own check."""
    ranks = Ranks(tmp_path, 2)
    first = ranks.commit(0, 1)
    chunks = sum(ranks.own[0].digests(r.slot).size for r in first)
    table = 48 * len(first) + 8 * chunks
    for position in range(48):
        ranks.network.damage = lambda _, __, size, at=position: at if size == table else None  # type: ignore[misc]
        records = first if position == 0 else ranks.commit(0, position + 1)
        together(
            lambda i=position + 1, r=records: ranks.replicators[0].replicate(i, r),  # type: ignore[misc]
            lambda i=position + 1: ranks.replicators[1].replicate(i, NO_RECORDS),  # type: ignore[misc]
        )
        for listed in ranks.held[1][0].page.records:
            truth = next(r for r in records if r.unit == listed.unit)
            assert (listed.iteration, listed.epoch, listed.digest, listed.tokens) == (
                truth.iteration, truth.epoch, truth.digest, truth.tokens,
            ), f"byte {position} of the table was damaged"  # fmt: skip
        for arena in (ranks.own[0], ranks.held[1][0]):
            arena.edit(lambda page: {"records": ()})


def test_a_dead_buddy_is_a_channel_error(tmp_path: Path) -> None:
    ranks = Ranks(tmp_path, 2)
    ranks.network.dead.add(1)
    with pytest.raises(ChannelError):
        ranks.replicators[0].replicate(1, ranks.commit(0, 1))


def test_ranks_out_of_step_stop_replicating(tmp_path: Path) -> None:
    ranks = Ranks(tmp_path, 2)
    with pytest.raises(ChannelError, match=r"replicates iteration \d of epoch 0; here it is iteration \d"):
        together(
            lambda: ranks.replicators[0].replicate(1, NO_RECORDS),
            lambda: ranks.replicators[1].replicate(2, NO_RECORDS),
        )


# -- what a wire may do ----------------------------------------------------------------------------------------

HEADER, TABLE = 0, 1


class Wire:
    """A channel of one rank on which the peer's messages come from a list. What was received is counted."""

    def __init__(self, messages: Sequence[bytes]) -> None:
        self._messages = list(messages)
        self.received: list[int] = []

    def exchange(self, sends: Sequence[Message], receives: Sequence[Message]) -> None:
        for message in receives:
            self.received.append(message.data.nbytes)
            data = self._messages.pop(0)
            if len(data) != message.data.nbytes:
                raise ChannelError("the two sides' messages do not match")
            message.data[:] = np.frombuffer(data, dtype=np.uint8)


class Heard:
    """A round in which rank 0 sends a snapshot, as rank 1 heard it; to be heard again with changes."""

    def __init__(self, folder: Path) -> None:
        ranks = Ranks(folder, 2)
        self.truth = ranks.commit(0, 1)
        self.messages: list[bytes] = []
        send = ranks.network.send

        def listen(source: int, target: int, data: bytes) -> None:
            if source == 0:
                self.messages.append(data)
            send(source, target, data)

        ranks.network.send = listen  # type: ignore[method-assign]
        assert ranks.round(1, [self.truth, ()]) == [True, False]
        del self.messages[2]  # rank 0's answer to rank 1, which in what follows asks nothing
        del self.messages[-1]
        self.own, self.held = ranks.own[1], ranks.held[1][0]

    def again(self, messages: Sequence[bytes]) -> Wire:
        """Rank 1 hears these messages, and keeps what it will; ``ChannelError`` as it comes."""
        self.held.edit(lambda page: {"records": ()})
        wire = Wire(messages)
        Replicator(
            channel=wire, own=self.own, holders=(), held={0: self.held}, pool=POOL, epoch=0, probe=no_probe,
            pacing=scheduler(),
        ).replicate(1, NO_RECORDS)  # fmt: skip
        return wire

    def changed(self, number: int, change: Callable[[bytearray], None], *, digests: bool = False) -> list[bytes]:
        """All messages, one of them changed; with digests that are right again, as a faulty peer would send them."""
        found = [bytearray(m) for m in self.messages]
        change(found[number])
        header = np.frombuffer(found[HEADER], dtype=np.uint64)
        if digests:
            header[4] = capture_digest(np.frombuffer(found[TABLE], dtype=np.uint64))
            header[6] = capture_digest(header[:-1])
        return [bytes(m) for m in found]


@pytest.fixture
def heard(tmp_path: Path) -> Heard:
    return Heard(tmp_path)


def test_what_was_heard_again_is_the_snapshot(heard: Heard) -> None:
    wire = heard.again(heard.messages)
    assert len(wire.received) == len(heard.messages)
    assert {(r.unit, r.iteration, r.digest) for r in heard.held.page.records} == {
        (r.unit, r.iteration, r.digest) for r in heard.truth
    }


def test_any_change_of_a_header_ends_replication_before_memory_is_taken(heard: Heard) -> None:
    for at in range(len(heard.messages[HEADER])):
        for flip in range(1, 256):
            wire = Wire(heard.changed(HEADER, lambda data, at=at, flip=flip: data.__setitem__(at, data[at] ^ flip)))  # type: ignore[misc]
            replicator = Replicator(
                channel=wire, own=heard.own, holders=(), held={0: heard.held}, pool=POOL, epoch=0, probe=no_probe,
                pacing=scheduler(),
            )  # fmt: skip
            with pytest.raises(ChannelError, match="the header of rank 0 for iteration 1 was damaged"):
                replicator.replicate(1, NO_RECORDS)
            assert wire.received == [len(heard.messages[HEADER])]


def test_any_change_of_a_table_costs_the_snapshot(heard: Heard) -> None:
    for at in range(len(heard.messages[TABLE])):
        for flip in (1, 0x80, 0xFF):
            wire = heard.again(
                heard.changed(TABLE, lambda data, at=at, flip=flip: data.__setitem__(at, data[at] ^ flip))  # type: ignore[misc]
            )
            assert wire.received == [len(m) for m in heard.messages[:2]], "no payload is asked for"
            assert heard.held.page.records == ()


WORDS = {"captures": 2, "table bytes": 3, "slice": 5}
IMPOSSIBLE = [
    *((word, value) for word in ("captures", "table bytes") for value in (0, 1, 5, 8, 2**16)),
    *((word, value) for word in WORDS for value in (2**32, 2**40, 2**63, 2**64 - 1)),
    ("slice", 0),
]


@pytest.mark.parametrize(("word", "value"), IMPOSSIBLE)
def test_a_header_that_verifies_and_cannot_be_is_refused_before_memory_is_taken(
    word: str, value: int, heard: Heard
) -> None:
    def change(data: bytearray) -> None:
        np.frombuffer(data, dtype=np.uint64)[WORDS[word]] = value

    largest = RECORD.itemsize * len(heard.truth) + 8 * sum(heard.held.digests(r.slot).size for r in heard.truth)
    wire = Wire(heard.changed(HEADER, change, digests=True))
    replicator = Replicator(
        channel=wire, own=heard.own, holders=(), held={0: heard.held}, pool=POOL, epoch=0, probe=no_probe,
        pacing=scheduler(),
    )  # fmt: skip
    with pytest.raises(ChannelError):
        replicator.replicate(1, NO_RECORDS)
    assert all(nbytes <= largest for nbytes in wire.received)


RECORDS: dict[str, tuple[str, int]] = {
    "a unit that is not there": ("unit", 2**31),
    "a unit twice": ("unit", 1),
    "another unit's size": ("nbytes", 64),
    "a size of nothing": ("nbytes", 0),
    "a size of everything": ("nbytes", 2**63),
    "another iteration": ("iteration", 2),
    "another epoch": ("epoch", 3),
    "zeros that have a size": ("slot", NO_SLOT),
}


@pytest.mark.parametrize("what", RECORDS)
def test_a_table_that_verifies_and_cannot_be_ends_replication(what: str, heard: Heard) -> None:
    field, value = RECORDS[what]

    def change(data: bytearray) -> None:
        np.frombuffer(data, dtype=np.uint8)[: RECORD.itemsize].view(RECORD)[0][field] = value

    with pytest.raises(ChannelError, match="rank 0 announces"):
        heard.again(heard.changed(TABLE, change, digests=True))
    assert heard.held.page.records == ()


def test_a_damaged_answer_is_neither_yes_nor_no(tmp_path: Path) -> None:
    for at in range(8):
        ranks = Ranks(tmp_path / str(at), 2)
        ranks.network.damage = lambda source, target, size, at=at: at if (source, size) == (1, 8) else None  # type: ignore[misc]
        ranks.network.timeout_s = 0.1
        with pytest.raises(ChannelError, match=r"the answer of rank 1 was damaged|timed out"):
            ranks.round(1, [ranks.commit(0, 1), ()])
        assert ranks.listed(1, 0) == set()
