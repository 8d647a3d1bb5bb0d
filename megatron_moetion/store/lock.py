# SPDX-License-Identifier: Apache-2.0
"""Who may write to a node's store: one process for each of the node's ranks, until it ends.

A POSIX record lock belongs to a process. Forked children do not inherit it, and the kernel drops it when the process
ends, however it ends. A lock by ``flock`` would live on in every forked child.
"""

from __future__ import annotations

import fcntl
import os
import struct
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

from megatron_moetion.clock import Clock
from megatron_moetion.errors import CorruptArena, StoreError
from megatron_moetion.store.files import open_or_make, open_regular

LOCK_WAIT_S = 40.0
"""A supervisor ends the processes of a failed attempt within 30 s; their locks go with them."""
LOCK_NAME = "lock"
_POLL_S = 0.05
_SAID_AFTER_S = 3.0
_FLOCK = struct.Struct("@hhqqi4x")  # struct flock of 64-bit Linux: type, whence, start, length, pid


class NodeLock:
    """One rank's share of the lock on a node's folder: the byte that stands for its position on the node.

    The last rank also locks all bytes behind its own, so an earlier attempt with more ranks on the node is noticed.
    A process must hold at most one lock on a folder: closing any descriptor of the file drops all of them.
    """

    def __init__(self, fd: int, path: Path, start: int, length: int) -> None:
        self.path = path
        self._fd = fd
        self._span = (start, length)

    @classmethod
    def take(
        cls, folder: Path, position: int, num_ranks: int, *, wait_s: float, say: Callable[[str], None], clock: Clock
    ) -> NodeLock:
        """Lock rank number ``position`` of the ``num_ranks`` of this node; waits at most ``wait_s``.

        ``say`` is told when that takes longer than a moment. ``StoreError`` names the process that holds the lock.
        """
        path = folder / LOCK_NAME
        span = (position, 0 if position == num_ranks - 1 else 1)  # a length of 0 means without end
        fd = open_or_make(path)
        began = clock.monotonic()
        is_said = False
        try:
            while not _try(fd, *span):
                waited_s = clock.monotonic() - began
                holder = describe(_holder(fd, *span))
                if waited_s >= wait_s:
                    raise StoreError(
                        f"{folder} is still in use by {holder} after {wait_s:.0f} s. If it is left from an earlier "
                        f"attempt, end it; if it is another job, give this one another --moetion-run-id"
                    )
                if waited_s >= _SAID_AFTER_S and not is_said:
                    is_said = True
                    say(f"waiting up to {wait_s:.0f} s for {holder}, which still uses {folder}")
                clock.sleep(_POLL_S)
        except BaseException:
            os.close(fd)
            raise
        return cls(fd, path, *span)

    @property
    def has_file(self) -> bool:
        """Whether the locked file still stands under its name, where others would look for it."""
        try:
            return self.path.stat().st_ino == os.fstat(self._fd).st_ino
        except OSError:
            return False

    def renew(self) -> None:
        """Lock the file of this name again after somebody deleted it. ``StoreError`` if another process has it."""
        if self.has_file:  # closing a second descriptor of one file would drop the lock on it
            return
        fd = open_or_make(self.path)
        if not _try(fd, *self._span):
            holder = describe(_holder(fd, *self._span))
            os.close(fd)
            raise StoreError(f"{self.path.parent} was deleted, and {holder} has taken it since")
        os.close(self._fd)
        self._fd = fd

    def close(self) -> None:
        """Let others have the folder."""
        if self._fd >= 0:
            os.close(self._fd)
            self._fd = -1


@contextmanager
def alone(path: Path, *, wait_s: float, clock: Clock) -> Iterator[None]:
    """Within this no other process is within the same of ``path``; waits at most ``wait_s``.

    Threads of one process do not exclude each other. ``StoreError`` names the process that does not come to an end.
    """
    fd = open_or_make(path)
    try:
        until = clock.monotonic() + wait_s
        while not _try(fd, 0, 0):
            if clock.monotonic() >= until:
                raise StoreError(f"{path} is still locked by {describe(_holder(fd, 0, 0))} after {wait_s:g} s")
            clock.sleep(_POLL_S)
        yield
    finally:
        os.close(fd)


def holders(folder: Path) -> list[int]:
    """Ids of the processes that use a node's folder, sorted; 0 stands for one that lives in another container.

    It takes no lock and waits for nobody. A process must not ask this of a folder that it has locked itself: it would
    lose its lock.
    """
    try:
        fd = open_regular(folder / LOCK_NAME, os.O_RDONLY, of_anyone=True)
    except CorruptArena:  # nobody has ever locked it here, or it is none of ours
        return []
    try:
        return sorted(_holders(fd, 0, 0))
    finally:
        os.close(fd)


def describe(pid: int) -> str:
    """A process, for a person: its id and how it was started."""
    try:
        words = " ".join(Path(f"/proc/{pid}/cmdline").read_bytes().decode(errors="replace").replace("\0", " ").split())
    except OSError:
        words = ""
    return f"process {pid}" + (f" ({words[:80]})" if words else "")


def _try(fd: int, start: int, length: int) -> bool:
    try:
        fcntl.lockf(fd, fcntl.LOCK_EX | fcntl.LOCK_NB, length, start)
    except BlockingIOError:
        return False
    return True


def _holder(fd: int, start: int, length: int) -> int:
    """Id of a process that holds the lock; 0 where it has just gone or lives in another container."""
    found = _held(fd, start, length)
    return found[2] if found is not None else 0


def _holders(fd: int, start: int, length: int) -> set[int]:
    """Ids of all processes that hold a part of this span; a length of 0 means without end."""
    found = _held(fd, start, length)
    if found is None:
        return set()
    held_start, held_length, pid = found
    pids = {pid}
    if held_start > start:
        pids |= _holders(fd, start, held_start - start)
    behind = held_start + held_length
    if held_length and (not length or behind < start + length):
        pids |= _holders(fd, behind, start + length - behind if length else 0)
    return pids


def _held(fd: int, start: int, length: int) -> tuple[int, int, int] | None:
    """Start, length and process of a lock within this span, any of them; None without one."""
    asked = _FLOCK.pack(fcntl.F_WRLCK, os.SEEK_SET, start, length, 0)
    kind, _, held_start, held_length, pid = _FLOCK.unpack(fcntl.fcntl(fd, fcntl.F_GETLK, asked))
    return (held_start, held_length, pid) if kind != fcntl.F_UNLCK else None
