# SPDX-License-Identifier: Apache-2.0
"""The channel contract, written once: two ranks call each case with their channel; a failed case raises.

Run as a program it is one rank of the gloo implementation: ``channel_cases.py RANK STORE RESULTS``.
"""

from __future__ import annotations

import json
import os
import sys
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import numpy.typing as npt

from megatron_moetion.clock import SystemClock
from megatron_moetion.errors import ChannelError
from megatron_moetion.replicate.channel import Channel, Fabric, Message
from megatron_moetion.replicate.worker import SystemThreads

IN_FLIGHT_BYTES = 1 << 18  # several slices a message, and fewer bytes than the largest message
SILENT_S = 2.0


class OpenGate:
    """Lets everything through and counts it."""

    admitted = 0
    left_bytes = 0

    def slice_bytes(self) -> int:
        return 1 << 14

    def in_flight_bytes(self) -> int:
        return 1 << 15

    def admit(self, nbytes: int) -> None:
        self.admitted += nbytes

    def left(self, nbytes: int, posted_s: float) -> None:
        assert posted_s <= time.monotonic()
        self.left_bytes += nbytes


OPEN = OpenGate()


def content(seed: int, nbytes: int) -> npt.NDArray[np.uint8]:
    return np.random.default_rng(seed).integers(0, 256, nbytes, dtype=np.uint8)


def both_ways(channel: Channel, rank: int) -> None:
    """Messages of all sizes, both directions at once, several to one peer, in order."""
    sizes = [1, 7, 64, 4096, 65536, 65537, 300_001, 1_000_003]
    mine = [content(10 * n + rank, size) for n, size in enumerate(sizes)]
    theirs = [np.zeros(size, dtype=np.uint8) for size in sizes]
    before = [m.copy() for m in mine]
    peer = 1 - rank
    channel.exchange([Message(peer=peer, data=m) for m in mine], [Message(peer=peer, data=t) for t in theirs])
    for n, (size, got) in enumerate(zip(sizes, theirs, strict=True)):
        assert (got == content(10 * n + peer, size)).all(), f"message {n} of {size} bytes"
    assert all((a == b).all() for a, b in zip(before, mine, strict=True)), "what is sent stays as it is"


def paced(channel: Channel, rank: int) -> None:
    """Slices of unequal size each way; a side that is held back still receives."""
    peer = 1 - rank
    mine, theirs = content(rank, 300_001), np.zeros(300_001, dtype=np.uint8)
    few, got = content(7, 100), np.zeros(100, dtype=np.uint8)
    sizes = (1 << 14, 5_000)
    sends = [Message(peer=peer, data=mine, slice_bytes=sizes[rank]), Message(peer=peer, data=few)]
    receives = [Message(peer=peer, data=theirs, slice_bytes=sizes[peer]), Message(peer=peer, data=got)]
    channel.exchange(sends, receives)
    assert (theirs == content(peer, 300_001)).all()
    assert (got == few).all()


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


def agreement(fabric: Fabric) -> None:
    """63 bits are AND-ed, once per start."""
    assert fabric.finish_agreement() is None
    fabric.start_agreement(*((1 << 62 | 0b1100, 0b1) if fabric.rank == 0 else (1 << 62 | 0b0110, 0b111)))
    assert fabric.finish_agreement() == (1 << 62 | 0b0100, 0b1)
    assert fabric.finish_agreement() is None


def sums(fabric: Fabric) -> None:
    """Counts add up over the ranks that share experts."""
    assert fabric.finish_sum() is None
    fabric.start_sum([fabric.rank + 1, 10**12, 0])
    assert fabric.finish_sum() == [3, 2 * 10**12, 0]
    assert fabric.finish_sum() is None


CHANNEL_CASES: tuple[Callable[[Channel, int], None], ...] = (
    both_ways,
    paced,
    one_way,
    nothing,
    into_the_middle,
    in_step,
)
FABRIC_CASES: tuple[Callable[[Fabric], None], ...] = (documents, agreement, sums)


def silent_peer(channel: Channel, rank: int) -> None:
    """A peer that lives and says nothing is a ``ChannelError`` in time."""
    if rank == 0:
        lost_peer(channel, rank)


def lost_peer(channel: Channel, rank: int) -> None:
    """A peer that has gone is a ``ChannelError`` in time, not a hang and not another error."""
    got = np.zeros(100, dtype=np.uint8)
    began = time.monotonic()
    try:
        channel.exchange([], [Message(peer=1 - rank, data=got)])
    except ChannelError as error:
        said = str(error)
    else:
        raise AssertionError("nothing arrived and nothing was raised")
    assert time.monotonic() - began < SILENT_S + 8
    assert "[1]" in said


def _as_gloo_rank(rank: int, store: Path, results: Path) -> None:
    from datetime import timedelta

    from megatron_moetion.replicate.gloo import GlooFabric
    from torch import distributed as dist

    dist.init_process_group(
        "gloo", init_method=f"file://{store}", rank=rank, world_size=2, timeout=timedelta(seconds=60)
    )
    fabric = GlooFabric.connect(
        timeout_s=20, in_flight_bytes=IN_FLIGHT_BYTES, gate=OPEN, clock=SystemClock(), threads=SystemThreads()
    )
    fabric.join_experts((0, 1))
    impatient = GlooFabric.connect(
        timeout_s=int(SILENT_S),
        in_flight_bytes=IN_FLIGHT_BYTES,
        gate=OPEN,
        clock=SystemClock(),
        threads=SystemThreads(),
    )
    found: dict[str, str] = {}

    def attempt(name: str, case: Callable[[], None]) -> None:
        try:
            case()
            found[name] = ""
        except Exception as error:
            found[name] = f"{type(error).__name__}: {error}"

    for channel_case in CHANNEL_CASES:
        attempt(channel_case.__name__, lambda case=channel_case: case(fabric.channel, rank))  # type: ignore[misc]
    for fabric_case in FABRIC_CASES:
        attempt(fabric_case.__name__, lambda case=fabric_case: case(fabric))  # type: ignore[misc]
    attempt("alone", lambda: _alone(impatient))
    attempt("silent_peer", lambda: silent_peer(impatient.channel, rank))
    attempt("together_again", lambda: documents(fabric))
    if rank == 1:
        results.write_text(json.dumps(found))
        os._exit(0)
    attempt("lost_peer", lambda: lost_peer(fabric.channel, rank))
    attempt("lost_gather", lambda: _lost_gather(fabric))
    results.write_text(json.dumps(found))
    os._exit(0)


def _alone(fabric: Fabric) -> None:
    """A rank that shares experts with nobody has its sums at once."""
    fabric.start_sum([4, 5])
    assert fabric.finish_sum() == [4, 5]


def _lost_gather(fabric: Fabric) -> None:
    """A collective that failed is repeated by every later one, of whatever kind, without asking anybody."""
    calls: list[Callable[[], object]] = [
        lambda: fabric.gather("anybody?"),
        lambda: fabric.gather("and now?"),
        lambda: fabric.start_agreement(1),
        lambda: fabric.start_sum([1]),
    ]
    said = []
    for call in calls:
        try:
            call()
        except ChannelError as error:
            said.append(str(error))
    assert len(said) == len(calls), f"only {said} although a rank has gone"
    assert len(set(said)) == 1, said


if __name__ == "__main__":
    _as_gloo_rank(int(sys.argv[1]), Path(sys.argv[2]), Path(sys.argv[3]))
