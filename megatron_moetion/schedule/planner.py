# SPDX-License-Identifier: Apache-2.0
"""Where in the next iteration a snapshot's bytes travel, and how large a snapshot fits. Pure.

From the timelines of the last iterations follow the *rhythm* of training and in it the idle windows of a link: what
nearly all of these iterations left free after one send and before the next. Chunks are placed in these windows,
earliest deadline first; what does not fit makes the next snapshots smaller, then rarer.

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
class Demand:
    """Bytes of one snapshot that must cross each of ``links``, in that order, before ``deadline_s``."""

    snapshot: int
    nbytes: int
    links: tuple[Link, ...]
    deadline_s: Mapping[Link, float]


@dataclass(frozen=True, kw_only=True)
class Placed:
    """A chunk, or the part of one that fits a window, on one link."""

    snapshot: int
    link: Link
    begin_s: float
    end_s: float
    nbytes: int


@dataclass(frozen=True, kw_only=True)
class Plan:
    """Chunks by link and time; ``refused_bytes`` did not fit before their deadline and are placed nowhere."""

    placed: tuple[Placed, ...]
    refused_bytes: Mapping[int, int]
    """By snapshot."""

    def on(self, link: Link) -> tuple[Placed, ...]:
        """One link's chunks in the order of time."""
        return tuple(p for p in self.placed if p.link is link)


@dataclass(frozen=True, kw_only=True)
class Rhythm:
    """A typical iteration, by what training sends between nodes; seconds since the end of the optimizer step.

    Windows lie between two sends and count from when the network has what the earlier one sends: what is known well is
    how long training computes from then to the next send, and not when in the iteration it comes to either.
    """

    sends_s: tuple[float, ...] = ()
    taken_s: tuple[float, ...] = ()
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
            quiet_since = [c.leaves_s for c in calls]
            begins.append(at)
            at += usually(q - c.begin_s for q, c in zip(quiet_since, calls, strict=True))
            takens.append(at)
            busy_until = max(busy_until, at) + max(c.sent_bytes for c in calls) / bytes_per_s
    return Rhythm(sends_s=tuple(begins), taken_s=tuple(takens), duration_s=at, windows=tuple(windows))


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


def place(
    windows: Mapping[Link, Sequence[Window]],
    bytes_per_s: Mapping[Link, float],
    demands: Sequence[Demand],
    chunk_bytes: int,
) -> Plan:
    """Put every demand's chunks into windows, earliest deadline first; a chunk crosses its links in their order.

    A chunk that reaches a window's end goes on in the next one. A chunk that would miss a deadline on any link is
    refused on all of them, and so is the rest of its snapshot: a snapshot that is not whole is worth nothing.
    """
    free = {link: _Free(spans, bytes_per_s[link]) for link, spans in windows.items()}
    placed: list[Placed] = []
    refused: dict[int, int] = {}
    for demand in sorted(demands, key=lambda d: min(d.deadline_s[link] for link in d.links)):
        left = demand.nbytes
        while left:
            nbytes = min(chunk_bytes, left)
            parts = _fit(demand, nbytes, free)
            if parts is None:
                refused[demand.snapshot] = refused.get(demand.snapshot, 0) + left
                break
            placed += parts
            left -= nbytes
    return Plan(placed=tuple(sorted(placed, key=lambda p: (p.begin_s, p.link.value))), refused_bytes=refused)


class _Free:
    """What is left of a link's windows: everything from a cursor on."""

    def __init__(self, windows: Sequence[Window], bytes_per_s: float) -> None:
        self._windows = windows
        self._bytes_per_s = bytes_per_s
        self._cursor_s = 0.0

    def take(self, nbytes: int, not_before_s: float) -> list[tuple[float, float, int]] | None:
        """The parts (begin, end, bytes) of the next ``nbytes``; None if the windows end before. Takes nothing yet."""
        parts: list[tuple[float, float, int]] = []
        at = max(self._cursor_s, not_before_s)
        for window in self._windows:
            begin = max(at, window.begin_s)
            fits = min(nbytes, int((window.end_s - begin) * self._bytes_per_s)) if begin < window.end_s else 0
            if fits <= 0:
                continue
            end = begin + fits / self._bytes_per_s
            parts.append((begin, min(end, window.end_s), fits))
            nbytes -= fits
            if not nbytes:
                return parts
        return None

    def keep(self, until_s: float) -> None:
        """Nothing before ``until_s`` is free any more."""
        self._cursor_s = until_s


def _fit(demand: Demand, nbytes: int, free: Mapping[Link, _Free]) -> list[Placed] | None:
    ready_s = 0.0
    found: list[Placed] = []
    for link in demand.links:
        parts = free[link].take(nbytes, ready_s)
        if parts is None or parts[-1][1] > demand.deadline_s[link]:
            return None
        ready_s = parts[-1][1]
        found += [
            Placed(snapshot=demand.snapshot, link=link, begin_s=begin, end_s=end, nbytes=part)
            for begin, end, part in parts
        ]
    for link in demand.links:
        free[link].keep(max(p.end_s for p in found if p.link is link))
    return found


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
