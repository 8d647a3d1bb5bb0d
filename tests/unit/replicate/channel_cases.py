# SPDX-License-Identifier: Apache-2.0
"""The contracts of a channel and of a fabric, written once: two ranks call each case at once; a failed case raises."""

from __future__ import annotations

import time
from collections.abc import Callable

import numpy as np
import numpy.typing as npt

from megatron_moetion.errors import ChannelError
from megatron_moetion.replicate.channel import Channel, Fabric, Message, Note, Reduced

SILENT_S = 1.0


def content(seed: int, nbytes: int) -> npt.NDArray[np.uint8]:
    return np.random.default_rng(seed).integers(0, 256, nbytes, dtype=np.uint8)


def both_ways(channel: Channel, rank: int) -> None:
    """Messages of all sizes, both directions at once, several to one peer, in order."""
    sizes = [1, 7, 64, 4096, 65536, 65537, 300_001, 20_000_003]
    mine = [content(10 * n + rank, size) for n, size in enumerate(sizes)]
    theirs = [np.zeros(size, dtype=np.uint8) for size in sizes]
    before = [m.copy() for m in mine]
    peer = 1 - rank
    channel.exchange([Message(peer=peer, data=m) for m in mine], [Message(peer=peer, data=t) for t in theirs])
    for n, (size, got) in enumerate(zip(sizes, theirs, strict=True)):
        assert (got == content(10 * n + peer, size)).all(), f"message {n} of {size} bytes"
    assert all((a == b).all() for a, b in zip(before, mine, strict=True)), "what is sent stays as it is"


def one_way(channel: Channel, rank: int) -> None:
    """One side has nothing to send."""
    data = content(5, 200_000)
    if rank == 0:
        channel.exchange([Message(peer=1, data=data)], [])
    else:
        got = np.zeros(200_000, dtype=np.uint8)
        channel.exchange([], [Message(peer=0, data=got)])
        assert (got == data).all()


def nothing(channel: Channel, rank: int) -> None:
    """No messages, and messages of no bytes."""
    channel.exchange([], [])
    empty = np.zeros(0, dtype=np.uint8)
    channel.exchange([Message(peer=1 - rank, data=empty)], [Message(peer=1 - rank, data=empty)])


def into_the_middle(channel: Channel, rank: int) -> None:
    """A view into a larger buffer receives exactly its bytes."""
    area = np.full(1000, 0xEE, dtype=np.uint8)
    peer = 1 - rank
    channel.exchange([Message(peer=peer, data=content(rank, 333))], [Message(peer=peer, data=area[100:433])])
    assert (area[100:433] == content(peer, 333)).all()
    assert (area[:100] == 0xEE).all()
    assert (area[433:] == 0xEE).all()


def in_step(channel: Channel, rank: int) -> None:
    """Many rounds in a row match up."""
    peer = 1 - rank
    for turn in range(30):
        got = np.zeros(turn + 1, dtype=np.uint8)
        mine = np.full(turn + 1, 2 * turn + rank, dtype=np.uint8)
        channel.exchange([Message(peer=peer, data=mine)], [Message(peer=peer, data=got)])
        assert (got == 2 * turn + peer).all()


def documents(fabric: Fabric) -> None:
    """``gather`` returns every rank's document, of whatever size, by rank."""
    found = fabric.gather({"rank": fabric.rank, "text": "é" * (1 + 1000 * fabric.rank), "none": None})
    assert [d["rank"] for d in found] == [0, 1]
    assert [len(d["text"]) for d in found] == [1, 1001]


def one_of_two(fabric: Fabric) -> None:
    """``reduce`` combines in the order of ranks, with the same result on both."""
    assert fabric.reduce([fabric.rank], lambda lower, higher: lower + higher) == [0, 1]
    assert fabric.reduce(None, lambda lower, higher: higher) is None


def words(fabric: Fabric) -> None:
    """A reducer combines 64-bit words, with notes, in rounds; results come in order, each once."""
    reducer = fabric.reducer("and", (0, 1), lambda a, b: [x & y for x, y in zip(a, b, strict=True)])
    assert reducer.results() == []
    mine = ((1 << 62 | 0b1100, -1), (1 << 62 | 0b0110, 5))[fabric.rank]
    note = Note(ranks=1, rank=fabric.rank, iteration=7, text=f"trouble of {fabric.rank}")
    for number in range(3):
        reducer.contribute(number, mine, {"trouble": note} if number == 1 else None)
    assert reducer.wait(2, 10.0)
    common = (1 << 62 | 0b0100, 5)
    said = {"trouble": Note(ranks=2, rank=0, iteration=7, text="trouble of 0")}
    assert reducer.results() == [Reduced(number=n, words=common, notes=said if n == 1 else {}) for n in range(3)]
    assert reducer.results() == []
    assert not reducer.wait(3, 0.05)


def alone(fabric: Fabric) -> None:
    """A rank alone in its reducer has its results at once."""
    reducer = fabric.reducer(f"of {fabric.rank}", (fabric.rank,), lambda a, b: a)
    reducer.contribute(0, [4, 5])
    assert reducer.results() == [Reduced(number=0, words=(4, 5))]


CHANNEL_CASES: tuple[Callable[[Channel, int], None], ...] = (both_ways, one_way, nothing, into_the_middle, in_step)
FABRIC_CASES: tuple[Callable[[Fabric], None], ...] = (documents, one_of_two, words, alone)


def lost_peer(channel: Channel) -> None:
    """Rank 0's peer lives and says nothing, or has gone: a ``ChannelError`` in time, not a hang and not another one."""
    got = np.zeros(100, dtype=np.uint8)
    began = time.monotonic()
    try:
        channel.exchange([], [Message(peer=1, data=got)])
    except ChannelError as error:
        said = str(error)
    else:
        raise AssertionError("nothing arrived and nothing was raised")
    assert time.monotonic() - began < SILENT_S + 20
    assert "[1]" in said
