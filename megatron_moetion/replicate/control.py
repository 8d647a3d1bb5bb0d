# SPDX-License-Identifier: Apache-2.0
"""The control plane of one rank: one thread, and one connection to each neighbour in any of its trees.

A child dials its parent, again and again if need be. A frame is

| bytes | field |
| --- | --- |
| 4 | bytes that follow the head of 12 bytes |
| 4 | CRC-32 of the four bytes before |
| 4 | CRC-32 of the bytes that follow |
| 1 | kind: 0 a heartbeat, 255 a farewell, else a ``Kind`` |
| 8 | tree: digest of its name and members |
| 8, 8 | number, floor |
| n | payload; of a heartbeat: pairs of uint32 rank and float32 seconds of silence |

all little-endian. A frame that is damaged closes the connection; what had no answer is said again on the next one.
"""

from __future__ import annotations

import contextlib
import logging
import selectors
import socket
import struct
import zlib
from collections import deque
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from hashlib import blake2b

import numpy as np

from megatron_moetion.clock import Clock
from megatron_moetion.errors import ChannelError
from megatron_moetion.replicate.channel import Connection
from megatron_moetion.replicate.connection import NO_CUTS, Cuts, SocketConnection
from megatron_moetion.replicate.kernel import Socket
from megatron_moetion.replicate.rounds import KEPT, Kind, Merge, Rounds, Say
from megatron_moetion.replicate.sockets import JOIN_S, SocketMesh
from megatron_moetion.replicate.tree import ARITY, place_of
from megatron_moetion.replicate.worker import Thread, Threads

PURPOSE = "control"
HEARTBEAT_S = 1.0
SILENT_BEATS = 5
"""A neighbour is silent after so many heartbeats without a word."""
NAMED = 64
"""Silent ranks that are told of, at most; the longest silent ones."""
FRAME_BYTES_MAX = 64 << 20
QUEUED_BYTES_MAX = 2 * FRAME_BYTES_MAX
"""What may wait for one neighbour; a connection that takes less is closed."""
DIAL_S = 5.0
FLUSH_S = 2.0
"""What a fabric that is closed gives its last words to leave."""
_REDIAL_S = (0.05, 1.0)
_LENGTH = struct.Struct("<I")
_HEAD = struct.Struct("<III")
_BODY = struct.Struct("<BQqq")
_BEAT, _FAREWELL = 0, 255
_SILENT = np.dtype([("rank", "<u4"), ("seconds", "<f4")])
_READ_BYTES = 1 << 18
_logger = logging.getLogger("megatron_moetion")


class Tree:
    """One rank's end of one tree: rounds that the control plane moves on. Made by ``Control.join``."""

    def __init__(self, control: Control, key: int, rounds: Rounds) -> None:
        self._control = control
        self._key = key
        self._rounds = rounds
        self.failure: Exception | None = None
        """What ``merge`` raised; there are no results after it."""

    def contribute(self, number: int, payload: bytes) -> None:
        """This rank's contribution to a round. Does not wait.

        What there is to say is with the kernel when this returns, as long as it takes anything: so a process may end
        as soon as it has a result, and the others get it too.
        """
        with self._control.changed:
            before = self._rounds.given_up
            self._control.act(self._key, lambda rounds: rounds.contribute(number, payload))
            self._control.write()
            is_first = not before and self._rounds.given_up
        if is_first:
            _logger.warning(
                "[moetion] rank %d: %d rounds without a result; older ones are given up. Ranks that are silent: %s",
                self._control.rank,
                self._rounds.kept,
                sorted(self._control.silent()) or "none",
            )

    def results(self) -> list[tuple[int, bytes]]:
        """Since the last call, in order."""
        with self._control.changed:
            return self._rounds.take_results()

    def wait(self, number: int, timeout_s: float) -> bool:
        """Return once this round, or a later one, has its result, or after the timeout; whether it has."""
        with self._control.changed:
            done = lambda: self._rounds.last >= number or self.failure is not None or self._control.is_closed
            self._control.changed.wait_for(done, timeout_s)
            return self._rounds.last >= number

    def missing(self, number: int) -> list[int]:
        """See ``Rounds.missing``."""
        with self._control.changed:
            return self._rounds.missing(number)

    # -- for the control plane, which holds ``changed`` ------------------------------------------------

    @property
    def rounds(self) -> Rounds:
        """The state, for ``Control``."""
        return self._rounds


@dataclass(eq=False, kw_only=True)
class _Neighbour:
    peer: int
    heard_s: float
    is_parent: bool = False
    is_watched: bool = False
    """In the tree of all ranks: its silence is told of."""
    socket: Socket | None = None
    is_dialling: bool = False
    dial_at_s: float = 0.0
    pause_s: float = _REDIAL_S[0]
    arrived: bytearray = field(default_factory=bytearray)
    queued: deque[memoryview] = field(default_factory=deque)
    queued_bytes: int = 0
    reported: dict[int, float] = field(default_factory=dict)
    """Ranks that it named as silent, and since when."""


class Control:
    """See the module. ``mesh`` is not this one's to close. Everything may be called from any thread."""

    def __init__(
        self,
        mesh: SocketMesh | None,
        rank: int,
        *,
        ranks_per_host: int,
        clock: Clock,
        threads: Threads,
        heartbeat_s: float = HEARTBEAT_S,
        arity: int = ARITY,
        cuts: Cuts = NO_CUTS,
    ) -> None:
        """Without a mesh there are no other ranks."""
        self.rank = rank
        self.changed = threads.condition()
        """Guards all that follows; notified when a result has come."""
        self.is_closed = False
        self._mesh = mesh
        self._ranks_per_host = ranks_per_host
        self._clock = clock
        self._heartbeat_s = heartbeat_s
        self._arity = arity
        self._cuts = cuts
        self._trees: dict[int, Tree] = {}
        self._neighbours: dict[int, _Neighbour] = {}
        self._silent: dict[int, float] = {}
        self._beat_s = clock.monotonic()
        self._flush_s = 0.0
        self._thread: Thread | None = None
        if mesh is not None:
            self._selector = mesh.kernel.selector()
            self._wake_out, self._wake_in = mesh.kernel.pair()
            for end in (self._wake_out, self._wake_in):
                end.setblocking(False)
            self._selector.register(self._wake_out, selectors.EVENT_READ, None)
            self._thread = threads.start(self._run, "moetion-control")
            mesh.serve(PURPOSE, self._adopt)

    def join(
        self, name: str, members: Sequence[int], merge: Merge, *, kept: int = KEPT, is_watched: bool = False
    ) -> Tree:
        """This rank's end of a tree over these ranks. ``is_watched``: neighbours in it are listened for."""
        with self.changed:
            ordered = sorted(set(members))
            text = f"{name}:{self._ranks_per_host}:{','.join(map(str, ordered))}"
            key = int.from_bytes(blake2b(text.encode(), digest_size=8).digest(), "little")
            assert key not in self._trees, f"there is a tree {name!r} already"
            place = place_of(self.rank, ordered, self._ranks_per_host, self._arity)
            tree = self._trees[key] = Tree(self, key, Rounds(place, merge, kept))
            for peer in (*place.children, *([place.parent] if place.parent is not None else [])):
                neighbour = self._neighbour(peer)
                neighbour.is_parent |= peer == place.parent
                neighbour.is_watched |= is_watched
            self.act(key, lambda rounds: [*rounds.here(), *rounds.again()])
            self._wake()
            return tree

    def silent(self) -> Mapping[int, float]:
        """See ``Fabric.silent``; as of the last heartbeat."""
        with self.changed:
            return dict(self._silent)

    def act(self, key: int, change: Callable[[Rounds], Sequence[Say]]) -> None:
        """Change a tree, and say what comes of it. The caller holds ``changed``."""
        tree = self._trees[key]
        if tree.failure is not None:
            return
        before = tree.rounds.last
        try:
            for say in change(tree.rounds):
                self._queue(self._neighbours[say.peer], _frame(say.kind, key, say.number, say.floor, say.payload))
        except Exception as error:  # a bug of ``merge``, or too much to say; whoever waits for this tree gets it
            tree.failure = error
            _logger.exception("[moetion] rank %d: cannot combine", self.rank)
        if tree.rounds.last != before or tree.failure is not None:
            self.changed.notify_all()

    def write(self) -> None:
        """Hand to the kernel what it takes. The caller holds ``changed``."""
        for neighbour in self._neighbours.values():
            self._write(neighbour)

    def close(self) -> None:
        """End; what has been said leaves first, within ``FLUSH_S``."""
        self._end(FLUSH_S)

    def abandon(self) -> None:
        """End at once."""
        self._end(0.0)

    def _end(self, flush_s: float) -> None:
        with self.changed:
            if not self.is_closed:
                self._flush_s = self._clock.monotonic() + flush_s
            self.is_closed = True
            self.changed.notify_all()
        if self._thread is not None:
            self._wake()
            self._thread.join(flush_s + JOIN_S)

    # -- called by any thread --------------------------------------------------------------------------

    def _neighbour(self, peer: int) -> _Neighbour:
        if peer not in self._neighbours:
            self._neighbours[peer] = _Neighbour(peer=peer, heard_s=self._clock.monotonic())
        return self._neighbours[peer]

    def _adopt(self, connection: Connection) -> None:
        """A child has dialled."""
        assert isinstance(connection, SocketConnection)
        with self.changed:
            self._connect(self._neighbour(connection.peer), connection)
        self._wake()

    def _dial(self, neighbour: _Neighbour) -> None:
        """In a thread of its own."""
        assert self._mesh is not None
        connection = None
        with contextlib.suppress(ChannelError):
            connection = self._mesh.dial(neighbour.peer, PURPOSE, DIAL_S)
        with self.changed:
            neighbour.is_dialling = False
            if connection is not None:
                self._connect(neighbour, connection)
        self._wake()

    def _connect(self, neighbour: _Neighbour, connection: SocketConnection) -> None:
        if neighbour.socket is not None:
            self._lose(neighbour)
        if self.is_closed:
            return connection.close()
        try:
            neighbour.socket = connection.detach()
        except ChannelError:
            return None
        neighbour.heard_s = self._clock.monotonic()
        self._selector.register(neighbour.socket, selectors.EVENT_READ, neighbour)
        for key, tree in self._trees.items():
            if tree.rounds.place.parent == neighbour.peer:
                self.act(key, Rounds.again)
            elif neighbour.peer in tree.rounds.place.children:
                self._queue(neighbour, _frame(Kind.HERE, key, 0, 0, b""))
        return None

    def _queue(self, neighbour: _Neighbour, frame: bytes) -> None:
        """To be sent, if the neighbour is connected; else it is said again when it is."""
        if neighbour.socket is None:
            return
        if neighbour.queued_bytes + len(frame) > QUEUED_BYTES_MAX:
            self._lose(neighbour)
            return
        neighbour.queued.append(memoryview(frame))
        neighbour.queued_bytes += len(frame)

    def _wake(self) -> None:
        if self._thread is not None and not self._thread.is_current:
            with contextlib.suppress(OSError):  # full: it is awake
                self._wake_in.send(b"\0")

    def _lose(self, neighbour: _Neighbour) -> None:
        if neighbour.socket is not None:
            self._selector.unregister(neighbour.socket)
            neighbour.socket.close()
            neighbour.socket = None
            for tree in self._trees.values():
                tree.rounds.child_lost(neighbour.peer)
            self._wake()
        neighbour.arrived.clear()
        neighbour.queued.clear()
        neighbour.queued_bytes = 0
        assert self._mesh is not None, "a rank that is alone has no neighbours"
        neighbour.dial_at_s = self._clock.monotonic() + neighbour.pause_s * self._mesh.kernel.between(0.5, 1.0)
        neighbour.pause_s = min(_REDIAL_S[1], neighbour.pause_s * 2)

    # -- the thread ------------------------------------------------------------------------------------

    def _run(self) -> None:
        is_known = False
        while not self.is_closed:
            try:
                self._turn()
            except Exception:  # a bug: all begin anew with this rank, which they cannot do without
                if not is_known:
                    _logger.exception("[moetion] rank %d: the control plane begins anew", self.rank)
                is_known = True
                with self.changed:
                    for neighbour in self._neighbours.values():
                        self._lose(neighbour)
                self._clock.sleep(self._heartbeat_s)
        self._flush()

    def _turn(self) -> None:
        """Wait until something is due, and do it."""
        found = self._selector.select(self._until())
        with self.changed:
            for key, _ in found:
                if key.data is None:
                    with contextlib.suppress(OSError):
                        self._wake_out.recv(1 << 12)
                elif key.fileobj is key.data.socket:
                    self._read(key.data)
            now_s = self._clock.monotonic()
            if now_s >= self._beat_s:
                self._beat(now_s, was_away=now_s - self._beat_s > SILENT_BEATS / 2 * self._heartbeat_s)
                self._beat_s = now_s + self._heartbeat_s
            for neighbour in self._neighbours.values():
                self._dial_if_due(neighbour, now_s)
            self.write()

    def _until(self) -> float:
        """Seconds until something is due."""
        with self.changed:
            due = [n.dial_at_s for n in self._neighbours.values() if self._wants_dial(n)]
        return max(0.0, min([self._beat_s, *due]) - self._clock.monotonic())

    def _wants_dial(self, neighbour: _Neighbour) -> bool:
        return neighbour.is_parent and neighbour.socket is None and not neighbour.is_dialling

    def _dial_if_due(self, neighbour: _Neighbour, now_s: float) -> None:
        if self._wants_dial(neighbour) and now_s >= neighbour.dial_at_s and self._mesh is not None:
            neighbour.dial_at_s = now_s + neighbour.pause_s
            neighbour.is_dialling = self._mesh.start(lambda: self._dial(neighbour), "moetion-dial")

    def _read(self, neighbour: _Neighbour) -> None:
        assert neighbour.socket is not None
        try:
            self._cuts.receiving(self.rank, neighbour.peer, PURPOSE)
            data = neighbour.socket.recv(_READ_BYTES)
        except BlockingIOError:
            return
        except (OSError, ChannelError):
            self._lose(neighbour)
            return
        neighbour.heard_s = self._clock.monotonic()
        neighbour.arrived += data
        if not data or not self._take_frames(neighbour):
            self._lose(neighbour)

    def _take_frames(self, neighbour: _Neighbour) -> bool:
        """Act on what has arrived whole; False where it is damaged."""
        arrived, start = neighbour.arrived, 0
        while len(arrived) - start >= _HEAD.size:
            length, length_checksum, checksum = _HEAD.unpack_from(arrived, start)
            if zlib.crc32(_LENGTH.pack(length)) != length_checksum or not _BODY.size <= length <= FRAME_BYTES_MAX:
                return False
            stop = start + _HEAD.size + length
            if len(arrived) < stop:
                break
            body = bytes(arrived[start + _HEAD.size : stop])
            if zlib.crc32(body) != checksum:
                return False
            start = stop
            neighbour.pause_s = _REDIAL_S[0]
            if not self._take(neighbour, body) or neighbour.socket is None:
                return False
        del arrived[:start]
        return True

    def _take(self, neighbour: _Neighbour, body: bytes) -> bool:
        """Act on a frame; False where it is none that a rank of this job can have made."""
        kind, key, number, floor = _BODY.unpack_from(body)
        payload, peer = body[_BODY.size :], neighbour.peer
        if kind == _BEAT:
            if len(payload) % _SILENT.itemsize or len(payload) > NAMED * _SILENT.itemsize:
                return False
            told = np.frombuffer(payload, dtype=_SILENT)
            assert self._mesh is not None, "a rank that is alone has no neighbours"
            if not (np.isfinite(told["seconds"]).all() and (told["rank"] < self._mesh.world_size).all()):
                return False
            now_s = self._clock.monotonic()
            neighbour.reported = {int(r): now_s - float(s) for r, s in zip(told["rank"], told["seconds"], strict=True)}
        elif kind == _FAREWELL:  # it is closed in good order, and silent from now on
            neighbour.is_watched, neighbour.reported = False, {}
        elif key in self._trees:  # else this rank has yet to join it, and will say so
            place = self._trees[key].rounds.place
            if kind == Kind.HERE and peer == place.parent:
                self.act(key, Rounds.again)
            elif kind == Kind.AGAIN:
                self.act(key, lambda rounds: rounds.child_again(peer, number))
            elif kind == Kind.UP:
                self.act(key, lambda rounds: rounds.from_child(peer, number, floor, payload))
            elif kind == Kind.DOWN and peer == place.parent:
                self.act(key, lambda rounds: rounds.from_parent(number, payload))
        return True

    def _write(self, neighbour: _Neighbour) -> None:
        """Hand over what the kernel takes; be called again when it takes more."""
        try:
            while neighbour.socket is not None and neighbour.queued:
                view = neighbour.queued[0]
                part = np.frombuffer(view, dtype=np.uint8)
                (cut,) = self._cuts.sending(self.rank, neighbour.peer, PURPOSE, [part])
                taken = neighbour.socket.send(cut.data)
                neighbour.queued_bytes -= taken
                if taken < len(view):
                    neighbour.queued[0] = view[taken:]
                else:
                    neighbour.queued.popleft()
        except BlockingIOError:
            pass
        except (OSError, ChannelError):
            self._lose(neighbour)
        if neighbour.socket is not None:
            wanted = selectors.EVENT_READ | (selectors.EVENT_WRITE if neighbour.queued else 0)
            if self._selector.get_key(neighbour.socket).events != wanted:
                self._selector.modify(neighbour.socket, wanted, neighbour)

    def _beat(self, now_s: float, *, was_away: bool) -> None:
        """Say that this rank lives, and who does not."""
        if was_away:  # this process was stopped; nobody else was silent
            for neighbour in self._neighbours.values():
                neighbour.heard_s = now_s
        above: dict[int, float] = {}
        below: dict[int, float] = {}
        for neighbour in self._neighbours.values():
            if not neighbour.is_watched:
                continue
            side = above if neighbour.is_parent else below
            if now_s - neighbour.heard_s >= SILENT_BEATS * self._heartbeat_s:
                neighbour.reported = {}
                side[neighbour.peer] = neighbour.heard_s
            side |= neighbour.reported
        everyone = {r: max(0.0, now_s - since_s) for r, since_s in (above | below).items() if r != self.rank}
        self._silent = dict(sorted(everyone.items(), key=lambda pair: -pair[1])[:NAMED])
        for neighbour in self._neighbours.values():
            if neighbour.socket is not None and not neighbour.queued:
                told = {r: s for r, s in self._silent.items() if r in below} if neighbour.is_parent else self._silent
                payload = np.array(list(told.items()), dtype=_SILENT).tobytes()
                self._queue(neighbour, _frame(_BEAT, 0, 0, 0, payload))

    def _flush(self) -> None:
        """Let what was said leave, then close: a peer reads all of it before it notices."""
        with self.changed:
            open_ones = [n for n in self._neighbours.values() if n.socket is not None]
            if self._clock.monotonic() < self._flush_s:
                for neighbour in open_ones:
                    self._queue(neighbour, _frame(_FAREWELL, 0, 0, 0, b""))
            while any(n.queued for n in open_ones) and self._clock.monotonic() < self._flush_s:
                for neighbour in open_ones:
                    self._write(neighbour)
                self.changed.wait(0.002)
            for neighbour in open_ones:
                if neighbour.socket is not None:
                    with contextlib.suppress(OSError):
                        neighbour.socket.shutdown(socket.SHUT_WR)
                self._lose(neighbour)
            self._selector.close()
            self._wake_out.close()
            self._wake_in.close()


def _frame(kind: int, key: int, number: int, floor: int, payload: bytes) -> bytes:
    """``ChannelError`` where it is too long."""
    length = _BODY.size + len(payload)
    if length > FRAME_BYTES_MAX:
        raise ChannelError(f"a control message of {length} bytes; at most {FRAME_BYTES_MAX} can be sent")
    body = _BODY.pack(kind, key, number, floor) + payload
    return _HEAD.pack(length, zlib.crc32(_LENGTH.pack(length)), zlib.crc32(body)) + body
