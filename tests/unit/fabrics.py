# SPDX-License-Identifier: Apache-2.0
"""Real fabrics of several ranks in one process, over the loopback, and a network that can be broken."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Collection, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

from ends import AT_END
from torch import distributed as dist

from megatron_moetion.arrays import Bytes
from megatron_moetion.clock import SystemClock
from megatron_moetion.errors import ChannelError
from megatron_moetion.replicate.fabric import SocketFabric
from megatron_moetion.replicate.worker import SystemThreads


@dataclass(frozen=True, kw_only=True)
class _Fault:
    from_ranks: Collection[int] | None
    to_ranks: Collection[int] | None
    purpose: str | None
    act: Callable[[Sequence[Bytes]], Sequence[Bytes]]
    """Called with what is sent; with nothing where a rank dials."""


class Faults:
    """``Cuts`` that tests make and heal. None for ranks or purpose: any. May be used from any thread.

    A fault acts when a rank dials or sends; a sender that fails closes the connection, so its peer notices too.
    """

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._faults: list[_Fault] = []
        self.met = 0
        """How often a fault has acted."""

    @contextmanager
    def cut(self, a: Collection[int], b: Collection[int] | None = None, purpose: str | None = None) -> Iterator[None]:
        """Within this, nothing passes between these two sets of ranks, in either direction."""

        def fail(parts: Sequence[Bytes]) -> Sequence[Bytes]:
            raise ChannelError("cut")

        ways = [_Fault(from_ranks=x, to_ranks=y, purpose=purpose, act=fail) for x, y in ((a, b), (b, a))]
        with self._lock:
            self._faults += ways
        try:
            yield
        finally:
            with self._lock:
                self._faults = [f for f in self._faults if f not in ways]

    def reset(self, times: int, rank: int | None = None, peer: int | None = None, purpose: str | None = None) -> None:
        """The next sends of ``rank`` to ``peer`` fail, so many of them."""

        def fail(parts: Sequence[Bytes]) -> Sequence[Bytes]:
            raise ChannelError("reset")

        self._next(times, rank, peer, purpose, fail)

    def flip(
        self,
        times: int,
        rank: int | None = None,
        peer: int | None = None,
        purpose: str | None = None,
        position: int = -1,
    ) -> None:
        """In the next sends of ``rank`` to ``peer`` one byte of the last part arrives damaged."""

        def flip(parts: Sequence[Bytes]) -> Sequence[Bytes]:
            damaged = parts[-1].copy()
            damaged[position] ^= 1
            return [*parts[:-1], damaged]

        self._next(times, rank, peer, purpose, flip)

    def delay(
        self, seconds: float, times: int, rank: int | None = None, peer: int | None = None, purpose: str | None = None
    ) -> None:
        """The next sends of ``rank`` to ``peer`` take so long."""

        def wait(parts: Sequence[Bytes]) -> Sequence[Bytes]:
            time.sleep(seconds)
            return parts

        self._next(times, rank, peer, purpose, wait)

    def _next(
        self,
        times: int,
        rank: int | None,
        peer: int | None,
        purpose: str | None,
        act: Callable[[Sequence[Bytes]], Sequence[Bytes]],
    ) -> None:
        left = [times]

        def count(parts: Sequence[Bytes]) -> Sequence[Bytes]:
            if not parts or left[0] == 0:
                return parts
            left[0] -= 1
            self.met += 1
            return act(parts)

        ranks, peers = None if rank is None else (rank,), None if peer is None else (peer,)
        with self._lock:
            self._faults.append(_Fault(from_ranks=ranks, to_ranks=peers, purpose=purpose, act=count))

    # -- Cuts ------------------------------------------------------------------------------------------

    def dialling(self, rank: int, peer: int, purpose: str) -> None:
        self.sending(rank, peer, purpose, [])

    def sending(self, rank: int, peer: int, purpose: str, parts: Sequence[Bytes]) -> Sequence[Bytes]:
        with self._lock:
            faults = list(self._faults)
        for fault in faults:
            if (
                (fault.from_ranks is None or rank in fault.from_ranks)
                and (fault.to_ranks is None or peer in fault.to_ranks)
                and fault.purpose in (None, purpose)
            ):
                parts = fault.act(parts)
        return parts

    def receiving(self, rank: int, peer: int, purpose: str) -> None:
        pass


class Fabrics(list[SocketFabric]):
    """By rank. As a context manager it closes them at the end."""

    def __enter__(self) -> Fabrics:
        return self

    def __exit__(self, *exc: object) -> None:
        self.close()

    def close(self) -> None:
        for fabric in reversed(self):
            fabric.close()


def loopback_fabrics(n: int, **options: Any) -> Fabrics:
    """Of ranks 0 ... n - 1. ``options`` are those of ``SocketFabric.connect``; ``cuts`` may be ``Faults``."""
    store = dist.HashStore()
    fabrics = Fabrics()
    try:
        for rank in range(n):
            fabrics.append(loopback_fabric(store, rank, n, **options))
    except BaseException:
        fabrics.close()
        raise
    return fabrics


def loopback_fabric(store: dist.Store, rank: int, world_size: int, **options: Any) -> SocketFabric:
    """One of them. Rank 0 does not wait, and is waited for. The end of the test closes it where nothing else has."""
    settings: dict[str, Any] = {
        "ranks_per_host": 1,
        "timeout_s": 10.0,
        "in_flight_bytes": 1 << 20,
        "clock": SystemClock(),
        "threads": SystemThreads(),
        "interface": "lo",
    }
    fabric = SocketFabric.connect(store=store, rank=rank, world_size=world_size, **(settings | options))
    AT_END.callback(fabric.close)
    return fabric


def eventually(holds: Callable[[], bool], limit_s: float = 20.0) -> None:
    """Return once it holds; fail where it does not for so long."""
    deadline_s = time.monotonic() + limit_s
    while not holds():
        assert time.monotonic() < deadline_s, "it has not come about"
        time.sleep(0.01)
