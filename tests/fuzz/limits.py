# SPDX-License-Identifier: Apache-2.0
"""One execution of a target, and what it may cost: expected errors, memory in proportion to the input, and time."""

from __future__ import annotations

import resource
import signal
import tracemalloc
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import FrameType

from targets import Target

SECONDS_MAX = 2.0
"""Of this process's own time."""
BYTES_FREE = 1 << 20
BYTES_PER_BYTE = 512
"""Python's objects are large: a number of two characters takes 28 bytes, and eight in a list."""
ADDRESS_SPACE_BYTES = 1 << 28
"""What a process may map beside what it has when it begins: allocations that are not traced fail there."""


class Finding(Exception):
    """An input that does what no input may."""


@contextmanager
def timed() -> Iterator[None]:
    """Executions take place within this, in the main thread."""

    def late(number: int, frame: FrameType | None) -> None:
        raise Finding(f"it takes longer than {SECONDS_MAX:g} s")

    before = signal.signal(signal.SIGVTALRM, late)
    try:
        yield
    finally:
        signal.signal(signal.SIGVTALRM, before)


def limit_address_space() -> None:
    """For the rest of this process."""
    pages = int(Path("/proc/self/statm").read_text().split()[0])
    most = pages * resource.getpagesize() + ADDRESS_SPACE_BYTES
    resource.setrlimit(resource.RLIMIT_AS, (most, most))


def execute(target: Target, data: bytes, *, traced: bool) -> str:
    """Run an input; returns the outcome's name. ``Finding`` where it does what it must not.

    ``traced``: memory is measured, which takes three times as long.
    """
    if not traced:
        return _execute(target, data)
    tracemalloc.start()
    try:
        outcome, most = _execute(target, data), tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    allowed = BYTES_FREE + target.room_bytes + BYTES_PER_BYTE * len(data)
    if most > allowed:
        raise Finding(f"it takes {most} bytes of memory for an input of {len(data)}; the most is {allowed}")
    return outcome


def _execute(target: Target, data: bytes) -> str:
    signal.setitimer(signal.ITIMER_VIRTUAL, SECONDS_MAX)
    try:
        target.run(data)
    except Finding:
        raise
    except target.allowed as error:
        return type(error).__name__
    except BaseException as error:
        raise Finding(f"{type(error).__name__}: {error}") from error
    finally:
        signal.setitimer(signal.ITIMER_VIRTUAL, 0)
    return "fine"
