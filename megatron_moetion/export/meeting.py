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
NOTHING = -1
"""In place of an iteration: there is nothing to be written."""
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
        self._has_part = False

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

    def add_part(self, iteration: int, document: bytes) -> None:
        """This rank's part of ``iteration`` is in the folder, and this says what is in it."""
        self._put(f"{_PART}{iteration}-{self._rank:05d}", document)
        self._has_part = True

    @property
    def may_use_part(self) -> bool:
        """Whether rank 0's process may yet make a checkpoint with this rank's part: it stays in the folder then."""
        return self._has_part and not self._failure_of_rank_0.exists()

    def fail(self, why: str) -> None:
        """Nobody need wait for this rank: it has no part, or will wait no longer. Works without room on the disk."""
        try:
            self._put(f"{_FAILED}{self._rank:05d}", why[:_WHY_MAX].encode())
        except OSError:
            (self.folder / f"{_FAILED}{self._rank:05d}").touch()

    def parts(self, iteration: int, time_left: Callable[[], float]) -> list[bytes]:
        """The documents of all ranks, by rank. ``MeetingFailed`` where a rank has none, or when no time is left.

        A rank that has its part and has failed has waited for the others for as long as it may.
        """
        kind = f"{_PART}{iteration}-"
        while len(there := self._names(kind)) < self._world_size:
            done = {int(name.removeprefix(kind)) for name in there}
            failed = self._failed()
            for rank in failed.keys() - done:
                raise MeetingFailed(f"rank {rank}: {failed[rank]}")
            if failed or time_left() <= 0:
                missing = sorted(set(range(self._world_size)) - done)
                raise MeetingFailed(f"{_listed(missing)} of {self._world_size} never wrote a part")
            self._clock.sleep(_POLL_S)
        return [(self.folder / name).read_bytes() for name in sorted(there)]

    def require_rank_0(self) -> None:
        """``MeetingFailed`` where rank 0's process has given the checkpoint up."""
        found = self._failure_of_rank_0
        if found.exists():
            raise MeetingFailed(f"rank 0: {found.read_text(errors='replace')}")

    def wait_for_rank_0(self, time_left: Callable[[], float]) -> None:
        """Return once rank 0's process has made the folder a checkpoint; ``MeetingFailed`` where it has given it up."""
        while self.folder.exists():
            self.require_rank_0()
            if time_left() <= 0:
                raise MeetingFailed("rank 0's process has not put the parts together")
            self._clock.sleep(_WAIT_POLL_S)

    def tidy(self) -> None:
        """Remove the small files; what stays is the checkpoint."""
        for name in [*self._names(_PART), *self._names(_FAILED), *self._names(_READY), *self._names(_CHOSEN)]:
            (self.folder / name).unlink(missing_ok=True)

    def clear(self) -> None:
        """Remove all but the words of who has failed, which others may still be looking for."""
        for name in os.listdir(self.folder):
            if not name.startswith(_FAILED):
                with suppress(OSError):
                    (self.folder / name).unlink()

    # -- the iteration --------------------------------------------------------------------------------

    def choose(self, stable: int, written: int, time_left: Callable[[], float]) -> int:
        """The newest iteration that any rank calls stable, so that all have it; ``NOTHING`` if it is on disk already.

        Each rank says which one it calls so, and rank 0 decides; ``written`` is the newest on disk, as that one has it.
        ``MeetingFailed`` where not all ranks come in time.
        """
        self._put(f"{_READY}{self._rank:05d}-{stable}", b"")
        chosen = self.folder / _CHOSEN
        while not chosen.exists():
            if self._rank == 0:
                for rank, why in self._failed().items():
                    raise MeetingFailed(f"rank {rank}: {why}")
                said = {name.rsplit("-", 1)[0]: int(name.rsplit("-", 1)[1]) for name in self._names(_READY)}
                if len(said) == self._world_size:
                    newest = max(said.values())
                    self._put(_CHOSEN, str(newest if newest > written else NOTHING).encode())
                    continue
            self.require_rank_0()
            if time_left() <= 0:
                raise MeetingFailed("not all ranks' processes were told to end, so nothing is written")
            self._clock.sleep(_POLL_S if self._rank == 0 else _WAIT_POLL_S)
        return int(chosen.read_text())

    # -- files ----------------------------------------------------------------------------------------

    def _names(self, kind: str) -> list[str]:
        return [name for name in os.listdir(self.folder) if name.startswith(kind)]

    @property
    def _failure_of_rank_0(self) -> Path:
        return self.folder / f"{_FAILED}{0:05d}"

    def _failed(self) -> dict[int, str]:
        """The ranks that have, and why."""
        names = sorted(self._names(_FAILED))
        return {int(n.removeprefix(_FAILED)): (self.folder / n).read_text(errors="replace") for n in names}

    def _put(self, name: str, content: bytes) -> None:
        scratch = self.folder / f".{name}"
        scratch.write_bytes(content)
        scratch.rename(self.folder / name)


def _listed(ranks: list[int]) -> str:
    shown = ", ".join(map(str, ranks[:8])) + (", ..." if len(ranks) > 8 else "")
    return f"rank{'s' * (len(ranks) > 1)} {shown}"
