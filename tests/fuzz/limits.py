# SPDX-License-Identifier: Apache-2.0
"""One execution of a target, and what it may cost: errors that are expected, memory in proportion to the input, time."""

from __future__ import annotations

import signal
import tracemalloc
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType

from targets import Target

SECONDS_MAX = 2.0
"""Of this process's own time."""
BYTES_FREE = 1 << 20
BYTES_PER_BYTE = 512
"""Python's objects are large: a number of two characters takes 28 bytes, and eight in a list."""


class Finding(Exception):
    """An input that does what no input may."""


@contextmanager
def limited() -> Iterator[None]:
    """Executions are measured within this, in the main thread."""

    def late(number: int, frame: FrameType | None) -> None:
        raise Finding(f"it takes longer than {SECONDS_MAX:g} s")

    before = signal.signal(signal.SIGVTALRM, late)
    tracemalloc.start(1)
    try:
        yield
    finally:
        tracemalloc.stop()
        signal.signal(signal.SIGVTALRM, before)


def execute(target: Target, data: bytes) -> str:
    """Run an input; returns the outcome's name. ``Finding`` where it does what it must not."""
    tracemalloc.reset_peak()
    before = tracemalloc.get_traced_memory()[0]
    signal.setitimer(signal.ITIMER_VIRTUAL, SECONDS_MAX)
    try:
        target.run(data)
        outcome = "fine"
    except Finding:
        raise
    except target.allowed as error:
        outcome = type(error).__name__
    except BaseException as error:
        raise Finding(f"{type(error).__name__}: {error}") from error
    finally:
        signal.setitimer(signal.ITIMER_VIRTUAL, 0)
    taken, most = (
        tracemalloc.get_traced_memory()[1] - before,
        BYTES_FREE + target.room_bytes + BYTES_PER_BYTE * len(data),
    )
    if taken > most:
        raise Finding(f"it takes {taken} bytes of memory for an input of {len(data)}; the most is {most}")
    return outcome
