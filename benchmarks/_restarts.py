# SPDX-License-Identifier: Apache-2.0
"""A restart, seen from outside: when processes end and begin, what the job says, and what its recovery reports."""

from __future__ import annotations

import json
import os
import re
import select
import threading
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from itertools import pairwise
from pathlib import Path

LIMIT_S = 300.0
"""For whatever is waited for."""
TORCHRUN_KNOWS = r"failed \(exitcode|Sending process \d+ closing signal"
ITERATION = r"iteration +\d+/"
CONNECTING, CONNECTED, BUILT, TRAINS = "^> connecting ", " are connected$", "parameters on rank 0", "^> training from "
PHASES = ("detect", "kill", "start", "imports", "connect", "model", "attach", "survey", "load", "first step")
"""``detect``: from the signal until somebody has acted on it. ``kill``: until the last old rank is gone. ``start``:
until the last new one's process exists. ``imports``: until rank 0 connects. ``connect``: until it is connected and has
Megatron's process groups. ``model``: data, model and optimizer. ``attach``: MoEtion's connections and sizes, up to the
survey. ``survey``: until a plan is agreed on. ``load``: until training goes on. ``first step``: until it is said."""


@dataclass
class Log:
    """What the job says, and when (monotonic clock)."""

    lines: list[tuple[float, str]] = field(default_factory=list)

    def read(self, stream: object) -> None:
        for line in stream:  # type: ignore[attr-defined]
            self.lines.append((time.monotonic(), line))

    def await_line(self, pattern: str, since_s: float) -> tuple[float, str]:
        """The first one after this moment that has the pattern."""
        wanted, deadline = re.compile(pattern), time.monotonic() + LIMIT_S
        while time.monotonic() < deadline:
            for moment, line in list(self.lines):
                if moment > since_s and wanted.search(line):
                    return moment, line
            time.sleep(0.002)
        said = "".join(text for _, text in self.lines[-200:])
        raise TimeoutError(f"no {pattern!r} in {LIMIT_S:.0f} s; the job said\n{said}")

    def last(self, pattern: str, since_s: float, until_s: float) -> float:
        """When the pattern was said last between two moments."""
        wanted = re.compile(pattern)
        found = [moment for moment, line in list(self.lines) if since_s < moment <= until_s and wanted.search(line)]
        if not found:
            raise LookupError(f"no {pattern!r} within these {until_s - since_s:.1f} s")
        return found[-1]


class Ends:
    """When these processes end, by rank; they need not be this one's children."""

    def __init__(self, pids: Mapping[int, int]) -> None:
        self._moments: dict[int, float] = {}
        self._rank_of = {os.pidfd_open(pid): rank for rank, pid in pids.items()}
        self._thread = threading.Thread(target=self._watch, daemon=True)
        self._thread.start()

    def moments(self) -> Mapping[int, float]:
        """Of all of them (monotonic clock), once the last one has ended."""
        self._thread.join(LIMIT_S)
        if self._thread.is_alive():
            raise TimeoutError(f"after {LIMIT_S:.0f} s only ranks {sorted(self._moments)} have ended")
        return self._moments

    def _watch(self) -> None:
        poll = select.poll()
        for descriptor in self._rank_of:
            poll.register(descriptor, select.POLLIN)
        while len(self._moments) < len(self._rank_of):
            for descriptor, _ in poll.poll():
                self._moments[self._rank_of[descriptor]] = time.monotonic()
                poll.unregister(descriptor)
        for descriptor in self._rank_of:
            os.close(descriptor)


class Restart:
    """One fault of a job that is about to be caused, and what follows. Make it right before the signal."""

    def __init__(self, log: Log, memory: Path, events: Path, hurt: Sequence[int]) -> None:
        """``memory``: holds all stores of the job. ``events``: of ``--moetion-report``. ``hurt``: ranks."""
        self._log, self._memory, self._events = log, memory, events
        self._hurt = frozenset(hurt)
        self._ends = Ends(pids(memory))
        self.began_s = time.monotonic()

    def await_phases(self, *, by_torchrun: bool, waits: Mapping[str, str] | None = None) -> dict[str, float]:
        """Seconds of each of ``PHASES``, in order, once the first new step is done.

        Where torchrun starts processes, ``detect`` ends as it says that it has seen a fault; else as the first rank
        ends that was not hurt. ``waits``: what else is waited for before new processes begin, and the line that ends
        it. Process starts are known to a clock tick, so a short ``start`` may come out below zero.
        """
        trains, _ = self._log.await_line(TRAINS, self.began_s)
        done, _ = self._log.await_line(ITERATION, trains)
        ended = self._ends.moments()
        first_end = min(moment for rank, moment in ended.items() if rank not in self._hurt)
        known = self._log.await_line(TORCHRUN_KNOWS, self.began_s)[0] if by_torchrun else first_end
        surveys, plans = self._recovery()
        moments = {"detect": known, "kill": max(ended.values())}
        moments |= {name: self._log.last(line, self.began_s, trains) for name, line in (waits or {}).items()}
        moments |= {
            "start": max(map(process_began, pids(self._memory).values())),
            "imports": self._log.last(CONNECTING, self.began_s, trains),
            "connect": self._log.last(CONNECTED, self.began_s, trains),
            "model": self._log.last(BUILT, self.began_s, trains),
            "attach": surveys,
            "survey": plans,
            "load": trains,
            "first step": done,
        }
        return dict(zip(moments, (b - a for a, b in pairwise([self.began_s, *moments.values()])), strict=True))

    def recovered(self) -> dict[str, float]:
        """Seconds of each phase of the last recovery, as rank 0 reports it."""
        return {name: float(s) for name, s in self._last()["phases_s"].items() if name not in ("detect", "restart")}

    def _last(self) -> dict:  # type: ignore[type-arg]
        events = map(json.loads, self._events.read_text().splitlines())
        return [event for event in events if event["event"] == "recovered"][-1]

    def _recovery(self) -> tuple[float, float]:
        """When the last one's survey began, and when all had agreed on a plan."""
        seconds = self.recovered()
        ended = float(self._last()["time"]) - time.time() + time.monotonic()
        surveys = ended - sum(seconds.values())
        return surveys, surveys + seconds["survey"] + seconds["network"]


def pids(memory: Path) -> dict[int, int]:
    """Of the ranks, by rank: the notes that they leave in their stores."""
    notes = [json.loads(note.read_text()) for note in memory.glob("**/rank*.pid")]
    return {int(note["rank"]): int(note["pid"]) for note in notes}


def process_began(pid: int) -> float:
    """When it was started (monotonic clock), to a clock tick."""
    ticks = int(Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[19])
    slept_s = time.clock_gettime(time.CLOCK_BOOTTIME) - time.monotonic()
    return ticks / os.sysconf("SC_CLK_TCK") - slept_s


def losses_in(metrics: Path) -> dict[int, set[str]]:
    """Every bit of the losses of each iteration, in all its executions."""
    found: dict[int, set[str]] = {}
    for line in metrics.read_text().splitlines():
        step = json.loads(line)
        if "loss_hex" in step:
            found.setdefault(step["iteration"], set()).add(step["loss_hex"])
    return found
