# SPDX-License-Identifier: Apache-2.0
"""Names ranks that are silent, and ends this process where they hold training up for too long.

A rank that is stopped, or whose machine is gone, leaves the others in a collective call that never returns, and nobody
can interrupt it. The heartbeats of the control plane tell who it is. A supervisor restarts the job once a process ends.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass, field

from megatron_moetion.clock import Clock
from megatron_moetion.replicate.channel import Fabric
from megatron_moetion.replicate.worker import Threads

NAME_AFTER_S = 10.0
"""Silence that is worth a line."""
POLL_S = 1.0
LAST_WORDS_S = 5.0
"""For what is said before the process ends: a log or a store that takes nothing must not keep it."""
_STEPS_COUNTED = 4
_NAMED = 8
"""Ranks that a line names."""


@dataclass(frozen=True, kw_only=True)
class Hang:
    """Ranks that hold training up."""

    silent_s: Mapping[int, float]
    """By rank: how long nothing was heard of it."""
    stalled_s: float
    """How long no step has ended on this rank."""

    @property
    def detect_s(self) -> float:
        """From the last word of the rank that has been silent for longest to now."""
        return max(self.silent_s.values())


@dataclass(frozen=True, kw_only=True)
class Verdict:
    """What one look gives: ranks whose silence has become worth a line, and those that are heard again, with its
    seconds."""

    named: Mapping[int, float] = field(default_factory=dict)
    back: Mapping[int, float] = field(default_factory=dict)
    hang: Hang | None = None
    """Where the process should end."""


class Patience:
    """Judges silence. Pure: it counts the time that it is told has passed.

    Time in which this process was stopped itself must not be told: its peers were not silent then. A rank that is cut
    off from the control plane while training goes on holds nobody up, so steps that end are as good as a word.
    ``limit_s``: 0: never ends the process.
    """

    def __init__(self, limit_s: float) -> None:
        self._limit_s = limit_s
        self._silent: dict[int, float] = {}
        self._named: dict[int, float] = {}
        """Ranks that were named, and their longest silence since."""
        self._steps = 0
        self._stalled_s = 0.0
        self._intervals: deque[float] = deque(maxlen=_STEPS_COUNTED)
        """Seconds between the last steps: a step that takes longer than the limit is no hang."""

    def look(self, silent: Mapping[int, float], *, passed_s: float, steps: int) -> Verdict:
        """``silent``: as ``Fabric.silent`` says; ``passed_s`` since the last look; ``steps`` that have ended in all."""
        if steps != self._steps:
            self._intervals.append(self._stalled_s)
            self._steps, self._stalled_s = steps, 0.0
        self._stalled_s += passed_s
        self._silent = {rank: self._silent.get(rank, 0.0) + passed_s for rank in silent}
        named = {r: s for r, s in silent.items() if s >= NAME_AFTER_S and r not in self._named}
        back = {r: self._named.pop(r) for r in self._named.keys() - silent.keys()}
        self._named |= {r: s for r, s in silent.items() if r in self._named or r in named}
        return Verdict(named=named, back=back, hang=self._hang(silent))

    def _hang(self, silent: Mapping[int, float]) -> Hang | None:
        usual_s = min(self._intervals, default=0.0)
        if not self._limit_s or self._stalled_s < self._limit_s + usual_s:
            return None
        hung = {rank: silent[rank] for rank, seconds in self._silent.items() if seconds >= self._limit_s}
        return Hang(silent_s=hung, stalled_s=self._stalled_s) if hung else None


class Watchdog:
    """A thread that looks at the fabric once a second. ``close`` it before the fabric.

    All callables are called by this thread, ``last_words`` by another one.
    """

    def __init__(
        self,
        *,
        fabric: Fabric,
        limit_s: float,
        steps: Callable[[], int],
        hosts: Sequence[str],
        say: Callable[[str], None],
        last_words: Callable[[Hang], None],
        end: Callable[[], object],
        clock: Clock,
        threads: Threads,
        poll_s: float = POLL_S,
        last_words_s: float = LAST_WORDS_S,
    ) -> None:
        """``steps`` counts the steps that have ended, ``hosts`` has the machine of each rank, ``say`` logs a line.

        ``last_words`` does all that should be done before the process ends, which waits ``last_words_s`` for it;
        ``end`` ends it.
        """
        self._fabric = fabric
        self._patience = Patience(limit_s)
        self._steps = steps
        self._hosts = hosts
        self._say = say
        self._last_words = last_words
        self._end = end
        self._clock = clock
        self._threads = threads
        self._poll_s = poll_s
        self._last_words_s = last_words_s
        self._closed = threads.event()
        self._worker = threads.worker("moetion-watchdog")
        self._worker.submit(self._watch)

    def close(self) -> None:
        """Stop watching. May be called more than once."""
        self._closed.set()
        self._worker.abandon()

    def _watch(self) -> None:
        before_s = self._clock.monotonic()
        while not self._closed.wait(self._poll_s):
            now_s = self._clock.monotonic()
            passed_s, before_s = min(now_s - before_s, 2 * self._poll_s), now_s
            silent = self._fabric.silent()
            verdict = self._patience.look(silent, passed_s=passed_s, steps=self._steps())
            if verdict.hang is not None:
                self._leave(verdict.hang)
                return
            if speaks(self._fabric.rank, silent):
                for ranks, text in ((verdict.named, "no sign of life for"), (verdict.back, "heard again after")):
                    if ranks:
                        self._say(f"{named(ranks, self._hosts)}: {text} {max(ranks.values()):.0f} s")

    def _leave(self, hang: Hang) -> None:
        said = self._threads.event()

        def speak() -> None:
            try:
                self._last_words(hang)
            finally:
                said.set()

        self._threads.worker("moetion-last-words").submit(speak)
        said.wait(self._last_words_s)
        if not self._closed.is_set():  # somebody has closed the session meanwhile: it ends by itself
            self._end()


def speaks(rank: int, silent: Collection[int]) -> bool:
    """Whether this rank says what all ranks know: the lowest one that can."""
    return rank == next(r for r in range(len(silent) + 1) if r not in silent)


def named(silent: Mapping[int, float], hosts: Sequence[str]) -> str:
    """``rank 3 on host7``, the longest silent ones first."""
    first = sorted(silent, key=lambda rank: -silent[rank])[:_NAMED]
    rest = len(silent) - len(first)
    return ", ".join(f"rank {rank} on {hosts[rank]}" for rank in first) + (f" and {rest} more" if rest else "")
