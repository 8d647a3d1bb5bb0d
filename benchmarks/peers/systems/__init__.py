# SPDX-License-Identifier: Apache-2.0
"""One module for each system, with a class that attaches it to the training as its documentation says."""

from __future__ import annotations

import importlib
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

if TYPE_CHECKING:
    from benchmarks.peers.training import Place, Training


class System(Protocol):
    """What the driver asks of a system; all of it is called by the training thread of every rank."""

    warming: int
    """Iterations with copies, after some without, before a copy is again what it costs in a long run."""

    def start(self) -> int | None:
        """Restore the newest copy into the training; its iteration. None: there is none, or nobody can read one."""

    def after_step(self, iteration: int, interval: int) -> None:
        """After each iteration. A copy of the state is due at multiples of the interval."""

    def pipeline_arguments(self, interval: int) -> dict[str, Any]:
        """What Megatron's schedule is given, so that the system sees traffic."""

    def waited_s(self) -> float:
        """Seconds that the training thread has waited for it outside of ``after_step``."""

    def drain(self) -> int:
        """Wait until all copies that were begun are whole or given up; how many became whole so far."""

    def leave(self, interval: int) -> None:
        """No more copies are due at this interval: what is kept for it alone goes."""

    def close(self) -> None: ...


class Nothing:
    """No copies at all: the reference."""

    warming = 0

    def __init__(
        self, training: Training, place: Place, memory: Path, shared: Path, intervals: tuple[int, ...]
    ) -> None:
        """``memory`` is a folder of this host's memory, ``shared`` one on a disk that all hosts see."""
        self.training, self.place, self.memory, self.shared, self.intervals = training, place, memory, shared, intervals
        self.whole = 0

    def start(self) -> int | None:
        return None

    def after_step(self, iteration: int, interval: int) -> None:
        pass

    def pipeline_arguments(self, interval: int) -> dict[str, Any]:
        return {}

    def waited_s(self) -> float:
        return 0.0

    def drain(self) -> int:
        return self.whole

    def leave(self, interval: int) -> None:
        pass

    def close(self) -> None:
        pass


def system_class(name: str) -> Any:
    """By ``module:Class``, below this package; empty is ``Nothing``."""
    if not name:
        return Nothing
    module, _, kind = name.partition(":")
    return getattr(importlib.import_module(f"benchmarks.peers.systems.{module}"), kind)
