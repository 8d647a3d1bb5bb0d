# SPDX-License-Identifier: Apache-2.0
"""When the network is idle, and how many bytes fit. Pure.

The timelines of the last iterations give the *rhythm* of training and the idle windows of a link in it: what nearly all
of these iterations left free after one send and before the next.

The idea of cutting a snapshot into chunks that fit profiled idle spans is GEMINI's (SOSP 2023); budgets for two
links, and what happens when they are too small, are our own.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import numpy.typing as npt

from megatron_moetion.schedule.timeline import Link, Timeline

IDLE_SHARE = 0.8
"""A window is as long as the gap between two messages was in at least this share of the recorded iterations."""
WINDOW_MIN_S = 1e-3
"""Shorter gaps are left alone: a chunk would hardly have started."""
SLICES_S = (20e-3, 10e-3, 5e-3, 2e-3, 1e-3)
"""How long a slice may occupy the link: so long a message of training may have to wait behind it. Each slice wakes
threads at both ends, so that smaller ones cost time of the processors that train."""
FILLED_SHARE = 0.8
"""Slices are as long as they may be while whole ones fill this share of the windows."""
HEADROOM = 0.8
"""Share of the windows' bytes that a snapshot may fill: the rest is for jitter and for the protocol."""


class Window(NamedTuple):
    """An idle stretch of a link, in seconds since the end of the optimizer step."""

    begin_s: float
    end_s: float

    @property
    def duration_s(self) -> float:
        """Seconds."""
        return self.end_s - self.begin_s


@dataclass(frozen=True, kw_only=True)
class Rhythm:
    """A typical iteration, by what training sends between nodes; seconds since the end of the optimizer step.

    Windows lie between two sends and count from when the network has accepted the earlier one: the time that training
    computes from then to the next send is stable, and the moment in the iteration when it comes to either is not.
    """

    sends_s: tuple[float, ...] = ()
    accepted_s: tuple[float, ...] = ()
    """When the network has accepted the n-th send: at once, or when the peer asks for it."""
    duration_s: float = 0.0
    windows: tuple[Window, ...] = ()
    slice_s: float = SLICES_S[0]
    """How long a slice should occupy the link, in seconds."""


def rhythm(timelines: Sequence[Timeline], bytes_per_s: float) -> Rhythm:
    """What the last iterations have in common on the network, from those that sent as often as the newest one.

    From one event to the next it takes the time that ``IDLE_SHARE`` of these iterations took at least. A call of the
    pipeline that sends n bytes keeps the link busy from its beginning, because its peer may ask for them at any moment,
    until the network has accepted them, and for n / bandwidth after that. A collective keeps it busy from its beginning
    to its end. Waiting for bytes of a peer keeps nothing busy.
    """
    if not timelines:
        return Rhythm()
    alike = [t for t in timelines if len(t.sends.nbytes) == len(timelines[-1].sends.nbytes)]
    on_wire_s = np.max([t.sends.left_bytes for t in alike], axis=0) / bytes_per_s

    # In turn: a send begins, the link is left to others. Of calls that overlap, each counts from the end of the last.
    events = np.empty((len(alike), 2 * len(on_wire_s) + 1))
    events[:, 0::2] = [np.append(t.sends.begin_s, t.duration_s) for t in alike]
    events[:, 1::2] = [t.sends.quiet_since_s for t in alike]
    steps = np.diff(np.maximum.accumulate(events, axis=1), axis=1, prepend=0.0)
    at = np.cumsum(_usually(steps))
    ends, accepted = at[0::2], at[1::2]

    # A message is off the wire when it and all before it are: each begins when accepted, or behind the one before.
    after = np.cumsum(on_wire_s)
    quiet = np.append(0.0, after + np.maximum.accumulate(accepted - np.append(0.0, after[:-1])))[: len(ends)]
    found = np.flatnonzero(ends - quiet >= WINDOW_MIN_S)
    windows = tuple(map(Window, quiet[found].tolist(), ends[found].tolist()))
    return Rhythm(
        sends_s=tuple(ends[:-1].tolist()),
        accepted_s=tuple(accepted.tolist()),
        duration_s=float(ends[-1]),
        windows=windows,
        slice_s=slice_of(windows),
    )


def slice_of(windows: Sequence[Window]) -> float:
    """The longest of ``SLICES_S`` that fills the windows well, in seconds; the shortest where none does."""
    durations = np.array([end - begin for begin, end in windows])
    filled = (s for s in SLICES_S if _filled_s(durations, s).sum() >= FILLED_SHARE * durations.sum())
    return next(filled, SLICES_S[-1])


def whole_slices(windows: Sequence[Window], slice_s: float) -> tuple[Window, ...]:
    """What whole slices fill of the windows."""
    begins, ends = np.array(windows, dtype=np.float64).reshape(-1, 2).T
    filled = _filled_s(ends - begins, slice_s)
    found = np.flatnonzero(filled)
    return tuple(map(Window, begins[found].tolist(), (begins + filled)[found].tolist()))


def _filled_s(durations: npt.NDArray[np.float64], slice_s: float) -> npt.NDArray[np.float64]:
    """float64[n] to float64[n], seconds: as much of each window as whole slices fill."""
    return np.floor(durations / slice_s + 1e-9) * slice_s


def _usually(durations: npt.NDArray[np.float64]) -> npt.NDArray[np.float64]:
    """float64[iterations, n] to float64[n]: what ``IDLE_SHARE`` of the iterations took at least."""
    unusual = math.floor((1 - IDLE_SHARE) * len(durations) + 1e-9)
    return np.asarray(np.sort(durations, axis=0)[unusual])


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


def capacity_bytes(windows: Mapping[Link, Sequence[Window]], bytes_per_s: Mapping[Link, float]) -> tuple[float, Link]:
    """Bytes that an iteration's windows carry on the tightest link, headroom taken off, and which link that is."""
    found = {link: HEADROOM * sum(w.duration_s for w in spans) * bytes_per_s[link] for link, spans in windows.items()}
    tightest = min(found, key=lambda link: found[link])
    return found[tightest], tightest
