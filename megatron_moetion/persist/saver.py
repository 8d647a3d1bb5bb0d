# SPDX-License-Identifier: Apache-2.0
"""Checkpoints on disk from the stable iteration in memory, written by a process of its own while training goes on.

A rank says what is to be written, and keeps its arena from releasing it until the writer has its own copy: a second or
so. Nothing waits for the writer, and whatever happens to it costs that checkpoint and nothing else.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, Protocol

from megatron_moetion.clock import Clock
from megatron_moetion.observe.journal import Journal
from megatron_moetion.persist.grace import Grace
from megatron_moetion.store.retention import Settled

HOLD_S, HOLD_BYTES_A_S = 20.0, 250e6
"""Longest that captures are kept for the writer's copy: some seconds, and more for much state. Afterwards the copy does
not verify, and is given up."""
START_S = 120.0
"""For a writer that is only just starting."""
_POLL_S = 0.05


class Writer(Protocol):
    """The process that writes one rank's part, as its rank sees it. Nothing here waits or raises."""

    def send(self, message: Mapping[str, Any]) -> bool:
        """Hand a message over; False where nobody takes it."""
        ...

    def hear(self) -> list[dict[str, Any]]:
        """What it has said since the last call."""
        ...

    @property
    def ended(self) -> str | None:
        """How it has ended, None while it lives."""
        ...

    def kill(self) -> None:
        """End it at once; what it is writing is lost."""
        ...

    def end(self, limit_s: float) -> None:
        """The job is told to end: have the newest stable iteration written, and wait for that. From any thread."""
        ...

    def close(self) -> None:
        """Say that nothing more will come. What it is writing it still writes, and then it ends."""
        ...


class NoWriter:
    """In place of a process that could not be started: a checkpoint fails for that reason, and it is tried again."""

    def __init__(self, why: str) -> None:
        self.ended: str | None = why

    def send(self, message: Mapping[str, Any]) -> bool:
        """Nobody is there."""
        return False

    def hear(self) -> list[dict[str, Any]]:
        """Nothing."""
        return []

    def kill(self) -> None:
        """Nobody is there."""

    def end(self, limit_s: float) -> None:
        """Nothing to wait for."""

    def close(self) -> None:
        """Nothing to close."""


class Releases:
    """What agreements allow arenas to release, on its way to them. Used by the training thread."""

    writes = False
    """Whether the stable iteration is written to disk, so that training need not stop for that."""

    def __init__(self) -> None:
        self._now: Settled | None = None

    def learn(self, settled: Settled) -> None:
        """The result of one agreement; in order, and the same on all ranks."""
        self._now = _joined(self._now, settled)

    def take(self) -> Settled | None:
        """What arenas may release now; None: nothing new."""
        taken, self._now = self._now, None
        return taken

    def finish(self, limit_s: float) -> None:
        """Wait until what is being written is on disk, at most this long."""

    def close(self) -> None:
        """No more results will come."""

    def abandon(self) -> None:
        """The process is about to end, and not because all is done."""


class Saver(Releases):
    """Has the first stable iteration written that reaches a multiple of ``interval`` (0: none of them).

    Equal results on all ranks lead to equal choices, without a word between them. ``start_writer`` makes the rank's
    process; it is called again where one has ended. ``written``: the iteration of the newest checkpoint that is there.
    ``state_bytes``: of this rank; ``limit_s``: after that a writer that has not done with one is ended; ``free_bytes``:
    memory that may be taken on this node.
    ``speaks``: on rank 0, which says for all ranks what has become of a checkpoint. ``grace_s``: how long a process
    that gets SIGTERM stays for its writer, 0: not at all; ``end`` ends it with an exit code.
    """

    writes = True

    def __init__(
        self,
        *,
        interval: int,
        written: int,
        state_bytes: int,
        limit_s: float,
        free_bytes: Callable[[], int],
        start_writer: Callable[[], Writer],
        journal: Journal,
        clock: Clock,
        speaks: bool,
        grace_s: float,
        end: Callable[[int], object],
    ) -> None:
        super().__init__()
        self._interval = interval
        self._hold_s = HOLD_S + state_bytes / HOLD_BYTES_A_S
        self._limit_s = limit_s + self._hold_s
        self._free_bytes = free_bytes
        self._due = _next(written, interval)
        self._start_writer = start_writer
        self._writer = start_writer()
        self._is_ready = False
        """The writer has come up."""
        self._has_come_up = False
        """Any has."""
        self._journal = journal
        self._clock = clock
        self._speaks = speaks
        self._is_ending = False
        """The job has been told to end, and what is stable is being written."""
        self._grace = Grace(lambda: self._end(grace_s), end)
        if grace_s and (why := self._grace.begin()) is not None:
            journal.warn_once("grace", written, f"this process ends at once when it gets SIGTERM: {why}")
        self._later: Settled | None = None
        """What may be released once the copy is made."""
        self._copying: int | None = None
        """The iteration that the writer is copying."""
        self._copy_since = 0.0
        self._writing: int | None = None
        """The iteration that is on its way to disk."""
        self._writing_since = 0.0

    def learn(self, settled: Settled) -> None:
        """See ``Releases``; what follows the iteration that is to be written is held back."""
        if self._copying is not None:
            self._later = _joined(self._later, settled)
        else:
            super().learn(settled)
        if self._interval and settled.stable >= self._due:
            self._due = _next(settled.stable, self._interval)
            self._begin(settled.stable)

    def take(self) -> Settled | None:
        """See ``Releases``."""
        self._hear()
        if self._is_ending:  # training may still go on, for no longer than the writer takes
            return None
        limit_s = self._hold_s if self._is_ready else START_S
        if self._copying is not None and self._clock.monotonic() - self._copy_since > limit_s:
            self._copying = None
        if self._copying is None and self._later is not None:
            self._now, self._later = _joined(self._now, self._later), None
        return super().take()

    def finish(self, limit_s: float) -> None:
        """See ``Releases``; a line says so where it takes more than a moment."""
        until = self._clock.monotonic() + limit_s
        said = self._clock.monotonic() + 1.0
        self._hear()
        while self._writing is not None and (now := self._clock.monotonic()) < until:
            if self._speaks and now > said:
                self._journal.info(self._writing, "training has ended; its last checkpoint is still being written")
                said = until
            self._clock.sleep(_POLL_S)
            self._hear()
        if self._writing is not None and self._speaks:
            self._journal.warn(self._writing, f"the checkpoint of this iteration is not on disk after {limit_s:.0f} s")

    def close(self) -> None:
        """See ``Releases``. What is being written goes on."""
        self._hear()
        self._writer.send({"is_over": True})
        self.abandon()

    def abandon(self) -> None:
        """See ``Releases``. What is being written goes on."""
        self._grace.close()
        self._writer.close()

    def _end(self, grace_s: float) -> None:
        """The last words of this process, in a thread of their own."""
        self._is_ending = True
        self._writer.end(grace_s)

    def _begin(self, iteration: int) -> None:
        """Have it written; a save that is still under way costs this one."""
        self._hear()
        why = None if self._writing is None else f"that of iteration {self._writing} is not done yet"
        is_asked = self._ask(iteration, why)
        if why is not None:
            self._tell(iteration, why)
        elif not is_asked:
            how = self._writer.ended
            self._tell(iteration, f"there is no process that writes it ({how})" if how else "its process takes nothing")
        else:
            self._copying = self._writing = iteration
            self._copy_since = self._writing_since = self._clock.monotonic()

    def _ask(self, iteration: int, why: str | None) -> bool:
        """Hand it to the writer, and to another one where that has ended. ``why``: this rank will have no part."""
        if self._writer.ended is not None:
            self._writer, self._is_ready = self._start_writer(), False
        return self._writer.send({"iteration": iteration, "why": why, "free": self._free_bytes()})

    def _hear(self) -> None:
        for said in self._writer.hear():
            iteration = said["iteration"]
            match said["what"]:
                case "ready":
                    self._is_ready, self._copy_since = True, self._clock.monotonic()
                    self._say_ready(said)
                case "copied" if iteration == self._copying:
                    self._copying = None
                case "saved":
                    self._writing = None if iteration == self._writing else self._writing
                    self._say_saved(iteration, said)
                case "failed" if iteration == self._writing:
                    self._give_up(said["why"])
        if (iteration := self._writing) is None:
            return
        if (how := self._writer.ended) is not None:
            why = f"the process that writes it has ended ({how})"
            self._give_up(why)
            self._ask(iteration, why)  # so that the processes of other ranks hear of it
        elif self._clock.monotonic() - self._writing_since > self._limit_s:
            self._writer.kill()
            self._give_up(f"it is not on disk after {self._limit_s:.0f} s")

    def _give_up(self, why: str) -> None:
        assert self._writing is not None, "there is one to give up"
        self._tell(self._writing, why)
        self._copying = self._writing = None

    def _say_ready(self, said: Mapping[str, Any]) -> None:
        if self._speaks and not self._has_come_up:
            often = f"one every {self._interval} iterations, and " if self._interval else ""
            where = f"checkpoints go to {said['root']} from memory, beside training"
            iteration = max(self._due - self._interval, 0)
            self._journal.info(iteration, f"{where}: {often}one when SIGTERM ends the job")
        self._has_come_up = True

    def _say_saved(self, iteration: int, said: Mapping[str, Any]) -> None:
        if not self._speaks:
            return
        figures = {name: said[name] for name in ("nbytes", "copy_s", "seconds")}
        self._journal.info(
            iteration,
            f"checkpoint written to {said['folder']} while training went on: {said['nbytes'] / 2**20:,.1f} MiB of this "
            f"rank, copied from memory in {said['copy_s']:.2f} s, whole after {said['seconds']:.1f} s",
        )
        self._journal.event("saved", iteration=iteration, folder=said["folder"], **figures)

    def _tell(self, iteration: int, why: str) -> None:
        """A checkpoint that is not written: each one from rank 0, else once."""
        text = f"no checkpoint of this iteration is written, and training goes on: {why}"
        if self._speaks:
            self._journal.warn(iteration, text)
            self._journal.event("save_failed", iteration=iteration, why=why)
        else:
            self._journal.warn_once("save", iteration, text)


def _next(iteration: int, interval: int) -> int:
    """The first multiple of ``interval`` beyond ``iteration``."""
    return (max(iteration, 0) // interval + 1) * interval if interval else 0


def _joined(earlier: Settled | None, later: Settled) -> Settled:
    return later if earlier is None else earlier.followed_by(later)
