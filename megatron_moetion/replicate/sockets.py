# SPDX-License-Identifier: Apache-2.0
"""Connections of pairs of ranks over TCP, each made where it is needed.

A rank listens on one port. Its address and a token of the job stand in the rendezvous store: a rank asks the store once
for each peer that it needs. A connection begins with a hello that only a rank of this job can make:

| bytes | field |
| --- | --- |
| 8 | ``MAGIC``, with the version |
| 4, 4 | from, to: ranks, little-endian |
| 16 | random, so that no two hellos are equal |
| 1, n | length of the purpose, and the purpose in ASCII |
| 32 | HMAC-SHA256 of all before, keyed with the token |

The listener answers with the HMAC of the hello's 32 bytes. A hello of anybody else, or for another rank, is closed at
once; one whose purpose is not served yet is closed too, and dialled again. The token keeps jobs apart that share a
network; it does not encrypt.
"""

from __future__ import annotations

import contextlib
import hashlib
import hmac
import logging
import os
import random
import select
import socket
import struct
import threading
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from typing import Protocol

from megatron_moetion.arrays import Bytes
from megatron_moetion.clock import Clock
from megatron_moetion.errors import ChannelError
from megatron_moetion.replicate.addresses import Directory
from megatron_moetion.replicate.channel import Connection, Gate

MAGIC = b"MOETNET1"
PROGRESS_S = 10.0
"""A send or receive under way fails where no byte moves for so long."""
HELLO_S = 5.0
"""What a hello, or its answer, may take."""
UNSENT_BYTES = 128 << 10
"""Bytes that may wait in the kernel of this machine before TCP takes them."""
JOIN_S = 0.3
"""What threads get to end when a mesh is closed or abandoned, all of them together."""
_HEAD = struct.Struct("<8sII16sB")
_PARTS = 64
"""Parts handed to the kernel in one call; it takes at most 1024."""
_BACKLOG = 1024
_STRANGERS = 256
"""Connections whose hello is awaited at once; more are closed."""
_RETRY_S = (0.02, 0.5)
"""First and longest pause between two attempts to dial."""
_MAC_BYTES = 32
_logger = logging.getLogger("megatron_moetion")


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
        sock: socket.socket,
        rank: int,
        peer: int,
        purpose: str,
        *,
        clock: Clock,
        progress_s: float,
        unsent_bytes: int,
        cuts: Cuts,
    ) -> None:
        self.rank = rank
        self.peer = peer
        self.purpose = purpose
        self._socket = sock
        self._clock = clock
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
            parts = self._cuts.sending(self.rank, self.peer, self.purpose, parts)
            if gate is None:
                self._send_all([part.data for part in parts if part.nbytes])
            else:
                self._send_gated(parts, gate)

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

    def detach(self) -> socket.socket:
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
        poll = select.poll()
        poll.register(self._socket, event)
        if not poll.poll(timeout_s * 1000):
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


class SocketMesh:
    """``Mesh`` over TCP. ``directory`` knows where the ranks listen; whoever makes a mesh lets it tell this rank's."""

    def __init__(
        self,
        rank: int,
        world_size: int,
        directory: Directory,
        *,
        clock: Clock,
        progress_s: float = PROGRESS_S,
        hello_s: float = HELLO_S,
        unsent_bytes: int = UNSENT_BYTES,
        cuts: Cuts = NO_CUTS,
    ) -> None:
        self.rank = rank
        self.world_size = world_size
        self._directory = directory
        self._clock = clock
        self._progress_s = progress_s
        self._hello_s = hello_s
        self._unsent_bytes = unsent_bytes
        self._cuts = cuts
        self._handlers: dict[str, Callable[[SocketConnection], None]] = {}
        self._lock = threading.RLock()  # a signal handler may abandon what this thread is in the middle of
        self._open: set[SocketConnection] = set()
        self._threads: set[threading.Thread] = set()
        self._strangers = 0
        self._is_closed = threading.Event()
        self._listener = _listen()
        self.port = int(self._listener.getsockname()[1])
        self.start(self._accept, "moetion-listen")

    def dial(self, peer: int, purpose: str, timeout_s: float) -> SocketConnection:
        """See ``Mesh``. Dials again and again until the timeout."""
        deadline_s = self._clock.monotonic() + timeout_s
        pause_s, longest_s = _RETRY_S
        while True:
            left_s = deadline_s - self._clock.monotonic()
            try:
                self._cuts.dialling(self.rank, peer, purpose)
                return self._dial_once(peer, purpose, max(0.05, left_s))
            except (OSError, ChannelError) as error:
                pause_s = min(longest_s, pause_s * 2)
                wait_s = pause_s * random.uniform(0.5, 1.0)
                if self._is_closed.is_set() or self._clock.monotonic() + wait_s >= deadline_s:
                    raise ChannelError(f"rank(s) [{peer}] cannot be reached: {error}") from error
            self._is_closed.wait(wait_s)

    def serve(self, purpose: str, handler: Callable[[Connection], None]) -> None:
        """See ``Mesh``."""
        self._handlers[purpose] = handler

    def abandon(self) -> None:
        """Let go of everything: whoever waits for a connection is woken, and the threads get a moment to end."""
        self._is_closed.set()
        with contextlib.suppress(OSError):
            self._listener.shutdown(socket.SHUT_RDWR)
        with self._lock:
            connections, threads = list(self._open), list(self._threads)
        for connection in connections:
            connection.close()
        deadline_s = self._clock.monotonic() + JOIN_S
        for thread in threads:
            if thread is not threading.current_thread():
                thread.join(max(0.0, deadline_s - self._clock.monotonic()))

    close = abandon

    # -- dialling --------------------------------------------------------------------------------------

    def _dial_once(self, peer: int, purpose: str, timeout_s: float) -> SocketConnection:
        place = self._directory.find(peer, timeout_s)
        limit_s = min(timeout_s, self._hello_s)
        sock = socket.create_connection(place, timeout=limit_s)
        try:
            deadline_s = self._clock.monotonic() + limit_s
            sock.sendall(hello := self._hello(peer, purpose))
            answer = self._read(sock, _MAC_BYTES, deadline_s)
            if not hmac.compare_digest(answer, self._mac(hello[-_MAC_BYTES:])):
                raise ConnectionError("somebody else answers there")
            return self._take(sock, peer, purpose)
        except BaseException:
            sock.close()
            raise

    def _hello(self, peer: int, purpose: str) -> bytes:
        name = purpose.encode("ascii")
        text = _HEAD.pack(MAGIC, self.rank, peer, os.urandom(16), len(name)) + name
        return text + self._mac(text)

    def _mac(self, text: bytes) -> bytes:
        return hmac.digest(self._directory.token, text, hashlib.sha256)

    def _take(self, sock: socket.socket, peer: int, purpose: str) -> SocketConnection:
        connection = SocketConnection(
            sock,
            self.rank,
            peer,
            purpose,
            clock=self._clock,
            progress_s=self._progress_s,
            unsent_bytes=self._unsent_bytes,
            cuts=self._cuts,
        )
        with self._lock:
            self._open = {each for each in self._open if each.fileno() >= 0} | {connection}
        if self._is_closed.is_set():
            connection.close()
            raise ChannelError("the mesh is closed")
        return connection

    # -- listening -------------------------------------------------------------------------------------

    def _accept(self) -> None:
        while not self._is_closed.is_set():
            try:
                sock, _ = self._listener.accept()
            except OSError:
                if self._is_closed.wait(0.1):  # else a passing lack of file descriptors, or a caller that has gone
                    break
                continue
            with self._lock:
                is_crowded = self._strangers >= _STRANGERS
                self._strangers += not is_crowded
            if is_crowded or not self.start(partial(self._welcome, sock), "moetion-serve"):
                sock.close()
        self._listener.close()

    def _welcome(self, sock: socket.socket) -> None:
        """Read a hello and serve its purpose."""
        try:
            connection, handler = self._known(sock)
        except (OSError, ChannelError):
            sock.close()
            return
        finally:
            with self._lock:
                self._strangers -= 1
        try:
            handler(connection)
        except ChannelError:
            pass  # the peer has gone; it, or somebody, will be back
        except Exception:  # a bug: this connection ends, and training goes on
            _logger.exception(
                "[moetion] rank %d: serving %r to rank %d", self.rank, connection.purpose, connection.peer
            )
        finally:
            connection.close()

    def _known(self, sock: socket.socket) -> tuple[SocketConnection, Callable[[SocketConnection], None]]:
        """The connection of a rank of this job, and who serves its purpose. ``OSError`` where it is none."""
        deadline_s = self._clock.monotonic() + self._hello_s
        head = self._read(sock, _HEAD.size, deadline_s)
        magic, peer, to, _, length = _HEAD.unpack(head)
        if magic != MAGIC or to != self.rank or not 0 <= peer < self.world_size:
            raise ConnectionError("not a rank of this job")
        name, mac = (self._read(sock, nbytes, deadline_s) for nbytes in (length, _MAC_BYTES))
        if not hmac.compare_digest(mac, self._mac(head + name)):
            raise ConnectionError("not a rank of this job")
        purpose = name.decode("ascii")
        handler = self._handlers.get(purpose)
        if handler is None:
            raise ConnectionError("nobody serves this yet")
        sock.sendall(self._mac(mac))
        return self._take(sock, peer, purpose), handler

    def _read(self, sock: socket.socket, nbytes: int, deadline_s: float) -> bytes:
        """Exactly so many bytes of a socket that blocks. ``OSError`` where they do not arrive in time."""
        found = bytearray()
        while len(found) < nbytes:
            sock.settimeout(max(0.001, deadline_s - self._clock.monotonic()))
            part = sock.recv(nbytes - len(found))
            if not part:
                raise ConnectionResetError("the peer has closed the connection")
            found += part
        return bytes(found)

    def start(self, call: Callable[[], None], name: str) -> bool:
        """Call this in a thread that gets a moment to end when the mesh is closed; False where the process ends."""
        thread = threading.Thread(target=call, name=name, daemon=True)
        try:
            thread.start()
        except RuntimeError:  # the interpreter ends, or the system has no thread to give
            return False
        with self._lock:
            self._threads = {each for each in self._threads if each.is_alive()} | {thread}
        return True


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


def _listen() -> socket.socket:
    """On a free port of all interfaces."""
    if socket.has_dualstack_ipv6():
        with contextlib.suppress(OSError):
            return socket.create_server(("", 0), family=socket.AF_INET6, dualstack_ipv6=True, backlog=_BACKLOG)
    return socket.create_server(("", 0), backlog=_BACKLOG)


def _tune(sock: socket.socket, progress_s: float) -> None:
    """No byte waits for more to come, and a peer that has gone without a word is noticed."""
    sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
    sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_USER_TIMEOUT, int(progress_s * 1000))
    sock.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
    sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_KEEPIDLE, max(1, int(progress_s / 2)))
    sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_KEEPINTVL, max(1, int(progress_s / 4)))
    sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_KEEPCNT, 2)
