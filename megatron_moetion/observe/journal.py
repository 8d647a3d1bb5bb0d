# SPDX-License-Identifier: Apache-2.0
"""For people: rare log lines that start with ``[moetion]``, and a JSON-lines file of events."""

from __future__ import annotations

import json
import logging
import os
from pathlib import Path
from typing import Any

from megatron_moetion.clock import Clock
from megatron_moetion.output import Output

_logger = logging.getLogger("megatron_moetion")


class Journal:
    """One rank's log lines and, where a path is given, its events (one JSON object a line, appended).

    ``ConfigError`` if the path cannot be written when a job begins; a later failure costs the events only.
    """

    def __init__(self, rank: int, attempt: int, events: Path | None, clock: Clock) -> None:
        self._clock = clock
        self._rank = rank
        self._attempt = attempt
        self._events = events
        self._warned: set[str] = set()
        self._output = Output("--moetion-report", events, rank=rank, attempt=attempt)
        if events is not None:
            with self._output.opening():
                events.parent.mkdir(parents=True, exist_ok=True)
                events.open("a").close()

    def info(self, iteration: int, text: str) -> None:
        """A rare, expected event."""
        _logger.info("[moetion] rank %d iteration %d: %s", self._rank, iteration, text)

    def warn(self, iteration: int, text: str) -> None:
        """Trouble that is reported each time."""
        _logger.warning("[moetion] rank %d iteration %d: %s", self._rank, iteration, text)

    def warn_once(self, kind: str, iteration: int, text: str) -> None:
        """Trouble that is reported once for each ``kind``; counters show the rest."""
        if kind not in self._warned:
            self._warned.add(kind)
            self.warn(iteration, text)

    def event(self, name: str, **fields: Any) -> None:
        """Append one event."""
        if self._events is None or self._output.lost:
            return
        line = json.dumps(
            {"event": name, "time": self._clock.unix_ns() / 1e9, "attempt": self._attempt, "rank": self._rank, **fields}
        )
        with self._output.writing(), self._events.open("a") as out:
            out.write(line + "\n")
            out.flush()
            os.fsync(out.fileno())


class Phases:
    """Wall-clock seconds of the phases of a recovery, in order."""

    def __init__(self, clock: Clock) -> None:
        self.seconds: dict[str, float] = {}
        self._clock = clock
        self._since = clock.monotonic()

    def done(self, name: str) -> None:
        """A phase ends, which began when the one before ended."""
        now = self._clock.monotonic()
        self.seconds[name] = self.seconds.get(name, 0.0) + now - self._since
        self._since = now
