# SPDX-License-Identifier: Apache-2.0
"""An owner's side of one mirror: keeps a holder's copy of this rank's arena as the arena is.

A connection begins with the holder's table, so that whatever was lost on an earlier one is found missing and sent
again while its bytes stand in the arena. Anything wrong on a connection ends it; another one is made, after a pause
that grows with each failure in a row.
"""

from __future__ import annotations

import random
import threading
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass, replace
from typing import Any, Protocol

import numpy as np

from megatron_moetion.arrays import Digests, Int64s
from megatron_moetion.coding import WHOLE, Part
from megatron_moetion.errors import ChannelError
from megatron_moetion.replicate.channel import Connection, Gate, Mesh
from megatron_moetion.replicate.frames import PURPOSE, Frame, Kind, Opening, receive_frame, send_frame
from megatron_moetion.replicate.mirror import Difference, Update, among, difference, encode_digests, plain, table_of
from megatron_moetion.replicate.worker import Lock
from megatron_moetion.snapshot.codec import Codec, is_sound, spans_of
from megatron_moetion.snapshot.digest import CALL_BYTES, capture_digests, chunk_spans, gather_digests, num_chunks_of
from megatron_moetion.snapshot.packer import HostPool
from megatron_moetion.store.arena import Arena
from megatron_moetion.store.manifest import NO_RECORDS, RECORD, Page, Records

_REASON_BYTES_MAX = 4096
_UNKNOWN = -2
_BATCH_BYTES = CALL_BYTES
"""Of fragments, in memory at once and in one call of the pool, about."""
_NEWS_S = 10.0
"""A link looks at its arena so often at least, whether it is told of news or not."""


class Pacing(Protocol):
    """Who decides when a snapshot's bytes go."""

    gate: Gate
    """What a connection asks before each slice."""

    def transfer(self, nbytes: int, turns: int = 1) -> AbstractContextManager[None]:
        """Wraps a transfer, from its first byte until the holder has acknowledged it.

        ``turns``: so many transfers like it share an iteration.
        """
        ...


@dataclass(frozen=True, kw_only=True)
class Timing:
    """Bounds of a link's waits, in seconds."""

    answer_s: float = 120.0
    """For an answer of a holder."""
    dial_s: float = 5.0
    """For a connection."""
    pause_min_s: float = 0.1
    """After the first failure in a row."""
    pause_max_s: float = 5.0
    away_s: float = 2.0
    """No holder counts as away before, however many snapshots come in that time."""

    def pause_s(self, failures: int, chance: float) -> float:
        """Until the next attempt, after so many failures in a row. ``chance`` (0 to 1) spreads ranks over time."""
        longest = min(self.pause_max_s, self.pause_min_s * 2.0 ** min(failures - 1, 30))
        return longest * (0.5 + 0.5 * chance)


class Turns:
    """Lets one link of a rank at a time send captures.

    A rank has one pace and one deadline for its snapshots, which are those of one stream of bytes; two links that
    followed it at once would send twice as fast as it says. ``count``: links that share an iteration.
    """

    def __init__(self, pacing: Pacing, count: int, lock: Lock) -> None:
        self.gate = pacing.gate
        self._pacing = pacing
        self._count = count
        self._lock = lock

    @contextmanager
    def transfer(
        self, nbytes: int, snapshots: int, timeout_s: float, tell_waiting: Callable[[bool], None]
    ) -> Iterator[None]:
        """Wrap the transfer of one of so many ``snapshots``, which together go at the pace of one.

        ``tell_waiting`` is told when a wait for the turn begins and ends. ``ChannelError`` where another link does not
        end its own turn in time.
        """
        is_mine = self._lock.acquire(blocking=False)
        if not is_mine:
            tell_waiting(True)
            is_mine = self._lock.acquire(timeout=timeout_s)
            tell_waiting(False)
        if not is_mine:
            raise ChannelError(f"another holder of this rank's replicas has been sent to for {timeout_s:g} s")
        try:
            with self._pacing.transfer(nbytes, self._count * snapshots):
                yield
        finally:
            self._lock.release()


@dataclass(frozen=True, kw_only=True)
class LinkState:
    """What is known of a mirror. A value: it does not change."""

    is_up: bool = False
    """Whether there is a connection, as far as is known."""
    was_up: bool = False
    """Whether there has ever been one."""
    whole: frozenset[int] = frozenset()
    """Iterations up to which the holder has had everything that the arena lists, and of which it still lists some."""
    lacking: frozenset[int] = frozenset()
    """Iterations of which the holder lacked something that the arena listed, when last looked at."""
    looked: int = -1
    """The sequence number of the arena's page then."""
    is_level: bool = False
    """Whether the holder listed exactly what the arena did then."""
    updates: int = 0
    """That the holder has acknowledged."""
    is_waiting: bool = False
    """Whether it waits for its turn: another link sends."""
    taken: int = 0
    """Snapshots that it has taken on this connection."""
    failures: int = 0
    """Connections, and attempts at one, that failed."""
    problem: str | None = None
    """Why the last one failed, None since the holder has taken something."""
    refusal: str | None = None
    """Why the holder keeps no mirror, in its own words; None if it does or has not been asked."""
    has_ended: bool = False
    """The holder has given the mirror up, as it was told to."""


class Link:
    """One holder's mirror, in a thread of its own that ``run`` is. Others read ``state``.

    ``changed`` guards ``state``, wakes the link when the arena has news, and is notified with every new state, after
    ``tell`` was called.
    """

    def __init__(
        self,
        *,
        holder: int,
        mesh: Mesh,
        own: Arena,
        pool: HostPool,
        probe: Callable[[str, int], None],
        turns: Turns,
        timing: Timing,
        changed: threading.Condition,
        tell: Callable[[], None],
        part: Part = WHOLE,
    ) -> None:
        self.holder = holder
        self.part = part
        """What the holder keeps of each capture."""
        self.state = LinkState()
        self._mesh = mesh
        self._own = own
        self._pool = pool
        self._probe = probe
        self._turns = turns
        self._timing = timing
        self._changed = changed
        self._tell = tell
        self._chance = random.Random(holder * 65537 + mesh.rank)
        self._mirror = NO_RECORDS
        self._stable = _UNKNOWN  # as the holder has it
        self._in_a_row = 0  # failures since the holder had everything, or took something
        self._connection: Connection | None = None
        self._is_closed = False
        self._is_retired = False
        self._codec: Codec | None = None

    # -- for others ------------------------------------------------------------------------------------

    @property
    def is_retired(self) -> bool:
        """Whether the holder is to give the mirror up."""
        return self._is_retired

    def retire(self) -> None:
        """Tell the holder, as soon as it can be reached, to give the mirror up; then end. ``changed`` is held."""
        self._is_retired = True
        self._changed.notify_all()

    def keep(self) -> None:
        """Take ``retire`` back; a mirror that is being given up by then is made anew. ``changed`` is held."""
        self._is_retired = False

    def close(self) -> None:
        """End, and let what is under way fail. ``changed`` is held."""
        self._is_closed = True
        if self._connection is not None:
            self._connection.close()
        self._changed.notify_all()

    # -- the thread ------------------------------------------------------------------------------------

    def run(self) -> None:
        """Until ``close``, or until the holder has given a retired mirror up."""
        try:
            while not self._is_over():
                try:
                    with self._connected() as connection:
                        if self._is_to_give_up():
                            self._give_up(connection)
                        else:
                            self._open(connection)
                            self._serve(connection)
                except ChannelError as error:
                    self._in_a_row += 1
                    failures = self.state.failures + 1
                    self._set(is_up=False, is_level=False, taken=0, failures=failures, problem=str(error))
                    self._pause(self._timing.pause_s(self._in_a_row, self._chance.random()))
        finally:
            self._set(is_up=False, is_level=False)

    @contextmanager
    def _connected(self) -> Iterator[Connection]:
        """``ChannelError`` where there is no connection."""
        connection = self._mesh.dial(self.holder, PURPOSE, self._timing.dial_s)
        try:
            with self._changed:
                self._connection = connection
                if self._is_closed:
                    raise ChannelError("the link was closed")
            yield connection
        finally:
            with self._changed:
                self._connection = None
            connection.close()

    def _open(self, connection: Connection) -> None:
        spec, page = self._own.spec, self._own.page
        opening = Opening(spec=spec.of_part(self.part), page=page).encode()
        send_frame(connection, self._pool, Frame(kind=Kind.OPEN, epoch=page.epoch, body=opening))
        answer = self._answer(connection, max(_REASON_BYTES_MAX, spec.num_records * RECORD.itemsize))
        if answer.kind is not Kind.TABLE:
            self._set(refusal=answer.reason)
            raise ChannelError(f"rank {self.holder} keeps no replica of this rank: {answer.reason}")
        self._mirror, self._stable = table_of(answer.body), _UNKNOWN
        self._set(is_up=True, was_up=True, refusal=None)

    def _serve(self, connection: Connection) -> None:
        while not self._is_over():
            if self._is_to_give_up():
                self._give_up(connection)
                return
            page, found = self._look()
            if found.is_empty and page.stable == self._stable:
                self._in_a_row = 0
                self._wait_for_news(page)
            else:
                self._catch_up(connection, page, found)

    def _look(self) -> tuple[Page, Difference]:
        page = self._own.page
        found = difference(page.records, self._mirror)
        self._set(
            whole=found.whole,
            lacking=frozenset(found.iterations),
            looked=page.sequence,
            is_level=found.is_empty,
        )
        return page, found

    def _catch_up(self, connection: Connection, page: Page, found: Difference) -> None:
        """Everything that is missing now, iteration after iteration, at the pace of one snapshot."""
        behind = found.iterations
        if not behind:
            self._update(connection, page, found, NO_RECORDS, 1)
        for iteration in behind:
            page, found = self._look()
            added = found.missing.where(found.missing.table["iteration"] == iteration)
            if added and not self._is_over():
                self._update(connection, page, found, added, len(behind))

    def _update(self, connection: Connection, page: Page, found: Difference, added: Records, snapshots: int) -> None:
        """One step of the mirror, towards so many ``snapshots``.

        ``ChannelError`` where it is not made, except for captures that are gone.
        """
        stored = added.table["slot"][~added.is_zero].astype(np.int64)
        digests = self._digests(stored) if self.part.is_whole else np.empty(0, dtype=np.uint64)
        update = Update(dropped=found.stale, added=added, digests=digests)
        iteration = int(added.table["iteration"][0]) if added else 0
        frame = Frame(
            kind=Kind.UPDATE,
            epoch=page.epoch,
            iteration=iteration,
            stable=page.stable,
            dropped=len(found.stale),
            added=len(added),
            body=update.encode(),
        )
        send_frame(connection, self._pool, frame)
        self._agree(connection, iteration)
        self._mirror = self._mirror.where(~among(self._mirror, found.stale))
        self._stable = page.stable
        if len(stored):
            nbytes = sum(map(self.part.stored_bytes, added.table["nbytes"].tolist()))
            with self._turns.transfer(nbytes, snapshots, self._timing.answer_s, self._tell_waiting):
                self._probe("mid-replication", iteration)
                if self.part.is_whole:
                    connection.send(self._own.payloads(stored), gate=self._turns.gate)
                else:
                    self._send_fragments(connection, page, added.where(~added.is_zero))
                answer = self._answer(connection, _REASON_BYTES_MAX)
            if answer.kind is not Kind.YES:
                self._judge(added, answer.reason)
                return
        self._mirror = plain(self._mirror + added)
        self._in_a_row = 0
        taken = self.state.taken + bool(added)
        self._set(updates=self.state.updates + 1, taken=taken, problem=None)

    def _send_fragments(self, connection: Connection, page: Page, stored: Records) -> None:
        """Make the fragments of these captures, send them, and then their digests.

        None of these are sent where a capture is not what it was, or has lost its slot while it was read.
        """
        part, chunk_bytes = self.part, self._own.spec.identity.chunk_bytes
        codec = self._codec = self._codec or Codec(part.data, part.parity)
        payloads = self._own.payloads(stored.table["slot"].astype(np.int64))
        sizes = np.array([part.stored_bytes(len(payload)) for payload in payloads], dtype=np.int64)
        counts = num_chunks_of(sizes, chunk_bytes)
        digests = np.empty(int(counts.sum()), dtype=np.uint64)
        done, are_sound = 0, True
        for batch in spans_of(sizes.tolist(), chunk_bytes, _BATCH_BYTES):
            lengths = np.array([span.nbytes for span in batch], dtype=np.int64)
            buffer = np.empty(int(lengths.sum()), dtype=np.uint8)
            places = np.cumsum(lengths) - lengths
            for span, place in zip(batch, places.tolist(), strict=True):
                record, payload = stored[span.capture], payloads[span.capture]
                out = buffer[place : place + span.nbytes]
                codec.fragment(part.number, payload, record.digest, span.start, out)
                if span.start + span.nbytes == sizes[span.capture]:  # what was wrong when it was read still is
                    own = self._own.digests(record.slot)
                    are_sound = are_sound and is_sound(self._pool, chunk_bytes, part, payload, own, record.digest)
            spans = chunk_spans(buffer.ctypes.data + places, lengths, chunk_bytes)
            self._pool.digest(spans, digests[done : done + len(spans)])
            done += len(spans)
            connection.send([buffer], gate=self._turns.gate)
        # A slot is freed by an edit before it is written to again: what is listed now was there all the time.
        are_still_there = among(plain(stored), plain(self._own.page.records)).all()
        body = np.empty(0, dtype=np.uint8)
        if are_sound and are_still_there:
            places = digests.ctypes.data + 8 * (np.cumsum(counts) - counts)
            body = encode_digests(capture_digests(self._pool, places, counts), digests)
        send_frame(connection, self._pool, Frame(kind=Kind.DIGESTS, epoch=page.epoch, body=body))

    def _agree(self, connection: Connection, iteration: int) -> None:
        answer = self._answer(connection, _REASON_BYTES_MAX)
        if answer.kind is not Kind.YES:
            raise ChannelError(f"rank {self.holder} does not take iteration {iteration}: {answer.reason}")

    def _tell_waiting(self, is_waiting: bool) -> None:
        self._set(is_waiting=is_waiting)

    def _judge(self, added: Records, reason: str) -> None:
        """Captures that the arena has dropped meanwhile may have lost their slots: then nothing went wrong."""
        if not difference(added, plain(self._own.page.records)).missing:
            raise ChannelError(f"rank {self.holder} did not get what was sent: {reason}")

    def _is_to_give_up(self) -> bool:
        """Whether the link is retired. From here on its mirror counts for nothing, even if ``keep`` comes meanwhile."""
        with self._changed:
            if self._is_retired:
                self._set(is_up=False, is_level=False, taken=0, whole=frozenset())
            return self._is_retired

    def _give_up(self, connection: Connection) -> None:
        send_frame(connection, self._pool, Frame(kind=Kind.DROP, epoch=self._own.page.epoch))
        answer = self._answer(connection, _REASON_BYTES_MAX)
        if answer.kind is not Kind.YES:
            raise ChannelError(f"rank {self.holder} does not give its replica up: {answer.reason}")
        self._set(has_ended=True, is_up=False, is_level=False, whole=frozenset())

    def _answer(self, connection: Connection, body_bytes_max: int) -> Frame:
        return receive_frame(connection, self._pool, body_bytes_max=body_bytes_max, timeout_s=self._timing.answer_s)

    def _digests(self, slots: Int64s) -> Digests:
        """The chunk digests of these slots, one behind the other."""
        sizes = self._own.slot_bytes(slots)
        places = self._own.payload_addresses(slots) + sizes
        return gather_digests(self._pool, places, num_chunks_of(sizes, self._own.spec.identity.chunk_bytes))

    def _is_over(self) -> bool:
        return self._is_closed or self.state.has_ended

    def _wait_for_news(self, page: Page) -> None:
        with self._changed:
            self._changed.wait_for(
                lambda: self._is_over() or self._is_retired or self._own.page.sequence != page.sequence, _NEWS_S
            )

    def _pause(self, seconds: float) -> None:
        with self._changed:
            self._changed.wait_for(self._is_over, seconds)

    def _set(self, **changes: Any) -> None:
        with self._changed:
            self.state = replace(self.state, **changes)
            self._tell()
            self._changed.notify_all()
