# SPDX-License-Identifier: Apache-2.0
"""Connections of pairs of ranks over TCP, each made where it is needed.

A rank listens on one port. Its address and a token of the job stand in the rendezvous store: a rank asks the store once
for each peer that it needs. The listener says 16 random bytes, its challenge. The caller answers with a hello, which
only a rank of this job can make, for this connection only:

| bytes | field |
| --- | --- |
| 8 | ``MAGIC``, with the version |
| 4, 4 | from, to: ranks, little-endian |
| 16 | random, so that no two hellos are equal |
| 1, n | length of the purpose, and the purpose in ASCII |
| 32 | HMAC-SHA256 of the challenge and all before, keyed with the token |

The listener answers with the HMAC of the hello's 32 bytes. A hello of anybody else, or for another rank, is closed at
once; one whose purpose is not served yet is closed too, and dialled again. The token keeps jobs apart that share a
network; it does not encrypt.
"""

from __future__ import annotations

import contextlib
import hashlib
import hmac
import logging
import socket
import struct
import threading
from collections.abc import Callable
from functools import partial

from megatron_moetion.clock import Clock
from megatron_moetion.errors import ChannelError
from megatron_moetion.replicate.addresses import Directory
from megatron_moetion.replicate.channel import Connection
from megatron_moetion.replicate.connection import NO_CUTS, PROGRESS_S, UNSENT_BYTES, Cuts, SocketConnection
from megatron_moetion.replicate.kernel import SYSTEM_KERNEL, Kernel, Socket
from megatron_moetion.replicate.worker import Thread, Threads

MAGIC = b"MOETNET1"
HELLO_S = 5.0
"""What a hello, or its answer, may take."""
JOIN_S = 0.3
"""What threads get to end when a mesh is closed or abandoned, all of them together."""
_HEAD = struct.Struct("<8sII16sB")
_STRANGERS = 256
"""Connections whose hello is awaited at once; more are closed."""
_RETRY_S = (0.02, 0.5)
"""First and longest pause between two attempts to dial."""
_MAC_BYTES = 32
_CHALLENGE_BYTES = 16
_logger = logging.getLogger("megatron_moetion")


class SocketMesh:
    """``Mesh`` over TCP. ``directory`` knows where the ranks listen; whoever makes a mesh lets it tell this rank's."""

    def __init__(
        self,
        rank: int,
        world_size: int,
        directory: Directory,
        *,
        clock: Clock,
        threads: Threads,
        kernel: Kernel = SYSTEM_KERNEL,
        progress_s: float = PROGRESS_S,
        hello_s: float = HELLO_S,
        unsent_bytes: int = UNSENT_BYTES,
        cuts: Cuts = NO_CUTS,
    ) -> None:
        self.rank = rank
        self.world_size = world_size
        self._directory = directory
        self._clock = clock
        self._of_threads = threads
        self.kernel = kernel
        self._progress_s = progress_s
        self._hello_s = hello_s
        self._unsent_bytes = unsent_bytes
        self._cuts = cuts
        self._handlers: dict[str, Callable[[SocketConnection], None]] = {}
        self._lock = threading.RLock()  # a signal handler may abandon what this thread is in the middle of
        self._open: set[SocketConnection] = set()
        self._threads: set[Thread] = set()
        self._strangers = 0
        self._is_closed = threads.event()
        self._listener = kernel.listen()
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
                wait_s = pause_s * self.kernel.between(0.5, 1.0)
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
            if not thread.is_current:
                thread.join(max(0.0, deadline_s - self._clock.monotonic()))

    close = abandon

    # -- dialling --------------------------------------------------------------------------------------

    def _dial_once(self, peer: int, purpose: str, timeout_s: float) -> SocketConnection:
        place = self._directory.find(peer, timeout_s)
        limit_s = min(timeout_s, self._hello_s)
        sock = self.kernel.dial(place, limit_s)
        try:
            deadline_s = self._clock.monotonic() + limit_s
            challenge = self._read(sock, _CHALLENGE_BYTES, deadline_s)
            sock.sendall(hello := self._hello(peer, purpose, challenge))
            answer = self._read(sock, _MAC_BYTES, deadline_s)
            if not hmac.compare_digest(answer, self._mac(hello[-_MAC_BYTES:])):
                raise ConnectionError("somebody else answers there")
            return self._take(sock, peer, purpose)
        except BaseException:
            sock.close()
            raise

    def _hello(self, peer: int, purpose: str, challenge: bytes) -> bytes:
        name = purpose.encode("ascii")
        text = _HEAD.pack(MAGIC, self.rank, peer, self.kernel.random_bytes(16), len(name)) + name
        return text + self._mac(challenge + text)

    def _mac(self, text: bytes) -> bytes:
        return hmac.digest(self._directory.token, text, hashlib.sha256)

    def _take(self, sock: Socket, peer: int, purpose: str) -> SocketConnection:
        connection = SocketConnection(
            sock,
            self.rank,
            peer,
            purpose,
            clock=self._clock,
            kernel=self.kernel,
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

    def _welcome(self, sock: Socket) -> None:
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

    def _known(self, sock: Socket) -> tuple[SocketConnection, Callable[[SocketConnection], None]]:
        """The connection of a rank of this job, and who serves its purpose. ``OSError`` where it is none."""
        deadline_s = self._clock.monotonic() + self._hello_s
        sock.sendall(challenge := self.kernel.random_bytes(_CHALLENGE_BYTES))
        head = self._read(sock, _HEAD.size, deadline_s)
        magic, peer, to, _, length = _HEAD.unpack(head)
        if magic != MAGIC or to != self.rank or not 0 <= peer < self.world_size:
            raise ConnectionError("not a rank of this job")
        name, mac = (self._read(sock, nbytes, deadline_s) for nbytes in (length, _MAC_BYTES))
        if not hmac.compare_digest(mac, self._mac(challenge + head + name)):
            raise ConnectionError("not a rank of this job")
        purpose = name.decode("ascii", "replace")
        handler = self._handlers.get(purpose)
        if handler is None:
            raise ConnectionError("nobody serves this yet")
        sock.sendall(self._mac(mac))
        return self._take(sock, peer, purpose), handler

    def _read(self, sock: Socket, nbytes: int, deadline_s: float) -> bytes:
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
        try:
            thread = self._of_threads.start(call, name)
        except RuntimeError:  # the interpreter ends, or the system has no thread to give
            return False
        with self._lock:
            self._threads = {each for each in self._threads if each.is_alive()} | {thread}
        return True
