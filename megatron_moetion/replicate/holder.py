# SPDX-License-Identifier: Apache-2.0
"""A holder's side of mirrors: arenas that this rank keeps for others, each as its owner's is.

The owner decides. An update first drops what the owner's arena has dropped, which the stable iteration does not need,
then receives, then verifies and lists: cut short anywhere, the arena still has what it had except that.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

import numpy as np

from megatron_moetion.arrays import Int64s
from megatron_moetion.errors import ChannelError, IdentityMismatch, StoreError
from megatron_moetion.replicate.channel import Connection, Mesh
from megatron_moetion.replicate.frames import (
    OPENING_BYTES_MAX,
    PURPOSE,
    Frame,
    Kind,
    Opening,
    receive_frame,
    refusal,
    send_frame,
)
from megatron_moetion.replicate.mirror import Received, decode_update, plain, update_bytes_max
from megatron_moetion.replicate.worker import Lock, Threads
from megatron_moetion.snapshot.digest import num_chunks_of, scatter_digests, verify
from megatron_moetion.snapshot.packer import HostPool
from megatron_moetion.store.arena import Arena
from megatron_moetion.store.manifest import ITERATIONS_MAX, NO_SLOT, Page
from megatron_moetion.store.node import NodeFolder
from megatron_moetion.store.open import OpenArenas
from megatron_moetion.store.spec import ArenaShape, ArenaSpec, check_identity

SPARE_SHARE = 4
"""A node has room for another rank's arena where a part of its size, one in so many, would still be free afterwards."""


class Holder:
    """Serves the owners of the arenas that this rank keeps, each in a thread of its connection.

    An arena that an owner asks for and that is not here is made, where the node has room. ``timeout_s``: for bytes that
    an owner has announced; ``idle_s``: for an owner's next word. ``probe`` is called between the steps of an update.
    """

    def __init__(
        self,
        *,
        mesh: Mesh,
        arenas: OpenArenas,
        node: NodeFolder,
        pool: HostPool,
        probe: Callable[[str, int], None],
        threads: Threads,
        timeout_s: float = 120.0,
        idle_s: float = 3600.0,
    ) -> None:
        self._arenas = arenas
        self._placed = frozenset(arenas.held)
        """Owners whose arenas this node had from the start."""
        self._node = node
        self._pool = pool
        self._probe = probe
        self._timeout_s = timeout_s
        self._idle_s = idle_s
        self._guard = threads.lock()
        self._making = threads.lock()
        self._is_quiet = False
        self._connections: dict[int, Connection] = {}
        self._in_use: dict[int, Lock] = defaultdict(threads.lock)
        """By owner: held while its arena here is used. One thread at a time uses it."""
        mesh.serve(PURPOSE, self._handle)

    def close(self) -> None:
        """Let go of all owners. Afterwards no thread uses the arenas, unless one does not let go in time."""
        with self._guard:
            self._is_quiet = True
        self._let_go(ExitStack())

    def abandon(self) -> None:
        """Serve no owner any more, and do not wait for what is under way."""
        with self._guard:
            self._is_quiet = True
            for connection in self._connections.values():
                connection.close()

    @contextmanager
    def quiet(self) -> Iterator[bool]:
        """While it is entered nobody else uses the arenas; owners come back afterwards. False: somebody still does."""
        with self._guard:
            self._is_quiet = True
        try:
            with ExitStack() as locks:
                yield self._let_go(locks)
        finally:
            with self._guard:
                self._is_quiet = False

    def _let_go(self, locks: ExitStack) -> bool:
        """Close all connections and wait until their threads are done with the arenas; ``locks`` keeps them so."""
        with self._guard:
            in_use = list(self._in_use.values())
            for connection in self._connections.values():
                connection.close()
        is_free = True
        for lock in in_use:
            if lock.acquire(timeout=self._timeout_s):
                locks.callback(lock.release)
            else:
                is_free = False
        return is_free

    # -- one connection --------------------------------------------------------------------------------

    def _handle(self, connection: Connection) -> None:
        owner = connection.peer
        frame = receive_frame(connection, self._pool, body_bytes_max=OPENING_BYTES_MAX, timeout_s=self._timeout_s)
        with self._guard:
            if self._is_quiet:
                return
            before = self._connections.get(owner)
            self._connections[owner] = connection
            lock = self._in_use[owner]
        if before is not None:
            before.close()  # the owner has given it up
        try:
            if not lock.acquire(timeout=self._timeout_s):
                raise ChannelError(f"an earlier connection of rank {owner} does not let go of its arena")
            try:
                if self._may_go_on():
                    self._serve(connection, frame)
            finally:
                lock.release()
        finally:
            with self._guard:
                if self._connections.get(owner) is connection:
                    del self._connections[owner]

    def _may_go_on(self) -> bool:
        with self._guard:
            return not self._is_quiet

    def _serve(self, connection: Connection, first: Frame) -> None:
        if first.kind is Kind.DROP:
            self._drop(connection, first)
            return
        if first.kind is not Kind.OPEN:
            raise ChannelError(f"rank {connection.peer} opens with {first.kind.name}")
        try:
            arena = self._arena(Opening.decode(first.body, connection.peer), connection.peer)
        except StoreError as error:
            send_frame(connection, self._pool, refusal(first.epoch, str(error)))
            return
        records = plain(arena.whole_records(arena.page.records)).table.view(np.uint8)
        send_frame(connection, self._pool, Frame(kind=Kind.TABLE, epoch=first.epoch, body=records))
        largest = update_bytes_max(arena.spec)
        while True:
            frame = receive_frame(connection, self._pool, body_bytes_max=largest, timeout_s=self._idle_s)
            if frame.kind is Kind.DROP:
                self._drop(connection, frame)
                return
            if frame.kind is not Kind.UPDATE or frame.epoch != arena.page.epoch:
                raise ChannelError(
                    f"rank {connection.peer} sends {frame.kind.name} of epoch {frame.epoch}; here it is epoch "
                    f"{arena.page.epoch}"
                )
            self._update(connection, arena, frame)

    def _arena(self, opening: Opening, owner: int) -> Arena:
        """The arena to mirror in. ``StoreError`` where there is none, and no room for it, or it is another's."""
        spec = opening.spec
        if spec.identity.owner != owner:
            raise IdentityMismatch(f"rank {owner} opens the arena of rank {spec.identity.owner}")
        check_identity(spec, self._arenas.own.spec.identity, None, f"the arena that rank {owner} opens")
        held = self._arenas.held.get(owner)
        if held is None:
            return self._make(spec, opening.page)
        check_identity(held.spec, spec.identity, ArenaShape.of(spec), held.name)
        if held.spec.part != spec.part:
            raise IdentityMismatch(f"{held.name} has {held.spec.part}, and rank {owner} asks for {spec.part}")
        if not opening.is_history_of(held.page):
            raise IdentityMismatch(
                f"{held.name} is of epoch {held.page.epoch}, rank {owner} of epoch {opening.page.epoch}, or of another "
                f"history"
            )
        return held

    def _make(self, spec: ArenaSpec, page: Page) -> Arena:
        """An arena, where there is room; one at a time on a node, so that no two are promised the same room."""
        owner = spec.identity.owner
        with self._making, self._node.deciding(self._timeout_s):
            free = self._node.spare_bytes()
            if free < spec.nbytes + (0 if owner in self._placed else spec.nbytes // SPARE_SHARE):
                raise StoreError(f"there is no room for {spec.nbytes} bytes of rank {owner}: {free} are free")
            arena = self._node.create_arena(spec.name, spec, page)
        self._arenas.add(arena)
        return arena

    def _drop(self, connection: Connection, frame: Frame) -> None:
        held = self._arenas.held.get(connection.peer)
        if held is not None and held.page.epoch > frame.epoch:
            problem = f"{held.name} is of epoch {held.page.epoch}, its owner gives up that of epoch {frame.epoch}"
            send_frame(connection, self._pool, refusal(frame.epoch, problem))
            return
        arena = self._arenas.take_out(connection.peer)
        if arena is not None:
            arena.remove()
        send_frame(connection, self._pool, Frame(kind=Kind.YES, epoch=frame.epoch))

    # -- one update ------------------------------------------------------------------------------------

    def _update(self, connection: Connection, arena: Arena, frame: Frame) -> None:
        page = arena.page
        if not -1 <= frame.stable < ITERATIONS_MAX:
            raise ChannelError(f"rank {connection.peer} calls iteration {frame.stable} stable")
        update = decode_update(
            frame.body,
            dropped=frame.dropped,
            added=frame.added,
            iteration=frame.iteration,
            unit_bytes=arena.unit_bytes,
            chunk_bytes=arena.spec.identity.chunk_bytes,
            epoch=page.epoch,
            branches=page.branches,
            is_late=not arena.spec.part.is_whole,
        )
        self._release(arena, update, frame.stable)
        self._probe("held-dropped", frame.iteration)
        slots = self._take_slots(arena, update)
        if slots is None:
            send_frame(connection, self._pool, refusal(frame.epoch, f"{arena.name} has no free slot for it"))
            return
        problem = self._fill(connection, arena, update, slots, frame)
        answer = refusal(frame.epoch, problem) if problem else Frame(kind=Kind.YES, epoch=frame.epoch)
        send_frame(connection, self._pool, answer)

    def _release(self, arena: Arena, update: Received, stable: int) -> None:
        """Drop what the owner has dropped, and write its stable iteration down."""
        page = arena.page
        if len(update.dropped) or page.stable != stable:
            changes: dict[str, Any] = {"records": update.kept(page.records), "stable": stable}
            arena.edit(lambda _: changes)

    def _take_slots(self, arena: Arena, update: Received) -> Int64s | None:
        """A slot for each added capture; None, and no slot, where one is missing."""
        if not arena.can_list(len(update.added)):
            return None
        is_stored = ~update.added.is_zero
        taken = arena.acquire_all(update.added.table["nbytes"][is_stored].astype(np.int64))
        if taken is None:
            return None
        slots = np.full(len(update.added), NO_SLOT, dtype=np.int64)
        slots[is_stored] = taken
        return slots

    def _fill(self, connection: Connection, arena: Arena, update: Received, slots: Int64s, frame: Frame) -> str | None:
        """Receive, verify and list the added captures, all or none; why not, None if they are there."""
        stored = slots[slots != NO_SLOT]
        is_listed = False
        try:
            if len(stored):
                send_frame(connection, self._pool, Frame(kind=Kind.YES, epoch=frame.epoch))
                connection.receive(arena.payloads(stored), self._timeout_s)
                self._probe("held-received", frame.iteration)
                if update.num_late:
                    completed = self._digests(connection, arena, update)
                    if completed is None:
                        return "the captures have gone, or are damaged, while they were sent"
                    update = completed
                if not self._verify(arena, update, stored):
                    return "its bytes are not those that were captured"
            if update.added:
                arena.add(update.added.replace(slot=slots))
            is_listed = True
            self._probe("held-listed", frame.iteration)
            return None
        finally:
            if not is_listed:
                arena.release(stored)

    def _digests(self, connection: Connection, arena: Arena, update: Received) -> Received | None:
        """The update with the digests of its fragments, which follow their bytes; None where their owner has none."""
        largest = update_bytes_max(arena.spec)
        frame = receive_frame(connection, self._pool, body_bytes_max=largest, timeout_s=self._timeout_s)
        if frame.kind is not Kind.DIGESTS:
            raise ChannelError(f"rank {connection.peer} sends {frame.kind.name} and not the digests of its captures")
        return update.completed(frame.body)

    def _verify(self, arena: Arena, update: Received, stored: Int64s) -> bool:
        """Whether the bytes in these slots are those that the update announced; their digests are then kept."""
        chunk_bytes = arena.spec.identity.chunk_bytes
        addresses, sizes = arena.payload_addresses(stored), arena.slot_bytes(stored)
        expected = np.ascontiguousarray(update.added.table["digest"][~update.added.is_zero])
        if not verify(self._pool, chunk_bytes, addresses, sizes, update.digests, expected).all():
            return False
        scatter_digests(self._pool, update.digests, addresses + sizes, num_chunks_of(sizes, chunk_bytes))
        return True
