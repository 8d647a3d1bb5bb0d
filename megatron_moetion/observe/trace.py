# SPDX-License-Identifier: Apache-2.0
"""A trace of one rank for Perfetto (ui.perfetto.dev) or chrome://tracing: lanes over time.

Chrome's JSON array format: a file that is cut short, as when its process is killed, still opens.
"""

from __future__ import annotations

import json
import threading
from contextlib import suppress
from pathlib import Path
from typing import IO

from megatron_moetion.observe.lanes import Lane
from megatron_moetion.output import Output

LANES = tuple(lane.value for lane in Lane)
"""From top to bottom."""
EVENTS_MAX = 500_000
"""About 60 MB a rank; later spans are left out."""
BUFFERED = 1000
FLUSH_S = 1.0
"""Spans are written after this and one iteration at the latest: the moments before a fault matter most."""


def trace_name(rank: int, attempt: int) -> str:
    """File name of one rank's trace in ``--moetion-trace-dir``."""
    return f"rank{rank:05d}.attempt{attempt}.trace.json"


class Trace:
    """Appends spans to a file, in batches, between ``open`` and ``close``; others are dropped. Thread-safe.

    Times are seconds of the host's monotonic clock.
    """

    def __init__(self, path: Path, rank: int, attempt: int = 0) -> None:
        self._path = path
        self._rank = rank
        self._lock = threading.Lock()
        self._waiting: list[str] = []
        self._left = EVENTS_MAX
        self._flushed_s = 0.0
        self._output = Output("--moetion-trace-dir", path, rank=rank, attempt=attempt)
        self._out: IO[str] | None = None

    def open(self) -> None:
        """Begin the file. ``ConfigError`` where a job begins and it cannot be written; later that costs the trace."""
        with self._lock:
            with self._output.opening():
                self._path.parent.mkdir(parents=True, exist_ok=True)
                self._out = self._path.open("w")
            self._write("[\n" + ",\n".join(json.dumps(e) for e in self._names()))

    def add(self, lane: str, begin_s: float, end_s: float, value: int) -> None:
        """A span. ``value`` is its bytes; on the lane ``iteration`` the iteration's number."""
        event = {
            "name": f"{lane} {value}" if lane == "iteration" else lane,
            "ph": "X",
            "ts": round(begin_s * 1e6, 1),
            "dur": round((end_s - begin_s) * 1e6, 1),
            "pid": self._rank,
            "tid": LANES.index(lane),
            "args": {"iteration" if lane == "iteration" else "bytes": value},
        }
        with self._lock:
            if self._left <= 0 or self._out is None:
                return
            self._left -= 1
            self._waiting.append(json.dumps(event))
            is_due = lane == "iteration" and end_s - self._flushed_s >= FLUSH_S
            if is_due or len(self._waiting) >= BUFFERED:
                self._flushed_s = end_s
                self._flush()

    def close(self) -> None:
        """Write what is left and end the file."""
        with self._lock:
            self._flush()
            self._write("\n]\n")
            self._discard()

    def _flush(self) -> None:
        if self._waiting:
            self._write(",\n" + ",\n".join(self._waiting))
            self._waiting.clear()

    def _write(self, text: str) -> None:
        if self._out is None:
            return
        with self._output.writing():
            self._out.write(text)
            self._out.flush()
        if self._output.lost:
            self._discard()

    def _discard(self) -> None:
        if self._out is not None:
            with suppress(OSError):  # it tries once more to write what could not be written
                self._out.close()
            self._out = None

    def _names(self) -> list[dict[str, object]]:
        rank = {"name": "process_name", "ph": "M", "pid": self._rank, "args": {"name": f"rank {self._rank}"}}
        lanes = [
            {"name": "thread_name", "ph": "M", "pid": self._rank, "tid": i, "args": {"name": lane}}
            for i, lane in enumerate(LANES)
        ]
        return [rank, *lanes]
