# SPDX-License-Identifier: Apache-2.0
"""For people: rare log lines that start with ``[moetion]``, and a JSON-lines file of events."""

from __future__ import annotations

import json
import logging
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from megatron_moetion.clock import Clock
from megatron_moetion.observe.notes import KINDS, TEXT_CHARS, Note
from megatron_moetion.output import Output

PATIENCE_S = 60.0
"""How long a rank waits for its trouble to be said for all ranks, before it says it by itself."""

_KEPT = 1024
"""Kinds of trouble that are remembered; of more, the oldest may be said again."""
_KINDS_KEPT = 1024
"""Kinds of trouble that a journal remembers; some kinds name an iteration."""

_logger = logging.getLogger("megatron_moetion")


class Journal:
    """One rank's log lines and, where a path is given, its events (one JSON object a line, appended).

    From ``share`` on, trouble that ``warn_once`` reports is said once a job: ranks exchange notes of it, and rank 0
    says how many ranks have it. ``ConfigError`` if the path cannot be written when a job begins; a later failure costs
    the events only.
    """

    def __init__(self, rank: int, attempt: int, events: Path | None, clock: Clock) -> None:
        self._clock = clock
        self._rank = rank
        self._attempt = attempt
        self._events = events
        self._is_shared = False
        self._warned: dict[str, None] = {}
        self._untold: dict[str, Note] = {}
        """This rank's trouble by kind, which no other rank knows of."""
        self._told: dict[str, tuple[Note, float]] = {}
        """What has been told and not been heard back, and since when (monotonic seconds)."""
        self._ranks: dict[str, int] = {}
        """By kind: the ranks that have told of it."""
        self._said: dict[str, int] = {}
        """By kind: how many of these there were when it was said here."""
        self._output = Output("--moetion-report", events, rank=rank, attempt=attempt)
        if events is not None:
            with self._output.opening():
                events.parent.mkdir(parents=True, exist_ok=True)
                events.open("a").close()

    def info(self, iteration: int, text: str) -> None:
        """A rare, expected event."""
        _logger.info("[moetion] rank %d iteration %d: %s", self._rank, iteration, text)

    def warn(self, iteration: int, text: str) -> None:
        """Trouble that is reported each time, by this rank."""
        _logger.warning("[moetion] rank %d iteration %d: %s", self._rank, iteration, text)

    def warn_once(self, kind: str, iteration: int, text: str) -> None:
        """Trouble that is reported once for each ``kind``; counters show the rest."""
        if kind in self._warned:
            return
        self._warned[kind] = None
        _forget(self._warned)
        if self._is_shared:
            self._untold[kind] = Note(ranks=1, rank=self._rank, iteration=iteration, text=text[:TEXT_CHARS])
        else:
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

    # -- once a job ----------------------------------------------------------------------------------

    def share(self) -> None:
        """From now on trouble is said once a job: somebody exchanges ``take_notes`` and calls ``hear``."""
        self._is_shared = True

    def unshare(self) -> None:
        """Nobody exchanges notes any more: this rank says by itself what has not been said."""
        self._is_shared = False
        for kind in [*self._told, *self._untold]:
            self._say_alone(kind)

    def take_notes(self) -> dict[str, Note]:
        """This rank's new trouble by kind, at most ``KINDS``, for the other ranks. It is taken as told."""
        now = self._clock.monotonic()
        for kind in [k for k, (_, since) in self._told.items() if now - since > PATIENCE_S]:
            self._say_alone(kind)
        taken = {kind: self._untold.pop(kind) for kind in sorted(self._untold)[:KINDS]}
        self._told |= {kind: (note, now) for kind, note in taken.items()}
        return taken

    def hear(self, notes: Mapping[str, Note]) -> None:
        """What all ranks have told in one round. Rank 0 says it, and again when it is twice as many ranks."""
        for kind, note in notes.items():
            self._told.pop(kind, None)
            ranks = self._ranks[kind] = self._ranks.get(kind, 0) + note.ranks
            _forget_oldest(self._ranks)
            _forget(self._ranks)
            if self._rank == 0 and ranks >= 2 * self._said.get(kind, 0):
                self._said[kind] = ranks
                _forget(self._said)
                self._say(kind, note, ranks)

    def _say(self, kind: str, note: Note, ranks: int) -> None:
        if ranks > 1:
            _logger.warning(
                "[moetion] %d ranks, first rank %d iteration %d: %s", ranks, note.rank, note.iteration, note.text
            )
        else:
            _logger.warning("[moetion] rank %d iteration %d: %s", note.rank, note.iteration, note.text)
        self.event("trouble", kind=kind, ranks=ranks, first=note.rank, iteration=note.iteration, text=note.text)

    def _say_alone(self, kind: str) -> None:
        self._say(kind, self._told.pop(kind)[0] if kind in self._told else self._untold.pop(kind), 1)


def _forget(kinds: dict[str, Any]) -> None:
    """Bound what is remembered, the oldest first."""
    while len(kinds) > _KEPT:
        del kinds[next(iter(kinds))]


def _forget_oldest(kinds: dict[str, Any]) -> None:
    while len(kinds) > _KINDS_KEPT:
        del kinds[next(iter(kinds))]


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
