# SPDX-License-Identifier: Apache-2.0
"""The time, as the runtime asks for it: an argument, so that a simulation can give another one."""

from __future__ import annotations

import time
from typing import Protocol


class Clock(Protocol):
    """Tells the time and lets it pass."""

    def monotonic(self) -> float:
        """Seconds since a fixed moment; never goes back."""
        ...

    def unix_ns(self) -> int:
        """Nanoseconds since 1970; may jump."""
        ...

    def sleep(self, seconds: float) -> None:
        """Return after this time."""
        ...


class SystemClock:
    """The machine's clock."""

    def monotonic(self) -> float:
        """See ``Clock``."""
        return time.monotonic()

    def unix_ns(self) -> int:
        """See ``Clock``."""
        return time.time_ns()

    def sleep(self, seconds: float) -> None:
        """See ``Clock``."""
        time.sleep(seconds)
