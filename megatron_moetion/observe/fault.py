# SPDX-License-Identifier: Apache-2.0
"""Deliberate faults for tests: SIGKILL of a rank at a named point of an iteration."""

from __future__ import annotations

import os
import signal
from collections.abc import Callable
from dataclasses import dataclass

from megatron_moetion.errors import ConfigError

POINTS = (
    *("before-select", "mid-pack", "before-commit", "mid-replication"),
    *("held-dropped", "held-received", "held-listed"),
    *("survey", "fetch", "restore", "restored"),
)
"""Where a fault can be injected. The second row is of a holder that mirrors another rank's iteration; the last four are
phases of a recovery, at whatever iteration."""


@dataclass(frozen=True, kw_only=True)
class Fault:
    """Kill ``rank`` in restart number ``attempt`` when it reaches ``point`` of ``iteration`` (-1: any)."""

    attempt: int
    rank: int
    iteration: int
    point: str


def parse_faults(text: str) -> tuple[Fault, ...]:
    """``ATTEMPT:RANK:ITERATION:POINT[,...]``; raises ``ConfigError`` that says what is wrong."""
    faults = []
    for part in filter(None, text.split(",")):
        fields = part.split(":")
        if len(fields) != 4 or fields[3] not in POINTS:
            raise ConfigError(
                f"--moetion-inject-fault: {part!r} is not ATTEMPT:RANK:ITERATION:POINT; points are {', '.join(POINTS)}"
            )
        try:
            attempt, rank, iteration = (int(f) for f in fields[:3])
        except ValueError as error:
            raise ConfigError(f"--moetion-inject-fault: {part!r}: {error}") from error
        faults.append(Fault(attempt=attempt, rank=rank, iteration=iteration, point=fields[3]))
    return tuple(faults)


def make_probe(faults: tuple[Fault, ...], attempt: int, rank: int) -> Callable[[str, int], None]:
    """A function that the runtime calls at each point; without faults it does nothing."""
    mine = {(f.point, f.iteration) for f in faults if f.attempt == attempt and f.rank == rank}

    def probe(point: str, iteration: int) -> None:
        if (point, iteration) in mine or (point, -1) in mine:
            os.kill(os.getpid(), signal.SIGKILL)

    return probe
