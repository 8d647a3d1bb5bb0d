# SPDX-License-Identifier: Apache-2.0
"""A folder on the shared file system where the processes of all ranks meet to write one checkpoint.

They say little to each other: small files that appear whole. Rank 0's process looks for those of the others, and the
others wait for one file of its at most.
"""

from __future__ import annotations

import fcntl
import os
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path

from megatron_moetion.clock import Clock

_POLL_S = 0.1
_WAIT_POLL_S = 0.5
_PART, _FAILED, _READY, _CHOSEN = "moetion-part-", "moetion-failed-", "moetion-ready-", "moetion-chosen"
_WHY_MAX = 1000


class MeetingFailed(Exception):
    """There will be no checkpoint, with the reason."""


class Meeting:
    """One rank's process in it. ``enter`` first, ``leave`` at last; ``OSError`` where the folder cannot be used.

    ``folder`` may be there already: any rank's process makes it.
    """

    def __init__(self, folder: Path, rank: int, world_size: int, clock: Clock) -> None:
        self.folder = folder
        self._rank = rank
        self._world_size = world_size
        self._clock = clock
        self._descriptor = -1

    def enter(self) -> None:
        """Make the folder, and hold it: who tidies up leaves it alone."""
        self.folder.mkdir(parents=True, exist_ok=True)
        self._descriptor = os.open(self.folder, os.O_RDONLY)
        with suppress(OSError):  # not every network file system has locks
            fcntl.flock(self._descriptor, fcntl.LOCK_SH)

    def leave(self) -> None:
        """Let go of the folder; it stays."""
        if self._descriptor >= 0:
            os.close(self._descriptor)
            self._descriptor = -1

    # -- parts ----------------------------------------------------------------------------------------

    def add_part(self, document: bytes) -> None:
        """This rank's part is in the folder, and this says what is in it."""
        self._put(f"{_PART}{self._rank:05d}", document)

    def fail(self, why: str) -> None:
        """This rank will have no part, so nobody need wait for it."""
        self._put(f"{_FAILED}{self._rank:05d}", why[:_WHY_MAX].encode())

    def parts(self, time_left: Callable[[], float]) -> list[bytes]:
        """The documents of all ranks, by rank. ``MeetingFailed`` where a rank has none, or when no time is left."""
        while len(there := self._names(_PART)) < self._world_size:
            self._require_no_failure()
            if time_left() <= 0:
                raise MeetingFailed(f"{_listed(self._missing(there))} of {self._world_size} never wrote a part")
            self._clock.sleep(_POLL_S)
        return [(self.folder / name).read_bytes() for name in sorted(there)]

    def wait_for_rank_0(self, time_left: Callable[[], float]) -> None:
        """Return once rank 0's process has made the folder a checkpoint, or has given it up."""
        while self.folder.exists():
            if time_left() <= 0:
                raise MeetingFailed("rank 0's process has not put the parts together")
            self._clock.sleep(_WAIT_POLL_S)

    def tidy(self) -> None:
        """Remove the small files; what stays is the checkpoint."""
        for name in [*self._names(_PART), *self._names(_FAILED), *self._names(_READY), *self._names(_CHOSEN)]:
            (self.folder / name).unlink(missing_ok=True)

    # -- the iteration --------------------------------------------------------------------------------

    def choose(self, stable: int, time_left: Callable[[], float]) -> int:
        """The newest iteration that any rank calls stable, so that all have it. Each rank says which one it does.

        ``MeetingFailed`` where not all ranks come in time.
        """
        self._put(f"{_READY}{self._rank:05d}-{stable}", b"")
        chosen = self.folder / _CHOSEN
        while True:
            if self._rank == 0 and len(there := self._names(_READY)) == self._world_size:
                self._put(_CHOSEN, str(max(int(name.rsplit("-", 1)[1]) for name in there)).encode())
            if chosen.exists():
                return int(chosen.read_text())
            self._require_no_failure()
            if time_left() <= 0:
                raise MeetingFailed("not all ranks' processes were told to end, so nothing is written")
            self._clock.sleep(_POLL_S)

    # -- files ----------------------------------------------------------------------------------------

    def _names(self, kind: str) -> list[str]:
        return [name for name in os.listdir(self.folder) if name.startswith(kind)]

    def _missing(self, there: list[str]) -> list[int]:
        found = {int(name.removeprefix(_PART)) for name in there}
        return [rank for rank in range(self._world_size) if rank not in found]

    def _require_no_failure(self) -> None:
        for name in sorted(self._names(_FAILED)):
            why = (self.folder / name).read_text(errors="replace")
            raise MeetingFailed(f"rank {int(name.removeprefix(_FAILED))}: {why}")

    def _put(self, name: str, content: bytes) -> None:
        scratch = self.folder / f".{name}"
        scratch.write_bytes(content)
        scratch.rename(self.folder / name)


def _listed(ranks: list[int]) -> str:
    shown = ", ".join(map(str, ranks[:8])) + (", ..." if len(ranks) > 8 else "")
    return f"rank{'s' * (len(ranks) > 1)} {shown}"
