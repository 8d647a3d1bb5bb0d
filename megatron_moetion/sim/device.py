# SPDX-License-Identifier: Apache-2.0
"""A simulated device: streams whose work is done later than it is enqueued, in virtual time.

What is enqueued on a stream is done in order, each piece some time after the one before. A copy reads its source at the
last moment of its time and training writes at the first of its own, so that nothing is right by luck where an order
is missing. The device goes on while its process is stopped, and is gone with it.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable
from dataclasses import dataclass, field

import numpy as np

from megatron_moetion.arrays import Bytes, Digests, Int64s
from megatron_moetion.sim.schedule import Process, Simulator
from megatron_moetion.sim.threads import SimEvent
from megatron_moetion.snapshot.packer import HostPool

NAME = "model:0"
TRAINING, SIDE = 0, 1
"""Streams, as ``DevicePacker`` numbers those of a model."""
_USUAL_S = (0.0, 0.0003, 0.004, 0.03)
"""What a piece of work takes."""


@dataclass(eq=False)
class Work:
    """One piece of a stream's work. ``begin`` and ``end`` are its effects at these moments."""

    stream: int
    seconds: float
    begin: Callable[[], None] = lambda: None
    end: Callable[[], None] = lambda: None
    after: Work | None = None
    """Of another stream: this begins once that is done."""
    is_done: bool = False
    news: SimEvent | None = None
    waiting: list[int] = field(default_factory=list)
    """Streams whose next piece comes after this one."""
    digests: Digests | None = None


class Device:
    """One process's. ``delay_s``: by how much its copies are slower than usual now."""

    def __init__(self, simulator: Simulator, process: Process, delay_s: Callable[[], float]) -> None:
        self._simulator = simulator
        self._process = process
        self._delay_s = delay_s
        self._queues: dict[int, deque[Work]] = {TRAINING: deque(), SIDE: deque()}
        self._busy: set[int] = set()

    def train(self, write: Callable[[], None]) -> None:
        """Enqueue something that training writes."""
        self.enqueue(Work(stream=TRAINING, seconds=self._usual_s(), begin=write))

    def copy(self, stream: int, call: Callable[[Work], None]) -> Work:
        """Enqueue a copy."""
        work = Work(stream=stream, seconds=self._usual_s() + self._delay_s())
        work.end = lambda: call(work)
        self.enqueue(work)
        return work

    def enqueue(self, work: Work) -> None:
        """Behind all that its stream has to do."""
        work.news = SimEvent(self._simulator)
        self._queues[work.stream].append(work)
        self._go_on(work.stream)

    def settle(self) -> None:
        """Return when all that is enqueued on training's stream is done."""
        queue = self._queues[TRAINING]
        if queue:
            self.wait(queue[-1], None)

    def wait(self, work: Work, timeout_s: float | None) -> bool:
        """Whether it is done, within this time."""
        assert work.news is not None
        return work.is_done or (work.news.wait(timeout_s) or work.is_done)

    def _usual_s(self) -> float:
        return self._simulator.chance.choice(_USUAL_S)

    def _go_on(self, stream: int) -> None:
        queue = self._queues[stream]
        if stream in self._busy or not queue:
            return
        work = queue[0]
        if work.after is not None and not work.after.is_done:
            work.after.waiting.append(stream)
            return
        self._busy.add(stream)
        work.begin()
        self._simulator.at(self._simulator.now_s + work.seconds, lambda: self._finish(work))

    def _finish(self, work: Work) -> None:
        if self._process.is_dead:
            return  # and so is its memory
        work.end()
        work.is_done = True
        assert work.news is not None
        work.news.set()
        self._busy.discard(work.stream)
        self._queues[work.stream].popleft()
        for stream in {work.stream, *work.waiting}:
            self._go_on(stream)


class LazyPool:
    """What ``DevicePacker`` asks of a ``DevicePool``, of a simulated device."""

    pci_bus_id = ""
    num_sms = 4
    copy_engine = False

    def __init__(self, device: Device, host: HostPool) -> None:
        self._device = device
        self._host = host
        self._pieces: Int64s = np.empty((0, 3), dtype=np.int64)
        self._tickets: dict[int, Work] = {}
        self._issued = 0

    def pinned(self, nbytes: int) -> Bytes:
        """See ``DevicePool``."""
        return np.zeros(nbytes, dtype=np.uint8)

    def register(self, address: int, nbytes: int) -> LazyPool:
        """See ``DevicePool``: there is nothing to pin."""
        return self

    def close(self) -> None:
        """Of a registration."""

    def check_spans_are_here(self, spans: Int64s) -> None:
        """See ``DevicePool``: all memory is this process's."""

    def upload_pieces(self, pieces: Int64s, *, timeout_s: float = 60.0) -> None:
        """See ``DevicePool``."""
        self._pieces = pieces.copy()

    def pack(self, pieces: Int64s, chunks: Int64s, *, stream: int = 0, copy_engine_bytes: int | None = None) -> int:
        """See ``DevicePool``."""
        pieces, chunks = pieces.copy(), chunks.copy()

        def call(work: Work) -> None:
            work.digests = np.empty(len(chunks), dtype=np.uint64)
            self._host.pack(pieces, chunks, work.digests)

        return self._ticket(self._device.copy(stream, call))

    def pack_uploaded(self, chunks: Int64s, *, stream: int = 0, copy_engine_bytes: int | None = None) -> int:
        """See ``DevicePool``."""
        pieces: list[tuple[int, int, int]] = []
        rows: list[tuple[int, int, int, int]] = []
        for target, nbytes, first, count, at in chunks.tolist():
            rows.append((target, nbytes, len(pieces), count))
            pieces += [(s, target + to - at, n) for s, to, n in self._pieces[first : first + count].tolist()]
        table = np.array(pieces, dtype=np.int64).reshape(-1, 3)
        return self.pack(table, np.array(rows, dtype=np.int64).reshape(-1, 4), stream=stream)

    def scatter(self, pieces: Int64s, *, stream: int = 0, copy_engine_bytes: int | None = None) -> int:
        """See ``DevicePool``."""
        pieces = pieces.copy()
        return self._ticket(self._device.copy(stream, lambda work: self._host.scatter(pieces)))

    def wait(self, ticket: int, *, timeout_s: float) -> bool:
        """See ``DevicePool``."""
        return self._device.wait(self._tickets[ticket], timeout_s)

    def finish(self, ticket: int, digests: Digests | None = None, *, timeout_s: float = 60.0) -> None:
        """See ``DevicePool``."""
        work = self._tickets[ticket]
        self._device.wait(work, None)
        del self._tickets[ticket]
        if digests is not None:
            assert work.digests is not None
            digests[:] = work.digests

    def order_after(self, later: int, ticket: int) -> None:
        """See ``DevicePool``."""
        if ticket in self._tickets:
            self._device.enqueue(Work(stream=later, seconds=0.0, after=self._tickets[ticket]))

    def _ticket(self, work: Work) -> int:
        self._issued += 1
        self._tickets[self._issued] = work
        return self._issued
