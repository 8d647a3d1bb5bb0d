# SPDX-License-Identifier: Apache-2.0
"""When the network is idle, and how large a snapshot fits. Pure.

From the timelines of the last iterations follow the *rhythm* of training and in it the idle windows of a link: what
nearly all of these iterations left free after one send and before the next. What does not fit these windows makes the
next snapshots smaller, then rarer.

The idea of cutting a snapshot into chunks that fit profiled idle spans is GEMINI's (SOSP 2023); budgets for two
links, and what happens when they are too small, are our own.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

from megatron_moetion.schedule.timeline import TRAFFIC, Link, Span, Timeline

IDLE_SHARE = 0.8
"""A window is as long as the gap between two messages was in at least this share of the recorded iterations."""
WINDOW_MIN_S = 1e-3
"""Shorter gaps are left alone: a chunk would hardly have started."""
HEADROOM = 0.8
"""Share of the windows' bytes that a snapshot may fill: the rest is for jitter and for the protocol."""
RARER = (8, 4, 2)
LEVELS = 16
"""Sizes that a snapshot can take, on every rank alike: ``RARER`` ones, then from the fewest to the most experts."""


@dataclass(frozen=True, kw_only=True)
class Window:
    """An idle stretch of a link, in seconds since the end of the optimizer step."""

    begin_s: float
    end_s: float

    @property
    def duration_s(self) -> float:
        """How long it is."""
        return self.end_s - self.begin_s


@dataclass(frozen=True, kw_only=True)
class Rhythm:
    """A typical iteration, by what training sends between nodes; seconds since the end of the optimizer step.

    Windows lie between two sends and count from when the network has what the earlier one sends: what is known well is
    how long training computes from then to the next send, and not when in the iteration it comes to either.
    """

    sends_s: tuple[float, ...] = ()
    accepted_s: tuple[float, ...] = ()
    """When the network has what the n-th send sends: at once, or when the peer asks for it."""
    duration_s: float = 0.0
    windows: tuple[Window, ...] = ()


def rhythm(timelines: Sequence[Timeline], bytes_per_s: float) -> Rhythm:
    """What the last iterations have in common on the network, from those that sent as often as the newest one.

    From one event to the next it takes the time that ``IDLE_SHARE`` of these iterations took at least. A call that
    sends n bytes keeps the way out busy from its beginning, because its peer may ask for them at any moment, until the
    network has taken them, and for n / bandwidth after that. Waiting for bytes of a peer keeps nothing busy.
    """
    if not timelines:
        return Rhythm()
    sends = [_sends(t) for t in timelines]
    alike = [(t, s) for t, s in zip(timelines, sends, strict=True) if len(s) == len(sends[-1])]
    unusual = math.floor((1 - IDLE_SHARE) * len(alike) + 1e-9)

    def usually(durations: Iterable[float]) -> float:
        return sorted(max(d, 0.0) for d in durations)[unusual]

    at, busy_until = 0.0, 0.0
    begins, takens, windows = [], [], []
    quiet_since = [0.0] * len(alike)
    for n in range(len(sends[-1]) + 1):
        ends = [found[n].begin_s if n < len(found) else t.duration_s for t, found in alike]
        end = at + usually(e - q for e, q in zip(ends, quiet_since, strict=True))
        if end - max(busy_until, at) >= WINDOW_MIN_S:
            windows.append(Window(begin_s=max(busy_until, at), end_s=end))
        at = end
        if n < len(sends[-1]):
            calls = [found[n] for _, found in alike]
            quiet_since = [c.on_wire_s for c in calls]
            begins.append(at)
            at += usually(q - c.begin_s for q, c in zip(quiet_since, calls, strict=True))
            takens.append(at)
            busy_until = max(busy_until, at) + max(c.sent_bytes for c in calls) / bytes_per_s
    return Rhythm(sends_s=tuple(begins), accepted_s=tuple(takens), duration_s=at, windows=tuple(windows))


def _sends(timeline: Timeline) -> list[Span]:
    found = [s for s in timeline.spans if s.lane in TRAFFIC and s.sent_bytes]
    return sorted(found, key=lambda s: s.begin_s)


def merge(intervals: Sequence[tuple[float, float]]) -> list[tuple[float, float]]:
    """The same stretches without overlaps, in order."""
    found: list[tuple[float, float]] = []
    for begin, end in sorted(i for i in intervals if i[1] > i[0]):
        if found and begin <= found[-1][1]:
            found[-1] = (found[-1][0], max(found[-1][1], end))
        else:
            found.append((begin, end))
    return found


def unplaced_bytes(
    windows: Sequence[Window], bytes_per_s: float, nbytes: int, deadline_s: float, chunk_bytes: int
) -> int:
    """How many of ``nbytes`` find no room in the windows before the deadline.

    Only whole chunks are sent. A chunk that reaches a window's end goes on in the next one.
    """
    free = merge([(w.begin_s, min(w.end_s, deadline_s)) for w in windows])
    room = sum(int((end - begin) * bytes_per_s) for begin, end in free)
    return 0 if room >= nbytes else nbytes - room // chunk_bytes * chunk_bytes


@dataclass(frozen=True, kw_only=True)
class Rung:
    """One size that snapshots can have: ``experts`` of a rank in every ``every``-th snapshot."""

    experts: int
    every: int

    def bytes_per_snapshot(self, dense_bytes: int, expert_bytes: float) -> float:
        """What one iteration must carry on average."""
        return (dense_bytes + self.experts * expert_bytes) / self.every


def ladder(experts_min: int, experts_max: int) -> tuple[Rung, ...]:
    """``LEVELS`` sizes, smallest first: rarer snapshots at the bottom, then more and more experts in each one.

    Ranks that share experts have the same ladder; all ranks have the same ``every`` at each level.
    """
    steps = LEVELS - len(RARER) - 1
    counts = [experts_min + round(i * (experts_max - experts_min) / steps) for i in range(steps + 1)]
    rarer = [Rung(experts=experts_min, every=every) for every in RARER]
    return (*rarer, *(Rung(experts=k, every=1) for k in counts))


def affordable(rungs: Sequence[Rung], capacity_bytes: float, dense_bytes: int, expert_bytes: float) -> int:
    """The highest level whose bytes fit the capacity of an iteration; the lowest one if none does."""
    fits = [i for i, r in enumerate(rungs) if r.bytes_per_snapshot(dense_bytes, expert_bytes) <= capacity_bytes]
    return max(fits, default=0)


def next_level(now: int, wanted: int) -> int:
    """A quarter of the way to what is wanted, at least one level: sizes move smoothly when measurements jump."""
    step = max(1, abs(wanted - now) // 4)
    return now + min(step, wanted - now) if wanted > now else now - min(step, now - wanted)


def capacity_bytes(windows: Mapping[Link, Sequence[Window]], bytes_per_s: Mapping[Link, float]) -> tuple[float, Link]:
    """Bytes that an iteration's windows carry on the tightest link, headroom taken off, and which link that is."""
    found = {link: HEADROOM * sum(w.duration_s for w in spans) * bytes_per_s[link] for link, spans in windows.items()}
    tightest = min(found, key=lambda link: found[link])
    return found[tightest], tightest


def vote(level: int) -> int:
    """A level as a bitmask; the AND of all ranks' votes is the vote for the lowest level among them."""
    return (1 << (level + 1)) - 1


def level_of(votes: int) -> int:
    """The level that a mask of votes stands for."""
    return votes.bit_length() - 1
