# SPDX-License-Identifier: Apache-2.0
"""The process that writes one rank's part of checkpoints on disk, from the rank's arena, while training goes on.

``persist/process.py`` starts it in the rank's process group and speaks with it over pipes, a JSON document a line. It
makes the captures of an iteration its own, verifies them, tells the rank, and writes. Ranks meet in a folder below the
checkpoints': each leaves its tensors and a table of them there, and rank 0's process makes them a checkpoint.

On SIGTERM, which a supervisor sends to whole groups when a job must leave, the processes of all ranks agree in such a
folder on the newest stable iteration, write that, and end. Without its rank a process ends what it is at, and itself.
"""

from __future__ import annotations

import json
import os
import select
import shutil
import signal
import sys
from collections.abc import Callable, Mapping
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

from megatron_moetion.clock import Clock, SystemClock
from megatron_moetion.export.assemble import memory_bytes, write_rank
from megatron_moetion.export.export import RankPart, replayer
from megatron_moetion.export.meeting import NOTHING, Meeting, MeetingFailed
from megatron_moetion.export.survey import owner_alone
from megatron_moetion.mcore.torch_dist import PartWriter, finish, part_name
from megatron_moetion.persist.tracker import DRAFT, checkpoint_folder, clear_drafts, latest_iteration, publish
from megatron_moetion.recover.survey import intact
from megatron_moetion.snapshot.host_state import decode, encode
from megatron_moetion.snapshot.packer import HostPool
from megatron_moetion.store.reading import read_only, take_over
from megatron_moetion.store.sharedfile import available_bytes

JOIN_S = 10.0
"""How long a process waits, after SIGTERM, for those of all other ranks: else only some are to end."""
ORPHAN_S = 120.0
"""How long rank 0's process waits for the parts of others when its rank has gone."""
_LOOK_S = 5.0
"""How often a process looks whether its rank is there: a forked child of the rank may hold its pipe open."""
_AFTER_RANK_S = 2.0
"""A signal to the whole group may come a little later than the end of the rank."""
_NICE = 10
_ENDING = "iter_ending"
"""The meeting of processes that were told to end."""


@dataclass(frozen=True, kw_only=True)
class Settings:
    """What the rank tells its process at the start; see ``run/saving.py``."""

    arena: str
    root: str
    rank: int
    world_size: int
    local_ranks: int
    history: str
    """Of the run, as far as this start: the names of folders carry it, so that two starts share none."""
    limit_s: float
    pid: int
    """Of the rank's process."""
    is_waited_for: bool
    """Whether ranks that are told to end stay until their processes have."""


class Rank(Protocol):
    """The rank, as its writer sees it."""

    is_ending: bool
    """Whether the job has been told to end."""

    def next(self) -> Mapping[str, Any] | None:
        """The next message; None when there will be none: the rank has gone, or the job ends."""
        ...

    @property
    def is_there(self) -> bool:
        """Whether the rank's process lives."""
        ...

    def say(self, **document: Any) -> None:
        """Tell the rank, if it is there."""
        ...


class Pipes:
    """The rank behind two pipes. Takes over SIGTERM."""

    def __init__(self, inward: int, outward: int) -> None:
        self._inward, self._outward = inward, outward
        self._rest = b""
        self._is_open = True
        self.pid = os.getppid()
        """The rank's; who knows better sets it."""
        self.is_ending = False
        self._woken, wake = os.pipe()
        for end in (self._woken, wake):
            os.set_blocking(end, False)
        signal.signal(signal.SIGTERM, self._end)
        signal.set_wakeup_fd(wake)

    def next(self) -> Mapping[str, Any] | None:
        """See ``Rank``."""
        while not self.is_ending:
            line, found, rest = self._rest.partition(b"\n")
            if found:
                self._rest = rest
                message: dict[str, Any] = json.loads(line)
                return message
            inputs = [self._woken, *([self._inward] if self._is_open else [])]
            ready, _, _ = select.select(inputs, [], [], _LOOK_S if self._is_open else _AFTER_RANK_S)
            if self._woken in ready:
                os.read(self._woken, 64)
            elif ready:
                data = os.read(self._inward, 1 << 16)
                self._rest += data
                self._is_open = bool(data)
            elif not self._is_open:
                return None
            else:
                self._is_open = self.is_there
        return None

    @property
    def is_there(self) -> bool:
        """See ``Rank``."""
        return os.getppid() == self.pid

    def say(self, **document: Any) -> None:
        """See ``Rank``."""
        with suppress(OSError):
            os.write(self._outward, json.dumps(document).encode() + b"\n")

    def _end(self, *_: object) -> None:
        self.is_ending = True


class _Log:
    """In place of a rank that ends: what it would have been told is for people."""

    is_ending = True
    is_there = True
    """It does not matter any more: a supervisor sets the limit."""

    def __init__(self, number: int) -> None:
        self._number = number

    def next(self) -> None:
        """Nothing more."""
        return

    def say(self, **document: Any) -> None:
        """On standard error: rank 0 speaks for all."""
        match document["what"]:
            case "saved" if self._number == 0:
                text = f"checkpoint written to {document['folder']} in {document['seconds']:.1f} s, as the job ends"
            case "failed" if self._number == 0:
                text = f"no checkpoint is written as the job ends: {document['why']}"
            case _:
                return
        print(f"[moetion] rank {self._number}: {text}", file=sys.stderr, flush=True)


class Service:
    """Writes what a rank asks for, one checkpoint after the other."""

    def __init__(self, settings: Settings, rank: Rank, num_threads: int, clock: Clock) -> None:
        self._settings = settings
        self._rank = rank
        self._num_threads = num_threads
        self._pool = HostPool(num_threads)
        self._clock = clock
        self._root = Path(settings.root)
        self._alone_since: float | None = None
        """When the rank was first seen gone."""

    def run(self) -> None:
        """Serve until nothing more will come."""
        if self._settings.rank == 0:
            clear_drafts(self._root)
        self._rank.say(what="ready", iteration=-1, root=self._settings.root)
        while (message := self._rank.next()) is not None and not message.get("is_over"):
            self._answer(message["iteration"], message["why"], message["free"])
        if self._rank.is_ending:
            self._rank = _Log(self._settings.rank)
            self._attempt(-1, self._meeting(_ENDING), self._save_newest)
        elif message is None and self._settings.is_waited_for:
            self._say_gone()
            return  # what it has said stays for a while
        if self._settings.rank == 0:
            clear_drafts(self._root)

    def _say_gone(self) -> None:
        """The rank has failed: those that are told to end for that need not wait for a checkpoint."""
        meeting = self._meeting(_ENDING)
        with suppress(OSError):
            meeting.enter()
            meeting.fail("its rank has ended by itself")
        meeting.leave()

    def _answer(self, iteration: int, why: str | None, free: int) -> None:
        def write(meeting: Meeting) -> None:
            if why is not None:
                raise MeetingFailed(why)
            self._save(iteration, meeting, self._written(), free)

        self._attempt(iteration, self._meeting(f"iter_{iteration:07d}"), write)

    def _meeting(self, name: str) -> Meeting:
        folder = self._root / f".{name}.{self._settings.history}{DRAFT}"
        return Meeting(folder, self._settings.rank, self._settings.world_size, self._clock)

    def _attempt(self, iteration: int, meeting: Meeting, write: Callable[[Meeting], None]) -> None:
        """Whatever goes wrong is said to the rank and to the other processes, and costs this checkpoint alone."""
        try:
            meeting.enter()
            write(meeting)
        except Exception as error:  # libraries that write raise what they like, and others must not wait for this part
            why = f"{error.strerror}: {error.filename}" if isinstance(error, OSError) else str(error) or repr(error)
            with suppress(OSError):
                if not meeting.may_use_part:
                    (meeting.folder / part_name(self._settings.rank)).unlink(missing_ok=True)
            with suppress(OSError):
                meeting.fail(why)
            if self._settings.rank == 0:
                with suppress(OSError):
                    meeting.clear()
            self._rank.say(what="failed", iteration=iteration, why=why)
        finally:
            meeting.leave()

    def _save(self, iteration: int, meeting: Meeting, written: int, free: int) -> None:
        """``written``: the newest checkpoint on disk before anything of this one was; ``free``: bytes of memory."""
        began = self._clock.monotonic()
        meeting.require_rank_0()
        document, copy_s = self._write_part(iteration, meeting.folder, began, free)
        meeting.add_part(iteration, encode(document))
        if self._settings.rank == 0:
            clear_drafts(self._root, but=meeting.folder)
            parts = [decode(part) for part in meeting.parts(iteration, lambda: self._time_left(began))]
            finish(meeting.folder, parts, iteration)
            meeting.tidy()
            newest = self._written()
            publish(meeting.folder, self._root, iteration, is_newest=newest == written or newest < iteration)
        else:
            meeting.wait_for_rank_0(lambda: self._time_left(began))
            if not checkpoint_folder(self._settings.root, iteration).exists():
                raise MeetingFailed("rank 0's process has given it up")
        self._rank.say(
            what="saved",
            iteration=iteration,
            folder=str(checkpoint_folder(self._settings.root, iteration)),
            nbytes=document["nbytes"],
            copy_s=copy_s,
            seconds=self._clock.monotonic() - began,
        )

    def _write_part(self, iteration: int, folder: Path, began: float, free: int) -> tuple[dict[str, Any], float]:
        """What ``finish`` needs of this rank's part, and the seconds until the rank could go on as it likes."""
        arena = read_only(Path(self._settings.arena))
        try:
            owner = owner_alone(arena, iteration)
            (source,) = owner.sources
            copied = int(source.records.table["nbytes"].sum())
            need = (copied + memory_bytes(owner)) * self._settings.local_ranks
            if need > free:
                raise MeetingFailed(
                    f"its node would need {need / 2**30:,.1f} GiB of memory beside the arenas and has "
                    f"{free / 2**30:,.1f} GiB available"
                )
            take_over(arena, source.records, self._num_threads)
            copy_s = self._clock.monotonic() - began
            if not intact(arena, source.records, self._pool).all():
                raise MeetingFailed(f"its captures were released before the copy of them was complete ({copy_s:.0f} s)")
            copy_s = self._clock.monotonic() - began
            self._rank.say(what="copied", iteration=iteration)
            with PartWriter(folder, self._settings.rank) as writer:
                write_rank(owner, iteration, RankPart(writer), self._pool, replayer)
                return writer.close(), copy_s
        finally:
            arena.close()

    def _save_newest(self, meeting: Meeting) -> None:
        """The job ends: write what all ranks have, if all of them end."""
        until = self._clock.monotonic() + JOIN_S
        arena = read_only(Path(self._settings.arena))
        stable = arena.page.stable
        arena.close()
        written = self._written()
        iteration = meeting.choose(stable, max(written, 0), lambda: until - self._clock.monotonic())
        if iteration != NOTHING:
            self._save(iteration, meeting, written, available_bytes())
        elif self._settings.rank == 0:
            shutil.rmtree(meeting.folder, ignore_errors=True)

    def _written(self) -> int:
        try:
            found = latest_iteration(self._settings.root)
        except (OSError, ValueError):
            found = None
        return -1 if found is None else found

    def _time_left(self, began: float) -> float:
        now = self._clock.monotonic()
        if self._alone_since is None and not self._rank.is_there:
            self._alone_since = now
        left_s = began + self._settings.limit_s - now
        return left_s if self._alone_since is None else min(left_s, self._alone_since + ORPHAN_S - now)


def serve(inward: int, outward: int) -> None:
    """Serve the rank behind these pipes until it is gone, or until a signal ends the job."""
    rank = Pipes(inward, outward)
    if (first := rank.next()) is None:
        return
    settings = Settings(**first)
    rank.pid = settings.pid
    os.nice(_NICE)
    with suppress(OSError):  # where memory runs out, this process goes and not training
        Path("/proc/self/oom_score_adj").write_text("1000")
    threads = max(1, len(os.sched_getaffinity(0)) // settings.local_ranks)
    Service(settings, rank, threads, SystemClock()).run()
