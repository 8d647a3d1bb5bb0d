# SPDX-License-Identifier: Apache-2.0
"""One TCP connection between two ranks, and the places where tests break it."""

from __future__ import annotations

import contextlib
import select
import socket
import threading
from collections.abc import Iterator, Sequence
from typing import Protocol

from megatron_moetion.arrays import Bytes
from megatron_moetion.clock import Clock
from megatron_moetion.errors import ChannelError
from megatron_moetion.replicate.channel import Gate
from megatron_moetion.replicate.kernel import Kernel, Socket

PROGRESS_S = 10.0
"""A send or receive under way fails where no byte moves for so long."""
UNSENT_BYTES = 128 << 10
"""Bytes that may wait in the kernel of this machine before TCP takes them."""
_PARTS = 64
"""Parts handed to the kernel in one call; it takes at most 1024."""


class Cuts(Protocol):
    """Where tests break the network. Each call may raise a ``ChannelError``, or take its time."""

    def dialling(self, rank: int, peer: int, purpose: str) -> None:
        """``rank`` is about to dial ``peer``."""
        ...

    def sending(self, rank: int, peer: int, purpose: str, parts: Sequence[Bytes]) -> Sequence[Bytes]:
        """``rank`` is about to send these parts; returns what is sent in their place."""
        ...

    def receiving(self, rank: int, peer: int, purpose: str) -> None:
        """``rank`` is about to receive."""
        ...


class NoCuts:
    """The network as it is."""

    def dialling(self, rank: int, peer: int, purpose: str) -> None:
        """See ``Cuts``."""

    def sending(self, rank: int, peer: int, purpose: str, parts: Sequence[Bytes]) -> Sequence[Bytes]:
        """See ``Cuts``."""
        return parts

    def receiving(self, rank: int, peer: int, purpose: str) -> None:
        """See ``Cuts``."""


NO_CUTS = NoCuts()


class SocketConnection:
    """``Connection`` over one TCP socket, which it owns.

    What is handed to the kernel and not yet taken by TCP is bounded by ``unsent_bytes``, with a gate by its slice if
    that is less. A longer queue would carry no more, and on a slow link training's messages would wait behind it.
    """

    def __init__(
        self,
        sock: Socket,
        rank: int,
        peer: int,
        purpose: str,
        *,
        clock: Clock,
        kernel: Kernel,
        progress_s: float,
        unsent_bytes: int,
        cuts: Cuts,
    ) -> None:
        self.rank = rank
        self.peer = peer
        self.purpose = purpose
        self._socket = sock
        self._clock = clock
        self._kernel = kernel
        self._progress_s = progress_s
        self._cuts = cuts
        self._lock = threading.RLock()  # a signal handler may abandon what this thread is in the middle of
        self._users = 0
        self._is_closed = False
        self._most_unsent_bytes = unsent_bytes
        self._unsent_bytes = 0
        sock.setblocking(False)
        _tune(sock, progress_s)
        self._allow_unsent(unsent_bytes)

    def send(self, parts: Sequence[Bytes], *, gate: Gate | None = None) -> None:
        """See ``Connection``."""
        with self.in_use("send to"):
            parts = self.cut(parts)
            if gate is None:
                self._send_all([part.data for part in parts if part.nbytes])
            else:
                self._send_gated(parts, gate)

    def cut(self, parts: Sequence[Bytes]) -> Sequence[Bytes]:
        """What is sent in the place of these parts: the same, unless ``Cuts`` says otherwise."""
        return self._cuts.sending(self.rank, self.peer, self.purpose, parts)

    def receive(self, parts: Sequence[Bytes], timeout_s: float | None = None) -> None:
        """See ``Connection``."""
        with self.in_use("receive from"):
            self._cuts.receiving(self.rank, self.peer, self.purpose)
            wait_s = self._progress_s if timeout_s is None else timeout_s
            views = [part.data for part in parts if part.nbytes]
            first = 0
            while first < len(views):
                taken = self.receive_some(views[first : first + _PARTS])
                if not taken:
                    self._wait(select.POLLIN, wait_s)
                first = _passed(views, first, taken)

    def close(self) -> None:
        """See ``Connection``. Whoever waits for this socket is woken; the last one closes it."""
        with self._lock:
            if self._is_closed:
                return
            self._is_closed = True
            with contextlib.suppress(OSError):
                self._socket.shutdown(socket.SHUT_RDWR)
            if not self._users:
                self._socket.close()

    def detach(self) -> Socket:
        """The socket itself, non-blocking: it is the caller's from now on, and this connection is closed."""
        with self._lock:
            assert not self._users, "somebody uses this connection"
            if self._is_closed:
                raise ChannelError(f"the connection to rank {self.peer} is closed")
            self._is_closed = True
            return self._socket

    def handed_over(self) -> SocketConnection:
        """The same socket in another connection, which its holder closes; this one is closed."""
        return SocketConnection(
            self.detach(),
            self.rank,
            self.peer,
            self.purpose,
            clock=self._clock,
            kernel=self._kernel,
            progress_s=self._progress_s,
            unsent_bytes=self._most_unsent_bytes,
            cuts=self._cuts,
        )

    @contextlib.contextmanager
    def in_use(self, what: str) -> Iterator[None]:
        """The socket stays open, if shut down, while this lasts. Any error within closes the connection for good.

        ``what``: for the ``ChannelError`` that a lost peer becomes, as in "cannot ``what`` rank(s) [3]".
        """
        with self._lock:
            if self._is_closed:
                raise ChannelError(f"cannot {what} rank(s) [{self.peer}]: the connection is closed")
            self._users += 1
        try:
            yield
        except OSError as error:
            self.close()
            raise ChannelError(f"cannot {what} rank(s) [{self.peer}]: {error}") from error
        except BaseException:  # what was under way has been torn
            self.close()
            raise
        finally:
            self._leave()

    def fileno(self) -> int:
        """For ``select``; -1 once closed."""
        return self._socket.fileno()

    def send_some(self, views: Sequence[memoryview]) -> int:
        """Bytes of these that the kernel took at once; 0 if none. ``OSError`` where the peer is lost."""
        try:
            return self._socket.sendmsg(views[:_PARTS])
        except BlockingIOError:
            return 0

    def receive_some(self, views: Sequence[memoryview]) -> int:
        """Bytes that had arrived, put into these; 0 if none. ``OSError`` where the peer is lost."""
        try:
            taken = self._socket.recvmsg_into(views[:_PARTS])[0]
        except BlockingIOError:
            return 0
        if not taken:
            raise ConnectionResetError("the peer has closed the connection")
        return taken

    def _send_gated(self, parts: Sequence[Bytes], gate: Gate) -> None:
        slice_bytes = max(1, min(gate.slice_bytes(), gate.in_flight_bytes()))
        self._allow_unsent(min(slice_bytes, self._most_unsent_bytes))
        for views in _slices(parts, slice_bytes):
            nbytes = sum(map(len, views))
            gate.admit(nbytes)
            posted_s = self._clock.monotonic()
            self._send_all(views)
            gate.left(nbytes, posted_s)

    def _send_all(self, views: list[memoryview]) -> None:
        first = 0
        while first < len(views):
            taken = self.send_some(views[first : first + _PARTS])
            if not taken:
                self._wait(select.POLLOUT, self._progress_s)
            first = _passed(views, first, taken)

    def _wait(self, event: int, timeout_s: float) -> None:
        if not self._kernel.wait(self._socket, event, timeout_s):
            raise TimeoutError(f"nothing moved for {timeout_s:g} s")

    def _allow_unsent(self, nbytes: int) -> None:
        if nbytes != self._unsent_bytes:
            self._unsent_bytes = nbytes
            self._socket.setsockopt(socket.IPPROTO_TCP, socket.TCP_NOTSENT_LOWAT, nbytes)

    def _leave(self) -> None:
        with self._lock:
            self._users -= 1
            if self._is_closed and not self._users:
                self._socket.close()


def _passed(views: list[memoryview], first: int, nbytes: int) -> int:
    """So many bytes of the views from ``first`` on are done: the view that comes next, begun with what is not."""
    while first < len(views) and nbytes >= len(views[first]):
        nbytes -= len(views[first])
        first += 1
    if nbytes:
        views[first] = views[first][nbytes:]
    return first


def _slices(parts: Sequence[Bytes], slice_bytes: int) -> Iterator[list[memoryview]]:
    """The parts, one behind the other, cut into slices of this size; the last one may be shorter."""
    views: list[memoryview] = []
    room = slice_bytes
    for part in parts:
        view = part.data
        while len(view):
            views.append(view[:room])
            view, room = view[room:], room - len(views[-1])
            if not room:
                yield views
                views, room = [], slice_bytes
    if views:
        yield views


def _tune(sock: Socket, progress_s: float) -> None:
    """No byte waits for more to come, and a peer that has gone without a word is noticed."""
    sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
    sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_USER_TIMEOUT, int(progress_s * 1000))
    sock.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
    sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_KEEPIDLE, max(1, int(progress_s / 2)))
    sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_KEEPINTVL, max(1, int(progress_s / 4)))
    sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_KEEPCNT, 2)
