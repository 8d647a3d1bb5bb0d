# SPDX-License-Identifier: Apache-2.0
"""Deliberate faults for tests: a rank is hurt at a named point of an iteration.

The kinds that NVIDIA's resiliency extension has too are named as there
(``nvidia_resiliency_ext.inprocess.tools.inject_fault``).
"""

from __future__ import annotations

import ctypes
import os
import signal
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from threading import Lock

from megatron_moetion.clock import SystemClock
from megatron_moetion.errors import ConfigError

POINTS = (
    *("before-select", "mid-pack", "before-commit", "mid-replication"),
    *("held-dropped", "held-received", "held-listed"),
    *("survey", "fetch", "restore", "restored"),
)
"""Where a fault can be injected. The second row is of a holder that mirrors another rank's iteration; the last four are
phases of a recovery, at whatever iteration."""
USUAL = "SIGKILL"
LOCKED_S = 1 << 30


class InjectedFault(Exception):
    """What nobody expects of training's code."""


def _raise() -> None:
    raise InjectedFault("injected by --moetion-inject-fault")


def _read_nothing() -> None:
    ctypes.string_at(0)


def _lock_gil() -> None:
    """Sleep without letting any other thread run Python."""
    ctypes.PyDLL(None).sleep(LOCKED_S)


def _send(number: signal.Signals) -> None:
    os.kill(os.getpid(), number)


KINDS: Mapping[str, Callable[[], None]] = {
    **{s.name: partial(_send, s) for s in (signal.SIGKILL, signal.SIGTERM, signal.SIGINT, signal.SIGSTOP)},
    "WORKLOAD_EXC": _raise,
    "OS_ABORT": os.abort,
    "SEGFAULT": _read_nothing,
    "LOCK_GIL": _lock_gil,
}
"""What happens to the process. A signal that is caught acts as it does where it comes from outside."""


@dataclass(frozen=True, kw_only=True)
class Fault:
    """Hurt ``rank`` in restart number ``attempt`` when it reaches ``point`` of ``iteration``, or of the first later one
    that has it: a snapshot may be dropped. Phases of a recovery have no iteration, and any will do."""

    attempt: int
    rank: int
    iteration: int
    point: str
    kind: str = USUAL


def parse_faults(text: str) -> tuple[Fault, ...]:
    """``ATTEMPT:RANK:ITERATION:POINT[:KIND][,...]``; raises ``ConfigError`` that says what is wrong."""
    faults = []
    for part in filter(None, text.split(",")):
        fields = [*part.split(":"), USUAL][:5]
        if part.count(":") > 4 or len(fields) != 5 or fields[3] not in POINTS or fields[4] not in KINDS:
            raise ConfigError(
                f"--moetion-inject-fault: {part!r} is not ATTEMPT:RANK:ITERATION:POINT[:KIND]; points are "
                f"{', '.join(POINTS)}; kinds are {', '.join(KINDS)}"
            )
        try:
            attempt, rank, iteration = (int(f) for f in fields[:3])
        except ValueError as error:
            raise ConfigError(f"--moetion-inject-fault: {part!r}: {error}") from error
        faults.append(Fault(attempt=attempt, rank=rank, iteration=iteration, point=fields[3], kind=fields[4]))
    return tuple(faults)


def make_probe(faults: tuple[Fault, ...], attempt: int, rank: int) -> Callable[[str, int], None]:
    """A function that the runtime calls at each point; without faults it does nothing. Each fault happens once."""
    mine = sorted((f for f in faults if f.attempt == attempt and f.rank == rank), key=lambda f: f.iteration)
    lock = Lock()  # several threads come to some of the points

    def probe(point: str, iteration: int) -> None:
        with lock:
            due = next((f for f in mine if f.point == point and (f.iteration <= iteration or iteration < 0)), None)
            if due is not None:
                mine.remove(due)
        if due is not None:
            _announce(rank, iteration, point, due.kind)
            KINDS[due.kind]()

    return probe


def _announce(rank: int, iteration: int, point: str, kind: str) -> None:
    """One write to standard error: the fault may hold every lock that a logger needs."""
    now_s = SystemClock().unix_ns() / 1e9
    line = f"[moetion] rank {rank} iteration {iteration}: injected {kind} at {point}, pid {os.getpid()}, {now_s:.3f}"
    os.write(2, f"{line}\n".encode())
